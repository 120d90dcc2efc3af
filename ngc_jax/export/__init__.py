"""Export a model: as a plain Hugging Face directory, or as a GGUF file for llama.cpp.

Both contain dense weights: groups are folded into the weights of their members. The function is the same up to
rounding, and the size is that of the dense architecture. A model with pruned MLPs and without groups keeps its smaller
size.
"""

from ngc_jax.export.folded import FoldedSource
from ngc_jax.export.gguf import GGUF_TYPES, export_gguf
from ngc_jax.export.huggingface import export_huggingface

__all__ = ["GGUF_TYPES", "FoldedSource", "export_gguf", "export_huggingface"]
