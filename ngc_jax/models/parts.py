"""Small modules that a decoder is made of: norms, projections, the embedding and the unembedding.

Legend: B batch, L tokens, D embed, O outputs of a block, V vocabulary.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ngc_jax.groups.plan import Block
from ngc_jax.groups.quantised import QuantisedMatrix, contract, stored_parameter

_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)


class Norm(nn.Module):
    """Root-mean-square or layer norm over the last axis, in float32."""

    eps: float
    unit_offset: bool
    param_dtype: jnp.dtype = jnp.float32
    kind: str = "rms"
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise; the scale is 1 + the parameter with `unit_offset`."""
        init = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype).astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        if self.kind == "layer":
            x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        y = normed * (1.0 + scale if self.unit_offset else scale)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype).astype(jnp.float32)
        return y.astype(x.dtype)


class Projection(nn.Module):
    """One block: its kernel unless a group forms its weights, and its bias if it has one."""

    block: Block
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "... D"], grouped: Float[Array, "... O"] | None) -> Float[Array, "... O"]:
        """Map x (..., d_in) to (..., d_out); `grouped` is the output of the block's group, if it has one."""
        y = grouped
        if y is None:
            shape = self.block.d_out, self.block.d_in
            kernel = stored_parameter(self, "kernel", _kernel_init, shape, self.param_dtype)
            y = contract(x, kernel).astype(x.dtype)
        if self.block.bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.block.d_out,), self.param_dtype).astype(y.dtype)
        return self.perturb("output", y)


class Unembedding(nn.Module):
    """Output matrix of a model whose embeddings are not tied."""

    vocab_size: int
    param_dtype: jnp.dtype
    joined: bool = False

    @nn.compact
    def __call__(self, embed_dim: int) -> Array:
        """The matrix (V, D); (D, V) in the run-time layout."""
        shape = (self.vocab_size, embed_dim)
        return stored_parameter(self, "kernel", _kernel_init, shape[::-1] if self.joined else shape, self.param_dtype)


class Embedding(nn.Embed):
    """The embedding, also of a quantised matrix, of which only the rows of the tokens are read."""

    def setup(self) -> None:
        """Declare the matrix."""
        shape = self.num_embeddings, self.features
        self.embedding = stored_parameter(self, "embedding", self.embedding_init, shape, self.param_dtype)

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """The tokens' rows."""
        if isinstance(self.embedding, QuantisedMatrix):
            return self.embedding.take(tokens, self.dtype)
        return super().__call__(tokens)
