"""One decoder for the Llama family: config, module, cache, generation, sources, loading and saving."""
