"""The state that passes hand on: the models, the statistics, the calibration text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.tokens import Bos, as_tokens, begin_windows, whole_windows
from ngc_jax.types import Progress

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from ngc_jax.conversion.chains import Chain
    from ngc_jax.conversion.fitted import FitCache
    from ngc_jax.conversion.statistics import Statistics
    from ngc_jax.models.load import LanguageModel

GRADIENT_TOKENS = 16_384
PROPAGATION_TOKENS = 16_384
# Called with (stage, done, total).


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The text that a conversion measures on, and how it is read.

    Attributes:
        tokens: (T,) one stream of token ids, with `prefix` before every window; from `Calibration.of`. Of an image
            encoder an `ImageStream`, whose windows are images.
        window: Tokens in a window, the prefix included.
        batch_size: Windows that run at once, on each device.
        prefix: Tokens at the start of every window, such as BOS.
        gradient_tokens: Number of tokens, from the first, on which gradients are measured.
        propagation_tokens: Number of tokens, from the first, on which the converted layers' inputs are measured.
        layers_per_pass: Layers whose gradient statistics are held at once; all if None.
        mesh: The windows of a batch are sharded over its axis "data", on the devices of this process. None for one
            device.

    Raises:
        UsageError: If a number is below 1.

    Example:
        >>> calibration = Calibration.of(model, text, window=32, gradient_tokens=64)
        >>> calibration.window, calibration.gradient_tokens
        (32, 64)
    """

    tokens: Any
    window: int = 1024
    batch_size: int = 4
    prefix: tuple[int, ...] = ()
    gradient_tokens: int = GRADIENT_TOKENS
    propagation_tokens: int = PROPAGATION_TOKENS
    layers_per_pass: int | None = None
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        for name in ("window", "batch_size", "gradient_tokens", "propagation_tokens", "layers_per_pass"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; expected at least 1")

    @classmethod
    def given(cls, model: LanguageModel, calibration: Any, options: Mapping[str, Any]) -> Calibration:
        """A calibration as it is, or made by `of` from a text or token ids and options.

        Raises:
            UsageError: As `of`, and if options are given in addition to a calibration.
        """
        if not isinstance(calibration, Calibration):
            return cls.of(model, calibration, **options)
        if options:
            raise UsageError(f"{sorted(options)[0]} is given, and a Calibration; set it in the calibration")
        return calibration

    @classmethod
    def of(cls, model: LanguageModel, tokens: Any, *, bos: Bos = "auto", **options: Any) -> Calibration:
        """Calibration on tokens or a text.

        Args:
            model: The model whose tokenizer reads the text.
            tokens: A text, or token ids (T,) or (1, T): an array or a list; see `as_tokens`. None if nothing is
                measured. For an image encoder, images; see `image_calibration`.
            bos: The start of each window, as for `Tokenizer.prefix`. It is measured like every other token, as models
                read it with every text.
            options: The other attributes, except prefix. Numbers of tokens are rounded to whole windows if windows have
                a prefix.

        Raises:
            UsageError: If the tokens are not the model's, or an option is unknown or out of range.

        Example:
            >>> Calibration.of(model, "A long text ...", window=4).tokens[:4].tolist()
            [32, 220, 75, 78]
        """
        known = {field.name for field in dataclasses.fields(cls)} - {"tokens", "prefix"}
        if wrong := sorted(set(options) - known):
            raise UsageError(f"calibration has no option {wrong[0]!r}; expected {', '.join(sorted(known | {'bos'}))}")
        if tokens is None:
            return cls(np.zeros(0, np.int32), **options)
        if not model.config.causal:
            if bos != "auto":
                raise UsageError("bos is for texts; leave it out for images")
            from ngc_jax.conversion.image_calibration import image_calibration  # imports jax

            return cls(**image_calibration(model, tokens, options, options.get("gradient_tokens", GRADIENT_TOKENS)))
        read_ids = bos == "never" and not isinstance(tokens, str)
        tokenizer = None if read_ids else model.load_tokenizer()
        ids = as_tokens(tokens, model.config.vocab_size, tokenizer=tokenizer, least=2)
        prefix = () if tokenizer is None else tokenizer.prefix(bos)
        made = cls(ids, prefix=prefix, **options)
        return dataclasses.replace(
            made,
            tokens=begin_windows(ids, made.window, prefix),
            gradient_tokens=whole_windows(made.gradient_tokens, made.window, prefix),
            propagation_tokens=whole_windows(made.propagation_tokens, made.window, prefix),
        )


def check_dense(model: LanguageModel) -> None:
    """Refuse a model that cannot be converted.

    Raises:
        UsageError: If it is compact, or applies its layers several times.
    """
    if model.plan is not None:
        raise UsageError(f"{model.name} is a compact model already; convert the dense model it was made from")
    if model.config.iterations > 1:
        raise UsageError(f"{model.name} applies its layers {model.config.iterations} times, which cannot be converted")


@dataclasses.dataclass(frozen=True)
class Needs:
    """The statistics that a conversion must measure; `|` gives the union of two.

    Attributes:
        inputs: Second moments of every block's inputs.
        fisher: Fisher information of every block's inputs, on the tokens of the gradients.
        gradients: Second moments of the loss's gradients with respect to every block's outputs, full or diagonal.
        whole: G itself of u and g, also where W^T G W is smaller.
        held: Whether the statistics of all layers are needed at once, and repeatedly.
        first: Also the inputs' second moments on the tokens of the gradients alone.
    """

    inputs: bool = False
    fisher: bool = False
    gradients: Literal["full", "diagonal"] | None = None
    whole: bool = False
    held: bool = False
    first: bool = False

    def __or__(self, other: Needs) -> Needs:
        flags = {
            name: getattr(self, name) or getattr(other, name) for name in ("inputs", "fisher", "whole", "held", "first")
        }
        both = {self.gradients, other.gradients}
        return Needs(gradients="full" if "full" in both else self.gradients or other.gradients, **flags)

    @property
    def anything(self) -> bool:
        """Whether a calibration text is read at all."""
        return self.inputs or self.fisher or self.gradients is not None


class Measurements(Protocol):
    """A source of statistics: measured now (`measure.Measured`), or cached for many conversions."""

    @property
    def fits(self) -> FitCache | None:
        """The fits that conversions of the same dense model share; None if they share none."""

    def stream(self, needs: Needs) -> Iterable[dict[str, Statistics]]:
        """Statistics by block name, layer by layer; each layer is freed when the next is requested."""


@dataclasses.dataclass(frozen=True)
class ConversionState:
    """The state of a conversion between two passes.

    Attributes:
        dense: The dense model whose blocks are converted: the original, or the original without its pruned neurons.
        keep: Keep ratio of the grouped blocks of `dense`.
        chain: All passes.
        calibration: The text.
        statistics: Of the blocks of `dense`: a list of layers if a later pass needs them, else a stream that is read
            once.
        compact: The converted model, once there is one.
        original: The dense model before pruning, if neurons were pruned.
        kept: By layer, the hidden neurons of the original that are kept, ascending.
        removed: Number of pruned parameters of the grouped blocks.
        held: Whether a later pass needs the statistics.
        last: Whether this is the last pass, after which the dense weights are no longer needed.
        donate: Delete replaced dense weights once they are no longer needed.
        fits: Fits that are shared with other conversions.
        progress: Called with (stage, done, total).

    Example:
        >>> from ngc_jax import chain, factorise
        >>> passes = chain(factorise("svd"))
        >>> after = passes.apply(ConversionState(model, 0.6, passes, Calibration.of(model, None)))
        >>> len(after.compact.plan.groups)
        21
    """

    dense: LanguageModel
    keep: float
    chain: Chain
    calibration: Calibration
    statistics: Iterable[dict[str, Statistics]] = ()
    compact: LanguageModel | None = None
    original: LanguageModel | None = None
    kept: Mapping[int, np.ndarray] | None = None
    removed: int = 0
    held: bool = False
    last: bool = False
    donate: bool = False
    fits: FitCache | None = None
    progress: Progress | None = None

    def report(self, stage: str, done: int, total: int) -> None:
        """Report a stage's progress."""
        if self.progress is not None:
            self.progress(stage, done, total)
