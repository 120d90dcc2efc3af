"""Evaluation of models: likelihoods, perplexity, bits per byte, tasks."""
