"""Describe a model from its config and the headers of its tensors alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args

from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.encoder import Encoder
from ngc_jax.models.encoder_config import EncoderConfig
from ngc_jax.models.families.encoders import is_encoder
from ngc_jax.models.keys import hf_name, match_tensors
from ngc_jax.models.latent_cache import CacheKind, numbers_per_token
from ngc_jax.models.load import parameter_shapes
from ngc_jax.models.saved_config import conversion_of, read_plan, split_config
from ngc_jax.models.sources import Source
from ngc_jax.models.vision import encoder_shapes, match_encoder_tensors


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The result of `inspect_model`.

    Attributes:
        config: The architecture.
        plan: The groups; None for a dense model.
        conversion: How it was converted, if it was.
        shapes: Shape of every stored tensor that the model uses, each once, by Hugging Face's name of its parameter.
        bytes: Stored size of these tensors.
        unused_bytes: Stored size of all others: a second copy of a tied embedding, a vision tower.
    """

    config: DecoderConfig
    plan: Plan | None
    conversion: Mapping[str, Any] | None
    shapes: Mapping[str, tuple[int, ...]]
    bytes: int
    unused_bytes: int

    def stored_parameters(self) -> int:
        """Numbers stored for the planned blocks (all blocks of a dense model), counted from the tensors themselves."""
        blocks = self.config.blocks() if self.plan is None else tuple(self.plan.blocks())
        names = {hf_name(f"{block.name}.{leaf}", self.config) for block in blocks for leaf in ("kernel", "bias")}
        return sum(math.prod(s) for name, s in self.shapes.items() if name in names or name.startswith("groups."))

    def dense_parameters(self) -> int:
        """Parameters of the planned blocks when dense."""
        if self.plan is not None:
            return self.plan.dense_parameters()
        return sum(block.parameters for block in self.config.blocks())

    def summary(self) -> dict[str, Any]:
        """Counts as plain data."""
        stored, dense = self.stored_parameters(), self.dense_parameters()
        total = sum(math.prod(shape) for shape in self.shapes.values())
        return {
            "keep_ratio": stored / dense,
            "stored_parameters": stored,
            "dense_parameters": dense,
            "total_parameters": total,
            "bytes": self.bytes,
            "bits_per_parameter": 8 * self.bytes / total,
            "unused_bytes": self.unused_bytes,
            "groups": 0 if self.plan is None else len(self.plan.groups),
            "cache_numbers_per_token": {}
            if not self.config.causal
            else {kind: numbers_per_token(self.config, self.plan, kind) for kind in get_args(CacheKind)},
        }

    def group_rows(self) -> list[list[str]]:
        """A table row for every group."""
        assert self.plan is not None
        return [_row(group.name, [group]) for group in self.plan.groups]

    def kind_rows(self) -> list[list[str]]:
        """A table row for every kind of group: the same roles, hence the same shape except for the rank."""
        assert self.plan is not None
        kinds: dict[str, list[GroupPlan]] = {}
        for group in self.plan.groups:
            kinds.setdefault(group.name.split("-", 1)[-1].partition(".")[0], []).append(group)
        return [_row(f"{len(groups)} × {kind}", groups) for kind, groups in kinds.items()]


def _row(name: str, groups: list[GroupPlan]) -> list[str]:
    ranks = sorted({group.rank for group in groups})
    stored = sum(group.count_parameters() for group in groups)
    dense = sum(group.dense_parameters for group in groups)
    members = sum(len(group.members) for group in groups)
    rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
    return [name, str(members), rank, f"{stored:,}", f"{dense:,}", f"{stored / dense:.3f}"]


def inspect_model(source: Source) -> Inspection:
    """Describe an open source without reading a tensor.

    Raises:
        UsageError: If its config, its plan or the names and shapes of its tensors are invalid.
    """
    hf_config, section = split_config(source.config, source.name)
    if is_encoder(hf_config):
        return _inspect_encoder(source, hf_config, section)
    config = DecoderConfig.from_hf(hf_config)
    plan = read_plan(section, config, source.name)
    parameters = parameter_shapes(Decoder(config, plan))
    names = match_tensors(parameters, source.shapes, config, source.name)
    used = sum(source.sizes[name] for name in names.values())
    shapes = {hf_name(parameter, config): shape for parameter, shape in parameters.items()}
    return Inspection(config, plan, conversion_of(section), shapes, used, source.nbytes - used)


def _inspect_encoder(source: Source, hf_config: Mapping[str, Any], section: Mapping[str, Any] | None) -> Inspection:
    config = EncoderConfig.from_hf(hf_config)
    plan = read_plan(section, config, source.name)
    parameters = {".".join(path): shape for path, shape in encoder_shapes(Encoder(config, plan)).items()}
    names = match_encoder_tensors(parameters, source.shapes, config, source.name)
    used = sum(source.sizes[name] for name in names.values())
    shapes = {hf_name(parameter, config): shape for parameter, shape in parameters.items()}
    return Inspection(config, plan, conversion_of(section), shapes, used, source.nbytes - used)
