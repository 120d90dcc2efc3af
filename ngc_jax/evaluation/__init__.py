"""What a model kept: likelihoods, perplexity, bits per byte."""
