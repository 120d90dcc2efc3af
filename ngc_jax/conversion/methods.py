"""Methods: named chains of passes, with the settings of their authors or settings chosen here.

The settings of `ngc` were chosen by perplexity on text that is neither calibration nor evaluation (docs/measured.md). A
new method is one more `register_method`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from ngc_jax.conversion.chains import Chain, chain, option_names
from ngc_jax.conversion.passes.factorise import factorise
from ngc_jax.conversion.passes.propagate_errors import propagate_errors
from ngc_jax.conversion.passes.prune_neurons import prune_neurons
from ngc_jax.conversion.passes.remeasure import remeasure
from ngc_jax.conversion.registry import all_passes
from ngc_jax.errors import UsageError

# By name: a function from the keep ratio to the method's chain.
METHODS: dict[str, Callable[[float], Chain]] = {}
# The same, in the form dense; methods that prune no neurons have none.
DENSE_FORMS: dict[str, Callable[[float], Chain]] = {}


def register_method(
    name: str, make: Callable[[float], Chain], *, dense: Callable[[float], Chain] | None = None
) -> None:
    """Register a method under a name, for `convert`, the command line and comparisons.

    Args:
        name: The name; replaces a method of the same name.
        make: Maps a keep ratio to the chain.
        dense: The same in the form dense; None if the method has none.

    Example:
        >>> register_method("svd_llm_gauge", lambda keep: chain(factorise("svd_llm", gauge=True)))
        >>> method_chain("svd_llm_gauge", 0.8).options()["gauge"]
        True
        >>> del METHODS["svd_llm_gauge"]
    """
    METHODS[name] = make
    DENSE_FORMS.pop(name, None)
    if dense is not None:
        DENSE_FORMS[name] = dense


def method_chain(name: str, keep: float, options: Mapping[str, Any] | None = None) -> Chain:
    """The chain of a method, with changed options.

    An option of a pass that the method does not contain adds the pass. Passes of the method that are incompatible with
    the given options are left out, unless one of their own options is given, which is an error.

    Args:
        name: One of `METHODS`.
        keep: Keep ratio.
        options: By name, as in `Chain.options`; None stands for the method's own.

    Raises:
        UsageError: If the method or an option is unknown, or options contradict each other.

    Example:
        >>> print(*(one.name for one in method_chain("ngc", 0.8)))
        prune_neurons factorise remeasure propagate_errors
        >>> print(*(one.name for one in method_chain("ngc", 0.8, {"rounds": 0, "propagation": 0})))
        prune_neurons factorise
    """
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
    given = {option: value for option, value in (options or {}).items() if value is not None}
    kinds = all_passes()
    known = [option for kind in kinds for option in option_names(kind)]
    if wrong := sorted(set(given) - set(known)):
        raise UsageError(f"there is no option {wrong[0]!r} of a conversion; expected one of {', '.join(known)}")
    make = METHODS[name]
    if given.get("form") == "dense":
        if name not in DENSE_FORMS:
            having = ", ".join(DENSE_FORMS)
            raise UsageError(f"method {name} has no form dense, because it prunes no neurons; expected one of {having}")
        make = DENSE_FORMS[name]
    passes, asked = list(make(keep)), set()
    for place, kind in enumerate(kinds):
        mine = {option: given[option] for option in option_names(kind) if option in given}
        if not mine:
            continue
        asked.add(kind)
        if any(type(one) is kind for one in passes):
            passes = [one.with_options(mine) if type(one) is kind else one for one in passes]
        else:
            follows = [number for number, one in enumerate(passes, start=1) if type(one) in kinds[:place]]
            passes.insert(max(follows, default=0), kind.from_options(mine))
    # Checked together, without the passes that would refuse the others.
    whole = Chain(tuple(one for one in passes if not one.is_off), name)
    kept = tuple(one for one in whole if type(one) in asked or one.is_default_in(whole))
    return Chain(kept, name).checked()


@dataclasses.dataclass(frozen=True, init=False)
class Recipe:
    """A method at a keep ratio, with options in flat form, as flags and YAML files give them.

    Attributes:
        method: One of `METHODS`.
        keep: Keep ratio of the grouped blocks, above 0 and at most 1.
        options: What the user changed, by name.
        chain: The passes.

    Raises:
        UsageError: If a value is out of range, an option is unknown, or options contradict each other.

    Example:
        >>> Recipe("ngc", keep=0.8, propagation=0).chain.options()["gauge"]
        True
    """

    method: str
    keep: float
    options: tuple[tuple[str, Any], ...]
    chain: Chain

    def __init__(
        self,
        method: str = "ngc",
        topology: str | None = None,
        keep: float = 0.8,
        rank: int | str | None = None,
        **options: Any,
    ) -> None:
        check_keep(keep)
        given = {"topology": topology, "rank": rank, **options}
        chosen = {name: value for name, value in given.items() if value is not None}
        object.__setattr__(self, "method", method)
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "options", tuple(sorted(chosen.items())))
        object.__setattr__(self, "chain", method_chain(method, keep, chosen))

    def replace(self, **changes: Any) -> Recipe:
        """A copy with other options, another method or keep ratio; None restores the method's own value."""
        return Recipe(**{"method": self.method, "keep": self.keep, **dict(self.options), **changes})


def check_keep(keep: float) -> None:
    """Raises UsageError for a keep ratio outside (0, 1]."""
    if not 0 < keep <= 1:
        raise UsageError(f"keep ratio {keep:g} is outside (0, 1]; 0.8 keeps 80 % of the parameters")


# Nothing is factorised: for a conversion by options alone, such as bits.
register_method("dense", lambda keep: chain())


def _plain(factorisation: str, **options: Any) -> Callable[[float], Chain]:
    return lambda keep: chain(factorise(factorisation, **options))


register_method("svd", _plain("svd"))
register_method("fwsvd", _plain("fwsvd"))
register_method("asvd", _plain("asvd"))
register_method("svd_llm", _plain("svd_llm"))
# arXiv 2503.12340.
register_method("svd_llm_v2", _plain("svd_llm", allocation="svd_llm_v2"))
# MLPs as in MoDeGPT (arXiv 2408.09632, section 3.2), except that neurons are pruned one by one; the rest as svd_llm.
register_method(
    "nystrom",
    lambda keep: chain(prune_neurons(keep, flexible=True), factorise("svd_llm", allocation="neurons")),
    dense=lambda keep: chain(prune_neurons(), factorise("svd_llm", form="dense")),
)
register_method("basis_sharing", _plain("basis_sharing", topology="qq-kk-vv-o-uu-gg-d"))
register_method("ngc_paper", _plain("ngc_paper", topology="qkv-o-ug-d"))
# The geometry of K-FAC (arXiv 1503.05671, section 3).
register_method("kfac_svd", _plain("ngc"))
register_method("ngc_one_sided", _plain("ngc_inputs", topology="qkv-o-ug-d"))
register_method(
    "ngc",
    lambda keep: chain(
        prune_neurons(min(keep + 0.1, 1.0), flexible=True),
        factorise("ngc", allocation="loss", gauge=True, shrinkage=0.03),
        remeasure(rounds=1),
        propagate_errors(0.3),
    ),
    dense=lambda keep: chain(prune_neurons(), factorise("ngc", form="dense", shrinkage=0.03), propagate_errors(0.2)),
)
