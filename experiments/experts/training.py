"""A small mixture of experts over bytes, trained from scratch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.types import Params

HF_CONFIG: Mapping[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
    "max_position_embeddings": 512,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
WINDOW, BATCH, LEARNING_RATE = 128, 16, 3e-3
# Of the sum over layers of E sum_e f_e p_e, with f_e the share of rows and p_e the mean routing weight of expert e
# (Switch Transformer, arXiv 2101.03961, eq. 4; here of the chosen experts' weights alone).
BALANCE = 0.01


def load_or_train(text: np.ndarray, directory: Path, steps: int, seed: int) -> tuple[LanguageModel, list[list[float]]]:
    """The model in a directory, trained now if there is none, and by layer the share of rows of every expert."""
    config, file = DecoderConfig.from_hf(HF_CONFIG), directory / "model.safetensors"
    decoder = Decoder(config)
    if file.exists():
        found = {tuple(name.split("/")): jnp.asarray(leaf) for name, leaf in load_file(file).items()}
        params = traverse_util.unflatten_dict(found)
    else:
        params = train(decoder, text, steps, seed)
        flat = {"/".join(path): np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params).items()}
        save_file(flat, file)
        (directory / "config.json").write_text(json.dumps(dict(HF_CONFIG), indent=2) + "\n")
    batch = text[: WINDOW * BATCH].reshape(BATCH, WINDOW)
    used = np.asarray(_loss(params, jnp.asarray(batch), decoder=decoder)[1][1])
    return LanguageModel("experts", config, None, params, HF_CONFIG, _no_tokenizer), used.round(3).tolist()


def train(decoder: Decoder, text: np.ndarray, steps: int, seed: int) -> Params:
    """Adam with warm-up and a cosine, on random windows."""
    params = decoder.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, max(steps // 20, 1), steps, LEARNING_RATE / 20)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
    state, generator = optimiser.init(params), np.random.default_rng(seed)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, batch: jax.Array) -> tuple[Params, Any, jax.Array]:
        (_, (loss, _)), gradients = jax.value_and_grad(partial(_loss, decoder=decoder), has_aux=True)(params, batch)
        updates, state = optimiser.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    for number in range(steps):
        starts = generator.integers(0, len(text) - WINDOW, BATCH)
        batch = np.stack([text[start : start + WINDOW] for start in starts])
        params, state, loss = step(params, state, jnp.asarray(batch))
        if (number + 1) % 50 == 0 or number == steps - 1:
            print(f"step {number + 1} of {steps}: {float(loss):.3f} nats per byte", flush=True)
    return params


@partial(jax.jit, static_argnames="decoder")
def _loss(params: Params, batch: jax.Array, *, decoder: Decoder) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Cross-entropy and balance; the cross-entropy alone, and by layer the share of rows of every expert."""
    (logits, _), sown = decoder.apply({"params": params}, batch, mutable=["block_inputs"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:]).mean()
    experts = decoder.config.experts
    assert experts is not None
    balance, shares = jnp.zeros(()), []
    for layer in sown["block_inputs"]["layers"].values():
        (rows,) = layer["mlp"]["rows"]
        share = jnp.bincount(rows.experts, length=experts.count) / len(rows.experts)
        weight = jnp.zeros(experts.count).at[rows.experts].add(rows.weights) / batch.size
        balance += experts.count * jnp.vdot(share, weight)
        shares.append(share)
    return loss + BALANCE * balance, (loss, jnp.stack(shares))


def _no_tokenizer() -> Tokenizer:
    raise UsageError("the model of this experiment reads bytes, and has no tokenizer")
