"""The run-time layout of a model: the same function, with weights arranged for fast inference.

Training, conversion and export need one array per block and group. Running a model does not: `for_inference` joins all
products that read one input into one (see `sites`), folds groups whose factors take longer than their weights, and
multiplies what depends on parameters alone (metrics, lifted features) once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ngc_jax.groups.gauge import other_neurons
from ngc_jax.groups.kernels import encoder, output_features, weights
from ngc_jax.groups.plan import Plan
from ngc_jax.models.config import block_name
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.sites import SITES, Site, site_of
from ngc_jax.types import Params


def for_inference(decoder: Decoder, params: Params) -> tuple[Decoder, Params]:
    """Arrange a decoder's weights for inference.

    The result computes the same logits, up to rounding, from any tokens, positions and cache. It cannot be trained,
    saved or exported, and its blocks cannot be perturbed.

    Args:
        decoder: Dense or compact.
        params: Its parameters; what needs no change is shared with the result, not copied.

    Returns:
        The decoder in the run-time layout and its parameters.

    Example:
        >>> decoder, params = for_inference(model.decoder, model.params)  # doctest: +SKIP
    """
    if decoder.joined:
        return decoder, params
    plan = decoder.plan or Plan()
    layers = {}
    for layer in range(decoder.config.num_layers):
        own = dict(params["layers"][str(layer)])
        for part, sites in SITES.items():
            blocks = dict(own.get(part, {}))  # nothing is left of a part whose blocks are all in groups
            joined = {}
            for roles in sites:
                site = site_of(decoder.config, plan, layer, roles)
                joined[roles] = _site_params(
                    site, decoder, params, layer, {role: blocks.pop(role, {}) for role in roles}
                )
            own[part] = blocks | joined
        layers[str(layer)] = own
    rest = {name: part for name, part in params.items() if name not in ("layers", "groups")}
    if "unembed" in rest:
        rest["unembed"] = {"kernel": rest["unembed"]["kernel"]}
    return dataclasses.replace(decoder, joined=True), {**rest, "layers": layers}


def inference_model(model: LanguageModel) -> LanguageModel:
    """A loaded model in the run-time layout, for generation and evaluation; see `for_inference`."""
    decoder, params = for_inference(model.decoder, model.params)
    return dataclasses.replace(model, params=params, joined=decoder.joined)


def _site_params(site: Site, decoder: Decoder, params: Params, layer: int, blocks: dict[str, Any]) -> dict[str, Array]:
    """The parameters of a `JoinedProjection`."""
    plan, dtype = decoder.plan or Plan(), decoder.compute_dtype
    group_of = {role: plan.group_of.get(block_name(layer, role)) for role in site.roles}

    def weight(role: str) -> Array:
        """(I, J) of a block that is multiplied directly."""
        group = group_of[role]
        if group is None:
            return blocks[role]["kernel"].T
        states = params["groups"][group.name]
        return weights(group.kernel, states, block_name(layer, role), site.d_in, pivots=group.pivots).T

    joined, found = [weight(role) for role in site.dense], {}
    for reading in site.readings:
        group = group_of[reading.roles[0]]
        assert group is not None
        states = params["groups"][group.name]
        if reading.pivots is None:
            joined.append(encoder(group.kernel, states, site.d_in, pivots=group.pivots))
        else:
            found[f"rest_{reading.roles}"] = states["input_states"][: len(other_neurons(reading.pivots, site.d_in))]
        names = [block_name(layer, role) for role in reading.roles]
        members = [output_features(group.kernel, states, name) for name in names]
        found[f"read_{reading.roles}"] = jnp.concatenate(members).T
    if joined:
        found["kernel"] = jnp.concatenate(joined, axis=1)
    if site.bias:
        found["bias"] = jnp.concatenate([blocks[role]["bias"] for role in site.roles])
    return jax.tree.map(lambda array: array.astype(dtype), found)
