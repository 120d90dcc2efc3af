"""From a number to an input of one kind and the command that reads it."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments.fuzz.gguf import mutate_gguf
from experiments.fuzz.mutate import dump, mutate_bytes, mutate_json, mutate_text
from experiments.fuzz.seeds import TOPOLOGIES

Make = Callable[[random.Random, Path, Path], list[str]]
EVALUATE = ["--max-tokens", "32", "--window", "16", "--batch-size", "1"]


@dataclass(frozen=True)
class Case:
    """An input.

    Attributes:
        kind: Which input was mutated.
        command: The command line that reads it; its output is called `out`.
    """

    kind: str
    command: list[str]


def make_case(number: int, seed: int, seeds: Path, place: Path) -> Case:
    """Write the input of a number into an empty directory; deterministic in the numbers."""
    rng = random.Random(f"{seed}-{number}")
    kind = _ORDER[number % len(_ORDER)]
    return Case(kind, KINDS[kind](rng, seeds, place))


def _model(seeds: Path, place: Path, name: str = "dense") -> Path:
    shutil.copytree(seeds / name, place / "model")
    return place / "model"


def _read(rng: random.Random, model: Path, seeds: Path) -> list[str]:
    """A command that reads a model."""
    out = str(model.parent / "out")
    return rng.choice(
        (
            ["info", str(model)],
            ["export", str(model), "--out", out],
            ["export", str(model), "--out", out],
        )
    )


def _json_file(*names: str, of: str = "dense") -> Make:
    def make(rng: random.Random, seeds: Path, place: Path) -> list[str]:
        model = _model(seeds, place, of)
        file = model / rng.choice(names)
        file.write_bytes(dump(rng, mutate_json(rng, json.loads(file.read_text(encoding="utf-8")))))
        return _read(rng, model, seeds)

    return make


def _tokenizer(rng: random.Random, seeds: Path, place: Path) -> list[str]:
    model = _model(seeds, place)
    file = model / rng.choice(("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"))
    file.write_bytes(dump(rng, mutate_json(rng, json.loads(file.read_text(encoding="utf-8")))))
    return ["evaluate", str(model), "--text", str(seeds / "text.txt"), *EVALUATE]


def _plan(rng: random.Random, seeds: Path, place: Path) -> list[str]:
    model = _model(seeds, place, "compact")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config["ngc"] = mutate_json(rng, config["ngc"])
    (model / "config.json").write_bytes(dump(rng, config))
    return _read(rng, model, seeds)


def _safetensors(rng: random.Random, seeds: Path, place: Path) -> list[str]:
    model = _model(seeds, place)
    file = model / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.4:
        file.write_bytes(mutate_bytes(rng, data, 8 + length))
    else:
        header = dump(rng, mutate_json(rng, json.loads(data[8 : 8 + length])))
        size = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**63, len(header) + 7))
        file.write_bytes(struct.pack("<Q", size) + header + data[8 + length :])
    return _read(rng, model, seeds)


def _index(rng: random.Random, seeds: Path, place: Path) -> list[str]:
    model = _model(seeds, place)
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    data = (model / "model-00001-of-00001.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    names = dict.fromkeys((n for n in header if n != "__metadata__"), "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_bytes(dump(rng, mutate_json(rng, {"weight_map": names})))
    return _read(rng, model, seeds)


def _gguf(rng: random.Random, seeds: Path, place: Path) -> list[str]:
    file = place / "model.gguf"
    data = (seeds / "model.gguf").read_bytes()
    if rng.random() < 0.4:
        file.write_bytes(mutate_bytes(rng, data, 9000, same_length=rng.random() < 0.7))
    else:
        file.write_bytes(mutate_gguf(rng, data))
    return _read(rng, file, seeds)


def _yaml(rng: random.Random, seeds: Path, place: Path) -> list[str]:
    options = {
        "export": {"model": str(seeds / "dense"), "out": str(place / "out"), "to": "hf", "overwrite": True},
        "info": {"model": str(seeds / "compact"), "all_groups": True, "json": str(place / "out.json")},
        "evaluate": {"model": str(seeds / "dense"), "text": str(seeds / "text.txt"), "window": 16, "max_tokens": 32},
    }
    command = rng.choice(list(options))
    text = yaml.safe_dump(mutate_json(rng, options[command]))
    text = mutate_text(rng, text) if rng.random() < 0.4 else text
    (place / "options.yaml").write_text(text, encoding="utf-8", errors="replace")
    return [command, "--config", str(place / "options.yaml")]


def _training(rng: random.Random, seeds: Path, place: Path) -> list[str]:
    """Options of `train` and `distil`; most of the mutations are in nested options."""
    source = {"name": str(seeds / "rows.jsonl"), "weight": 1.0, "column": "text", "streaming": False, "max_tokens": 400}
    source |= {"prompt_column": "prompt", "skip_tokens": 0, "joined": False, "seed": 0, "arguments": {}}
    nested = {
        "data_options": {
            "sources": [source, str(seeds / "text.txt")],
            "packing": rng.choice(("pack", "concatenate")),
            "long_documents": "cut",
            "mask_prompts": True,
            "prompts": rng.choice(("plain", "chat")),
            "separator": "\n",
            "end_token": True,
            "shuffle": True,
            "remainder": "drop",
            "window": 4,
            "prefetch": 0,
        },
        "optimizer_options": {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1, "eps": 1e-8},
        "learning_rate_scales": {"groups/.*": 0.5, "embed": 0},
        "architecture": {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    }
    options: dict[str, Any] = {
        "out": str(place / "out"),
        "optimizer": "adamw",
        "schedule": "cosine",
        "parallel": "jit",
        "steps": 1,
        "batch_size": 2,
        "sequence_length": 16,
        "warmup_steps": 0,
        "evaluation_tokens": 0,
        "save_every": 0,
        "seed": 0,
        "dtype": "float32",
        **nested,
    }
    command = rng.choice(("train", "distil"))
    if command == "train":
        options |= {"tokenizer": str(seeds / "dense"), "topology": "qkv-o-ug-d", "rank": 4}
    else:
        options |= {"model": str(seeds / "compact"), "teacher": str(seeds / "dense")}
        del options["architecture"]
    name = rng.choice([name for name in nested if name in options])
    options = mutate_json(rng, options) if rng.random() < 0.25 else {**options, name: mutate_json(rng, options[name])}
    (place / "options.yaml").write_text(yaml.safe_dump(options), encoding="utf-8", errors="replace")
    return [command, "--config", str(place / "options.yaml")]


def _conversion(rng: random.Random, seeds: Path, place: Path) -> list[str]:
    options: dict[str, Any] = {
        "model": str(seeds / "dense"),
        "out": str(place / "out"),
        "method": "svd",
        "topology": rng.choice(TOPOLOGIES),
        "keep": 0.7,
        "rank_multiple": 1,
        "gauge": True,
        "text": str(seeds / "text.txt"),
        "window": 16,
        "calibration_tokens": 64,
        "batch_size": 2,
        "seed": 0,
        "dtype": "float32",
    }
    mutated = mutate_json(rng, options)
    mutated = mutate_json(rng, mutated) if rng.random() < 0.2 and isinstance(mutated, dict) else mutated
    (place / "options.yaml").write_text(yaml.safe_dump(mutated), encoding="utf-8", errors="replace")
    return ["convert", "--config", str(place / "options.yaml")]


def _chat(rng: random.Random, seeds: Path, place: Path) -> list[str]:
    """A prompt, with a chat template or stop tokens."""
    model = _model(seeds, place)
    text = mutate_text(rng, rng.choice(("The capital of France is", "[/INST] hi <eos>"))).replace("\0", "")
    file = model / rng.choice(("tokenizer_config.json", "generation_config.json", "chat_template.jinja"))
    if file.suffix == ".jinja":
        template = "{% for m in messages %}<user>{{ m['content'] | trim }}{% endfor %}{% if x %}{% endif %}"
        file.write_text(mutate_text(rng, template), encoding="utf-8", errors="replace")
    else:
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"eos_token_id": [298, 1]}
        file.write_bytes(dump(rng, mutate_json(rng, content)))
    return ["generate", str(model), "--chat", f"--prompt={text}", "--max-new-tokens", "2"]


def _topology(rng: random.Random, seeds: Path, place: Path) -> list[str]:
    text = mutate_text(rng, rng.choice(TOPOLOGIES)).replace("\0", "")
    return ["plan-memory", str(seeds / "dense"), f"--topology={text}", "--keep", "0.5"]


def _text(rng: random.Random, seeds: Path, place: Path) -> list[str]:
    file = place / "text.txt"
    file.write_bytes(mutate_bytes(rng, (seeds / "text.txt").read_bytes()))
    return ["evaluate", str(seeds / "dense"), "--text", str(file), *EVALUATE]


def _rows(rng: random.Random, seeds: Path, place: Path) -> list[str]:
    lines = (seeds / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    if rng.random() < 0.5:
        place_of = rng.randrange(len(lines))
        lines[place_of] = json.dumps(mutate_json(rng, json.loads(lines[place_of])))
    data = "\n".join(lines).encode()
    (place / "rows.jsonl").write_bytes(mutate_bytes(rng, data) if rng.random() < 0.5 else data)
    return ["rows", str(place / "rows.jsonl"), rng.choice(("text", "prompt", "none")), str(seeds / "dense")]


KINDS: dict[str, Make] = {
    "config.json": _json_file("config.json"),
    "plan": _plan,
    "tokenizer files": _tokenizer,
    "safetensors header": _safetensors,
    "safetensors index": _index,
    "GGUF header": _gguf,
    "YAML options": _yaml,
    "training options": _training,
    "conversion options": _conversion,
    "chat": _chat,
    "topology": _topology,
    "text": _text,
    "JSONL rows": _rows,
}
# A training run takes a hundred times as long as reading a file.
_ORDER = ([kind for kind in KINDS if kind != "training options"] * 4) + ["training options"]
