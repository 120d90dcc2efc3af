"""A conversion is a chain of passes, as an optimiser of optax is a chain of transforms.

A pass is a frozen dataclass. Its fields are the options of one lever and its docstring describes them. Both define the
flags of the command line, the keys of YAML files, what a comparison distinguishes conversions by, and what is saved
with a model. A new lever is a new module in `ngc_jax.conversion.passes` with one such class, registered by
`register_pass`:

    @register_pass(after="factorise")
    @dataclasses.dataclass(frozen=True)
    class ScaleStates(Pass):
        '''Multiply all states by a number.

Attributes:
            scale: The number.
        '''

        name: ClassVar[str] = "scale_states"
        scale: float = 1.0

        def apply(self, state): ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from ngc_jax.conversion.state import Calibration, ConversionState, Needs
from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig

P = TypeVar("P", bound="Pass")


@dataclasses.dataclass(frozen=True)
class Pass:
    """One step of a conversion. Subclasses override the methods that differ.

    Fields are options, unless their metadata contain {"option": False}. Option names are unique across all passes.

    Example:
        See `register_pass`, and docs/howto/add_a_pass.md.

        >>> from ngc_jax import prune_neurons
        >>> prune_neurons(0.9).keep_neurons
        0.9
    """

    name: ClassVar[str]
    # Whether it reads the calibration text itself, and not only what is measured on it.
    reads_text: ClassVar[bool] = False
    # Whether it runs the dense model, whose weights must then not be deleted by the passes before it.
    keeps_dense: ClassVar[bool] = False

    @property
    def is_off(self) -> bool:
        """Whether the pass does nothing; a chain made from options leaves it out."""
        return False

    def check(self, chain: Chain) -> None:
        """Refuse a chain that this pass is incompatible with.

        Raises:
            UsageError: With what to change.
        """

    def is_default_in(self, chain: Chain) -> bool:
        """Whether a method's own chain keeps this pass when the user changes options of other passes."""
        try:
            self.check(chain)
        except UsageError:
            return False
        return True

    def with_options(self: P, options: Mapping[str, Any]) -> P:
        """A copy with the options that the user gave in place of the method's."""
        return dataclasses.replace(self, **options)

    @classmethod
    def from_options(cls: type[P], options: Mapping[str, Any]) -> P:
        """A pass that the method does not contain, from options that the user gave."""
        return cls(**options)

    def plan(self, config: DecoderConfig, keep: float, chain: Chain) -> tuple[DecoderConfig, float]:
        """The architecture and keep ratio for the passes after it, from parameter counts alone."""
        return config, keep

    def needs(self, config: DecoderConfig, keep: float, chain: Chain, calibration: Calibration) -> Needs:
        """What must be measured for this pass."""
        return Needs()

    def apply(self, state: ConversionState) -> ConversionState:
        """Run the pass; pure except for progress reports and, if `state.donate`, deleted weights."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Chain:
    """A sequence of passes, made by `chain`, which also checks it.

    Attributes:
        passes: The passes, in order.
        method: The name of the method, or `custom`.

    Example:
        >>> from ngc_jax import chain, factorise
        >>> made = chain(factorise("svd_llm", gauge=True))
        >>> made.method, made.options()["gauge"]
        ('custom', True)
    """

    passes: tuple[Pass, ...]
    method: str = "custom"

    def checked(self) -> Chain:
        """The chain itself.

        Raises:
            UsageError: If passes contradict each other.
        """
        for number, one in enumerate(self.passes):
            if not isinstance(one, Pass):
                raise UsageError(f"pass {number} of the chain is {one!r}; expected a pass, such as factorise('ngc')")
        for one in self.passes:
            one.check(self)
        return self

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def find(self, kind: type[P]) -> P | None:
        """The first pass of a class; None if there is none."""
        return next((one for one in self.passes if isinstance(one, kind)), None)

    def options(self) -> dict[str, Any]:
        """All options of all passes, by name."""
        return {name: getattr(one, name) for one in self.passes for name in option_names(type(one))}

    def describe(self) -> list[dict[str, Any]]:
        """Plain data: the name and the options of each pass."""
        return [{"pass": one.name, **{n: getattr(one, n) for n in option_names(type(one))}} for one in self.passes]

    def plan(self, config: DecoderConfig, keep: float) -> tuple[DecoderConfig, float]:
        """What is factorised: the architecture without pruned neurons, and its keep ratio."""
        for one in self.passes:
            config, keep = one.plan(config, keep, self)
        return config, keep

    def needs(self, config: DecoderConfig, keep: float, calibration: Calibration) -> Needs:
        """What must be measured for all passes together."""
        found = Needs()
        for one in self.passes:
            found |= one.needs(config, keep, self, calibration)
            config, keep = one.plan(config, keep, self)
        return found

    def apply(self, state: ConversionState) -> ConversionState:
        """Apply all passes in order."""
        for number, one in enumerate(self.passes):
            state = one.apply(dataclasses.replace(state, last=number == len(self.passes) - 1))
        return state


def chain(*passes: Pass) -> Chain:
    """Compose passes into a conversion.

    Args:
        passes: The passes, in order.

    Raises:
        UsageError: If passes contradict each other.

    Example:
        >>> from ngc_jax.conversion import chain, factorise, propagate_errors, prune_neurons
        >>> own = chain(prune_neurons(0.9), factorise("svd_llm", gauge=True), propagate_errors(0.3))
        >>> print(*(one.name for one in own))
        prune_neurons factorise propagate_errors
    """
    return Chain(tuple(passes)).checked()


# Every class of passes by name, and the name of the pass that it follows.
REGISTERED: dict[str, tuple[type[Pass], str | None]] = {}


def register_pass(*, after: str | None = None) -> Callable[[type[P]], type[P]]:
    """Decorator that makes a pass known by its options to the command line, YAML files and methods.

    Args:
        after: The pass that it follows where options ask for both; None for the first place.

    Raises:
        ValueError: If the class is no dataclass with a name, or another pass already has one of its options.

    Example:
        >>> @register_pass(after="factorise")
        ... @dataclasses.dataclass(frozen=True)
        ... class Report(Pass):
        ...     name: ClassVar[str] = "report"
        ...     loudness: int = 0
        ...
        ...     def apply(self, state):
        ...         print("groups:", len(state.compact.plan.groups))
        ...         return state
        >>> from ngc_jax import chain, convert, factorise
        >>> compact = convert(model, chain(factorise("svd"), Report()), keep=0.6)
        groups: 21
        >>> del REGISTERED["report"]
    """

    def register(kind: type[P]) -> type[P]:
        if not isinstance(getattr(kind, "name", None), str) or "__dataclass_fields__" not in vars(kind):
            raise ValueError(
                f"{kind.__name__} cannot be registered as a pass; expected a class with @register_pass(...) above "
                '@dataclasses.dataclass(frozen=True), and a name: ClassVar[str] = "..."'
            )
        others = [other for other, _ in REGISTERED.values() if other.name != kind.name]
        taken = set(option_names(kind)) & {name for other in others for name in option_names(other)}
        if taken:
            raise ValueError(f"{kind.__name__} has the option {sorted(taken)[0]!r} of another pass")
        REGISTERED[kind.name] = (kind, after)
        return kind

    return register


def option_names(kind: type[Pass]) -> list[str]:
    """The names of a pass's options."""
    return [field.name for field in dataclasses.fields(kind) if field.metadata.get("option", True)]
