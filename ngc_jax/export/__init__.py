"""Take a model out of ngc-jax: as a plain Hugging Face directory, or as a GGUF file for llama.cpp.

Both hold dense weights, whatever the model here is: groups are folded into the weights that they stand for. The
function stays the same up to rounding, and the size is that of the dense architecture. A model whose MLPs were pruned
and that has no groups stays as small as it is.
"""

from ngc_jax.export.folded import FoldedSource
from ngc_jax.export.gguf import GGUF_TYPES, export_gguf
from ngc_jax.export.huggingface import export_huggingface

__all__ = ["GGUF_TYPES", "FoldedSource", "export_gguf", "export_huggingface"]
