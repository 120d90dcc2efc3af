"""Image encoders as models: loaded, saved, and read tensor by tensor."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from ngc_jax.errors import UsageError
from ngc_jax.files import atomic_directory, os_errors, parse_json
from ngc_jax.models.card import encoder_card
from ngc_jax.models.encoder import Encoder
from ngc_jax.models.encoder_config import EncoderConfig
from ngc_jax.models.families.encoder_record import EncoderFamily
from ngc_jax.models.families.encoders import OTHER_TOWER, encoder_config_json, encoder_family
from ngc_jax.models.keys import hf_name, some_names, unwrapped, with_guess
from ngc_jax.models.load import LanguageModel, put_parameter
from ngc_jax.models.preprocessing import Preprocessor
from ngc_jax.models.saved_config import conversion_of, join_config, read_plan, split_config
from ngc_jax.models.sources import Source
from ngc_jax.types import Params

_PREPROCESSOR = "preprocessor_config.json"


@dataclasses.dataclass(frozen=True)
class VisionModel(LanguageModel):
    """A loaded image encoder: conversions take it as they take a language model.

    `config` is an `EncoderConfig` and `decoder` an `Encoder`. It has no tokenizer: whatever needs one refuses it.

    Attributes:
        preprocessor_config: The preprocessor_config.json it came with; empty for the defaults of its family.

    Example:
        >>> vision = load_model("google/vit-base-patch16-224")  # doctest: +SKIP
        >>> pixels = vision.preprocessor.load(["cat.png"])  # doctest: +SKIP
        >>> logits = vision.encoder.apply({"params": vision.params}, pixels)  # doctest: +SKIP
    """

    preprocessor_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def decoder(self) -> Encoder:  # type: ignore[override]
        """The module that runs it; `encoder` by the name that conversions use."""
        return Encoder(self.encoder_config, self.plan, self.param_dtype, dtype=self.compute_dtype)

    @property
    def encoder(self) -> Encoder:
        """The module that runs it."""
        return self.decoder

    @property
    def encoder_config(self) -> EncoderConfig:
        """The architecture."""
        assert isinstance(self.config, EncoderConfig)
        return self.config

    @property
    def preprocessor(self) -> Preprocessor:
        """What makes images of files its inputs.

        Raises:
            UsageError: If its preprocessor_config.json is invalid.
        """
        c = self.encoder_config
        return Preprocessor.from_hf(self.preprocessor_config, c.architecture, c.image_size, c.channels)

    @property
    def labels(self) -> list[str]:
        """The classes' names; their numbers where config.json names none."""
        if self.encoder_config.head != "classes":
            return []
        named = {str(number): str(name) for number, name in dict(self.hf_config.get("id2label") or {}).items()}
        return [named.get(str(number), str(number)) for number in range(self.config.vocab_size)]


def no_tokenizer(name: str) -> Callable[[], Any]:
    """In the place of a tokenizer's loader.

    Args:
        name: The model's.
    """

    def refuse() -> Any:
        raise UsageError(f"{name} is an image encoder, which reads no text; give a language model, or images")

    return refuse


def make_encoder(
    name: str, hf_config: Mapping[str, Any], params: Params | None = None, *, seed: int = 0
) -> VisionModel:
    """An image encoder from a config.json and parameters.

    Args:
        name: Its name.
        hf_config: The config.json.
        params: The parameters; random ones if None.
        seed: Of the random ones.

    Example:
        >>> hf = {"model_type": "vit", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> hf |= {"intermediate_size": 12, "image_size": 8, "patch_size": 4}
        >>> make_encoder("tiny", hf).count_parameters()
        1006
    """
    hf = own_config(encoder_config_json(hf_config))
    config = EncoderConfig.from_hf(hf)
    if params is None:
        pixels = jnp.zeros((1, config.channels, config.image_size, config.image_size))
        params = jax.jit(Encoder(config).init)(jax.random.key(seed), pixels)["params"]
    return VisionModel(name, config, None, params, hf, no_tokenizer(name))


def own_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the entries that a converted model's has to have.

    A mask token is not read, and the width of SigLIP's pooling MLP does not change where neurons are pruned.
    """
    found = dict(hf)
    if found.get("model_type") in ("dinov2", "dinov2_with_registers"):
        found["use_mask_token"] = False
    config = EncoderConfig.from_hf(found)
    if config.pooling == "attention":
        found["pool_intermediate_size"] = config.pool_dim
    return found


def load_encoder(
    source: Source,
    stored: jnp.dtype,
    computed: jnp.dtype | None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> VisionModel:
    """An image encoder from an open source; see `load.load_model`.

    Args:
        source: The source.
        stored: Type of the parameters.
        computed: Type of the computation; None for the parameters'.
        progress: Called with (tensors loaded, total).

    Raises:
        UsageError: If its config or its tensors are invalid.
    """
    hf_config, section = split_config(source.config, source.name)
    hf = own_config(encoder_config_json(hf_config))
    config = EncoderConfig.from_hf(hf)
    plan = read_plan(section, config, source.name)
    params = load_encoder_params(source, Encoder(config, plan, stored), progress=progress)
    preprocessor = _read_preprocessor(source)
    return VisionModel(
        source.name,
        config,
        plan,
        params,
        hf,
        no_tokenizer(source.name),
        conversion_of(section),
        source.license,
        computed,
        preprocessor_config=preprocessor,
    )


def _read_preprocessor(source: Source) -> dict[str, Any]:
    file = source.files[0].parent / _PREPROCESSOR
    if not file.is_file():
        return {}
    with os_errors(file):
        text = file.read_text(encoding="utf-8", errors="replace")
    try:
        found = parse_json(text)
    except ValueError as error:
        raise UsageError(f"{file}: is not JSON ({error}); download the model again") from None
    if not isinstance(found, dict):
        raise UsageError(f"{file}: is not a JSON object; download the model again")
    return found


def encoder_shapes(encoder: Encoder) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of every parameter by its path; nothing is computed."""
    c = encoder.config
    pixels = jax.ShapeDtypeStruct((1, c.channels, c.image_size, c.image_size), jnp.float32)
    tree = jax.eval_shape(encoder.init, jax.random.key(0), pixels)["params"]
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}


def load_encoder_params(
    source: Source, encoder: Encoder, *, progress: Callable[[int, int], None] | None = None
) -> Params:
    """The encoder's parameters, each read, cast and put on the device before the next is read.

    Raises:
        UsageError: If tensors are missing, misshapen, left over or unreadable.
    """
    family = encoder_family(encoder.config.architecture)
    by_path = encoder_shapes(encoder)
    names = match_encoder_tensors(
        {".".join(path): shape for path, shape in by_path.items()}, source.shapes, encoder.config, source.name
    )
    flat = {}
    for done, path in enumerate(by_path, start=1):
        name = names[".".join(path)]
        tensor = source.read(name)
        scale = names.get(_scale_key(path, family))
        if scale is not None:
            factors = np.asarray(source.read(scale), np.float32)
            tensor = np.asarray(tensor, np.float32) * factors.reshape(-1, *(1,) * (tensor.ndim - 1))
        flat[path] = put_parameter(tensor, encoder.param_dtype, f"tensor {name!r} of {source.name}")
        if progress is not None:
            progress(done, len(by_path))
    return traverse_util.unflatten_dict(flat)


def _scale_key(path: tuple[str, ...], family: EncoderFamily) -> str:
    """The key, beside parameters, of the tensor that multiplies the outputs of a block."""
    if path[0] != "layers" or ".".join(path[2:4]) not in family.scales:
        return ""
    return f"scale of {'.'.join(path[:4])}"


def _scale_names(config: EncoderConfig) -> dict[str, str]:
    """Hugging Face's names of all tensors that multiply the outputs of blocks, by `_scale_key`."""
    family = encoder_family(config.architecture)
    return {
        f"scale of layers.{layer}.{block}": f"{family.layer(layer)}.{tensor}"
        for layer in range(config.num_layers)
        for block, tensor in family.scales.items()
    }


def match_encoder_tensors(
    parameters: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, tuple[int, ...]],
    config: EncoderConfig,
    source: str,
) -> dict[str, str]:
    """Find the tensor of every parameter, and those that multiply blocks; every tensor is used, every shape checked.

    A grouped block has no kernel, and its states have the multiplier in them; its bias, where one is stored, too.

    Args:
        parameters: Shape of every parameter, by path.
        tensors: Shape of every tensor in the source.
        config: The encoder.
        source: The source's name, for messages.

    Raises:
        UsageError: If tensors are missing, misshapen or left over; all are named.
    """
    family = encoder_family(config.architecture)
    canonical = _canonical(tensors, family)
    wanted = {hf_name(parameter, config): (parameter, shape) for parameter, shape in parameters.items()}
    wanted |= {name: (key, (config.embed_dim,)) for key, name in _scale_names(config).items()}
    problems = []
    left_over = [found for name, found in canonical.items() if name not in wanted]
    if missing := [with_guess(name, left_over) for name in wanted if name not in canonical]:
        problems.append(f"missing {some_names(missing)}")
    if wrong := [
        f"{name} is {tuple(tensors[canonical[name]])}, expected {tuple(shape)}"
        for name, (_, shape) in wanted.items()
        if name in canonical and tuple(tensors[canonical[name]]) != tuple(shape)
    ]:
        problems.append(f"misshapen {some_names(wrong)}")
    if left_over:
        problems.append(f"left over {some_names(left_over)}")
    if problems:
        raise UsageError(
            f"the tensors of {source} do not fit its config.json: {'; '.join(problems)}. Download the whole model again"
        )
    return {key: canonical[name] for name, (key, _) in wanted.items()}


def _canonical(tensors: Iterable[str], family: EncoderFamily) -> dict[str, str]:
    """Names of a source's tensors by those of a model with a head; tensors that no output depends on are left out."""
    heads = set(family.head.values())
    found = {}
    for name in tensors:
        plain = unwrapped(name)
        inner = plain.removeprefix("model.").removeprefix(family.prefix)
        if plain in heads or plain.startswith("groups."):
            found[plain] = name
        elif not inner.startswith((*family.ignored, *OTHER_TOWER)):
            found[f"{family.prefix}{inner}"] = name
    return found


def save_encoder(model: Any, directory: Path, *, overwrite: bool = False, card: str | None = None) -> Path:
    """Write an image encoder; see `save.save_model`."""
    config, family = model.encoder_config, encoder_family(model.config.architecture)
    flat = traverse_util.flatten_dict(model.params)
    tensors = {hf_name(".".join(path), config): np.asarray(leaf) for path, leaf in flat.items()}
    one = np.ones(config.embed_dim, model.param_dtype)
    tensors |= dict.fromkeys(_scale_names(config).values(), one)
    hf = {"architectures": [family.model_class], **model.hf_config}
    with atomic_directory(directory, overwrite) as temporary, os_errors(directory):
        hf_config = join_config(hf, config, model.plan, model.conversion)
        hf_config["torch_dtype"] = hf_config["dtype"] = str(np.dtype(model.param_dtype))
        text = json.dumps(hf_config, indent=2)
        # Lists of pivots on one line each.
        text = re.sub(r"\[\n\s+(-?\d+(?:,\n\s+-?\d+)*)\n\s+\]", lambda got: f"[{' '.join(got[1].split())}]", text)
        (temporary / "config.json").write_text(text + "\n", encoding="utf-8")
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        if model.preprocessor_config:
            preprocessor = json.dumps(dict(model.preprocessor_config), indent=2)
            (temporary / _PREPROCESSOR).write_text(preprocessor + "\n", encoding="utf-8")
        readme = card or encoder_card(model, directory.absolute().name)
        (temporary / "README.md").write_text(readme, encoding="utf-8")
    return directory
