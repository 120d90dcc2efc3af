"""Methods of conversion against each other: perplexity and tasks."""
