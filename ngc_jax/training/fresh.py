"""Models to train from scratch: dense, or of neuronal groups from the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from ngc_jax.errors import UsageError
from ngc_jax.groups.kernel_spec import Kernel
from ngc_jax.groups.plan import Block, GroupPlan, Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.tokenizer import Tokenizer
from ngc_jax.planning.candidates import all_candidates, candidate_cells
from ngc_jax.planning.ranks import fitting_rank, full_rank, uniform_rank

_BILINEAR = Kernel()


def uniform_plan(
    config: DecoderConfig,
    topology: str,
    *,
    keep: float | None = None,
    rank: int | None = None,
    kernel: Kernel = _BILINEAR,
    multiple: int = 1,
) -> Plan:
    """A plan that gives every group the same keep ratio, or the same rank.

    Args:
        config: The decoder.
        topology: In the topology language.
        keep: Stored over dense parameters of each group's blocks; this or `rank`.
        rank: Every group's rank, at most its full rank.
        kernel: Of every group. With a keep ratio the largest rank that fits is chosen by counting.
        multiple: Ranks are multiples of this, for the tiles of an accelerator.

    Raises:
        UsageError: If not exactly one of `keep` and `rank` is given, or a group is left without a rank.
    """
    if (keep is None) == (rank is None):
        raise UsageError("give either a keep ratio or a rank, not both")
    groups = all_candidates(candidate_cells(config, topology))
    plans = []
    for group in groups:
        if keep is None:
            assert rank is not None
            chosen = min(rank, full_rank(group.members))
        else:
            chosen = fitting_rank(group, keep * group.dense_parameters, kernel, uniform_rank(group.members, keep))
        chosen = chosen // multiple * multiple
        if chosen < 1:
            raise UsageError(f"group {group.name} is left without a rank of {multiple} or more; raise keep or rank")
        plans.append(GroupPlan(group.name, group.members, chosen, kernel))
    grouped = {member.name for group in groups for member in group.members}
    dense: tuple[Block, ...] = tuple(block for block in config.blocks() if block.name not in grouped)
    return Plan(tuple(plans), dense)


def fresh_model(
    hf_config: Mapping[str, Any],
    load_tokenizer: Callable[[], Tokenizer],
    key: Key[Array, ""],
    *,
    plan_of: Callable[[DecoderConfig], Plan | None] = lambda config: None,
    name: str = "fresh",
) -> LanguageModel:
    """A model with random parameters, in float32.

    Kernels and states are drawn so that signals keep their variance from layer to layer; see `groups.states`.

    Args:
        hf_config: As in a config.json.
        load_tokenizer: Returns its tokenizer.
        key: Randomness.
        plan_of: From the architecture to the plan; None for a dense model.
        name: The model's name.

    Raises:
        UsageError: If the architecture is not supported or the plan does not fit.
    """
    config = DecoderConfig.from_hf(dict(hf_config))
    plan = plan_of(config)
    decoder = Decoder(config, plan, jnp.dtype("float32"))
    params = jax.jit(decoder.init)(key, jnp.zeros((1, 2), jnp.int32))["params"]
    conversion = None if plan is None else {"method": "fresh"}
    return LanguageModel(name, config, plan, params, dict(hf_config), load_tokenizer, conversion)
