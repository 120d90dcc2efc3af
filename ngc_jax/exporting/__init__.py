"""Export a model: as a Hugging Face directory, plain or with its groups, or as a GGUF file for llama.cpp.

Plain directories and GGUF files contain dense weights: groups are folded into the weights of their members. The
function is the same up to rounding, and the size is that of the dense architecture. A model with pruned MLPs and
without groups (form `dense`) keeps its smaller size. A directory with groups keeps its size and runs in transformers by
a modelling file of ours, which `trust_remote_code=True` permits.
"""

from ngc_jax.exporting.any import FORMS, export
from ngc_jax.exporting.folded import FoldedSource
from ngc_jax.exporting.gguf import GGUF_TYPES, export_gguf
from ngc_jax.exporting.grouped import export_grouped
from ngc_jax.exporting.hub import push
from ngc_jax.exporting.huggingface import export_huggingface

__all__ = [
    "FORMS",
    "GGUF_TYPES",
    "FoldedSource",
    "export",
    "export_gguf",
    "export_grouped",
    "export_huggingface",
    "push",
]
