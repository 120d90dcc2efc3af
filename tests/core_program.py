"""Load a Hugging Face directory, encode, chat, generate and measure stability with the core dependencies alone.

A program of its own: CI runs it in an environment that has nothing else; `tests/test_core.py` in this one, where other
packages cannot be imported either.
"""

import importlib
import json
import pkgutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CORE = ("flax", "jax", "jaxtyping", "jinja2", "numpy", "safetensors", "tokenizers")
# What else `pip install ngc-jax` brings, or an extra; the rest comes with the core itself.
OTHERS = ["accelerate", "chex", "datasets", "docstring_parser", "gguf", "grain", "huggingface_hub", "jsonargparse"]
OTHERS += ["matplotlib", "sentencepiece", "shtab", "tensorboardX", "threadpoolctl", "torch", "transformers"]
PACKAGES = ["ngc_jax.groups", "ngc_jax.models", "ngc_jax.stability"]
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "eos_token_id": 257,
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'note' %}{% continue %}{% endif %}<turn>{{ m.content }}\n"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<turn>{% endif %}"
)


class Refusing:
    """An entry of sys.meta_path through which some packages cannot be imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] in OTHERS:
            raise ModuleNotFoundError(f"no module named {name!r}: it is not of the core", name=name)


def write_model(directory: Path) -> None:
    """A tiny Llama with random numbers, as a hub repository has it."""
    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<turn>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    embed, mlp, heads, kv = 24, 40, 40, 20
    shapes = {"model.embed_tokens": (260, embed), "model.norm": (embed,)}
    for layer in ("model.layers.0", "model.layers.1"):
        shapes |= {f"{layer}.self_attn.{name}_proj": (n, embed) for name, n in (("q", heads), ("k", kv), ("v", kv))}
        shapes |= {f"{layer}.self_attn.o_proj": (embed, heads), f"{layer}.mlp.down_proj": (embed, mlp)}
        shapes |= {f"{layer}.mlp.{name}_proj": (mlp, embed) for name in ("gate", "up")}
        shapes |= {f"{layer}.{name}_layernorm": (embed,) for name in ("input", "post_attention")}
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.weight": rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5 for name, shape in shapes.items()
    }
    save_file(tensors, str(directory / "model.safetensors"))


def import_all(packages: Sequence[str]) -> int:
    """Import every module of some packages but those that read GGUF files; return their number."""
    count = 0
    for package in packages:
        module = importlib.import_module(package)
        for found in pkgutil.walk_packages(module.__path__, f"{package}."):
            if not found.name.startswith("ngc_jax.models.gguf"):
                importlib.import_module(found.name)
                count += 1
    return count


def main() -> None:
    """Everything that the core does."""
    sys.meta_path.insert(0, Refusing())
    assert import_all(PACKAGES) > 30
    import jax
    import numpy as np

    from ngc_jax import UsageError, depth_stability, generate, load_model, save_model

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_model(directory)
        model = load_model(str(directory))
        tokenizer = model.load_tokenizer()
        prompt = tokenizer.encode_prompt("Hi")
        assert prompt.tolist()[0] == 256
        assert tokenizer.decode(prompt, skip_special_tokens=True) == "Hi"
        messages = [{"role": "user", "content": "Hi"}, {"role": "note", "content": "no"}]
        tools = [{"name": "a<b"}]
        assert tokenizer.render_chat(messages, tools=tools) == '<s><turn>Hi\n[{"name": "a<b"}]<turn>'
        chat = tokenizer.apply_chat_template(messages)
        (expected,) = generate(model, [chat], max_new_tokens=5, stop_tokens=tokenizer.stop_tokens)
        save_model(model, str(directory / "again"))
        again = load_model(str(directory / "again"))
        np.testing.assert_array_equal(again.load_tokenizer().apply_chat_template(messages), chat)
        np.testing.assert_array_equal(generate(again, [chat], max_new_tokens=5)[0][: len(expected)], expected)
        found = depth_stability(model.decoder, model.params, chat[None], key=jax.random.key(0), directions=2)
        assert np.isfinite(found.metric).all()
        (directory / "model.gguf").write_bytes(b"GGUF")
        for missing, given in (("gguf", str(directory / "model.gguf")), ("huggingface_hub", "an/other")):
            message = ""
            try:
                load_model(given)
            except UsageError as error:
                message = str(error)
            assert f"needs the package {missing}" in message, message
        print(f"generated {expected.tolist()}, stability {float(found.metric.mean()):+.4f} per layer")
    loaded = {module.split(".")[0] for module in sys.modules}
    assert not loaded & set(OTHERS), loaded & set(OTHERS)


if __name__ == "__main__":
    print(*CORE) if sys.argv[1:] == ["--packages"] else main()
