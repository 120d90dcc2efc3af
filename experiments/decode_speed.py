"""Speed of converted models: tokens decoded and read per second, measured alternately with the dense model.

    python -m experiments.decode_speed smollm2-0.5 --dtype float32 --torch

Measures the dense model of the same architecture, the given converted models, and a dense model with narrower MLPs that
stores as many parameters as the first of them. Weights are random: speed does not depend on them. Every model runs in
its plain form and in the run-time layout. `--torch` adds transformers' PyTorch, dense and narrower, on as many threads.

Other load on the machine affects all rows equally: in each round every row is measured once, its speed is divided by
the first row's in that round, and the medians over the rounds are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.files import write_json
from ngc_jax.groups.plan import Block, Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.decoding import begin, decode, prefill
from ngc_jax.models.inference import for_inference
from ngc_jax.models.sampling import Sampling
from ngc_jax.models.saved_config import read_plan, split_config
from ngc_jax.models.sources import open_source
from ngc_jax.types import Params

PROMPT = 64
STEPS = 16
# Runs the measured work once, and returns after it is done.
Run = Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One model in one form."""

    name: str
    stored: int
    decoder: Decoder
    params: Params


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="converted models of one architecture")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8], help="sequences decoded together")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt that is read; 0 for none")
    parser.add_argument("--dtype", default="float32", help="of parameters and activations")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="take this number of layers, evenly spaced: compiles faster")
    parser.add_argument("--forms", nargs="+", default=["plain", "inference"], choices=["plain", "inference"])
    parser.add_argument("--torch", action="store_true", help="also transformers' PyTorch")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    versions = f"jax {jax.__version__}, {jax.device_count()} {jax.default_backend()} device(s), {os.cpu_count()} cores"
    print(f"{versions}, {arguments.dtype}, {arguments.rounds} rounds")
    rows, hf_config = make_rows(arguments.models, jnp.dtype(arguments.dtype), arguments.forms, arguments.layers)
    found: dict[str, Any] = {}
    for task, count in [*((f"decode, batch {b}", b) for b in arguments.batch), ("prefill", 0)]:
        if task == "prefill" and not arguments.prompt:
            continue
        tokens = count * STEPS if count else arguments.prompt
        runs = {row.name: decoding_run(row, count) if count else prefill_run(row, tokens) for row in rows}
        if arguments.torch:
            runs |= torch_runs(rows, hf_config, arguments.dtype, count, tokens)
        seconds = alternate(runs, arguments.rounds)
        found[task] = summarise(task, seconds, tokens)
        jax.clear_caches()
    if arguments.json:
        write_json(arguments.json, {"versions": versions, "arguments": str(arguments), "rows": found})


def make_rows(
    models: list[str], dtype: jnp.dtype, forms: list[str], layers: int | None = None
) -> tuple[list[Row], dict[str, Any]]:
    """All models in all forms, and the first one's config.json; the dense model comes first."""
    converted = [thinned(*read_model(model), layers) for model in models]
    hf_config, config, plan = converted[0]
    dense_hf = hf_config
    if plan.removed:
        removed_per_neuron = 3 * config.embed_dim * config.num_layers
        dense_hf = {**hf_config, "intermediate_size": config.mlp_dim + plan.removed // removed_per_neuron}
    dense = DecoderConfig.from_hf(dense_hf)
    stored = plan.count_parameters()
    total = sum(dense.block(layer, role).parameters for layer in range(dense.num_layers) for role in "qkvougd")
    neurons = dense.mlp_dim - round((total - stored) / (3 * dense.embed_dim * dense.num_layers))
    cases: list[tuple[str, DecoderConfig, Plan | None]] = [
        ("dense", dense, None),
        *((Path(name).name, *each[1:]) for name, each in zip(models, converted, strict=True)),
        (f"pruned to {neurons} neurons", dataclasses.replace(dense, mlp_dim=neurons), None),
    ]
    rows = []
    for name, config, its_plan in cases:
        decoder = Decoder(config, its_plan, dtype)
        params = random_params(decoder)
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        if "plain" in forms:
            rows.append(Row(f"{name}, plain", size, decoder, params))
        if "inference" in forms:
            rows.append(Row(f"{name}, inference", size, *for_inference(decoder, params)))
    return rows, dense_hf


def read_model(model: str) -> tuple[dict[str, Any], DecoderConfig, Plan]:
    """The config.json, the architecture and the plan of a converted model, without its weights."""
    with open_source(model) as source:
        hf_config, section = split_config(source.config, source.name)
        config = DecoderConfig.from_hf(hf_config)
        plan = read_plan(section, config, source.name)
    assert plan is not None, f"{model} is dense; expected a converted model"
    return dict(hf_config), config, plan


def thinned(
    hf_config: dict[str, Any], config: DecoderConfig, plan: Plan, layers: int | None
) -> tuple[dict[str, Any], DecoderConfig, Plan]:
    """A model of fewer layers, evenly spaced ones of the given; all if None."""
    if layers is None:
        return hf_config, config, plan
    step = config.num_layers / layers
    number_of = {int((new + 0.5) * step): new for new in range(layers)}

    def renamed(block: Block) -> Block | None:
        head, layer, *rest = block.name.split(".")
        new = number_of.get(int(layer))
        return None if new is None else dataclasses.replace(block, name=".".join([head, str(new), *rest]))

    groups = []
    for group in plan.groups:
        members = tuple(new for member in group.members if (new := renamed(member)) is not None)
        if members:
            groups.append(dataclasses.replace(group, members=members))
    dense = tuple(new for block in plan.dense if (new := renamed(block)) is not None)
    hf_config = {**hf_config, "num_hidden_layers": layers}
    removed = plan.removed * layers // config.num_layers
    return hf_config, DecoderConfig.from_hf(hf_config), Plan(tuple(groups), dense, removed)


def random_params(decoder: Decoder) -> Params:
    """Parameters of a decoder, without running its initialisers."""
    tree = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    numbers = np.random.default_rng(0).standard_normal(1 << 16).astype(np.float32) * 0.03
    return jax.tree.map(lambda leaf: jnp.asarray(np.resize(numbers, leaf.shape), leaf.dtype), tree)


def decoding_run(row: Row, batch: int) -> Run:
    """Decode `STEPS` more tokens of every sequence, greedily."""
    tokens = (np.arange(batch * PROMPT, dtype=np.int32) % row.decoder.config.vocab_size).reshape(batch, PROMPT)
    stops, greedy = jnp.full(8, -1, jnp.int32), Sampling().arrays
    lengths, remaining = jnp.full(batch, PROMPT, jnp.int32), jnp.full(batch, 1 << 20, jnp.int32)
    keys = jax.random.split(jax.random.key(0), batch)
    _, state = begin(
        row.decoder, row.params, tokens, lengths, remaining, keys, stops, capacity=4 * PROMPT, sampling=greedy
    )

    def run() -> None:
        nonlocal state
        emitted, state = decode(row.decoder, row.params, state, STEPS, stops, sampling=greedy)
        emitted.block_until_ready()

    return run


def prefill_run(row: Row, length: int) -> Run:
    """Read a prompt of `length` tokens."""
    tokens = (jnp.arange(length, dtype=jnp.int32) % row.decoder.config.vocab_size)[None]
    lengths = jnp.full(1, length, jnp.int32)

    def run() -> None:
        jax.block_until_ready(prefill(row.decoder, row.params, tokens, lengths, length + 64))

    return run


def torch_runs(rows: list[Row], hf_config: dict[str, Any], dtype: str, batch: int, length: int) -> dict[str, Run]:
    """The same work by transformers' PyTorch, for the dense models; decoding if `batch` is positive."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    sizes = dict.fromkeys(row.decoder.config.mlp_dim for row in rows if row.decoder.plan is None)
    runs: dict[str, Run] = {}
    for size in sizes:
        config = transformers.AutoConfig.for_model(**{**hf_config, "intermediate_size": size})
        model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()

        def run(model: Any = model, memory: list[Any] = []) -> None:  # noqa: B006
            with torch.inference_mode():
                if not batch:
                    model(torch.arange(length)[None] % config.vocab_size, use_cache=True, logits_to_keep=1)
                    return
                if not memory:
                    tokens = torch.arange(batch * PROMPT).reshape(batch, PROMPT) % config.vocab_size
                    out = model(tokens, use_cache=True, logits_to_keep=1)
                    memory[:] = [out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)]
                for _ in range(STEPS):
                    out = model(memory[1], past_key_values=memory[0], use_cache=True)
                    memory[:] = [out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)]

        runs[f"PyTorch, {size} neurons"] = run
    return runs


def alternate(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round, after one that is not counted."""
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            before = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - before)
    return seconds


def summarise(task: str, seconds: dict[str, list[float]], tokens: int) -> dict[str, dict[str, float]]:
    """Print and return the medians of each row's speeds and of its ratios to the first row's."""
    base = next(iter(seconds.values()))
    found = {}
    print(task)
    for name, its in seconds.items():
        ratios = [first / each for first, each in zip(base, its, strict=True)]
        speed = tokens / statistics.median(its)
        found[name] = {"tokens_per_second": speed, "ratio": statistics.median(ratios)}
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"  {name:40s} {speed:8.1f} tokens/s  {found[name]['ratio']:.2f} ({spread})", flush=True)
    return found


if __name__ == "__main__":
    main()
