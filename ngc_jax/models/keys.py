"""The key table between Hugging Face's tensor names and the decoder's parameters.

A parameter is named by its path in the tree joined with dots. A compact model's file has Hugging Face's names for all
parameters that it shares with the dense model, and `groups.<group>.…` for the states, exactly as in the tree.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from ngc_jax.errors import UsageError
from ngc_jax.groups.plan import Plan
from ngc_jax.models.config import DecoderConfig, block_name
from ngc_jax.models.families import OTHER_PARTS, Family, family_of
from ngc_jax.models.families.encoders import encoder_family
from ngc_jax.models.families.llama import LLAMA

# Tensors that a file may contain and a text decoder does not need; frequencies and masks are computed.
_IGNORED = re.compile(
    rf"rotary_emb\.inv_freq$|\.(attn|attention)\.(masked_)?bias$|^(model\.)?({'|'.join(OTHER_PARTS)})\."
)
# Parts that torch.compile, FSDP and activation checkpointing insert anywhere into names.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Other places of a multimodal model's head.
_HEADS = ("language_model.lm_head.weight", "model.language_model.lm_head.weight")


def hf_name(parameter: str, config: DecoderConfig) -> str:
    """Hugging Face's name of a parameter, for example `layers.3.attn.q.kernel`.

    Raises:
        KeyError: If the decoder has no such parameter.
    """
    if parameter.startswith("groups."):
        return parameter
    if not config.causal:
        return encoder_family(config.architecture).hf_name(parameter)
    return family_of(config.architecture).hf_name(parameter)


def matrices_of_experts(
    parameters: Iterable[str], config: DecoderConfig, plan: Plan | None
) -> dict[str, tuple[str, ...]]:
    """The stacked matrices of experts among parameters, and the names of the parts, in their order.

    Args:
        parameters: By path, such as `layers.3.mlp.u.kernel`.
        config: The decoder.
        plan: Its groups; a matrix whose expert has a group is not among the parts. None for the dense model.
    """
    grouped = {} if plan is None else plan.group_of
    known = set(parameters)
    found: dict[str, tuple[str, ...]] = {}
    for layer in range(config.num_layers if config.experts is not None else 0):
        for role in config.mlp_roles if config.is_sparse(layer) else "":
            assert config.experts is not None
            blocks = [block_name(layer, role, expert) for expert in range(config.experts.count)]
            if (stacked := f"{block_name(layer, role)}.kernel") in known:
                found[stacked] = tuple(f"{block}.kernel" for block in blocks if block not in grouped)
    return found


def separate_experts(
    shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters with each expert's matrix by itself; `parts` from `matrices_of_experts`."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        found |= dict.fromkeys(parts[name], shape[1:]) if name in parts else {name: shape}
    return found


def match_tensors(
    parameters: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, tuple[int, ...]],
    config: DecoderConfig,
    source: str,
) -> dict[str, str]:
    """Find the tensor of every parameter: each parameter is filled once, each tensor used once, every shape checked.

    Args:
        parameters: Shape of every parameter, by path.
        tensors: Shape of every tensor in the source, by Hugging Face's name.
        config: The decoder.
        source: The source's name, for messages.

    Returns:
        The tensor's name for every parameter.

    Raises:
        UsageError: If tensors are missing, misshapen or left over; all are named.
    """
    canonical: dict[str, str] = {}
    twice = []
    for name, plain in plain_names(tensors, family_of(config.architecture)).items():
        if canonical.setdefault(plain, name) != name:
            twice.append(name)
    head, embedding = (hf_name(parameter, config) for parameter in ("unembed.kernel", "embed.embedding"))
    if config.tied_embeddings and embedding not in canonical and head in canonical:
        # Two names of the same tensor; programs differ in which they write.
        canonical[embedding] = canonical.pop(head)
    wanted = {hf_name(parameter, config): parameter for parameter in parameters}
    missing = [name for name in wanted if name not in canonical]
    misshapen = [
        f"{name} is {tuple(tensors[canonical[name]])}, expected {tuple(parameters[parameter])}"
        for name, parameter in wanted.items()
        if name in canonical and tuple(tensors[canonical[name]]) != tuple(parameters[parameter])
    ]
    # A tied model's file may repeat the embedding as lm_head.
    left_over = twice + [name for plain, name in canonical.items() if plain not in wanted and plain != head]
    problems = []
    if missing:
        problems.append(f"missing {some_names(with_guess(name, left_over) for name in missing)}")
    if misshapen:
        problems.append(f"misshapen {some_names(misshapen)}")
    if left_over:
        problems.append(f"left over {some_names(left_over)}")
    if problems:
        raise UsageError(
            f"the tensors of {source} do not fit its config.json: {'; '.join(problems)}. Download the whole model again"
        )
    return {parameter: canonical[name] for name, parameter in wanted.items()}


def is_ignored(name: str) -> bool:
    """Whether a text decoder does not need a tensor: a vision tower's, or a computed one."""
    return _IGNORED.search(_WRAPPERS.sub("", name)) is not None


def plain_names(tensors: Iterable[str], family: Family = LLAMA) -> dict[str, str]:
    """Every tensor's name as the plain causal language model has it; ignored ones are left out.

    A prefix before the decoder's names (peft, DataParallel, multimodal models and many others add one) is found as the
    prefix of the only token embedding. If there are several embeddings, no prefix is removed.

    Args:
        tensors: The names.
        family: Whose names they are.

    >>> plain_names(["base.model.embed_tokens.weight", "base.lm_head.weight"])["base.lm_head.weight"]
    'lm_head.weight'
    """
    bare = {name: unwrapped(name) for name in tensors if not is_ignored(name)}
    base, embedding = _split_base(family.hf_name("embed.embedding"))
    found = {name for name in bare.values() if name == embedding or name.endswith(f".{embedding}")}
    inner = found.pop().removesuffix(embedding) if len(found) == 1 else base
    outer = inner.removesuffix(base) if inner.endswith(f".{base}") or inner == base else inner
    return {name: _plain(rest, inner, outer, family) for name, rest in bare.items()}


def _split_base(name: str) -> tuple[str, str]:
    """A name's first part with its dot, such as `model.`, and the rest."""
    first, _, rest = name.partition(".")
    return f"{first}.", rest


def _plain(name: str, inner: str, outer: str, family: Family) -> str:
    """A name without the prefix of the decoder (inner) or of its head (outer)."""
    head, base = _split_base(family.hf_name("unembed.kernel"))[0], _split_base(family.layers)[0]
    if name in _HEADS:
        return family.hf_name("unembed.kernel")
    for prefix in (inner, outer):
        if prefix and name.startswith(prefix):
            name = name.removeprefix(prefix)
            return name if prefix == outer != inner or name.startswith(head) else f"{base}{name}"
    # Names in a decoder without a head.
    inside = (
        family.hf_name(part).removeprefix(base)
        for part in ("embed.embedding", "norm.scale", "position_embed.embedding")
    )
    bare = [_split_base(part)[0] for part in (*inside, f"{family.layers.removeprefix(base)}.")]
    return f"{base}{name}" if name.startswith(tuple(bare)) else name


def unwrapped(name: str) -> str:
    """A tensor's name without the parts that torch.compile, FSDP and activation checkpointing insert."""
    return _WRAPPERS.sub("", name)


def with_guess(name: str, candidates: Iterable[str]) -> str:
    """A missing name, with the nearest of some others for a message."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.8)
    return f"{name} (did it mean {close[0]}?)" if close else name


def some_names(names: Iterable[str], most: int = 8) -> str:
    """The first of some names, for a message."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
