"""What is measured at each size, and what the devices could do at best."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.models.config import ATTENTION_ROLES, DecoderConfig
from ngc_jax.planning.candidates import all_candidates, candidate_cells
from ngc_jax.planning.ranks import uniform_rank

TOPOLOGY = "q-k-v-o-u-g-d"
_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500_000.0}
_LLAMA_3_8B = {
    **_LLAMA,
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
_LLAMA_3_1B = {
    **_LLAMA,
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_TINY = {
    **_LLAMA,
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
}


@dataclasses.dataclass(frozen=True)
class Size:
    """The models and the amounts of data of a run.

    Attributes:
        generation: config.json of the model that generates.
        student: config.json of the student and its teacher.
        keeps: Keep ratios, in the order in which they are measured.
        multiple: Ranks and pruned widths are multiples of this.
        batches: Sequences at once, in the order in which they are measured.
        prompt: Tokens of a prompt.
        chunks: Timed chunks of `decoding.MAX_STEPS` decoded tokens.
        rows: Rows of a training step.
        length: Tokens of a row.
        tokens: Tokens that one layer is measured on, in windows of `window`.
        window: Tokens of a window.
        matrix: Width of the matrices of the linear algebra.
        variants: Which models generate; all if empty.
    """

    generation: Mapping[str, Any]
    student: Mapping[str, Any]
    keeps: tuple[float, ...]
    multiple: int
    batches: tuple[int, ...]
    prompt: int
    chunks: int
    rows: int
    length: int
    tokens: int
    window: int
    matrix: int
    variants: tuple[str, ...] = ()

    @property
    def layer(self) -> DecoderConfig:
        """One layer of the model that generates."""
        return DecoderConfig.from_hf({**self.generation, "num_hidden_layers": 1})


# One of each kind: a small run's time goes into compiling.
_FEW = ("dense", "grouped 0.6", "pruned 0.6", "grouped 0.6, int8", "grouped 0.6, run-time layout")
SIZES = {
    "8b": Size(_LLAMA_3_8B, _LLAMA_3_1B, (0.6, 0.8, 0.5), 128, (1, 64, 8), 512, 3, 8, 1024, 16_384, 1024, 4096),
    "tiny": Size(_TINY, _TINY, (0.6,), 8, (3,), 16, 1, 2, 32, 96, 32, 48, _FEW),
}

# Dense matrix products in bfloat16, in 10^12 operations per second, and memory bandwidth, in 10^12 bytes per second, by
# the vendors' data sheets. The first name that the device's kind contains counts.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250.0, 8.0),
    ("H200", 989.0, 4.8),
    ("H100 PCIe", 756.0, 2.0),
    ("H100 NVL", 835.0, 3.9),
    ("H100", 989.0, 3.35),
    ("A100-SXM4-40GB", 312.0, 1.555),
    ("A100", 312.0, 2.0),
    ("L40S", 362.0, 0.864),
    ("L4", 121.0, 0.3),
    ("TPU v6 lite", 918.0, 1.64),
    ("TPU v5 lite", 197.0, 0.82),
    ("TPU v5", 459.0, 2.765),
    ("TPU v4", 275.0, 1.2),
)


def peaks(kind: str) -> tuple[float, float] | None:
    """Operations per second in bfloat16 and bytes per second of a device kind; None if unknown."""
    for name, operations, bandwidth in _PEAKS:
        if name in kind:
            return operations * 1e12, bandwidth * 1e12
    return None


def share_of_peak(value: float, *, bandwidth: bool = False) -> float | str:
    """A rate, in operations or bytes per second, over the device's peak; "unknown" for a device not in the table."""
    found = peaks(jax.devices()[0].device_kind)
    return "unknown" if found is None else value / found[bandwidth]


def grouped_plan(config: DecoderConfig, keep: float, multiple: int, *, gauge: bool = True) -> Plan:
    """Private groups of the same keep ratio, ranks rounded down; in the fixed gauge pivots are spread evenly."""
    groups = []
    for group in all_candidates(candidate_cells(config, TOPOLOGY)):
        rank = max(uniform_rank(group.members, keep, gauge=gauge) // multiple, 1) * multiple
        pivots = tuple(round(i * (group.inputs - 1) / max(rank - 1, 1)) for i in range(rank)) if gauge else None
        groups.append(GroupPlan(group.name, group.members, rank, pivots=pivots))
    return Plan(tuple(groups))


def pruned_width(config: DecoderConfig, keep: float, multiple: int) -> int:
    """Hidden neurons at which a layer's blocks have `keep` of their parameters, rounded down."""
    total = sum(config.block(0, role).parameters for role in "qkvougd")
    attention = sum(config.block(0, role).parameters for role in ATTENTION_ROLES)
    return max(int((keep * total - attention) / (3 * config.embed_dim)) // multiple, 1) * multiple
