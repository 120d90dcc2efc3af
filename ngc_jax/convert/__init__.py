"""From a dense model to a compact one: calibration, factorisation methods, ranks, the pipeline."""
