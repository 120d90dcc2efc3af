"""Figure of training: one distillation step of a student with its teacher, by the library's own step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.accelerator_check.random_models import memory, random_params, random_tokens
from experiments.accelerator_check.records import Values
from experiments.accelerator_check.sizes import Size, grouped_plan, share_of_peak
from ngc_jax.groups.plan import Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.layers import input_site
from ngc_jax.training.losses import Objective
from ngc_jax.training.optimizer import OptimizerConfig, make_optimizer
from ngc_jax.training.step import Constants, Program, init_state, jit_step
from ngc_jax.training.trainable import split_params


def flops_per_token(config: DecoderConfig, plan: Plan | None, length: int) -> float:
    """Floating-point operations per token of a forward pass: two for each multiply-add.

    Blocks, unembedding, and attention's two products with half of the keys (a token sees those before it).
    """
    multiply_adds = (plan or Plan(dense=config.blocks())).multiply_adds(input_site)
    multiply_adds += config.vocab_size * config.embed_dim
    multiply_adds += config.num_layers * length * config.num_heads * config.head_dim
    return 2.0 * multiply_adds


def training_step(size: Size, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Values]]:
    """Tokens per second, and model FLOP/s: three forward passes of the student and one of the teacher.

    What is computed again in the backward pass to save memory does not count as model FLOP.
    """
    config, dtype = DecoderConfig.from_hf(size.student), jnp.dtype("bfloat16")
    plan = grouped_plan(config, 0.6, size.multiple)
    student, teacher = Decoder(config, plan, dtype, remat=True), Decoder(config, None, dtype)
    objective = Objective(cross_entropy=0.0, divergence=1.0)
    program = Program(student, objective, make_optimizer(OptimizerConfig(learning_rate=1e-5)), teacher)
    trained, frozen = split_params(random_params(student, "float32"), "all")
    state = init_state(program, trained)
    del trained
    constants = Constants(frozen, random_params(teacher))
    shape = (size.rows, size.length)
    positions = np.broadcast_to(np.arange(size.length, dtype=np.int32), shape)
    batch = jax.device_put(
        {
            "tokens": random_tokens(shape, config.vocab_size),
            "positions": positions,
            "starts": np.zeros(shape, np.int32),
            "weights": (positions > 0).astype(np.float32),
        }
    )
    step, seconds = jit_step(program), []
    for _ in range(4):
        began = time.perf_counter()
        state, metrics = step(state, constants, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - began)
    each, tokens = statistics.median(seconds[1:]), size.rows * size.length
    flops = 3 * flops_per_token(config, plan, size.length) + flops_per_token(config, None, size.length)
    yield (
        f"{size.rows} x {size.length} tokens, student at keep {plan.keep_ratio():.2f}",
        {
            "tokens/s": tokens / each,
            "model TFLOP/s": flops * tokens / each / 1e12,
            "of peak": share_of_peak(flops * tokens / each),
            "seconds": each,
            "first step, with compilation (s)": seconds[0],
            "finite": float(metrics["finite"]),
            **memory(),
        },
    )
