"""The key table between Hugging Face's tensor names and the decoder's parameters.

A parameter is named by its path in the tree joined with dots. A compact model's file has Hugging Face's names for all
that it shares with the dense model, and `groups.<group>.…` for the states, exactly as in the tree.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

from ngc_jax.errors import UsageError
from ngc_jax.models.config import DecoderConfig

_PROJECTIONS = {
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.u": "mlp.up_proj",
    "mlp.g": "mlp.gate_proj",
    "mlp.d": "mlp.down_proj",
}
_NORMS = {
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
}
_LLAMA_NORMS = {"mlp_norm": "post_attention_layernorm"}
_GEMMA_NORMS = {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
# Tensors that a file may hold and a text decoder does not need.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|^(model\.)?(vision_tower|multi_modal_projector)\.")
# What wrappers put before every name: torch.compile, peft, DataParallel.
_WRAPPERS = ("_orig_mod.", "base_model.model.", "module.")
_MULTIMODAL = ("language_model.", "model.language_model.")
# What a decoder without a head calls its own.
_BARE = ("layers.", "embed_tokens.", "norm.")


def hf_name(parameter: str, config: DecoderConfig) -> str:
    """Hugging Face's name of a parameter, for example `layers.3.attn.q.kernel`.

    Raises:
        KeyError: If the decoder has no such parameter.
    """
    top = {"embed.embedding": "model.embed_tokens.weight", "norm.scale": "model.norm.weight"}
    top["unembed.kernel"] = "lm_head.weight"
    if parameter in top:
        return top[parameter]
    if parameter.startswith("groups."):
        return parameter
    _, layer, rest = parameter.split(".", 2)
    module, leaf = rest.rsplit(".", 1)
    modules = _PROJECTIONS | _NORMS | (_GEMMA_NORMS if config.post_norms else _LLAMA_NORMS)
    return f"model.layers.{layer}.{modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def match_tensors(
    parameters: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, tuple[int, ...]],
    config: DecoderConfig,
    source: str,
) -> dict[str, str]:
    """Find the tensor of every parameter: each parameter filled once, each tensor used once, every shape checked.

    Args:
        parameters: Shape of every parameter, by path.
        tensors: Shape of every tensor in the source, by Hugging Face's name.
        config: The decoder.
        source: What the user called the source, for messages.

    Returns:
        The tensor's name for every parameter.

    Raises:
        UsageError: If tensors are missing, misshapen or left over; all are named.
    """
    canonical: dict[str, str] = {}
    twice = []
    for name in tensors:
        if not _IGNORED.search(name) and canonical.setdefault(_canonical(name), name) != name:
            twice.append(name)
    wanted = {hf_name(parameter, config): parameter for parameter in parameters}
    missing = [name for name in wanted if name not in canonical]
    misshapen = [
        f"{name} is {tuple(tensors[canonical[name]])}, expected {tuple(parameters[parameter])}"
        for name, parameter in wanted.items()
        if name in canonical and tuple(tensors[canonical[name]]) != tuple(parameters[parameter])
    ]
    # A tied model's file may repeat the embedding as lm_head.
    left_over = twice + [name for name in canonical if name not in wanted and name != "lm_head.weight"]
    problems = []
    if missing:
        problems.append(f"missing {_some(_with_guess(name, left_over) for name in missing)}")
    if misshapen:
        problems.append(f"misshapen {_some(misshapen)}")
    if left_over:
        problems.append(f"left over {_some(left_over)}")
    if problems:
        raise UsageError(
            f"the tensors of {source} do not fit its config.json: {'; '.join(problems)}. Get the whole model again"
        )
    return {parameter: canonical[name] for name, parameter in wanted.items()}


def _canonical(name: str) -> str:
    """A tensor's name as the plain causal language model has it."""
    for wrapper in _WRAPPERS:
        name = name.removeprefix(wrapper)
    for prefix in _MULTIMODAL:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            if not name.startswith(("model.", "lm_head.")):
                name = f"model.{name}"
    return f"model.{name}" if name.startswith(_BARE) else name


def _with_guess(name: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.8)
    return f"{name} (did it mean {close[0]}?)" if close else name


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
