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
import numpy as np
from jaxtyping import Array
from numpy.typing import NDArray

from ngc_jax.groups.gauge import free_gauge, other_neurons
from ngc_jax.groups.kernels import States, encoder, output_features
from ngc_jax.groups.plan import GroupPlan, Plan
from ngc_jax.groups.quantised import is_quantised
from ngc_jax.models.config import block_name, language_only
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.experts import form_of, stack_experts
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.sites import SITES, Site, site_of
from ngc_jax.types import Params


def for_inference(decoder: Decoder, params: Params) -> tuple[Decoder, Params]:
    """Arrange a decoder's weights for inference.

    The result computes the same logits, up to rounding, from any tokens, positions and cache. It cannot be trained,
    saved or exported, and its blocks cannot be perturbed. Attention whose cache keeps signals of groups stays as it
    is, and so does a quantised model.

    Args:
        decoder: Dense or compact.
        params: Its parameters; what needs no change is shared with the result, not copied.

    Returns:
        The decoder in the run-time layout and its parameters.

    Example:
        >>> decoder, params = for_inference(model.decoder, model.params)  # doctest: +SKIP
    """
    if decoder.joined or any(map(is_quantised, jax.tree.leaves(params, is_leaf=is_quantised))):
        return decoder, params
    plan, joined_decoder = decoder.plan or Plan(), dataclasses.replace(decoder, joined=True)
    parts = joined_decoder.joined_parts()
    layers = {}
    for layer in range(decoder.config.num_layers):
        own = dict(params["layers"][str(layer)])
        for part in parts[layer]:
            blocks = dict(own.get(part, {}))  # nothing, if all blocks have groups and no norm or bias
            joined = {}
            if part == "mlp" and decoder.config.is_sparse(layer):
                own[part] = _expert_params(decoder, plan, params, layer)
                continue
            for all_roles in SITES[part]:
                roles = "".join(role for role in all_roles if role in decoder.config.roles)
                site = site_of(decoder.config, plan, layer, roles)
                joined[roles] = _site_params(
                    site, decoder, params, layer, {role: blocks.pop(role, {}) for role in roles}
                )
            own[part] = blocks | joined
        layers[str(layer)] = own
    rest = {name: part for name, part in params.items() if name not in ("layers", "groups")}
    table = rest.pop("embed")["embedding"] if decoder.config.tied_embeddings else rest.pop("unembed")["kernel"]
    rest["unembed"] = {"kernel": _stored(np.asarray(table).T, decoder)}
    if kept := {group.name: params["groups"][group.name] for group in joined_decoder.separate_groups()}:
        rest["groups"] = kept
    return joined_decoder, {**rest, "layers": layers}


def inference_model(model: LanguageModel) -> LanguageModel:
    """A loaded model in the run-time layout, for generation and evaluation; see `for_inference`."""
    language_only(model.config, "the run-time layout")
    decoder, params = for_inference(model.decoder, model.params)
    drafter = model.drafter
    if drafter is not None:
        drafter = dataclasses.replace(drafter, model=inference_model(drafter.model))
    return dataclasses.replace(model, params=params, joined=decoder.joined, drafter=drafter)


def _site_params(site: Site, decoder: Decoder, params: Params, layer: int, blocks: dict[str, Any]) -> dict[str, Array]:
    """The parameters of a `JoinedProjection`."""
    plan = decoder.plan or Plan()
    group_of = {role: plan.group_of.get(block_name(layer, role)) for role in site.roles}

    def weight(role: str) -> NDArray:
        """(I, J) of a block that is multiplied directly."""
        group = group_of[role]
        if group is None:
            return np.asarray(blocks[role]["kernel"]).T
        states = params["groups"][group.name]
        return _encoder(group, states, site.d_in) @ _outputs(group, states, block_name(layer, role)).T

    joined, found = [weight(role) for role in site.dense], {}
    for reading in site.readings:
        group = group_of[reading.roles[0]]
        assert group is not None
        states = params["groups"][group.name]
        if reading.pivots is None:
            joined.append(_encoder(group, states, site.d_in))
        else:
            others = len(other_neurons(reading.pivots, site.d_in))
            found[f"rest_{reading.roles}"] = np.asarray(states["input_states"])[:others]
        members = [_outputs(group, states, block_name(layer, role)) for role in reading.roles]
        found[f"read_{reading.roles}"] = np.concatenate(members).T
    if joined:
        found["kernel"] = np.concatenate(joined, axis=1)
    if site.bias:
        found["bias"] = np.concatenate([np.asarray(blocks[role]["bias"]) for role in site.roles])
    return {name: _stored(array, decoder) for name, array in found.items()}


def _expert_params(decoder: Decoder, plan: Plan, params: Params, layer: int) -> dict[str, Any]:
    """The parameters of a layer's mixture of experts in the run-time layout."""
    config, mlp = decoder.config, params["layers"][str(layer)]["mlp"]
    assert config.experts is not None
    found: dict[str, Any] = {"router": {"kernel": _stored(np.asarray(mlp["router"]["kernel"]), decoder)}}
    encoded: set[tuple[str, bool]] = set()
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for role in config.mlp_roles:
            form = form_of(config, plan, layer, role)
            names = tuple(block_name(layer, role, expert) for expert in range(config.experts.count))
            d_in = config.block(layer, role, 0).d_in
            dense = mlp[role]["kernel"] if form.left_dense else None
            stacks = stack_experts(form, names, d_in, params.get("groups", {}), dense)
            group = form.groups[0]
            # A signal is encoded once for all roles that read it.
            if form.kind == "shared" and group is not None and (group.name, role == "d") not in encoded:
                encoded.add((group.name, role == "d"))
                stacks["signal"] = jnp.asarray(_encoder(group, params["groups"][group.name], d_in))
            found[role] = {name: _stored(np.asarray(array), decoder) for name, array in stacks.items()}
    return found


def _stored(array: NDArray, decoder: Decoder) -> Array:
    return jnp.asarray(np.ascontiguousarray(array), decoder.compute_dtype)


# On the host, since each shape would be compiled for the device: a converted model has hundreds of them.


def _encoder(group: GroupPlan, states: States, d_in: int) -> NDArray:
    """phi_in · M (I, S), in float32."""
    if group.kernel.name != "bilinear":
        return np.asarray(encoder(group.kernel, states, d_in))
    stored = np.asarray(states["input_states"]).astype(np.float32)
    return (stored if group.pivots is None else free_gauge(group.pivots, stored, group.d_in))[:d_in]


def _outputs(group: GroupPlan, states: States, block: str) -> NDArray:
    """phi_out (J, S) of a member, in float32."""
    return np.asarray(output_features(group.kernel, states, block)).astype(np.float32)
