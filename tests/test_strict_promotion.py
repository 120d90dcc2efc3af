"""Everything that computes works where JAX promotes no types by itself (`jax_numpy_dtype_promotion="strict"`).

So no product or sum of a bfloat16 model is computed in another type by accident, and who sets strict promotion for a
program of their own can call ours.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ngc_jax.conversion import chain, convert, factorise, prune_neurons, quantise
from ngc_jax.evaluation.perplexity import measure_perplexity
from ngc_jax.groups.kernel_spec import Kernel
from ngc_jax.groups.kernels import forward as forward_group
from ngc_jax.groups.kernels import weights
from ngc_jax.groups.states import init_states
from ngc_jax.models.generate import generate
from ngc_jax.models.inference import inference_model
from ngc_jax.stability.depth import depth_stability
from ngc_jax.stability.sequence import sequence_stability
from ngc_jax.training.losses import Objective
from ngc_jax.training.step import Constants, Program, gradient_sums
from ngc_jax.training.trainable import split_params
from tests.tiny import forward, random_tokens, tiny_model, tiny_tokenizer

TOKENS = random_tokens(240)
GROUPED = chain(prune_neurons(0.8), factorise("ngc", allocation="loss", gauge=True))


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def converted(how, **options):
    return convert(tiny_model("qwen2"), how, TOKENS, window=60, batch_size=2, bos="never", **options)


@pytest.fixture(scope="module")
def models():
    with jax.numpy_dtype_promotion("strict"):
        return {
            "dense": tiny_model("gemma3"),
            "grouped": converted(GROUPED),
            "quantised": converted(chain(*GROUPED.passes, quantise(4, embedding_bits=4))),
        }


@pytest.mark.parametrize("name", ["dense", "grouped", "quantised"])
def test_models_run_generate_and_are_evaluated(models, name):
    """Stored in float32: in bfloat16 every use of a parameter must say its type."""
    model = dataclasses.replace(models[name], compute_dtype=jnp.dtype(jnp.bfloat16))
    assert forward(model.params, TOKENS[None, :20], decoder=model.decoder)[0].dtype == jnp.float32
    assert len(generate(inference_model(model), [TOKENS[:9].tolist()], max_new_tokens=3)[0]) == 3
    assert np.isfinite(
        measure_perplexity(model, TOKENS[:80], window=20, bos="never", tokenizer=tiny_tokenizer()).perplexity
    )


@pytest.mark.parametrize("name", ["dense", "grouped"])
def test_stability_along_depth_and_the_sequence(models, name):
    model = dataclasses.replace(models[name], compute_dtype=jnp.bfloat16)
    options = {"key": jax.random.key(0), "directions": 2}
    assert np.isfinite(depth_stability(model, TOKENS[None, :6], **options).metric).all()
    assert np.isfinite(sequence_stability(model, TOKENS[None, :8], memory=3, **options).metric).any()


@pytest.mark.parametrize("kernel", [Kernel("bilinear"), Kernel("riemannian", metric_rank=2), Kernel("lifted", lift=9)])
def test_groups_of_every_kernel_exchange_signals(kernel):
    states = init_states(jax.random.key(0), kernel, 3, 8, {"a": 5}, jnp.bfloat16)
    x = jnp.ones((4, 8), jnp.bfloat16)
    assert forward_group(kernel, states, "a", x).dtype == jnp.bfloat16
    assert weights(kernel, states, "a").shape == (5, 8)


def test_the_gradient_of_distillation(models):
    """optax's own update relies on promotion."""
    student = dataclasses.replace(models["grouped"], compute_dtype=jnp.bfloat16)
    teacher = tiny_model("qwen2")
    trained, frozen = split_params(student.params, "states")
    program = Program(student.decoder, Objective(0.5, 1.0, chunk=8), optax.sgd(0.1), teacher.decoder)
    row = np.arange(12, dtype=np.int32)[None]
    batch = {"tokens": TOKENS[:12][None], "positions": row, "starts": 0 * row, "weights": (row > 0).astype(np.float32)}
    constants = Constants(frozen, teacher.params)
    gradient, count, _ = jax.jit(lambda p: gradient_sums(program, p, constants, batch, jnp.int32(0)))(trained)
    assert float(count) == 11
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
