"""Mixtures of experts: an MLP whose router chooses a few experts for each token.

Every token is repeated for each of its experts, the rows are sorted by expert, and each role's weights, stacked over
the experts, multiply them by one `jax.lax.ragged_dot` (on a CPU by a loop over blocks of rows); all shapes are static.
Of fewer rows than experts (a token or a few, when generating) each row's own weights are gathered instead, so that no
others are read.

An expert's weights may be dense, or formed by its group's states. The experts' signals differ where each has a group
of its own: the states are stacked, padded to the largest rank. Where one group has all experts as members, its signal
is encoded once per token, and each expert reads it with its own output states.

Legend: B batch, L tokens of a sequence, T tokens of a batch, K experts of a token, R = T K rows, E experts, D embed,
I inputs of a block, O its outputs, S signal width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ngc_jax.groups.kernels import encode, encoder, output_features, weights
from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.models.config import DecoderConfig, Experts, block_name

BLOCK_INPUTS = "block_inputs"
_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2, batch_axis=(0,))
_router_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch's tokens, each once for every expert that it is routed to.

    Attributes:
        tokens: (R,), which token.
        experts: (R,), which expert.
        weights: (R,), of the expert in the token's output; float32.
        places: (T, K), the row of each of a token's experts.
        sizes: (E,), rows of every expert if they are sorted by expert; None if they are not.
    """

    tokens: Int[Array, " R"]
    experts: Int[Array, " R"]
    weights: Float[Array, " R"]
    places: Int[Array, "T K"]
    sizes: Int[Array, " E"] | None


def route(experts: Experts, logits_TxE: Float[Array, "T E"]) -> Rows:
    """Choose each token's experts, those with the greatest logits.

    Args:
        experts: How many, and whether their weights are normalised.
        logits_TxE: The router's, in float32.

    Returns:
        The rows, sorted by expert unless there are at most as many as experts.

    Example:
        >>> import jax.numpy as jnp
        >>> from ngc_jax.models.config import Experts
        >>> rows = route(Experts(count=3, per_token=1, width=8, layers=(True,)), jnp.asarray([[0.0, 2.0, 1.0]]))
        >>> rows.experts.tolist(), rows.weights.tolist()
        ([1], [1.0])
    """
    values_TxK, chosen_TxK = jax.lax.top_k(jax.nn.softmax(logits_TxE.astype(jnp.float32), axis=-1), experts.per_token)
    if experts.normalised:
        values_TxK = values_TxK / values_TxK.sum(axis=-1, keepdims=True)
    chosen_R, places = chosen_TxK.reshape(-1), jnp.arange(chosen_TxK.size, dtype=jnp.int32)
    if len(chosen_R) <= experts.count:
        sizes, order = None, places
    else:
        sizes = jnp.zeros(experts.count, jnp.int32).at[chosen_R].add(1)
        order = jnp.argsort(chosen_R, stable=True).astype(jnp.int32)
        places = jnp.zeros_like(order).at[order].set(places)
    return Rows(
        order // experts.per_token,
        chosen_R[order],
        values_TxK.reshape(-1)[order],
        places.reshape(chosen_TxK.shape),
        sizes,
    )


def multiply(rows: Rows, x_RxI: Float[Array, "R I"], stacked_ExOxI: Float[Array, "E O I"]) -> Float[Array, "R O"]:
    """Each row times the transposed weights of its expert, accumulated in float32, of x's type."""
    stacked = stacked_ExOxI.astype(x_RxI.dtype)
    if rows.sizes is None:
        y = jnp.einsum("ri,roi->ro", x_RxI, stacked[rows.experts], preferred_element_type=jnp.float32)
    elif jax.default_backend() == "cpu":
        # XLA's CPU compiler multiplies every row by the weights of every expert, and masks the results.
        y = multiply_in_blocks(rows, x_RxI, stacked)
    else:
        y = jax.lax.ragged_dot(x_RxI, stacked.swapaxes(1, 2), rows.sizes, preferred_element_type=jnp.float32)
    return y.astype(x_RxI.dtype)


def multiply_in_blocks(
    rows: Rows, x_RxI: Float[Array, "R I"], stacked_ExOxI: Float[Array, "E O I"]
) -> Float[Array, "R O"]:
    """As `ragged_dot` of sorted rows, by one product for each block of rows of one expert, in float32.

    An expert's last block is filled up with rows that are not used: at most one block for each expert.
    """
    assert rows.sizes is not None
    count, experts = len(x_RxI), len(rows.sizes)
    size = min(max(1 << (count // experts).bit_length() - 1, 8), 256)
    ends = jnp.cumsum(rows.sizes)
    starts, last_blocks = ends - rows.sizes, jnp.cumsum(-(-rows.sizes // size))
    first_blocks = jnp.concatenate([jnp.zeros(1, last_blocks.dtype), last_blocks[:-1]])
    blocks = jnp.arange(count // size + experts)
    expert_of = jnp.minimum(jnp.searchsorted(last_blocks, blocks, side="right"), experts - 1)
    first_rows = starts[expert_of] + (blocks - first_blocks[expert_of]) * size
    taken = jnp.clip(first_rows[:, None] + jnp.arange(size), 0, count - 1)

    def product(block: tuple[Array, Array]) -> Array:
        expert, rows_of_block = block
        return jnp.dot(x_RxI[rows_of_block], stacked_ExOxI[expert].T, preferred_element_type=jnp.float32)

    y = jax.lax.map(product, (expert_of, taken)).reshape(-1, stacked_ExOxI.shape[1])
    within = jnp.arange(count) - starts[rows.experts]
    return y[first_blocks[rows.experts] * size + within]


Kind = Literal["dense", "own", "shared"]


@dataclasses.dataclass(frozen=True)
class Form:
    """How the experts' weights of one role are multiplied.

    Attributes:
        kind: By weights, dense or formed (dense); by each expert's own encoder and output states (own); or by the
            signal of a group that has all experts as members (shared).
        groups: The group of each expert; None for a dense one.
        width: S, the widest signal; 0 for dense.
    """

    kind: Kind
    groups: tuple[GroupPlan | None, ...]
    width: int

    @property
    def left_dense(self) -> tuple[int, ...]:
        """The experts without a group."""
        return tuple(expert for expert, group in enumerate(self.groups) if group is None)


@lru_cache(maxsize=4096)
def form_of(config: DecoderConfig, plan: Plan, layer: int, role: str) -> Form:
    """The form of a role in a layer with experts: weights are formed where factors would multiply by more numbers."""
    assert config.experts is not None
    block = config.block(layer, role, 0)
    groups = tuple(plan.group_of.get(block_name(layer, role, e)) for e in range(config.experts.count))
    known = [group for group in groups if group is not None]
    width = max((group.kernel.signal_width(group.rank) for group in known), default=0)
    if len(known) < len(groups):
        return Form("dense", groups, 0)
    if len(set(known)) == 1 and len(groups) > 1:
        return Form("shared", groups, width)
    if width * (block.d_in + block.d_out) >= block.d_in * block.d_out:
        return Form("dense", groups, 0)
    return Form("own", groups, width)


def stack_experts(
    form: Form, names: tuple[str, ...], d_in: int, states: Mapping[str, Any], dense: Float[Array, "N O I"] | None
) -> dict[str, Array]:
    """The arrays that a form multiplies by: kernel (E, O, I), or reader (E, O, S) and for own an encoder (E, S, I).

    Args:
        form: The form.
        names: The experts' blocks.
        d_in: Their inputs.
        states: Of the groups, by name.
        dense: Weights of the experts that have no group, in their order; None if all have one.
    """
    if form.kind == "dense":
        if dense is not None and len(dense) == len(names):
            return {"kernel": dense}
        own = iter(()) if dense is None else iter(dense)
        formed = [
            next(own) if group is None else weights(group.kernel, states[group.name], name, d_in, pivots=group.pivots)
            for group, name in zip(form.groups, names, strict=True)
        ]
        return {"kernel": jnp.stack(formed)}

    def padded(features: Array) -> Array:
        return jnp.pad(features, ((0, 0), (0, form.width - features.shape[1])))

    groups = [group for group in form.groups if group is not None]
    pairs = list(zip(groups, names, strict=True))
    stacks = {"reader": jnp.stack([padded(output_features(g.kernel, states[g.name], name)) for g, name in pairs])}
    if form.kind == "own":
        encoders = [padded(encoder(g.kernel, states[g.name], d_in, pivots=g.pivots)) for g in groups]
        stacks["encoder"] = jnp.stack(encoders).swapaxes(1, 2)
    return stacks


class ExpertBlocks(nn.Module):
    """The blocks of one role of all experts of a layer.

    Attributes:
        config: The decoder.
        plan: Its groups.
        layer: Which layer.
        role: Of the MLP.
        param_dtype: Of the parameters that `init` makes.
        joined: The parameters are the arrays of `stack_experts`, and an encoder (I, S) of a shared signal.
    """

    config: DecoderConfig
    plan: Plan
    layer: int
    role: str
    param_dtype: jnp.dtype
    joined: bool

    @nn.compact
    def __call__(
        self,
        rows: Rows,
        x: Float[Array, "N I"],
        tokens: Int[Array, " R"] | None,
        groups: Mapping[str, Any],
        signals: dict[str, Array],
    ) -> Float[Array, "R O"]:
        """The outputs of all rows.

        Args:
            rows: The rows.
            x: The inputs of tokens, or of rows.
            tokens: Which row reads which input; None if each reads its own.
            groups: States.
            signals: Of groups with x as input, by name; those that are encoded here are added.
        """
        form = form_of(self.config, self.plan, self.layer, self.role)
        block = self.config.block(self.layer, self.role, 0)
        stacks = self._stacks(form, block.d_out, block.d_in, groups)

        def taken(x: Array) -> Array:
            return x if tokens is None else x[tokens]

        if form.kind == "dense":
            y = multiply(rows, taken(x), stacks["kernel"])
        elif form.kind == "own":
            y = multiply(rows, multiply(rows, taken(x), stacks["encoder"]), stacks["reader"])
        else:
            group = form.groups[0]
            assert group is not None
            if group.name not in signals:
                signals[group.name] = self._signal(group, x, groups)
            y = multiply(rows, taken(signals[group.name]), stacks["reader"])
        return self.perturb("output", y)

    @nn.nowrap
    def _stacks(self, form: Form, d_out: int, d_in: int, groups: Mapping[str, Any]) -> dict[str, Array]:
        count = len(form.groups)

        def parameter(name: str, *shape: int) -> Array:
            array: Array = self.param(name, _init, shape, self.param_dtype)
            return array

        if self.joined:
            if form.kind == "dense":
                return {"kernel": parameter("kernel", count, d_out, d_in)}
            stacks = {"reader": parameter("reader", count, d_out, form.width)}
            if form.kind == "own":
                stacks["encoder"] = parameter("encoder", count, form.width, d_in)
            return stacks
        dense = parameter("kernel", len(form.left_dense), d_out, d_in) if form.left_dense else None
        names = tuple(block_name(self.layer, self.role, expert) for expert in range(count))
        return stack_experts(form, names, d_in, groups, dense)

    @nn.nowrap
    def _signal(self, group: GroupPlan, x: Array, groups: Mapping[str, Any]) -> Array:
        if not self.joined:
            return encode(group.kernel, groups[group.name], x, pivots=group.pivots)
        shape = x.shape[-1], group.kernel.signal_width(group.rank)
        matrix: Array = self.param("signal", _router_init, shape, self.param_dtype)
        return jnp.dot(x, matrix.astype(x.dtype), preferred_element_type=jnp.float32).astype(x.dtype)


class Router(nn.Module):
    """The router's logits, in float32."""

    count: int
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_TxD: Float[Array, "T D"]) -> Float[Array, "T E"]:
        """X times the transposed kernel (E, D)."""
        kernel: Array = self.param("kernel", _router_init, (self.count, x_TxD.shape[-1]), self.param_dtype)
        return jnp.einsum("td,ed->te", x_TxD, kernel.astype(x_TxD.dtype), preferred_element_type=jnp.float32)


class SparseMlp(nn.Module):
    """The mixture of experts of one layer; see `decoder.Mlp`, whose place it takes.

    Sows the rows (rows) and the inputs of the experts' d (d_input, (R, F)) into the collection "block_inputs".
    """

    config: DecoderConfig
    plan: Plan
    layer: int
    param_dtype: jnp.dtype
    joined: bool
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], groups: Mapping[str, Any]) -> Float[Array, "B L D"]:
        """Route every token, run its experts and add their weighted outputs."""
        experts = self.config.experts
        assert experts is not None
        x_TxD = x.reshape(-1, x.shape[-1])
        rows = route(experts, Router(experts.count, self.param_dtype, name="router")(x_TxD))
        self.sow(BLOCK_INPUTS, "rows", rows)

        def block(role: str) -> ExpertBlocks:
            module = self.config, self.plan, self.layer, role, self.param_dtype, self.joined
            return ExpertBlocks(*module, name=role)

        signals: dict[str, Array] = {}
        up, *gate = (block(role)(rows, x_TxD, rows.tokens, groups, signals) for role in self.config.mlp_roles[:-1])
        hidden = self.activation(gate[0]) * up if gate else self.activation(up)
        self.sow(BLOCK_INPUTS, "d_input", hidden)
        y_RxD = block("d")(rows, hidden, None, groups, {}) * rows.weights.astype(hidden.dtype)[:, None]
        return y_RxD[rows.places].astype(jnp.float32).sum(axis=1).astype(x.dtype).reshape(x.shape)
