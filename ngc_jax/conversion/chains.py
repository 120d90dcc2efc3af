"""A conversion is a chain of passes, as an optimiser of optax is a chain of transforms.

A pass is a frozen dataclass. Its fields are the options of one lever; its docstring describes them; from both come the
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
    """One step of a conversion. Subclasses override what differs.

    Fields are options, unless their metadata say {"option": False}. Names of options are unique over all passes.
    """

    name: ClassVar[str]

    @property
    def is_off(self) -> bool:
        """Whether it does nothing; then a chain that is made from options leaves it out."""
        return False

    def check(self, chain: Chain) -> None:
        """Refuse a chain that it does not go with.

        Raises:
            UsageError: With what to change.
        """

    def is_default_in(self, chain: Chain) -> bool:
        """Whether a method's own chain keeps it when the user changes options of other passes."""
        try:
            self.check(chain)
        except UsageError:
            return False
        return True

    def with_options(self: P, options: Mapping[str, Any]) -> P:
        """With these options of its own, which the user gave, in place of a method's."""
        return dataclasses.replace(self, **options)

    @classmethod
    def from_options(cls: type[P], options: Mapping[str, Any]) -> P:
        """A pass that the method does not have, from options that the user gave."""
        return cls(**options)

    def plan(self, config: DecoderConfig, keep: float, chain: Chain) -> tuple[DecoderConfig, float]:
        """The architecture and keep ratio that passes after it work with, by counting alone."""
        return config, keep

    def needs(self, config: DecoderConfig, keep: float, chain: Chain, calibration: Calibration) -> Needs:
        """What must be measured for it."""
        return Needs()

    def apply(self, state: ConversionState) -> ConversionState:
        """Do it; pure but for the progress that it reports and the weights that it may delete if `state.donate`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Chain:
    """Passes, in order. Made by `chain`.

    Attributes:
        passes: The passes.
        method: The name of the method that it is, or `custom`.

    Raises:
        UsageError: If passes contradict each other.
    """

    passes: tuple[Pass, ...]
    method: str = "custom"

    def __post_init__(self) -> None:
        for number, one in enumerate(self.passes):
            if not isinstance(one, Pass):
                raise UsageError(f"pass {number} of the chain is {one!r}; expected a pass, such as factorise('ngc')")
        for one in self.passes:
            one.check(self)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def find(self, kind: type[P]) -> P | None:
        """The first pass of a class; None if there is none."""
        return next((one for one in self.passes if isinstance(one, kind)), None)

    def options(self) -> dict[str, Any]:
        """All options of all passes, by name."""
        return {name: getattr(one, name) for one in self.passes for name in option_names(type(one))}

    def describe(self) -> list[dict[str, Any]]:
        """Plain data: each pass's name and options."""
        return [{"pass": one.name, **{n: getattr(one, n) for n in option_names(type(one))}} for one in self.passes]

    def plan(self, config: DecoderConfig, keep: float) -> tuple[DecoderConfig, float]:
        """What the blocks are factorised as: the architecture without pruned neurons, and its keep ratio."""
        for one in self.passes:
            config, keep = one.plan(config, keep, self)
        return config, keep

    def needs(self, config: DecoderConfig, keep: float, calibration: Calibration) -> Needs:
        """What must be measured for all passes."""
        found = Needs()
        for one in self.passes:
            found |= one.needs(config, keep, self, calibration)
            config, keep = one.plan(config, keep, self)
        return found

    def apply(self, state: ConversionState) -> ConversionState:
        """All passes, one after the other."""
        for number, one in enumerate(self.passes):
            state = one.apply(dataclasses.replace(state, last=number == len(self.passes) - 1))
        return state


def chain(*passes: Pass) -> Chain:
    """A conversion of one's own.

    Args:
        passes: In order.

    Raises:
        UsageError: If they contradict each other.

    Example:
        >>> from ngc_jax.conversion import chain, factorise, propagate_errors, prune_neurons
        >>> own = chain(prune_neurons(0.9), factorise("svd_llm", gauge=True), propagate_errors(0.3))
        >>> [one.name for one in own]
        ['prune_neurons', 'factorise', 'propagate_errors']
    """
    return Chain(tuple(passes))


# Every class of passes by name, and the name of the pass that it follows.
REGISTERED: dict[str, tuple[type[Pass], str | None]] = {}


def register_pass(*, after: str | None = None) -> Callable[[type[P]], type[P]]:
    """A decorator that makes a class of passes known by its options: to the command line, to YAML files, to methods.

    Args:
        after: The name of the pass that it follows where options ask for both; None for the first place.

    Raises:
        ValueError: If one of its options is another pass's.
    """

    def register(kind: type[P]) -> type[P]:
        others = [other for other, _ in REGISTERED.values() if other.name != kind.name]
        taken = set(option_names(kind)) & {name for other in others for name in option_names(other)}
        if taken:
            raise ValueError(f"{kind.__name__} has the option {sorted(taken)[0]!r} of another pass")
        REGISTERED[kind.name] = (kind, after)
        return kind

    return register


def option_names(kind: type[Pass]) -> list[str]:
    """The options of a class of passes."""
    return [field.name for field in dataclasses.fields(kind) if field.metadata.get("option", True)]
