"""Size, perplexity and speed of GGUF files in llama.cpp, through llama-cpp-python.

    python -m experiments.in_llama_cpp dense.gguf pruned.gguf --text wikitext2-valid.txt --out runs/llama-cpp

Perplexity is by the convention of `ngc-jax evaluate`: windows of 1,024 tokens, the first of each not scored. Files are
timed in turn: in each round every file reads a prompt and decodes after it once, its speed is divided by the first
file's, and the medians over the rounds are printed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special

from ngc_jax.files import write_json
from ngc_jax.text import read_text


def perplexity(model: Any, tokens: list[int], window: int) -> float:
    """The exponential of the mean cross-entropy of all tokens but the first of each window."""
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, window):
        some = tokens[start : start + window]
        model.reset()
        model.eval(some)
        logits = np.asarray(model.scores[: len(some) - 1], np.float64)
        right = logits[np.arange(len(some) - 1), some[1:]]
        total += float((scipy.special.logsumexp(logits, axis=1) - right).sum())
        count += len(some) - 1
    return math.exp(total / count)


def speeds(model: Any, tokens: list[int], prompt: int, steps: int) -> tuple[float, float]:
    """Tokens/s of reading a prompt, and of decoding after it."""
    model.reset()
    begun = time.perf_counter()
    model.eval(tokens[:prompt])
    read = time.perf_counter()
    for token in tokens[prompt : prompt + steps]:
        model.eval([token])
    return prompt / (read - begun), steps / (time.perf_counter() - read)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--text", default="pydoc:second-half")
    parser.add_argument("--skip", type=int, default=65_536, help="tokens of the text before those that are scored")
    parser.add_argument("--tokens", type=int, default=8_192, help="scored")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that is timed")
    parser.add_argument("--steps", type=int, default=64, help="tokens decoded after it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="directory for results.json")
    arguments = parser.parse_args()
    try:
        import llama_cpp
    except ModuleNotFoundError:
        raise SystemExit("llama-cpp-python is not installed; pip install llama-cpp-python") from None
    print(f"llama-cpp-python {llama_cpp.__version__}, {arguments.threads} threads")
    text = read_text(arguments.text)
    rows: list[dict[str, Any]] = []
    threads = {"n_threads": arguments.threads, "n_threads_batch": arguments.threads}
    for file in arguments.files:
        model = llama_cpp.Llama(file, n_ctx=arguments.window, logits_all=True, verbose=False, **threads)
        ids = model.tokenize(text.encode(), add_bos=False, special=False)
        tokens = ids[arguments.skip : arguments.skip + arguments.tokens]
        if len(tokens) < arguments.tokens:
            raise SystemExit(f"the text has {len(ids):,} tokens; expected {arguments.skip + arguments.tokens:,}")
        found = perplexity(model, tokens, arguments.window)
        model.close()
        rows.append({"file": file, "bytes": Path(file).stat().st_size, "perplexity": found})
    # Without the logits of the prompt, as a program that generates text reads it.
    models = [llama_cpp.Llama(file, n_ctx=arguments.window, verbose=False, **threads) for file in arguments.files]
    rounds = [
        [speeds(model, tokens, arguments.prompt, arguments.steps) for model in models]
        for _ in range(arguments.rounds + 1)
    ][1:]
    for number, row in enumerate(rows):
        for kind, name in enumerate(("prefill", "decode")):
            row[name] = statistics.median(one[number][kind] for one in rounds)
            row[f"{name}_ratio"] = statistics.median(one[number][kind] / one[0][kind] for one in rounds)
        print(
            f"{row['file']}: {row['bytes'] / 1e6:.1f} MB, perplexity {row['perplexity']:.3f}, decode "
            f"{row['decode']:.1f} tokens/s ({row['decode_ratio']:.2f}), prefill {row['prefill']:.1f} "
            f"({row['prefill_ratio']:.2f})"
        )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "results.json", {"arguments": str(arguments), "rows": rows})


if __name__ == "__main__":
    main()
