"""A Hugging Face directory that keeps the groups: factors in safetensors, and a modelling file for transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ngc_jax.errors import UsageError
from ngc_jax.exporting.folded import DTYPES, read_states
from ngc_jax.exporting.huggingface import write_shards
from ngc_jax.files import atomic_directory, os_errors
from ngc_jax.groups.gauge import other_neurons
from ngc_jax.groups.plan import Block, GroupPlan
from ngc_jax.groups.states import fixed_lift
from ngc_jax.models.card import front_matter, hub_id, render_card
from ngc_jax.models.decoder import Decoder
from ngc_jax.models.families import Family, family_of
from ngc_jax.models.families.record import PROJECTIONS
from ngc_jax.models.inspect import inspect_model
from ngc_jax.models.keys import hf_name, match_tensors
from ngc_jax.models.load import check_tied_head, parameter_shapes, read_tensor
from ngc_jax.models.save import SHARD_BYTES
from ngc_jax.models.saved_config import MODEL_TYPE, SECTION, join_config, split_config
from ngc_jax.models.sources import Source

FILES = ("configuration_ngc.py", "modeling_ngc.py")


class GroupedSource:
    """The tensors of a compact model by the names of `modeling_ngc.py`, each read when it is asked for.

    Attributes:
        name: The other source's name.
        config: config.json, with the two classes of our modelling file.
        shapes: Tensor name -> shape.

    Raises:
        UsageError: If the source is no compact model, or transformers' architecture cannot be built on.
    """

    def __init__(self, source: Source) -> None:
        inspection = inspect_model(source)
        config, plan = inspection.config, inspection.plan
        if plan is None or not plan.groups:
            raise UsageError(f"{source.name} has no groups, and loads without code of ours; export it to hf")
        if config.iterations != 1:
            raise UsageError(
                f"{source.name} applies its layers {config.iterations} times, which transformers' model does not; it "
                "can be used with ngc-jax only"
            )
        if config.experts is not None:
            raise UsageError(
                f"the groups of {config.architecture} models cannot be written for transformers: their MLPs are "
                "mixtures of experts; export it to hf, which folds them, or use it with ngc-jax"
            )
        self.name, self.license, self.conversion = source.name, source.license, inspection.conversion
        self.architecture = config.architecture
        self._source = source
        parameters = parameter_shapes(Decoder(config, plan))
        stored = match_tensors(parameters, source.shapes, config, source.name)
        check_tied_head(source, config, stored["embed.embedding"])
        self._stored = stored
        self._held: tuple[str, Mapping[str, Any]] = ("", {})
        # By tensor name: the stored tensor of a parameter, or the group and the part of it.
        self._from: dict[str, str | tuple[GroupPlan, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        family = family_of(config.architecture)

        def own_name(parameter: str) -> str:
            return inside_fused(hf_name(parameter, config), family)

        for parameter, shape in parameters.items():
            if not parameter.startswith("groups."):
                block, _, leaf = parameter.rpartition(".")
                name = own_name(parameter)
                name = f"{name.removesuffix('bias')}read.bias" if block in plan.group_of and leaf == "bias" else name
                self.shapes[name], self._from[name] = shape, stored[parameter]
        for group in plan.groups:
            for name, part, shape in _parts(group, lambda block: own_name(f"{block}.kernel")):
                self.shapes[name], self._from[name] = shape, (group, part)
        hf_config, _ = split_config(source.config, source.name)
        whole = join_config(hf_config, config, plan, None)
        section = {
            "model_type": whole[SECTION]["model_type"],
            "groups": [_group_entry(group) for group in plan.groups],
            "dense": [_block_entry(block) for block in plan.dense],
        }
        places = {module: at for module, at in family.modules.items() if module in PROJECTIONS}
        if other := {module: at for module, at in places.items() if at != PROJECTIONS[module]}:
            section |= {"places": other}
        if family.fused:
            blocks = {block.name: block for block in (*config.blocks(), *plan.blocks())}
            section |= {"fused": {whole: list(parts) for whole, parts in family.fused.items()}}
            section |= {"dense": [_block_entry(block) for block in blocks.values() if block.name not in plan.group_of]}
        classes = {"AutoConfig": "configuration_ngc.NgcConfig", "AutoModelForCausalLM": "modeling_ngc.NgcForCausalLM"}
        self.config: dict[str, Any] = {**whole, "model_type": MODEL_TYPE, "auto_map": classes, SECTION: section}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        found = self._from[name]
        if isinstance(found, str):
            return read_tensor(self._source, found)
        group, part = found
        if part == "order":
            assert group.pivots is not None
            return np.concatenate([group.pivots, other_neurons(group.pivots, group.d_in)]).astype(np.int64)
        if part == "lift" and not group.kernel.learned:
            return fixed_lift(group.rank, group.kernel.lift, group.kernel.seed).astype(np.float32)
        if self._held[0] != group.name:
            self._held = (group.name, read_states(self._source, group, self._stored))
        states: Any = self._held[1]
        for key in part.split(":"):
            states = states[key]
        return np.asarray(states)

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._source.tokenizer()


def inside_fused(name: str, family: Family) -> str:
    """The name of a tensor where a fused module has its parts inside.

    >>> inside_fused("model.layers.0.mlp.up_proj.weight", family_of("phi3"))
    'model.layers.0.mlp.gate_up_proj.up_proj.weight'
    """
    for whole, parts in family.fused.items():
        for part in parts:
            if f".{part}." in name:
                return name.replace(part, f"{whole}.{part.rpartition('.')[2]}")
    return name


def _parts(group: GroupPlan, name_of: Callable[[str], str]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, path in the states and shape of every tensor of a group."""
    kernel, rank = group.kernel, group.rank
    first = name_of(group.members[0].name).removesuffix("weight") + "encoder."
    rows = group.d_in - (0 if group.pivots is None else rank)
    found: list[tuple[str, str, tuple[int, ...]]] = [(f"{first}input_states", "input_states", (rows, rank))]
    if group.pivots is not None:
        found.append((f"{first}order", "order", (group.d_in,)))
    if kernel.name == "riemannian":
        found.append((f"{first}log_diagonal", "metric:log_diagonal", (rank,)))
        if columns := min(kernel.metric_rank, rank):
            found.append((f"{first}factor", "metric:factor", (rank, columns)))
    if kernel.name == "lifted":
        found += [(f"{first}gain", "gain", ()), (f"{first}lift", "lift", (rank, kernel.lift))]
    for member in group.members:
        read = name_of(member.name).removesuffix("weight") + "read."
        found.append((f"{read}weight", f"output_states:{member.name}", (member.d_out, rank)))
        if kernel.name == "lifted":
            found.append((f"{read}amplitude", f"amplitude:{member.name}", (member.d_out,)))
    return found


def _block_entry(block: Block) -> dict[str, Any]:
    return {"name": block.name, "shape": [block.d_out, block.d_in], "bias": block.bias}


def _group_entry(group: GroupPlan) -> dict[str, Any]:
    return {
        "rank": group.rank,
        "kernel": group.kernel.to_dict(),
        "pivots": group.pivots is not None,
        "members": [_block_entry(member) for member in group.members],
    }


def export_grouped(
    source: Source,
    directory: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a compact model for transformers with its groups, so that it is as small and as fast as here.

    transformers loads it with `trust_remote_code=True`: the directory has two Python files that need torch and
    transformers (4.57 or later) and nothing else. Without that it is refused, with a message that names it.

    Args:
        source: The compact model, from `models.sources.open_source`.
        directory: Where to write it, atomically.
        dtype: float32, float16 or bfloat16; of the source's embedding if None.
        overwrite: Replace an existing model directory.
        progress: Called with (tensors written, total).

    Returns:
        A summary: directory, dtype, parameters, bytes of the tensors.

    Raises:
        UsageError: If the model has no groups, cannot be read or written, or the type is unknown or too small for it.

    Example:
        >>> from ngc_jax import save_model
        >>> from ngc_jax.models.sources import open_source
        >>> with open_source(str(save_model(compact, "smaller"))) as source:
        ...     export_grouped(source, "grouped")["dtype"]
        'float32'
    """
    grouped = GroupedSource(source)
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not supported; expected one of {', '.join(DTYPES)}")
    kind = DTYPES[dtype] if dtype is not None else grouped.read("model.embed_tokens.weight").dtype
    config = {**grouped.config, "dtype": str(kind), "torch_dtype": str(kind)}
    with atomic_directory(directory, overwrite) as temporary, os_errors(Path(directory)):
        (temporary / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        for file in FILES:
            (temporary / file).write_text(remote_file(file, grouped.architecture), encoding="utf-8")
        grouped.tokenizer().save(temporary)
        sizes = write_shards(grouped, temporary, kind, SHARD_BYTES, progress)
        (temporary / "README.md").write_text(_card(Path(directory).absolute().name, grouped), encoding="utf-8")
    integers = sum(int(np.prod(shape)) for name, shape in grouped.shapes.items() if name.endswith(".order"))
    return {
        "out": str(directory),
        "dtype": str(kind),
        "folded": False,
        "parameters": sum(int(np.prod(shape)) for shape in grouped.shapes.values()) - integers,
        "bytes": sum(sizes),
    }


def remote_file(name: str, architecture: str) -> str:
    """The text of one of `FILES`, built on transformers' classes of an architecture."""
    text = resources.files("ngc_jax.exporting").joinpath("remote", name).read_text(encoding="utf-8")
    family = family_of(architecture)
    for written, wanted in (("LlamaConfig", family.config_class), ("LlamaForCausalLM", family.model_class)):
        text = text.replace(written, wanted)
    return text


def _card(name: str, grouped: GroupedSource) -> str:
    conversion = grouped.conversion or {}
    source = str(conversion.get("source") or grouped.name)
    base = conversion["base_model"] if "base_model" in conversion else hub_id(source)
    front = {**front_matter(grouped.license, base, plain=False), "library_name": "transformers"}
    front["tags"] = [*front["tags"], "custom_code"]
    kept = conversion.get("keep")
    made = f"A compact form of `{source}`{'' if kept is None else f', at keep ratio {kept:g}'}, exported by ngc-jax."
    use = (
        "    from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'    model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)\n'
        f'    tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)'
    )
    parts = [
        f"# {name}",
        f"{made} Its weight matrices are products of factors that groups of them share (`modeling_ngc.py`).",
        use,
        "The weights keep the licence of the model they were made from.",
    ]
    return render_card(front, parts)
