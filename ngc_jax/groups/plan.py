"""The plan: which blocks form which group, by which kernel and at which rank.

A plan contains exactly what is needed to build a compact model: plain data, frozen, serialised as JSON. It does not
depend on weights.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import cached_property
from typing import Any

from ngc_jax.errors import UsageError
from ngc_jax.groups.kernel_spec import Kernel, check_pivots, count_parameters, multiply_adds


class _Value:
    """A frozen dataclass's equality and hash, the hash computed once.

    Plans are static arguments of compiled functions, which look them up by hash at every call, and they hold thousands
    of pivots.
    """

    @cached_property
    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]

    @cached_property
    def _hash(self) -> int:
        return hash(self._values)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(other) is not type(self):
            return NotImplemented
        return self._hash == other._hash and self._values == other._values

    def __hash__(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # Strings hash differently in every process: cached values must not be pickled.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Block:
    """One weight matrix of a network.

    Attributes:
        name: For example `layers.3.attn.q`.
        d_out: Number of output neurons (rows).
        d_in: Number of input neurons (columns).
        bias: Whether the block has a bias; it is stored (and counted) in the dense and in the compact model.
    """

    name: str
    d_out: int
    d_in: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        """Dense parameters of the block, bias included."""
        return self.d_out * self.d_in + (self.d_out if self.bias else 0)


@dataclasses.dataclass(frozen=True, eq=False)
class GroupPlan(_Value):
    """Blocks that share one latent space of dimension `rank`.

    Attributes:
        name: The group's name.
        members: The blocks, at least one.
        rank: Dimension of the latent space.
        kernel: The interaction kernel.
        pivots: The fixed gauge of a bilinear group (see `gauge.py`): the `rank` input neurons, ascending, whose states
            are the unit vectors and are not stored. None for the free gauge, in which all input states are stored.

    Raises:
        UsageError: If there are no members, a member appears twice, the rank is not positive, or the pivots do not fit
            the group.
    """

    name: str
    members: tuple[Block, ...]
    rank: int
    kernel: Kernel = dataclasses.field(default_factory=Kernel)
    pivots: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.members:
            raise UsageError(f"group {self.name!r} has no members; a group needs at least one block")
        if len({member.name for member in self.members}) != len(self.members):
            raise UsageError(f"group {self.name!r} names a block twice; name every block once")
        if self.rank < 1:
            raise UsageError(f"group {self.name!r} has rank {self.rank}; expected a rank of at least 1")
        if self.pivots is not None:
            try:
                pivots = check_pivots(self.kernel, self.rank, self.d_in, self.pivots)
            except UsageError as error:
                raise UsageError(f"group {self.name!r}: {error}") from None
            object.__setattr__(self, "pivots", pivots)

    @property
    def d_in(self) -> int:
        """Width of the group's input states: the widest member's; members with fewer inputs read the first rows."""
        return max(member.d_in for member in self.members)

    @property
    def d_outs(self) -> dict[str, int]:
        """Output neurons of each member."""
        return {member.name: member.d_out for member in self.members}

    @property
    def dense_parameters(self) -> int:
        """Parameters of the members when dense, biases included."""
        return sum(member.parameters for member in self.members)

    def count_parameters(self) -> int:
        """Parameters that the group stores: states, kernel and biases."""
        biases = sum(member.d_out for member in self.members if member.bias)
        d_outs, fixed_gauge = self.d_outs.values(), self.pivots is not None
        return count_parameters(self.kernel, self.rank, self.d_in, d_outs, fixed_gauge=fixed_gauge) + biases

    def multiply_adds(self, site_of: Callable[[str], Hashable]) -> int:
        """Multiply-adds per token of all members: each input is encoded once, for all members that read it.

        Args:
            site_of: The identity of the input that a block reads, by block name. Members of one site share a signal.

        Returns:
            The products of activations and signals with states and M. Additions without a multiplication (a pivot's
            own input, a bias) do not count, nor do a kernel's computations on its states alone.
        """
        width_of = {site_of(member.name): member.d_in for member in self.members}
        width = self.kernel.signal_width(self.rank)
        # An input with fewer neurons meets the states of its own neurons only.
        rows = sum(self._stored_rows(d_in) for d_in in width_of.values())
        reads = sum(self.d_outs.values())
        return (rows + reads) * width + len(width_of) * multiply_adds(self.kernel, self.rank)

    def _stored_rows(self, d_in: int) -> int:
        """Number of stored states among the first `d_in` input states."""
        return d_in - (0 if self.pivots is None else bisect.bisect_left(self.pivots, d_in))


@dataclasses.dataclass(frozen=True, eq=False)
class Plan(_Value):
    """The structure of a compact model.

    Attributes:
        groups: The neuronal groups.
        dense: Planned blocks that are left dense; they count at full size in the keep ratio.
        removed: Number of parameters of the planned blocks that neuron pruning removed; they count as dense.

    A block that the plan does not name is outside it: dense in the model, and not counted.

    Raises:
        UsageError: If a block is named twice or two groups have the same name.

    Example:
        >>> plan = compact.plan
        >>> len(plan.groups), plan.groups[0].rank, round(plan.keep_ratio(), 2)
        (21, 9, 0.59)
    """

    groups: tuple[GroupPlan, ...] = ()
    dense: tuple[Block, ...] = ()
    removed: int = 0

    def __post_init__(self) -> None:
        names = [block.name for block in self.blocks()]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            raise UsageError(
                f"the plan names {', '.join(twice)} more than once; a block is in exactly one group or dense"
            )
        if self.removed < 0:
            raise UsageError(f"the plan has {self.removed} parameters removed; expected 0 or more")
        if len({group.name for group in self.groups}) < len(self.groups):
            raise UsageError("two groups of the plan have the same name; give every group its own")

    def blocks(self) -> Iterator[Block]:
        """All planned blocks, those of the groups first."""
        for group in self.groups:
            yield from group.members
        yield from self.dense

    @cached_property
    def group_of(self) -> Mapping[str, GroupPlan]:
        """The group of every grouped block, by block name."""
        return {member.name: group for group in self.groups for member in group.members}

    def count_parameters(self) -> int:
        """Parameters stored for the planned blocks."""
        return sum(group.count_parameters() for group in self.groups) + sum(block.parameters for block in self.dense)

    def dense_parameters(self) -> int:
        """Parameters of the planned blocks when all are dense, before neuron pruning."""
        return sum(block.parameters for block in self.blocks()) + self.removed

    def multiply_adds(self, site_of: Callable[[str], Hashable]) -> int:
        """Multiply-adds per token of the planned blocks.

        Args:
            site_of: The identity of the input that a block reads, by block name; see `GroupPlan.multiply_adds`.
        """
        dense = sum(block.d_out * block.d_in for block in self.dense)
        return dense + sum(group.multiply_adds(site_of) for group in self.groups)

    def keep_ratio(self) -> float:
        """Stored over dense parameters of the planned blocks; 1.0 for an empty plan."""
        dense = self.dense_parameters()
        return self.count_parameters() / dense if dense else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dump`."""
        return {
            "groups": [_group_to_json(group) for group in self.groups],
            "dense": [_block_to_json(block) for block in self.dense],
            **({"removed": self.removed} if self.removed else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Read the result of `to_json`.

        Raises:
            UsageError: If a field is missing or of the wrong type.
        """
        try:
            groups = tuple(
                GroupPlan(
                    name=str(group["name"]),
                    members=tuple(_block_from_json(member) for member in group["members"]),
                    rank=int(group["rank"]),
                    kernel=Kernel.from_dict(group["kernel"]),
                    pivots=None if group.get("pivots") is None else tuple(group["pivots"]),
                )
                for group in data["groups"]
            )
            dense = tuple(_block_from_json(block) for block in data["dense"])
            return cls(groups=groups, dense=dense, removed=int(data.get("removed", 0)))
        except UsageError:
            raise
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise UsageError(f"the plan is not readable ({error!r}); write it again with Plan.to_json") from error


def _group_to_json(group: GroupPlan) -> dict[str, Any]:
    data = {
        "name": group.name,
        "rank": group.rank,
        "kernel": group.kernel.to_dict(),
        "members": [_block_to_json(member) for member in group.members],
    }
    return data if group.pivots is None else data | {"pivots": list(group.pivots)}


def _block_to_json(block: Block) -> dict[str, Any]:
    return {"name": block.name, "shape": [block.d_out, block.d_in], "bias": block.bias}


def _block_from_json(data: Mapping[str, Any]) -> Block:
    d_out, d_in = data["shape"]
    return Block(name=str(data["name"]), d_out=int(d_out), d_in=int(d_in), bias=bool(data["bias"]))
