"""Save a model as a directory: config.json, safetensors, tokenizer and a model card."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from ngc_jax.errors import UsageError
from ngc_jax.files import atomic_directory, os_errors
from ngc_jax.groups.quantised import is_quantised
from ngc_jax.models.card import model_card
from ngc_jax.models.families import family_of
from ngc_jax.models.fused import fused_names, own_tensor
from ngc_jax.models.keys import hf_name, matrices_of_experts
from ngc_jax.models.load import LanguageModel
from ngc_jax.models.quantised_tensors import describe_quantised, tensors_of
from ngc_jax.models.saved_config import is_plain, join_config
from ngc_jax.models.sources import Source

SHARD_BYTES = 5 * 10**9


def save_model(
    model: LanguageModel,
    directory: str | Path,
    *,
    overwrite: bool = False,
    conversion: Mapping[str, Any] | None = None,
    card: str | None = None,
) -> Path:
    """Write a model so that `load_model` reads it back bit for bit.

    Args:
        model: The model.
        directory: Where to write it, atomically.
        overwrite: Replace an existing model directory.
        conversion: How it was made, stored in our section of config.json; the model's own if None.
        card: Text of README.md; a short one is made if None.

    Returns:
        The directory.

    Raises:
        UsageError: If the model is in the run-time layout; see also `files.check_output`.

    Example:
        >>> save_model(compact, "compact").name
        'compact'
    """
    if model.joined:
        raise UsageError("the model is in the run-time layout; save the model that it was made from")
    directory = Path(directory).expanduser()
    if conversion is not None:
        model = dataclasses.replace(model, conversion=conversion)
    if not model.config.causal:
        from ngc_jax.models.vision import save_encoder

        return save_encoder(model, directory, overwrite=overwrite, card=card)
    with atomic_directory(directory, overwrite) as temporary, os_errors(directory):
        quantised = describe_quantised(model.params, model.config)
        hf_config = join_config(model.hf_config, model.config, model.plan, model.conversion, quantised)
        hf_config["torch_dtype"] = hf_config["dtype"] = str(np.dtype(model.param_dtype))
        _write_text(temporary / "config.json", _json(hf_config) + "\n")
        _save_tensors(model, temporary)
        model.load_tokenizer().save(temporary)
        _write_text(temporary / "README.md", card or model_card(model, directory.absolute().name))
    return directory


def storage_dtype(source: Source) -> str:
    """The type to store a conversion in: bfloat16 if the source has at most 16 bits for each number, else float32."""
    numbers = sum(math.prod(shape) for shape in source.shapes.values())
    return "bfloat16" if 8 * source.nbytes <= 16 * numbers else "float32"


def in_dtype(model: LanguageModel, dtype: str) -> LanguageModel:
    """A model with the parameters that are not quantised in another type.

    Raises:
        UsageError: If a number is too large for it.
    """

    def cast(path: Any, leaf: Any) -> Any:
        if is_quantised(leaf):
            return leaf
        made = leaf.astype(dtype)
        if dtype == "float16" and not bool(jnp.isfinite(made).all()):
            raise UsageError(f"{jax.tree_util.keystr(path)} has numbers too large for float16; store bfloat16")
        return made

    params = jax.tree_util.tree_map_with_path(cast, model.params, is_leaf=is_quantised)
    return dataclasses.replace(model, params=params)


def tensor_bytes(directory: Path) -> int:
    """Bytes on disk of a model directory's tensors."""
    return sum(file.stat().st_size for file in Path(directory).glob("*.safetensors"))


def _json(data: Mapping[str, Any]) -> str:
    """Indented JSON, but with lists of integers on one line each: a plan can have a hundred thousand pivots."""
    # No string is taken for a list: a string in JSON text contains no line breaks.
    text = json.dumps(data, indent=2)
    return re.sub(r"\[\n\s+(-?\d+(?:,\n\s+-?\d+)*)\n\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def _save_tensors(model: LanguageModel, directory: Path) -> None:
    shards: list[dict[str, jax.Array]] = [{}]
    size = total = 0
    by_path = {".".join(path): leaf for path, leaf in traverse_util.flatten_dict(model.params).items()}
    apart = matrices_of_experts(by_path, model.config, model.plan)
    leaves: dict[str, Any] = {}
    for path, leaf in by_path.items():
        of_experts = enumerate(apart.get(path, ()))
        own = {part: leaf[number] for number, part in of_experts} if path in apart else {path: leaf}
        leaves |= {hf_name(part, model.config): one for part, one in own.items()}
    plain = is_plain(model.config, model.plan, quantised=model.quantised)
    whole = fused_names(leaves, family_of(model.config.architecture)) if plain else {name: (name,) for name in leaves}
    for name, parts in whole.items():
        leaf = own_tensor([leaves[part] for part in parts], name, model.config) if plain else leaves[name]
        if shards[-1] and size + leaf.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1] |= tensors_of(name, leaf)
        size += leaf.nbytes
        total += leaf.nbytes
    if len(shards) == 1:
        _write_tensors(directory / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_tensors(directory / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_text(directory / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def _write_tensors(file: Path, tensors: Mapping[str, jax.Array]) -> None:
    # Only now are they copied from the device: the host holds one shard at a time.
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    save_file(arrays, file, metadata={"format": "pt"})


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
