"""A model as its plain dense architecture: every group folded into the weights of its members.

W = phi_out(Q_out) · M · phi_in(Q_in)^T, formed one block at a time when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.files import Closing
from ngc_jax.groups.kernels import weights
from ngc_jax.groups.plan import GroupPlan
from ngc_jax.groups.quantised import QuantisedMatrix
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.inspect import inspect_model
from ngc_jax.models.keys import hf_name, match_tensors
from ngc_jax.models.load import check_tied_head, count_not_finite, parameter_shapes, read_tensor
from ngc_jax.models.saved_config import join_config, split_config
from ngc_jax.models.sources import Source
from ngc_jax.models.tokenizer import Tokenizer

DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


class FoldedSource(Closing):
    """A source (see `models.sources.Source`) of the dense tensors of another source's model, dense or compact.

    Tensors have Hugging Face's names, each parameter once; other tensors of the source are left out.

    Attributes:
        name: The other source's name.
        config: config.json of the dense architecture, without our own section.
        decoder_config: The same, read.
        compact: Whether the model has groups.
        conversion: How the model was converted, if it was.
        shapes: Tensor name -> shape.
        nbytes: Bytes of all tensors in the type of the source's embedding.

    Example:
        >>> from ngc_jax import save_model
        >>> from ngc_jax.models.sources import open_source
        >>> with open_source(str(save_model(compact, "folded"))) as source:
        ...     folded = FoldedSource(source)
        ...     folded.read("model.layers.0.self_attn.q_proj.weight").shape
        (40, 24)
    """

    def __init__(self, source: Source) -> None:
        """Wrap an open source, which must remain open.

        Raises:
            UsageError: If its config, plan or tensors are invalid, or no plain architecture computes the same function.
        """
        inspection = inspect_model(source)
        config = inspection.config
        if config.iterations != 1:
            raise UsageError(
                f"{source.name} applies its layers {config.iterations} times, which no plain architecture does; it "
                "can be used with ngc-jax only"
            )
        self.name = source.name
        hf_config, _ = split_config(source.config, source.name)
        self.config: dict[str, Any] = join_config(hf_config, config, None, None)
        self.decoder_config = config
        self.compact = inspection.plan is not None and bool(inspection.plan.groups)
        self._source = source
        self._groups = {} if inspection.plan is None else inspection.plan.group_of
        self._stored = match_tensors(
            parameter_shapes(Decoder(config, inspection.plan)), source.shapes, config, source.name
        )
        check_tied_head(source, config, self._stored["embed.embedding"])
        dense = parameter_shapes(Decoder(config))
        self._parameters = {hf_name(parameter, config): parameter for parameter in dense}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: dense[p] for name, p in self._parameters.items()}
        width = np.asarray(source.read(self._stored["embed.embedding"])[:1]).dtype.itemsize
        self.sizes: Mapping[str, int] = {name: width * int(np.prod(shape)) for name, shape in self.shapes.items()}
        self.nbytes = sum(self.sizes.values())
        self.license, self.files = source.license, source.files
        self.conversion = inspection.conversion
        self._held: tuple[str, dict[str, Any]] | None = None

    def parameter(self, name: str) -> str:
        """The decoder's name of a tensor, for example `layers.3.attn.q.kernel`."""
        return self._parameters[name]

    def read(self, name: str) -> np.ndarray:
        """One tensor: as it is stored, or, for a group's member, its weight matrix in float32.

        Raises:
            UsageError: If no tensor has that name, or it cannot be read.
        """
        if name not in self._parameters:
            raise UsageError(f"{self.name}: has no tensor {name!r}; expected one of the names in shapes")
        parameter = self._parameters[name]
        block, _, leaf = parameter.rpartition(".")
        group = self._groups.get(block)
        if group is None or leaf != "kernel":
            return read_tensor(self._source, self._stored[parameter])
        d_in = self.shapes[name][1]
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return np.asarray(weights(group.kernel, self._states(group), block, d_in, pivots=group.pivots))

    def read_quantised(self, name: str) -> QuantisedMatrix | None:
        """The codes and scales of a matrix that a conversion quantised; None for any other tensor."""
        stored = self._stored.get(self._parameters[name])
        return None if stored is None else self._source.read_quantised(stored)

    def _states(self, group: GroupPlan) -> dict[str, Any]:
        """The states of one group in float32; those of the last group are cached for its next member."""
        if self._held is None or self._held[0] != group.name:
            self._held = (group.name, read_states(self._source, group, self._stored))
        return self._held[1]

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._source.tokenizer()

    def close(self) -> None:
        """Close the other source."""
        self._source.close()


def read_states(source: Source, group: GroupPlan, names: Mapping[str, str]) -> dict[str, Any]:
    """The states of one group, in float32.

    Args:
        source: A compact model.
        group: One of its groups.
        names: The tensor's name for every parameter, from `keys.match_tensors`.
    """
    prefix = f"groups.{group.name}."
    states: dict[str, Any] = {}
    for path, name in names.items():
        if not path.startswith(prefix):
            continue
        part, _, member = path.removeprefix(prefix).partition(".")
        array = jnp.asarray(read_tensor(source, name).astype(np.float32))
        if member:
            states.setdefault(part, {})[member] = array
        else:
            states[part] = array
    return states


def cast(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """A tensor in another type.

    Raises:
        UsageError: If a number is too large for it.
    """
    with np.errstate(over="ignore"):
        result = tensor.astype(dtype)
    if count_not_finite(result):
        wider = "bfloat16 or float32" if dtype == np.float16 else "float32"
        raise UsageError(f"tensor {name!r} has numbers too large for {dtype}; choose {wider}")
    return result
