"""The pass that rounds weights to a few bits; the algorithms are in `ngc_jax.conversion.quantising` and `rounding`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from ngc_jax.conversion.chains import Chain, Pass, register_pass
from ngc_jax.conversion.passes.factorise import Factorise
from ngc_jax.conversion.state import Calibration, ConversionState, Needs
from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig
from ngc_jax.types import Bits, GroupSize


@register_pass(after="refine")
@dataclasses.dataclass(frozen=True)
class Quantise(Pass):
    """Store states and dense weights as integers of a few bits, with a scale for every group of numbers.

    Models run from the integers. Norms, biases and kernels' own parameters are not quantised.

    Attributes:
        bits: Of a weight: 2, 3, 4 or 8. 8 is nearly exact; below 4 a model of fewer parameters is often better.
        group_size: Numbers, along a matrix's inputs, that share a scale: 32, 64 or 128.
        symmetric: Whether the grid of each group contains 0; otherwise an offset is stored with every scale.
        feedback: Compensate each number's rounding error by those not yet rounded, in the geometry of the inputs
            (GPTQ), and of the signal of a group; otherwise round to nearest, which reads no text.
        embedding_bits: Of the embeddings and the unembedding: 2, 3, 4 or 8. Below 8 the unembedding, or both if they
            are tied, is rounded with feedback too; an embedding of its own to nearest.

    Raises:
        UsageError: If a value is not one of these.

    Example:
        >>> from ngc_jax import chain, convert
        >>> small = convert(model, chain(quantise(bits=8, feedback=False)))
        >>> small.quantised
        True
    """

    name: ClassVar[str] = "quantise"
    bits: Bits = 4
    group_size: GroupSize = 64
    symmetric: bool = True
    feedback: bool = True
    embedding_bits: Bits = 8

    def __post_init__(self) -> None:
        for option, kind in {"bits": Bits, "group_size": GroupSize, "embedding_bits": Bits}.items():
            if getattr(self, option) not in (known := get_args(kind)):
                *most, last = map(str, known)
                raise UsageError(
                    f"{option.replace('_', '-')} {getattr(self, option)!r} is not supported; expected "
                    f"{', '.join(most)} or {last}"
                )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Quantise:
        """From options that the user gave, bits among them.

        Raises:
            UsageError: If there are no bits.
        """
        if "bits" not in options:
            raise UsageError(
                f"{next(iter(options)).replace('_', '-')} is an option of quantisation; add bits, such as 4"
            )
        return cls(**options)

    def check(self, chain: Chain) -> None:
        """Raises UsageError unless it is the last pass."""
        if chain.passes[-1] is not self:
            raise UsageError("the other passes compute with weights in floating point; put quantise last")

    def needs(self, config: DecoderConfig, keep: float, chain: Chain, calibration: Calibration) -> Needs:
        """The inputs' second moments, after all groups are fitted; nothing without feedback."""
        return Needs(inputs=True, held=chain.find(Factorise) is not None) if self.feedback else Needs()

    def apply(self, state: ConversionState) -> ConversionState:
        """Quantise the compact model, or the dense one if there are no groups."""
        from ngc_jax.conversion.quantising import quantise_model

        return dataclasses.replace(state, compact=quantise_model(state, self))


quantise = Quantise
