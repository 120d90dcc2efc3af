"""Interaction kernels as plain data: their names, options and parameter counts.

Nothing here needs JAX, so that plans can be read, counted and printed without loading it. The functions that
compute with a kernel are in `ngc_jax.groups.kernels`.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ngc_jax.errors import UsageError

# The options of every kernel, in the order in which they are written.
KERNEL_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "bilinear": (),
    "riemannian": ("metric_rank",),
    "lifted": ("lift", "seed", "learned"),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The rule by which two neuron states make a weight: W = phi_out(Q_out) · M · phi_in(Q_in)^T.

    - `bilinear`: phi is the identity, M = I.
    - `riemannian`: phi is the identity, M a learned symmetric positive metric, one per group; I when
      initialised.
    - `lifted`: phi(Q) = tanh(Q P) with P (rank, lift), on the output side times an amplitude per neuron, and
      M one gain per group: weights of rank up to `lift` from states of dimension `rank`. tanh is bounded, so
      the magnitude of the weights has other sources: the amplitude lets a neuron be strong while its state
      is moderate, and the gain lets small states make bilinear weights of any magnitude, so bilinear is a
      limit of this kernel.

    Attributes:
        name: `bilinear`, `riemannian` or `lifted`.
        metric_rank: riemannian: rank k of the metric's low-rank part; 0 is a diagonal metric. At a group rank
            below k the group's rank is used, which already gives the most general metric.
        lift: lifted: number of lifted features R, above the group's rank.
        seed: lifted: the seed that fixes P (or initialises it, if learned).
        learned: lifted: whether P is learned and stored, one per group; otherwise only the seed is
            stored.

    Raises:
        UsageError: If the name is unknown, an option belongs to another kernel or a value is out of range.
    """

    name: str = "bilinear"
    metric_rank: int = 0
    lift: int = 0
    seed: int = 0
    learned: bool = False

    def __post_init__(self) -> None:
        if self.name not in KERNEL_OPTIONS:
            raise UsageError(f"unknown kernel {self.name!r}; expected one of {_names(KERNEL_OPTIONS, self.name)}")
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            # A bool is an int to isinstance, and 1 equals True: compare the types themselves.
            if type(value) is not type(field.default):
                expected = type(field.default).__name__
                raise UsageError(f"kernel option {field.name} is {value!r}; expected {expected}")
            if field.name not in KERNEL_OPTIONS[self.name] and value != field.default:
                owner = next(name for name, options in KERNEL_OPTIONS.items() if field.name in options)
                raise UsageError(f"kernel {self.name!r} has no option {field.name!r}; leave it out, {owner!r} has it")
        if self.metric_rank < 0:
            raise UsageError(f"kernel option metric_rank is {self.metric_rank}; expected 0 (diagonal) or more")
        if self.name == "lifted" and self.lift < 2:
            raise UsageError(f"kernel 'lifted' has lift {self.lift}; set lift to a number above the group's rank")
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"kernel option seed is {self.seed}; expected 0 to 2**32 - 1")

    @property
    def max_rank(self) -> int | None:
        """The largest group rank that the kernel admits; None when there is no limit."""
        return self.lift - 1 if self.name == "lifted" else None

    def signal_width(self, rank: int) -> int:
        """Numbers per token that a group broadcasts: `lift` for the lifted kernel, else its rank."""
        return self.lift if self.name == "lifted" else rank

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON or YAML: the name and the kernel's own options."""
        return {"name": self.name} | {option: getattr(self, option) for option in KERNEL_OPTIONS[self.name]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Kernel:
        """Read the result of `to_dict`, or a mapping from a config file.

        Raises:
            UsageError: If the name is missing or unknown, or an option is unknown or out of range.
        """
        if not isinstance(data, Mapping) or "name" not in data:
            raise UsageError(f"a kernel is a mapping with a name, got {data!r}; write for example {{name: bilinear}}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in data if key not in known]
        if unknown:
            raise UsageError(f"unknown kernel option {unknown[0]!r}; expected one of {_names(known[1:], unknown[0])}")
        return cls(**data)


def check_rank(kernel: Kernel, rank: int) -> None:
    """Refuse a rank that the kernel does not admit.

    Raises:
        UsageError: If `rank` is below 1, or not below the kernel's `lift`.
    """
    if rank < 1:
        raise UsageError(f"rank {rank} is too small; expected at least 1")
    if kernel.max_rank is not None and rank > kernel.max_rank:
        raise UsageError(
            f"kernel {kernel.name!r} lifts to {kernel.lift} features, not above the rank {rank};"
            " lower the rank or raise lift"
        )


def check_pivots(kernel: Kernel, rank: int, d_in: int, pivots: Sequence[int]) -> tuple[int, ...]:
    """Refuse pivots (the input neurons with unit states, out of `d_in`) that do not fix the gauge of a group.

    Returns:
        The pivots as a tuple of plain integers.

    Raises:
        UsageError: If the kernel has no gauge, or these are not `rank` ascending indices of input neurons.
    """
    if kernel.name != "bilinear":
        raise UsageError(f"kernel {kernel.name!r} has no pivots; leave them out, only 'bilinear' has a gauge to fix")
    try:
        indices = tuple(operator.index(pivot) for pivot in pivots)
    except TypeError as error:
        raise UsageError(f"the pivots are not a sequence of integers ({error}); give indices of neurons") from error
    if len(indices) != rank:
        raise UsageError(f"{len(indices)} pivots at rank {rank}; expected one for each latent dimension")
    if any(before >= after for before, after in itertools.pairwise(indices)):
        raise UsageError("the pivots are not in ascending order, each once; sort them")
    if indices and not 0 <= indices[0] <= indices[-1] < d_in:
        outside = indices[0] if indices[0] < 0 else indices[-1]
        raise UsageError(f"pivot {outside} of {d_in} input neurons; expected indices from 0 to {d_in - 1}")
    return indices


def metric_rank_at(kernel: Kernel, rank: int) -> int:
    """Columns of the metric's low-rank part in a group of this rank; 0 for a diagonal metric."""
    return min(kernel.metric_rank, rank)


def count_parameters(kernel: Kernel, rank: int, d_in: int, d_outs: Iterable[int], *, fixed_gauge: bool = False) -> int:
    """Numbers that a group stores, exactly: states and kernel parameters, without biases.

    Args:
        kernel: The interaction kernel.
        rank: Dimension r of the neuron states.
        d_in: Rows of the input states.
        d_outs: Rows of each member's output states.
        fixed_gauge: Whether `rank` of the input neurons are pivots, whose unit states are not stored.

    Returns:
        The sum of the sizes of the leaves of `init_states` for the same arguments.

    Raises:
        UsageError: If the kernel does not admit the rank.
    """
    check_rank(kernel, rank)
    outputs = sum(d_outs)
    states = rank * (d_in - (rank if fixed_gauge else 0) + outputs)
    match kernel.name:
        case "riemannian":
            return states + rank * (1 + metric_rank_at(kernel, rank))
        case "lifted":
            return states + 1 + outputs + (rank * kernel.lift if kernel.learned else 0)
        case _:
            return states


def multiply_adds(kernel: Kernel, rank: int) -> int:
    """Multiply-adds per token and signal by M alone: 0, the metric's, or the gain's."""
    match kernel.name:
        case "riemannian":
            return rank * (1 + 2 * metric_rank_at(kernel, rank))
        case "lifted":
            return kernel.lift
        case _:
            return 0


def logical_axes(kernel: Kernel) -> dict[str, tuple[str | None, ...]]:
    """Names of the axes of every parameter of a group, for one table of sharding rules per mesh.

    Keys are paths inside the group, joined by "."; the entries `output_states` and `amplitude` stand for
    those of all members. The axes: `in` and `out` (neurons), `latent` (the state's dimensions), `lift`
    (lifted features); None is an axis too short to be worth sharding.
    """
    axes: dict[str, tuple[str | None, ...]] = {
        "input_states": ("in", "latent"),
        "output_states": ("out", "latent"),
    }
    if kernel.name == "riemannian":
        axes["metric.log_diagonal"] = ("latent",)
        if kernel.metric_rank:
            axes["metric.factor"] = ("latent", None)
    if kernel.name == "lifted":
        axes["gain"] = ()
        axes["amplitude"] = ("out",)
        if kernel.learned:
            axes["lift"] = ("latent", "lift")
    return axes


def _names(names: Iterable[str], given: object) -> str:
    """The permitted names, and the nearest one to the given name."""
    names = list(names)
    near = difflib.get_close_matches(str(given), names, n=1)
    return ", ".join(names) + (f"; did you mean {near[0]!r}?" if near else "")
