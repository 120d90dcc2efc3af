"""The layers of decoders and encoders: one linen module for all families, dense or made of neuronal groups.

Legend: B batch, L tokens, D embed, N query heads, K key-value heads, H head dimensions, F mlp.

The block inputs are sown into the collection "block_inputs" (paths: `INPUT_SITE`), which costs nothing unless a caller
requests it with `mutable`; so is the residual stream after every layer, into "residuals" at `layers/<layer>/output`.
Each block's output can be perturbed through the linen collection "perturbations" (entry "output" of the block), by
which its gradient is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ngc_jax.groups.kernels import encode, output_features, read
from ngc_jax.groups.plan import Plan
from ngc_jax.models.attention import LayerCache, attend, extend, rotate
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.experts import BLOCK_INPUTS, SparseMlp
from ngc_jax.models.latent_attention import AttentionRules, Readers, attend_in_latent_space
from ngc_jax.models.latent_cache import LatentCache, MixedCache
from ngc_jax.models.parts import Norm, Projection
from ngc_jax.models.sites import JoinedProjection, site_of

GroupStates = Mapping[str, Any]
RESIDUALS = "residuals"
# Position of each role's input in a layer's sown variables; roles with the same site read the same numbers.
INPUT_SITE = {
    "q": "attn_input",
    "k": "attn_input",
    "v": "attn_input",
    "o": "attn.o_input",
    "u": "mlp_input",
    "g": "mlp_input",
    "d": "mlp.d_input",
}


def input_site(block: str) -> tuple[str, str]:
    """The layer and site of the input that a block reads, by block name; blocks with equal ones share their input."""
    _, layer, _, role, *expert = block.split(".")
    # All experts read the stream; the hidden neurons of each are its own.
    return layer, ".".join([INPUT_SITE[role], *(expert if role == "d" else [])])


_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def activate(name: str, x: Array) -> Array:
    """One of `config.ACTIVATIONS`."""
    return _ACTIVATIONS[name](x)


def _project(
    config: DecoderConfig,
    plan: Plan,
    layer: int,
    roles: str,
    x: Float[Array, "B L D"],
    groups: GroupStates,
    param_dtype: jnp.dtype,
    joined: bool,
) -> list[Float[Array, "B L O"]]:
    """Read x by every role. Blocks of the same group encode x once and read the same signal."""
    if joined:
        return JoinedProjection(site_of(config, plan, layer, roles), param_dtype, name=roles)(x)
    signals: dict[str, Array] = {}
    outputs = []
    for role in roles:
        block = config.block(layer, role)
        group = plan.group_of.get(block.name)
        y = None
        if group is not None:
            states = groups[group.name]
            if group.name not in signals:
                signals[group.name] = encode(group.kernel, states, x, pivots=group.pivots)
            y = read(group.kernel, states, block.name, signals[group.name])
        outputs.append(Projection(block, param_dtype, name=role)(x, y))
    return outputs


class Attention(nn.Module):
    """Grouped-query self-attention of one layer."""

    config: DecoderConfig
    plan: Plan
    layer: int
    param_dtype: jnp.dtype
    hold_others: bool
    joined: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        cache: LayerCache | LatentCache | None,
        groups: GroupStates,
        starts: Int[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L D"], LayerCache | LatentCache | None]:
        """Attend; returns the output and the layer's new cache."""
        c = self.config
        rope = c.ropes[self.layer]
        q, k, v = _project(c, self.plan, self.layer, "qkv", x, groups, self.param_dtype, self.joined)
        v = v.reshape(*v.shape[:2], c.num_kv_heads, c.head_dim)
        heads_of_k = self._norm_of_heads("k_norm")
        q, k = self._norm_of_heads("q_norm")(q), heads_of_k(k)
        if isinstance(cache, LatentCache):
            readers = self._readers(x, cache, groups, heads_of_k)
            rules = AttentionRules(rope, c.attention_scale, c.windows[self.layer], c.attention_soft_cap)
            y, cache = attend_in_latent_space((q, k, v), cache, readers, positions, starts, rules)
            return self._output(y, groups), cache
        q, k = rotate(q, positions, rope), rotate(k, positions, rope)
        own = None
        # A cache without slots returns the tokens in order.
        ordered = c.causal and not self.hold_others and (cache is None or cache.positions.shape[1] == 0)
        if self.hold_others:
            assert cache is not None, "held keys and values must be given"
            attended, (own, _) = cache, extend(None, k, v, positions)
        else:
            attended, cache = extend(cache, k, v, positions)
        y = attend(
            q,
            attended,
            positions,
            starts,
            own,
            scale=c.attention_scale,
            window=c.windows[self.layer],
            soft_cap=c.attention_soft_cap,
            ordered=ordered,
        )
        return self._output(y, groups), cache

    @nn.nowrap
    def _norm_of_heads(self, name: str) -> Callable[[Array], Array]:
        """Split the outputs of q or k into heads, and norm them."""
        c = self.config

        def heads(x: Array) -> Array:
            return x.reshape(*x.shape[:2], -1, c.head_dim)

        if c.qk_norm is None:
            return heads
        norm = Norm(c.norm_eps, c.unit_offset_norm, self.param_dtype, name=name)
        return (lambda x: heads(norm(x))) if c.qk_norm == "whole" else (lambda x: norm(heads(x)))

    def _output(self, y: Float[Array, "B L N H"], groups: GroupStates) -> Float[Array, "B L D"]:
        y = y.reshape(*y.shape[:2], -1)
        self.sow(BLOCK_INPUTS, "o_input", y)
        (out,) = _project(self.config, self.plan, self.layer, "o", y, groups, self.param_dtype, self.joined)
        return out

    def _readers(
        self, x: Float[Array, "B L D"], cache: LatentCache, groups: GroupStates, heads_of_k: Callable[[Array], Array]
    ) -> Readers:
        """How the cache's signals become keys and values."""
        c = self.config
        blocks = {role: c.block(self.layer, role) for role, kept in zip("kv", cache[:2], strict=True) if kept is None}
        heads = (c.num_kv_heads, c.head_dim)
        used = {role: self.plan.group_of[block.name] for role, block in blocks.items()}
        # The compiler computes a signal once that is also encoded for the queries.
        signals = tuple(
            encode(group.kernel, groups[group.name], x, pivots=group.pivots) for group in dict.fromkeys(used.values())
        )
        biases = {role: self.variables["params"][role]["bias"] for role, block in blocks.items() if block.bias}

        def keys(signal: Array) -> Array:
            k = read(used["k"].kernel, groups[used["k"].name], blocks["k"].name, signal)
            k = k + biases["k"].astype(k.dtype) if "k" in biases else k
            return heads_of_k(k)

        values = None
        if "v" in used:
            values = output_features(used["v"].kernel, groups[used["v"].name], blocks["v"].name).reshape(*heads, -1)
        bias = biases["v"].reshape(heads) if "v" in biases else None
        return Readers(signals, keys if "k" in used else None, values, bias)


class Mlp(nn.Module):
    """MLP of one layer."""

    config: DecoderConfig
    plan: Plan
    layer: int
    param_dtype: jnp.dtype
    joined: bool

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], groups: GroupStates) -> Float[Array, "B L D"]:
        """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""
        roles, activation = self.config.mlp_roles[:-1], _ACTIVATIONS[self.config.activation]
        up, *gate = _project(self.config, self.plan, self.layer, roles, x, groups, self.param_dtype, self.joined)
        hidden = activation(gate[0]) * up if gate else activation(up)
        self.sow(BLOCK_INPUTS, "d_input", hidden)
        (out,) = _project(self.config, self.plan, self.layer, "d", hidden, groups, self.param_dtype, self.joined)
        return out


class DecoderLayer(nn.Module):
    """One layer: attention and MLP, each added to the residual stream.

    Attributes:
        config: The architecture.
        plan: Which blocks form which group.
        layer: Which layer, from 0.
        param_dtype: Of the parameters that `init` makes; the computation has the type of its input.
        hold_others: Whether the cache has the keys and values of the tokens themselves, which each token then takes for
            all tokens but itself; see `attention.attend`.
        joined: Parts, attn or mlp, whose parameters are in the run-time layout; see `inference.for_inference`.
    """

    config: DecoderConfig
    plan: Plan
    layer: int
    param_dtype: jnp.dtype = jnp.float32
    hold_others: bool = False
    joined: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        cache: LayerCache | LatentCache | None = None,
        groups: GroupStates | None = None,
        starts: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], LayerCache | LatentCache | None]:
        """Apply the layer.

        Args:
            x: Residual stream.
            positions: Token positions, ascending in a row; -1 for padding.
            cache: The layer's cache or None.
            groups: States of (at least) the groups that have a member in this layer.
            starts: Position at which each token's document begins: it attends to nothing before that. None for 0.

        Returns:
            The residual stream and the layer's new cache.
        """
        c, groups = self.config, {} if groups is None else groups
        module = (c, self.plan, self.layer, self.param_dtype)

        def norm(name: str, x: Array, wanted: bool) -> Array:
            if not wanted:
                return x
            return Norm(c.norm_eps, c.unit_offset_norm, self.param_dtype, c.norm, c.norm_bias, name=name)(x)

        def add(x: Array, y: Array) -> Array:
            return x + (y if c.residual_scale == 1.0 else y * jnp.asarray(c.residual_scale, y.dtype))

        attn_in = norm("attn_norm", x, c.pre_norms)
        self.sow(BLOCK_INPUTS, "attn_input", attn_in)
        y, cache = Attention(*module, self.hold_others, "attn" in self.joined, name="attn")(
            attn_in, positions, cache, groups, starts
        )
        before, x = x, add(x, norm("attn_post_norm", y, c.post_norms))
        shares_norm = c.parallel and not c.parallel_norms
        mlp_in = attn_in if shares_norm else norm("mlp_norm", before if c.parallel else x, c.pre_norms)
        self.sow(BLOCK_INPUTS, "mlp_input", mlp_in)
        if c.is_sparse(self.layer):
            mlp: Any = SparseMlp(*module, "mlp" in self.joined, _ACTIVATIONS[c.activation], name="mlp")
        else:
            mlp = Mlp(*module, "mlp" in self.joined, name="mlp")
        y = mlp(mlp_in, groups)
        x = add(x, norm("mlp_post_norm", y, c.post_norms))
        self.sow(RESIDUALS, "output", x)
        return x, cache


class Layers(nn.Module):
    """All layers, named by their number."""

    config: DecoderConfig
    plan: Plan
    param_dtype: jnp.dtype
    remat: bool
    joined: tuple[tuple[str, ...], ...]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B L D"],
        positions: Int[Array, "B L"],
        cache: MixedCache | None,
        groups: GroupStates,
        starts: Int[Array, "B L"] | None,
    ) -> tuple[Float[Array, "B L D"], MixedCache | None]:
        """Apply every layer in turn, in each of the model's iterations."""
        new_cache: list[Any] = []
        layer_type = nn.remat(DecoderLayer) if self.remat else DecoderLayer
        modules = [
            layer_type(self.config, self.plan, layer, self.param_dtype, joined=self.joined[layer], name=str(layer))
            for layer in range(self.config.num_layers)
        ]
        for number, module in enumerate(modules * self.config.iterations):
            x, layer_cache = module(x, positions, None if cache is None else cache[number], groups, starts)
            new_cache.append(layer_cache)
        return x, None if cache is None else tuple(new_cache)
