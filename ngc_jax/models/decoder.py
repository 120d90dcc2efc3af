"""The decoder: one linen module for all families, dense or made of neuronal groups.

Legend: B batch, L tokens, D embed, V vocabulary.

Group states exist once, at `params["groups"]`, and are passed to the layers; a block that the plan puts into a group
has no kernel of its own. What the layers sow, and how their blocks are perturbed, is in `layers`.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ngc_jax.groups.modules import Groups
from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.groups.quantised import contract
from ngc_jax.models.config import DecoderConfig, check_length
from ngc_jax.models.latent_cache import CacheKind, MixedCache, cache_layout
from ngc_jax.models.layers import Layers
from ngc_jax.models.parts import Embedding, Norm, Unembedding
from ngc_jax.models.sites import product, take_columns


class Decoder(nn.Module):
    """A causal language model.

    Attributes:
        config: The architecture.
        plan: Which blocks form which group; None for the dense model.
        param_dtype: Of the parameters that `init` makes, and of the computation unless `dtype` is given.
        remat: Recompute each layer in the backward pass instead of storing its intermediate values.
        dtype: Of the computation: activations, and the parameters when they are used, whatever type they are stored in.
            Products accumulate in float32; norms, rotary angles, softmax and logits are float32 throughout.
        joined: Whether the parameters are in the run-time layout; see `inference.for_inference`.
        cache: What the caches of `decoding` keep; see `latent_cache`.

    Example:
        >>> decoder = Decoder(model.config)
        >>> logits, _ = decoder.apply({"params": model.params}, tokens[None, :5])
        >>> logits.shape
        (1, 5, 259)
    """

    config: DecoderConfig
    plan: Plan | None = None
    param_dtype: jnp.dtype = jnp.float32
    remat: bool = False
    dtype: jnp.dtype | None = None
    joined: bool = False
    cache: CacheKind = "full"

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The type of activations, and of the cache."""
        return jnp.dtype(self.param_dtype if self.dtype is None else self.dtype)

    def setup(self) -> None:
        """Create the submodules."""
        c, plan = self.config, self.plan or Plan()
        if not (self.joined and c.tied_embeddings):
            self.embed = Embedding(c.vocab_size, c.embed_dim, param_dtype=self.param_dtype, dtype=self.compute_dtype)
        if c.learned_positions:
            self.position_embed = Embedding(
                c.max_length, c.embed_dim, param_dtype=self.param_dtype, dtype=self.compute_dtype
            )
        self.layers = Layers(c, plan, self.param_dtype, self.remat, self.joined_parts())
        self.norm = Norm(c.norm_eps, c.unit_offset_norm, self.param_dtype, c.norm, c.norm_bias)
        if self.joined or not c.tied_embeddings:
            self.unembed = Unembedding(c.vocab_size, self.param_dtype, self.joined)
        self._kept = self.separate_groups()
        if self._kept:
            self.groups = Groups(Plan(self._kept), self.param_dtype)

    def joined_parts(self) -> tuple[tuple[str, ...], ...]:
        """By layer, the parts that are in the run-time layout: none of attention where signals of groups are cached."""
        if not self.joined:
            return ((),) * self.config.num_layers
        layouts = cache_layout(self.config, self.plan, self.cache)
        return tuple(("mlp",) if layout.widths else ("attn", "mlp") for layout in layouts)

    def separate_groups(self) -> tuple[GroupPlan, ...]:
        """The groups whose states are parameters of their own: all but those that the run-time layout has joined."""
        parts = self.joined_parts()

        def kept(group: GroupPlan) -> bool:
            places = [member.name.split(".")[1:3] for member in group.members]
            return any(part not in parts[int(layer)] for layer, part in places)

        return tuple(filter(kept, () if self.plan is None else self.plan.groups))

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B L"] | None = None,
        cache: MixedCache | None = None,
        starts: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L V"], MixedCache | None]:
        """Next-token logits.

        Args:
            tokens: Token ids.
            positions: Their positions, ascending in a row, 0, 1, 2, ... if None; -1 marks padding.
            cache: From `init_cache`, `init_latent_cache` or an earlier call; None to run without one.
            starts: Position at which each token's document begins, for several documents in a row: a token attends to
                nothing before that. None for 0.

        Returns:
            Logits in float32 and the new cache (None without one).

        Raises:
            UsageError: If positions are learned, and one document of tokens is longer than their table.
        """
        x, cache = self.hidden(tokens, positions, cache, starts)
        return self.logits(x), cache

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        positions: Int[Array, "B L"] | None = None,
        cache: MixedCache | None = None,
        starts: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], MixedCache | None]:
        """Final hidden states, normed: the input of `logits`. Arguments as for `__call__`."""
        x = self.embedded(tokens, positions, starts)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        groups = self.groups() if self._kept else {}
        x, cache = self.layers(x, positions, cache, groups, starts)
        return self.normed(x), cache

    def normed(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The last layer's output as `logits` reads it."""
        return self.norm(x)

    def embedded(
        self,
        tokens: Int[Array, "*batch L"],
        positions: Int[Array, "*batch L"] | None = None,
        starts: Int[Array, "*batch L"] | None = None,
    ) -> Float[Array, "*batch L D"]:
        """The residual stream before the first layer; arguments as for `__call__`.

        Raises:
            UsageError: As for `__call__`.
        """
        if self.joined and self.config.tied_embeddings:  # one matrix, stored as the unembedding reads it
            rows = take_columns(self.unembed(self.config.embed_dim), tokens)
        else:
            rows = self.embed(tokens)
        # Hugging Face rounds the scale to the model's dtype; in bfloat16 that is part of the model.
        rows = rows * jnp.asarray(self.config.embed_scale, self.compute_dtype)
        return rows if not self.config.learned_positions else rows + self._position_rows(tokens, positions, starts)

    def _position_rows(self, tokens: Array, positions: Array | None, starts: Array | None) -> Array:
        """The vectors of positions within documents. One beyond the table, of traced positions, is NaN."""
        within = jnp.arange(tokens.shape[-1], dtype=jnp.int32) if positions is None else positions
        within = within if starts is None else within - starts
        longest = tokens.shape[-1] if positions is None and starts is None else 0
        if not isinstance(within, jax.core.Tracer):
            longest = int(within.max(initial=-1)) + 1
        check_length(self.config, longest)
        return self.position_embed(jnp.maximum(within, 0))

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits in float32 of normed hidden states."""
        if self.joined:
            y = product(x, self.unembed(self.config.embed_dim), jnp.float32)
        else:
            table = self.embed.embedding if self.config.tied_embeddings else self.unembed(self.config.embed_dim)
            y = contract(x, table)
        y = y if self.config.logit_scale == 1.0 else y * self.config.logit_scale
        cap = self.config.logit_soft_cap
        return y if cap is None else cap * jnp.tanh(y / cap)
