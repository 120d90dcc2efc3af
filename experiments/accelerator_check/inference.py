"""Figures of running models: the device, logits against the CPU's, speed and memory of generation."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.accelerator_check.random_models import gigabytes, memory, random_model, random_params, random_tokens
from experiments.accelerator_check.records import Values
from experiments.accelerator_check.sizes import SIZES, Size, grouped_plan, peaks, pruned_width, share_of_peak
from ngc_jax.conversion.fitting import assemble, fit_group
from ngc_jax.conversion.passes.factorise import factorise
from ngc_jax.conversion.state import Calibration
from ngc_jax.conversion.statistics import calibrate
from ngc_jax.groups.plan import Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.decoding import MAX_STEPS, NO_TOKEN, _read, begin, decode, prefill
from ngc_jax.models.generate import bucket
from ngc_jax.models.inference import for_inference
from ngc_jax.models.latent_cache import CacheKind
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.sampling import Sampling
from ngc_jax.planning.candidates import all_candidates, candidate_cells
from ngc_jax.planning.ranks import uniform_rank
from ngc_jax.types import Params

Wanted = Callable[[str], bool]
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy")


def device(wanted: Wanted) -> Iterator[tuple[str, Values]]:
    """The device and the versions."""
    first = jax.devices()[0]
    stats = first.memory_stats() or {}
    found = peaks(first.device_kind)
    yield (
        "device",
        {
            "kind": first.device_kind,
            "platform": first.platform,
            "devices": jax.device_count(),
            "memory (GB)": stats["bytes_limit"] / 1e9 if "bytes_limit" in stats else "unknown",
            "peak (TFLOP/s, bf16)": found[0] / 1e12 if found else "unknown",
            "peak (TB/s)": found[1] / 1e12 if found else "unknown",
            "host cores": os.cpu_count() or 0,
        },
    )
    yield "versions", {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in _PACKAGES}}


@partial(jax.jit, static_argnames="decoder")
def _logits(params: Params, tokens: jax.Array, *, decoder: Decoder) -> jax.Array:
    return decoder.apply({"params": params}, tokens)[0]


def tiny_models() -> dict[str, LanguageModel]:
    """A tiny random dense model, and what the library's own fit makes of it, in float32; made on the CPU."""
    model = random_model(DecoderConfig.from_hf(SIZES["tiny"].generation), "float32")
    tokens = random_tokens(192, model.config.vocab_size)
    measured: dict[str, Any] = {}
    for _, layer in calibrate(model, Calibration(tokens, window=32)):
        measured |= layer
    method = factorise("ngc_inputs", topology="ug", gauge=True)  # one group: fitted without a pool of threads
    groups = all_candidates(candidate_cells(model.config, method.topology))
    ranks = {group.name: uniform_rank(group.members, 0.6, gauge=True) for group in groups}
    fitted = {
        group.name: fit_group(
            group, method, model.params, [measured[member.name] for member in group.members], ranks[group.name]
        )
        for group in groups
    }
    return {"dense": model, "converted": assemble(model, groups, ranks, fitted.__getitem__, gauge=True)}


def logits(wanted: Wanted) -> Iterator[tuple[str, Values]]:
    """Logits of tiny models on the device against those of the same program on the CPU."""
    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    with jax.default_device(cpu):
        models = tiny_models()
    tokens = random_tokens((3, 40), models["dense"].config.vocab_size, seed=1)

    def run(model: LanguageModel, dtype: Any, where: jax.Device) -> np.ndarray:
        params = jax.device_put(jax.tree.map(lambda leaf: leaf.astype(dtype), model.params), where)
        decoder = Decoder(model.config, model.plan, jnp.dtype(dtype))
        return np.asarray(_logits(params, jax.device_put(tokens, where), decoder=decoder))

    for name, model in models.items():
        for dtype, precision in (("float32", None), ("float32", "highest"), ("bfloat16", None)):
            with jax.default_matmul_precision(precision):
                theirs, ours = run(model, dtype, cpu), run(model, dtype, here)
            difference = np.abs(theirs - ours).max()
            row = f"{name}, {dtype}" + (f", {precision} precision" if precision else "")
            yield row, {"max difference": float(difference), "max logit": float(np.abs(theirs).max())}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A model whose generation is measured.

    Attributes:
        config: The architecture; with fewer hidden neurons if pruned.
        plan: Its groups.
        int8: Whether matrices are stored as 8-bit codes.
        joined: Whether it runs in the run-time layout; see `ngc_jax.models.inference`.
    """

    config: DecoderConfig
    plan: Plan | None = None
    int8: bool = False
    joined: bool = False

    def make(self) -> tuple[Decoder, Params]:
        """The decoder, whose cache is what generation chooses, and random parameters."""
        # The run-time layout has no latent cache.
        cache: CacheKind = "full" if self.joined else "auto"
        decoder = Decoder(self.config, self.plan, jnp.dtype("bfloat16"), cache=cache)
        params = random_params(decoder, int8=self.int8)
        return for_inference(decoder, params) if self.joined else (decoder, params)

    def keep_ratio(self, size: Size) -> float:
        """Parameters of the blocks over those of the dense model's."""
        dense = sum(block.parameters for block in DecoderConfig.from_hf(size.generation).blocks())
        own = self.plan.count_parameters() if self.plan else sum(block.parameters for block in self.config.blocks())
        return own / dense


def variants(size: Size) -> dict[str, Callable[[], Variant]]:
    """What is compared: the dense model, the grouped and the pruned one at each keep ratio; int8, other layouts."""
    config = DecoderConfig.from_hf(size.generation)

    def grouped(keep: float, gauge: bool) -> Variant:
        return Variant(config, grouped_plan(config, keep, size.multiple, gauge=gauge))

    def pruned(keep: float) -> Variant:
        width = pruned_width(config, keep, size.multiple)
        return Variant(DecoderConfig.from_hf({**size.generation, "intermediate_size": width}))

    found: dict[str, Callable[[], Variant]] = {"dense": lambda: Variant(config)}
    for keep in size.keeps:
        found[f"grouped {keep}"] = partial(grouped, keep, True)
        found[f"pruned {keep}"] = partial(pruned, keep)
    found["int8"] = lambda: Variant(config, int8=True)
    found["grouped 0.6, run-time layout"] = lambda: dataclasses.replace(grouped(0.6, True), joined=True)
    found["dense, run-time layout"] = lambda: Variant(config, joined=True)
    found["grouped 0.6, int8"] = lambda: dataclasses.replace(grouped(0.6, True), int8=True)
    # Without pivots: no activation is gathered.
    found["grouped 0.6, free gauge"] = partial(grouped, 0.6, False)
    return {name: make for name, make in found.items() if name in (size.variants or found)}


def generation(size: Size, variant: Callable[[], Variant], wanted: Wanted) -> Iterator[tuple[str, Values]]:
    """Seconds to make a model's weights; prefill and decoding by the library's own programs, at each batch size."""
    rows = {batch: f"batch {batch}" for batch in size.batches}
    if not any(map(wanted, rows.values())):
        return
    chosen = variant()
    began = time.perf_counter()
    decoder, params = jax.block_until_ready(chosen.make())
    made = time.perf_counter() - began
    weights = gigabytes(params)
    if wanted("weights"):
        yield "weights", {"keep ratio": chosen.keep_ratio(size), "weights (GB)": weights, "initialise (s)": made}
    runs = {batch: _Run(decoder, params, batch, size) for batch, row in rows.items() if wanted(row)}
    # At the same time: a large model's programs take much longer to compile than to run.
    with ThreadPoolExecutor(len(runs)) as pool:
        compiled = dict(zip(runs, pool.map(_Run.compile, runs.values()), strict=True))
    for batch in list(runs):
        prefill_s, step_s, cache = runs.pop(batch).measure()
        yield (
            rows[batch],
            {
                "prefill (tokens/s)": batch * size.prompt / prefill_s,
                "decode (tokens/s)": batch / step_s,
                "decode (ms/step)": 1000 * step_s,
                "weights read, of peak": share_of_peak(1e9 * weights / step_s, bandwidth=True),
                "cache (GB)": cache,
                **memory(),
                "compile (s)": compiled[batch],
            },
        )


class _Run:
    """Generation at one batch size."""

    def __init__(self, decoder: Decoder, params: Params, batch: int, size: Size) -> None:
        self.decoder, self.params, self.batch, self.chunks = decoder, params, batch, size.chunks
        self.tokens = jnp.asarray(random_tokens((batch, size.prompt), decoder.config.vocab_size))
        self.lengths = jnp.full(batch, size.prompt, jnp.int32)
        self.capacity = bucket(size.prompt + 1 + MAX_STEPS * (size.chunks + 1))
        self.stops = jnp.full(8, NO_TOKEN, jnp.int32)
        self.sampling = Sampling().arrays
        self.keys = jax.random.split(jax.random.key(0), batch)

    def compile(self) -> float:
        """Compile both programs; returns the seconds. Later calls with the same shapes do not compile again."""
        began = time.perf_counter()
        shape = jax.eval_shape(self._begin, self.params)[1]
        _read.lower(self.decoder, self.params, self.tokens, self.lengths).compile()
        decode.lower(self.decoder, self.params, shape, MAX_STEPS, self.stops, sampling=self.sampling).compile()
        return time.perf_counter() - began

    def _begin(self, params: Params) -> Any:
        remaining = jnp.full(self.batch, 10_000, jnp.int32)
        return begin(
            self.decoder,
            params,
            self.tokens,
            self.lengths,
            remaining,
            self.keys,
            self.stops,
            capacity=self.capacity,
            sampling=self.sampling,
        )

    def measure(self) -> tuple[float, float, float]:
        """Seconds of a prefill, seconds of a decoding step, and gigabytes of the cache."""
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            jax.block_until_ready(prefill(self.decoder, self.params, self.tokens, self.lengths, self.capacity))
            seconds.append(time.perf_counter() - began)
        _, state = self._begin(self.params)
        cache = gigabytes(state.cache)
        steps = []
        for _ in range(self.chunks + 1):
            began = time.perf_counter()
            made, state = decode(self.decoder, self.params, state, MAX_STEPS, self.stops, sampling=self.sampling)
            made.block_until_ready()
            steps.append((time.perf_counter() - began) / MAX_STEPS)
        return statistics.median(seconds[1:]), statistics.median(steps[1:]), cache
