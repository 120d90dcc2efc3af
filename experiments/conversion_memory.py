"""Peak host memory of converting a synthetic model of a billion parameters, streamed layer by layer.

    python experiments/conversion_memory.py [--layers 16] [--tokens 2048] [--json FILE]

The model has Llama's shape (width 2,048, MLP 8,192, 16 layers) and random weights, in float32. It is converted by `ngc`
with the diagonal of the output gradients' second moments and without a second round, which holds one layer's statistics
at a time; the dense model is donated. The bound is the dense model + the statistics of two layers + 1 GiB, and the peak
is that of the whole process, interpreter and libraries included. Linux only: peaks come from /proc. Takes about a
quarter of an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ngc_jax.commands.console import console, progress_bar
from ngc_jax.conversion import Recipe
from ngc_jax.conversion.pipeline import convert
from ngc_jax.host_memory import peak_bytes
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.layers import INPUT_SITE
from ngc_jax.models.load import LanguageModel

GIB = 2**30


def synthetic_model(layers: int, seed: int = 0) -> LanguageModel:
    """A random model of Llama's shape, made without a second copy of any tensor."""
    hf_config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    config = DecoderConfig.from_hf(hf_config)
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))["params"]
    generator = np.random.default_rng(seed)
    flat = {}
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        if path[-1] == "scale":
            array = np.ones(leaf.shape, np.float32)
        else:
            array = generator.standard_normal(leaf.shape, np.float32)
            array *= leaf.shape[-1] ** -0.5
        flat[path] = jax.device_put(array).block_until_ready()

    def no_tokenizer() -> Any:
        raise NotImplementedError("a synthetic model has no tokenizer")

    return LanguageModel("synthetic", config, None, traverse_util.unflatten_dict(flat), hf_config, no_tokenizer)


def main() -> None:
    """Convert, and compare the peak with the bound."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = synthetic_model(options.layers)
    dense = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    # In float64; the other statistics are vectors.
    widths = {site: model.config.block(0, role).d_in for role, site in INPUT_SITE.items()}
    two_layers = 2 * sum(8 * width**2 for width in widths.values())
    bound = dense + two_layers + GIB
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of making the model
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, options.tokens).astype(np.int32)
    started = time.perf_counter()
    with progress_bar() as bar:
        compact = convert(
            model,
            Recipe("ngc", keep=options.keep, gradients="diagonal", rounds=0, propagation=0),
            tokens,
            gradient_tokens=options.tokens // 2,
            window=512,
            batch_size=1,
            donate=True,
            bos="never",
            progress=lambda stage, done, total: bar(done, total, stage),
        )
    assert compact.plan is not None
    result = {
        "parameters": dense // 4,
        "dense_bytes": dense,
        "statistics_of_two_layers_bytes": two_layers,
        "bound_bytes": bound,
        "peak_bytes": peak_bytes(),
        "keep_ratio": compact.plan.keep_ratio(),
        "seconds": time.perf_counter() - started,
    }
    console.print(
        f"{result['parameters']:,} parameters: peak {result['peak_bytes'] / GIB:.2f} GiB, bound {bound / GIB:.2f} GiB "
        f"(dense {dense / GIB:.2f} + two layers {two_layers / GIB:.2f} + 1), {result['seconds']:.0f} s"
    )
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
