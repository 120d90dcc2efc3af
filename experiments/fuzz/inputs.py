"""From a number to an input of one kind and the command that reads it."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from experiments.fuzz.mutate import dump, mutate_bytes, mutate_json, mutate_text
from experiments.fuzz.seeds import TOPOLOGIES

Make = Callable[[random.Random, Path, Path], list[str]]
EVALUATE = ["--max-tokens", "32", "--window", "16", "--batch-size", "1"]


@dataclass(frozen=True)
class Case:
    """An input.

    Attributes:
        kind: What was mutated.
        command: The command line that reads it; what it may write is called `out`.
    """

    kind: str
    command: list[str]


def make_case(number: int, seed: int, seeds: Path, place: Path) -> Case:
    """Write the input of a number into an empty directory; the same for the same numbers."""
    rng = random.Random(f"{seed}-{number}")
    kind = list(KINDS)[number % len(KINDS)]
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
    file.write_bytes(mutate_bytes(rng, data, 9000, same_length=rng.random() < 0.7))
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
    "topology": _topology,
    "text": _text,
    "JSONL rows": _rows,
}
