"""A model as groups: kept parameters and sharing of every block, and the change of its weights.

Shape suffixes: J outputs of a block, I its inputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.exporting.folded import read_states
from ngc_jax.groups.kernels import weights
from ngc_jax.groups.plan import Block, GroupPlan, Plan
from ngc_jax.models.config import ROLES, DecoderConfig, block_name, without_experts
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.inspect import inspect_model
from ngc_jax.models.keys import match_tensors
from ngc_jax.models.load import parameter_shapes, read_tensor
from ngc_jax.models.sources import Source
from ngc_jax.reporting.charts import ROLE_NAMES, BlockMap, Cell, Number, percent

_HEAD = ("block", "group", "members", "rank", "full rank", "stored", "dense", "kept")


@dataclasses.dataclass(frozen=True)
class _Place:
    """A block's part of a plan; `group` is None if it is left dense."""

    layer: int
    role: str
    block: Block
    group: GroupPlan | None
    planned: bool

    @property
    def kept(self) -> float:
        """Stored over dense parameters of its group: numbers of a shared group do not belong to single members."""
        return 1.0 if self.group is None else self.group.count_parameters() / self.group.dense_parameters

    @property
    def full_rank(self) -> int:
        """Rank at which its group can represent any weights."""
        if self.group is None:
            return min(self.block.d_out, self.block.d_in)
        return min(sum(self.group.d_outs.values()), self.group.d_in)


def kept_map(config: DecoderConfig, plan: Plan, name: str) -> BlockMap:
    """The model as groups: kept parameters and rank of every block, and the sharing between blocks.

    Args:
        config: The architecture.
        plan: Its groups.
        name: The model's name.
    """

    def cell(place: _Place) -> tuple[Number, str, str]:
        if not place.planned:
            return None, "", "not planned, unchanged"
        if place.group is None:
            return 1.0, "100", "left dense"
        return place.kept, f"{100 * place.kept:.0f}", f"keeps {percent(place.kept)}"

    places = _places(config, plan)
    return BlockMap(
        title=f"{name}: kept parameters of every block",
        description="A row for each role, a column for each layer, coloured by stored over dense parameters, in "
        "percent. Chained blocks share one latent space.",
        ramp="kept",
        legend=("few parameters kept", "all kept"),
        highest=1.0,
        layers=config.num_layers,
        cells=tuple(_cell(place, *cell(place), _HEAD) for place in places),
        links=tuple(_links(places)),
        by_layer=tuple(_mean_kept(p for p in places if p.layer == layer) for layer in range(config.num_layers)),
        by_role={role: _mean_kept(p for p in places if p.role == role) for role in config.roles},
        margin="kept",
        head=_HEAD,
    )


def loss_map(config: DecoderConfig, plan: Plan, errors: Mapping[str, float], name: str) -> BlockMap:
    """Distance of every block's weights from the dense model's.

    Args:
        config: The architecture.
        plan: Its groups.
        errors: By block name, as `block_errors` finds them.
        name: The model's name.
    """

    def cell(place: _Place) -> tuple[Number, str, str]:
        error = errors.get(place.block.name)
        if error is None:
            return None, "", "pruned, of another shape" if place.planned else "not planned, unchanged"
        return error, f"{100 * error:.0f}", f"relative error {percent(error)}"

    places = _places(config, plan)
    head = (*_HEAD, "relative error")
    highest = max((error for error in errors.values() if math.isfinite(error)), default=1.0)
    return BlockMap(
        title=f"{name}: relative error of every block's weights",
        description="A row for each role, a column for each layer, coloured by the size of the change over the size "
        "of the dense weights, in percent.",
        ramp="loss",
        legend=("unchanged", "most changed"),
        highest=_round_up(highest),
        layers=config.num_layers,
        cells=tuple(_cell(place, *cell(place), head) for place in places),
        links=(),
        by_layer=tuple(_mean_error(errors, (p for p in places if p.layer == i)) for i in range(config.num_layers)),
        by_role={role: _mean_error(errors, (p for p in places if p.role == role)) for role in config.roles},
        margin="error",
        head=head,
    )


def block_errors(
    compact: Source, dense: Source, *, progress: Callable[[int, int], None] | None = None
) -> dict[str, float]:
    """Distance of each planned block of a compact model from the dense model's: |W - What| / |W|, Frobenius.

    One group and one dense block are in memory at a time. Blocks that are zero in both models have error 0.

    Args:
        compact: A saved compact model.
        dense: The model it was made from, or any of the same shapes.
        progress: Called with (groups and dense blocks done, total).

    Returns:
        The errors by block name, without pruned MLPs.

    Raises:
        UsageError: If one of them is of the wrong kind, or they do not fit each other.
    """
    small, large = inspect_model(compact), inspect_model(dense)
    if small.plan is None:
        raise UsageError(f"{compact.name} is a dense model; errors are those of a compact one")
    if large.plan is not None:
        raise UsageError(f"{dense.name} is a compact model; give the dense one as --dense")
    # Neuron pruning may have shrunk MLPs: their blocks have no counterpart of the same shape.
    pruned = small.config.mlp_dim != large.config.mlp_dim
    if dataclasses.replace(small.config, mlp_dim=large.config.mlp_dim).blocks() != large.config.blocks():
        raise UsageError(f"{compact.name} was not made from {dense.name}: their blocks differ; give another --dense")
    names = match_tensors(parameter_shapes(Decoder(large.config)), dense.shapes, large.config, dense.name)
    own = match_tensors(parameter_shapes(Decoder(small.config, small.plan)), compact.shapes, small.config, compact.name)
    errors: dict[str, float] = {}
    total = len(small.plan.groups) + len(small.plan.dense)
    for done, group in enumerate(small.plan.groups, start=1):
        states = read_states(compact, group, own)
        for member in group.members:
            if pruned and _is_mlp(member.name):
                continue
            made_JxI = weights(group.kernel, states, member.name, member.d_in, pivots=group.pivots)
            errors[member.name] = _distance(read_tensor(dense, names[f"{member.name}.kernel"]), np.asarray(made_JxI))
        if progress is not None:
            progress(done, total)
    for done, block in enumerate(small.plan.dense, start=len(small.plan.groups) + 1):
        kernel = f"{block.name}.kernel"
        if pruned and _is_mlp(block.name):
            continue
        errors[block.name] = _distance(read_tensor(dense, names[kernel]), read_tensor(compact, own[kernel]))
        if progress is not None:
            progress(done, total)
    return errors


def _is_mlp(block: str) -> bool:
    return ".mlp." in block


def _distance(dense_JxI: np.ndarray, made_JxI: np.ndarray) -> float:
    """|W - What| / |W|."""
    dense_JxI = dense_JxI.astype(np.float32)
    change = float(np.linalg.norm((made_JxI.astype(np.float32) - dense_JxI).ravel()))
    size = float(np.linalg.norm(dense_JxI.ravel()))
    return change / size if size else (0.0 if change == 0 else math.inf)


def _places(config: DecoderConfig, plan: Plan) -> list[_Place]:
    """Every block, role by role."""
    without_experts(config, "a map of the blocks")
    dense = {block.name for block in plan.dense}
    found = []
    for role in config.roles:
        for layer in range(config.num_layers):
            name = block_name(layer, role)
            group = plan.group_of.get(name)
            found.append(_Place(layer, role, config.block(layer, role), group, group is not None or name in dense))
    return found


def _cell(place: _Place, value: Number, short: str, result: str, head: tuple[str, ...]) -> Cell:
    block, group = place.block, place.group
    where = f"layer {place.layer}, {ROLE_NAMES[place.role]}"
    parts = [where, result]
    if group is not None:
        others = [_short(member.name) for member in group.members if member.name != block.name]
        sharing = f"shares with {', '.join(others)}" if others else "shares with no other block"
        if group.kernel.name != "bilinear":
            sharing += f"; {group.kernel.name} kernel"
        parts += [f"group {group.name}", sharing, f"rank {group.rank} of {place.full_rank}"]
        parts += [f"group stores {group.count_parameters():,} of {group.dense_parameters:,} parameters"]
        row = [block.name, group.name, str(len(group.members)), f"{group.rank:,}", f"{place.full_rank:,}"]
        row += [f"{group.count_parameters():,}", f"{group.dense_parameters:,}", percent(place.kept)]
    else:
        parts += [f"{block.parameters:,} parameters"]
        row = [block.name, "dense", "1", "–", f"{place.full_rank:,}", f"{block.parameters:,}", f"{block.parameters:,}"]
        row += ["100.0 %"]
    if len(head) > len(_HEAD):
        row += [percent(value, 2)]
    shared = 1 if group is None else len(group.members)
    name = None if group is None else group.name
    return Cell(place.layer, place.role, name, shared, value, short, "; ".join(parts), tuple(row))


def _links(places: list[_Place]) -> Iterator[tuple[int, int]]:
    """For each group a shortest tree over its members: neighbours first, so that adjacent blocks are joined."""
    members: dict[str, list[int]] = {}
    for index, place in enumerate(places):
        if place.group is not None:
            members.setdefault(place.group.name, []).append(index)

    def distance(one: int, other: int) -> tuple[int, int]:
        a, b = places[one], places[other]
        rows = abs(ROLES.index(a.role) - ROLES.index(b.role))
        return rows + abs(a.layer - b.layer), rows

    for group in members.values():
        joined, left = group[:1], group[1:]
        while left:  # Prim's
            near, far = min(((one, other) for one in joined for other in left), key=lambda pair: distance(*pair))
            yield near, far
            joined.append(far)
            left.remove(far)


def _mean_kept(places: Iterator[_Place]) -> Number:
    """Kept share of several blocks; a group's parameters are divided among its members in proportion to their size."""
    found = [(place.kept, place.block.parameters) for place in places if place.planned]
    return sum(kept * size for kept, size in found) / sum(size for _, size in found) if found else None


def _mean_error(errors: Mapping[str, float], places: Iterator[_Place]) -> Number:
    """Root mean square of the blocks' errors."""
    found = [errors[place.block.name] for place in places if place.block.name in errors]
    return math.sqrt(sum(error**2 for error in found) / len(found)) if found else None


def _round_up(value: float) -> float:
    """To a round percentage, at least 1 %."""
    return max(math.ceil(20 * value) / 20 if value > 0.05 else math.ceil(100 * value) / 100, 0.01)


def _short(block: str) -> str:
    """layers.3.attn.q as "query of layer 3"."""
    _, layer, _, role = block.split(".")
    return f"{ROLE_NAMES[role]} of layer {layer}"
