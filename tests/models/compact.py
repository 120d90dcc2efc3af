"""A tiny compact model with every kernel, and groups over roles, over layers and over unlike widths."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ngc_jax.groups.kernels import weights
from ngc_jax.groups.plan import GroupPlan, Kernel, Plan
from ngc_jax.models.config import DecoderConfig
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.load import LanguageModel
from ngc_jax.types import Params
from tests.tiny import HF_CONFIGS, tiny_tokenizer

# Name -> (members as layer and role, rank, kernel).
GROUPS = {
    "0-qkk": ((0, "q"), (0, "k"), (1, "k")),
    "0-vv": ((0, "v"), (1, "v")),
    "0-ug": ((0, "u"), (0, "g")),
    "1-qd": ((1, "q"), (1, "d")),
}
RANKS = {"0-qkk": 5, "0-vv": 3, "0-ug": 4, "1-qd": 6}
KERNELS = {
    "0-qkk": Kernel(),
    "0-vv": Kernel("riemannian", metric_rank=2),
    "0-ug": Kernel("lifted", lift=9, seed=3),
    "1-qd": Kernel("lifted", lift=11, seed=4, learned=True),
}


def compact_plan(config: DecoderConfig) -> Plan:
    """Four groups, one planned block that stays dense, and blocks that are not planned.

    Of experts: one group of all u and g of a layer in place of u and g; and in the last layer every expert's d, groups
    of unlike ranks, and u, of which the first stays dense.
    """
    if config.experts is not None:
        return _experts_plan(config)
    return Plan(
        groups=tuple(
            GroupPlan(
                name,
                tuple(config.block(*member) for member in members if member[1] in config.roles),
                RANKS[name],
                KERNELS[name],
            )
            for name, members in GROUPS.items()
        ),
        dense=(config.block(0, "o"),),
    )


def _experts_plan(config: DecoderConfig) -> Plan:
    assert config.experts is not None
    experts, last = range(config.experts.count), config.num_layers - 1
    shared = tuple(config.block(0, role, expert) for role in "ug" for expert in experts)
    own = [GroupPlan(f"{last}-d.{e}", (config.block(last, "d", e),), 2 + e % 3) for e in experts]
    own += [GroupPlan(f"{last}-u.{e}", (config.block(last, "u", e),), 3, Kernel("riemannian")) for e in experts if e]
    attention = tuple(
        GroupPlan(name, tuple(config.block(*member) for member in GROUPS[name]), RANKS[name], KERNELS[name])
        for name in ("0-qkk", "0-vv")
    )
    return Plan((*attention, GroupPlan("0-ug*", shared, 5), *own), dense=(config.block(0, "o"),))


def dense_model(architecture: str = "llama_untied", dtype: str = "float32", **changes: Any) -> LanguageModel:
    """A random dense model of two layers."""
    hf_config = {**HF_CONFIGS[architecture], "num_hidden_layers": 2, "intermediate_size": 36, **changes}
    config = DecoderConfig.from_hf(hf_config)
    params = random_params(Decoder(config, None, jnp.dtype(dtype)))
    return LanguageModel("tiny", config, None, params, hf_config, tiny_tokenizer)


def compact_model(architecture: str = "llama_untied", dtype: str = "float32", **changes: Any) -> LanguageModel:
    """A random compact model of two layers, with the groups of `compact_plan`."""
    model = dense_model(architecture, dtype, **changes)
    plan = compact_plan(model.config)
    params = random_params(Decoder(model.config, plan, jnp.dtype(dtype)))
    return dataclasses.replace(model, plan=plan, params=params)


def fixed_gauge_model(architecture: str = "llama_untied", dtype: str = "float32", **changes: Any) -> LanguageModel:
    """As `compact_model`, but bilinear groups in the fixed gauge, one of them of full rank, with nothing of its input.

    The embedding has 24 dimensions and the MLP 36: `1-qd` has pivots that its narrow member does not reach.
    """
    pivots = {"0-qkk": (0, 3, 8, 17, 23), "0-vv": (1, 2, 22), "0-ug": tuple(range(24)), "1-qd": (2, 9, 23, 24, 30, 35)}
    model = dense_model(architecture, dtype, **changes)
    groups = tuple(
        GroupPlan(group.name, group.members, len(pivots[group.name]), pivots=pivots[group.name])
        for group in compact_plan(model.config).groups
    )
    plan = Plan(groups, (model.config.block(0, "o"),))
    params = random_params(Decoder(model.config, plan, jnp.dtype(dtype)))
    return dataclasses.replace(model, plan=plan, params=params)


def random_params(decoder: Decoder, seed: int = 0) -> Params:
    """Parameters drawn by NumPy, which compiles nothing; no norm, bias or metric is trivial."""
    return jax.tree.map(jnp.array, _random_params(decoder, seed))


@functools.cache
def _random_params(decoder: Decoder, seed: int) -> Params:
    shapes = jax.eval_shape(decoder.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    centres = {"scale": 0.0 if decoder.config.unit_offset_norm else 1.0, "amplitude": 1.0, "gain": 1.0}

    def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        if len(shape) < 2:
            return (centres.get(path[-1], centres.get(path[-2])) or 0.0) + 0.3 * rng.standard_normal(shape)
        fan_in = max(shape[0], 1) if path[-1] == "input_states" else shape[-1]
        return fan_in**-0.5 * rng.standard_normal(shape)

    flat = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict(
        {path: draw(path, leaf.shape).astype(leaf.dtype) for path, leaf in flat.items()}
    )


def dense_equivalent(model: LanguageModel) -> LanguageModel:
    """The dense model whose grouped blocks are the weights that their groups make."""
    assert model.plan is not None
    params = jax.tree.map(lambda leaf: leaf, dict(model.params))
    states = params.pop("groups")
    of_experts: dict[tuple[str, str], list[Any]] = {}
    for block in model.config.blocks():
        _, layer, part, role, *expert = block.name.split(".")
        group = model.plan.group_of.get(block.name)
        kernel = None
        if group is not None:
            kernel = weights(group.kernel, states[group.name], block.name, block.d_in, pivots=group.pivots)
        if expert:
            of_experts.setdefault((layer, role), []).append(kernel)
        elif kernel is not None:
            params["layers"][layer][part].setdefault(role, {})["kernel"] = kernel
    for (layer, role), kernels in of_experts.items():
        stacked = params["layers"][layer]["mlp"].setdefault(role, {})
        own = iter(stacked.get("kernel", ()))
        stacked["kernel"] = jnp.stack([next(own) if kernel is None else kernel for kernel in kernels])
    return dataclasses.replace(model, plan=None, params=params)
