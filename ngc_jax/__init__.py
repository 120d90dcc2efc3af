"""ngc-jax: see, shrink and study large neural networks as societies of neuronal groups.

The parts, each a package to import from:

- `ngc_jax.groups`: neuron states, interaction kernels, topologies, plans, communication dynamics.
- `ngc_jax.models`: the decoder, its sources, cache, generation, loading and saving.
- `ngc_jax.convert`: calibration statistics, factorisation methods, the conversion pipeline.
- `ngc_jax.evaluate`: perplexity and bits per byte.
"""

__version__ = "0.1.0"
