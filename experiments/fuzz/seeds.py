"""Tiny valid inputs that the fuzzer mutates: models, a tokenizer, a GGUF file, texts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from ngc_jax.conversion import Recipe
from ngc_jax.conversion.pipeline import convert
from ngc_jax.exporting import export_gguf
from ngc_jax.models.save import save_model
from ngc_jax.models.sources import open_source
from ngc_jax.models.tokenizer import Tokenizer, wrap
from ngc_jax.training.fresh import fresh_model

TEXT = "Groups of neurons exchange signals; a weight is what two states make of each other, 12345 times.\n"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 297,
    "eos_token_id": 298,
}
TOPOLOGIES = (
    "q-k-v-o-u-g-d",
    "qkv-o-ug-d",
    "qkk-qvv",
    "0:1=kk-qv; 1:2=qq-kk-vv",
    "hybrid3-ug-d",
    "qq-kk-vv-o-uu-gg-dd",
)


def make_seeds(directory: Path) -> None:
    """Write `dense`, `sharded`, `compact`, `model.gguf`, `text.txt` and `rows.jsonl` into a directory."""
    model = fresh_model(CONFIG, tokenizer, jax.random.key(0), name="seed")
    save_model(model, directory / "dense")
    recipe = Recipe("svd", keep=0.6, topology="qkv-o-ug-d", gauge=True)
    compact = convert(model, recipe, np.zeros(0, np.int32))
    save_model(dataclasses.replace(compact, conversion={"method": "svd", "source": "seed"}), directory / "compact")
    with open_source(str(directory / "dense")) as source:
        export_gguf(source, directory / "model.gguf", type="f32")
    (directory / "text.txt").write_text(TEXT * 20, encoding="utf-8")
    rows = "".join(json.dumps({"text": TEXT, "prompt": f"line {number}"}) + "\n" for number in range(20))
    (directory / "rows.jsonl").write_text(rows, encoding="utf-8")


def tokenizer() -> Tokenizer:
    """Byte-level BPE of 300 tokens, the last three special."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=297, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT * 3], trainer)
    backend.add_special_tokens(["<bos>", "<eos>", "<user>"])
    template = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return wrap(backend, special_tokens=special, chat_template=template, add_bos=True)
