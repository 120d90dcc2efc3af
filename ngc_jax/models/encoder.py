"""The image encoder: one linen module for all families, dense or made of neuronal groups.

Its layers are the decoder's, with attention in both directions; so are its groups. An image becomes patches, which are
embedded as tokens; the last layer's tokens are pooled, and a head reads the result.

Legend: B images, C channels, S height and width of an image, P those of a patch, L tokens, D embed, V outputs, N heads,
H head dimensions.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ngc_jax.groups.modules import Groups
from ngc_jax.groups.plan import Plan
from ngc_jax.models.encoder_config import EncoderConfig
from ngc_jax.models.images import Images
from ngc_jax.models.layers import Layers, activate
from ngc_jax.models.parts import Norm

_init = nn.initializers.normal(0.02)
_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)


class Affine(nn.Module):
    """x W^T + b, in float32, of a part of the encoder that is no block."""

    outputs: int
    param_dtype: jnp.dtype
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """Map x."""
        kernel = self.param("kernel", _kernel_init, (self.outputs, x.shape[-1]), self.param_dtype)
        y = jnp.einsum("...i,oi->...o", x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)
        if not self.bias:
            return y
        return y + self.param("bias", nn.initializers.zeros, (self.outputs,), self.param_dtype).astype(jnp.float32)


class Patches(nn.Module):
    """The convolution of an image with a stride of the kernel's size: a matrix product with every patch."""

    config: EncoderConfig
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: Float[Array, "*batch C S S"]) -> Float[Array, "*batch h w D"]:
        """The patches' embeddings; pixels beyond the last whole patch are ignored."""
        c, size = self.config, self.config.patch_size
        rows, columns = pixels.shape[-2] // size, pixels.shape[-1] // size
        cut = pixels[..., : rows * size, : columns * size]
        cut = cut.reshape(*pixels.shape[:-2], rows, size, columns, size)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(1, 2, 3), out_axis=0)
        kernel = self.param("kernel", init, (c.embed_dim, c.channels, size, size), self.param_dtype)
        y = jnp.einsum("...chpwq,dcpq->...hwd", cut, kernel.astype(cut.dtype), preferred_element_type=jnp.float32)
        if c.patch_bias:
            bias = self.param("bias", nn.initializers.zeros, (c.embed_dim,), self.param_dtype)
            y = y + bias.astype(jnp.float32)
        return y.astype(pixels.dtype)


class ImageEmbedding(nn.Module):
    """Patches, learned tokens and positions."""

    config: EncoderConfig
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, pixels: Float[Array, "*batch C S S"]) -> Float[Array, "*batch L D"]:
        """The residual stream before the first layer.

        Raises:
            UsageError: If the images' size is not the model's, and positions are not interpolated.
        """
        c = self.config
        c.tokens_of(*pixels.shape[-2:])
        patches = Patches(c, self.param_dtype, name="patch")(pixels)
        rows, columns = patches.shape[-3:-1]
        x = patches.reshape(*patches.shape[:-3], rows * columns, c.embed_dim)
        learned = []
        if c.class_token:
            learned.append(self._tokens("class_token", 1, flat=c.flat_embeddings))
        if c.distillation_token:
            learned.append(self._tokens("distillation_token", 1))
        with_positions = len(learned)
        side = c.image_size // c.patch_size
        shape: tuple[int, ...] = (side * side + with_positions, c.embed_dim)
        stored = self.param("positions", _init, shape if c.flat_embeddings else (1, *shape), self.param_dtype)
        positions = stored.reshape(shape)
        if (rows, columns) != (side, side):
            grid = positions[with_positions:].astype(jnp.float32).reshape(side, side, c.embed_dim)
            by_row, by_column = (jnp.asarray(bicubic(side, size, antialias=c.antialias)) for size in (rows, columns))
            grid = jnp.einsum("hr,wc,rcd->hwd", by_row, by_column, grid, precision="highest")
            own = positions[:with_positions].astype(jnp.float32)
            positions = jnp.concatenate([own, grid.reshape(-1, c.embed_dim)])
        if learned:
            first = jnp.concatenate(learned).astype(x.dtype)
            x = jnp.concatenate([jnp.broadcast_to(first, (*x.shape[:-2], *first.shape)), x], axis=-2)
        x = x + positions.astype(x.dtype)
        if c.registers:
            extra = self._tokens("registers", c.registers).astype(x.dtype)
            extra = jnp.broadcast_to(extra, (*x.shape[:-2], *extra.shape))
            x = jnp.concatenate([x[..., :with_positions, :], extra, x[..., with_positions:, :]], axis=-2)
        if c.embed_norm:
            x = Norm(c.norm_eps, False, self.param_dtype, "layer", True, name="norm")(x)
        return x

    def _tokens(self, name: str, count: int, *, flat: bool = False) -> Float[Array, "n D"]:
        width = self.config.embed_dim
        stored: Array = self.param(name, _init, (width,) if flat else (1, count, width), self.param_dtype)
        return stored.reshape(count, width)


def bicubic(size: int, new_size: int, *, antialias: bool = False) -> Float[np.ndarray, "new old"]:
    """The matrix of cubic interpolation as PyTorch computes it.

    Keys' kernel (1981, IEEE Transactions on Acoustics, Speech, and Signal Processing 29(6), eq. 15): with a = -0.75 and
    edges repeated; or, with antialiasing, a = -0.5, widened where the result is smaller, and cut off at the edges.

    Example:
        >>> bicubic(3, 3).round(6).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    a, width = (-0.5, max(size / new_size, 1.0)) if antialias else (-0.75, 1.0)
    places = (np.arange(new_size) + 0.5) * size / new_size - 0.5
    reach = int(np.ceil(2 * width)) + 1
    matrix = np.zeros((new_size, size))
    for row, place in enumerate(places):
        index = np.arange(int(np.floor(place)) - reach, int(np.floor(place)) + reach + 1)
        t = np.abs(place - index) / width
        near = ((a + 2) * t - (a + 3)) * t * t + 1
        far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
        weights = np.where(t <= 1, near, np.where(t < 2, far, 0.0))
        if antialias:
            weights *= (index >= 0) & (index < size)
            weights /= weights.sum()
        np.add.at(matrix[row], np.clip(index, 0, size - 1), weights)
    return matrix.astype(np.float32)


class AttentionPool(nn.Module):
    """One learned query that attends to all tokens, and an MLP."""

    config: EncoderConfig
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        """The pooled vector, in float32."""
        c, width = self.config, self.config.embed_dim
        x = x.astype(jnp.float32)
        probe = self.param("probe", _init, (1, 1, width), self.param_dtype).reshape(1, width).astype(jnp.float32)
        projections = Affine(3 * width, self.param_dtype, name="attention")
        q = projections(probe)[:, :width].reshape(c.num_heads, c.head_dim)
        k, v = jnp.split(projections(x)[..., width:].reshape(*x.shape[:2], 2 * c.num_heads, c.head_dim), 2, axis=2)
        weights = jax.nn.softmax(jnp.einsum("nh,blnh->bnl", q, k) * c.head_dim**-0.5)
        y = Affine(width, self.param_dtype, name="out")(jnp.einsum("bnl,blnh->bnh", weights, v).reshape(-1, width))
        normed = Norm(c.norm_eps, False, self.param_dtype, "layer", True, name="norm")(y)
        hidden = activate(c.activation, Affine(c.pool_dim, self.param_dtype, name="up")(normed))
        return y + Affine(width, self.param_dtype, name="down")(hidden)


class Head(nn.Module):
    """Pooling, and classifiers or a projection."""

    config: EncoderConfig
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B V"]:
        """Outputs in float32 of the last layer's tokens, normed."""
        c = self.config
        x = x.astype(jnp.float32)

        def classifier(name: str, x: Array) -> Array:
            y: Array = Affine(c.vocab_size, self.param_dtype, name=name)(x)
            return y

        if c.pooling == "distilled":
            return (classifier("class_classifier", x[:, 0]) + classifier("distillation_classifier", x[:, 1])) / 2
        patches = x[:, c.special_tokens :]
        if c.pooling == "attention":
            pooled = AttentionPool(c, self.param_dtype, name="pool")(x)
        elif c.pooling == "mean":
            pooled = patches.mean(axis=1)
        elif c.pooling == "class_mean":
            pooled = jnp.concatenate([x[:, 0], patches.mean(axis=1)], axis=-1)
        else:
            pooled = x[:, 0]
        if c.head == "classes":
            return classifier("classifier", pooled)
        if c.head == "projection":
            return Affine(c.vocab_size, self.param_dtype, bias=False, name="projection")(pooled)
        return pooled


class Encoder(nn.Module):
    """An image encoder.

    Attributes:
        config: The architecture.
        plan: Which blocks form which group; None for the dense model.
        param_dtype: Of the parameters that `init` makes, and of the computation unless `dtype` is given.
        remat: Recompute each layer in the backward pass instead of storing its intermediate values.
        dtype: Of the computation; see `Decoder`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> hf = {"model_type": "vit", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> config = EncoderConfig.from_hf({**hf, "intermediate_size": 12, "image_size": 8, "patch_size": 4})
        >>> encoder, pixels = Encoder(config), jnp.zeros((2, 3, 8, 8))
        >>> encoder.apply(encoder.init(jax.random.key(0), pixels), pixels).shape
        (2, 2)
    """

    config: EncoderConfig
    plan: Plan | None = None
    param_dtype: jnp.dtype = jnp.float32
    remat: bool = False
    dtype: jnp.dtype | None = None

    @property
    def compute_dtype(self) -> jnp.dtype:
        """The type of activations."""
        return jnp.dtype(self.param_dtype if self.dtype is None else self.dtype)

    def setup(self) -> None:
        """Create the submodules."""
        c, plan = self.config, self.plan or Plan()
        self.embed = ImageEmbedding(c, self.param_dtype)
        self.layers = Layers(c, plan, self.param_dtype, self.remat, ((),) * c.num_layers)
        self.norm = Norm(c.norm_eps, False, self.param_dtype, "layer", True)
        self.head = Head(c, self.param_dtype)
        if plan.groups:
            self.groups = Groups(plan, self.param_dtype)

    def __call__(self, pixels: Float[Array, "B C S S"]) -> Float[Array, "B V"]:
        """The outputs in float32 for images: logits of classes, a projection, or the pooled vector."""
        return self.logits(self.hidden(pixels))

    def hidden(self, pixels: Float[Array, "B C S S"]) -> Float[Array, "B L D"]:
        """The last layer's tokens, normed: the input of `logits`."""
        x = self.embedded(pixels)
        groups: Any = self.groups() if self.plan is not None and self.plan.groups else {}
        x, _ = self.layers(x, jnp.zeros(x.shape[:2], jnp.int32), None, groups, None)
        return self.normed(x)

    def embedded(self, images: Float[Array, "*batch C S S"] | Images) -> Float[Array, "*batch L D"]:
        """The residual stream before the first layer."""
        pixels = images.pixels if isinstance(images, Images) else images
        y: Array = self.embed(pixels.astype(self.compute_dtype))
        return y

    def normed(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The last layer's output as `logits` reads it."""
        y: Array = self.norm(x)
        return y

    def logits(self, x: Float[Array, "B L D"]) -> Float[Array, "B V"]:
        """The outputs in float32 of normed tokens."""
        y: Array = self.head(x)
        return y
