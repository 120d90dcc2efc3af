"""Explanations of a report's sections, for readers who have not seen one before."""

from __future__ import annotations

# The heading of each section, and the same for the list of sections.
TITLES = {
    "groups": ("The model as groups", "Groups"),
    "losses": ("How much each block lost", "Losses"),
    "pareto": ("Size against quality", "Size and quality"),
    "depth": ("Stability through the layers, over the text", "Through the layers"),
    "sequence": ("Stability from token to token, over the text", "Token to token"),
    "training": ("Training", "Training"),
    "samples": ("What they write", "Samples"),
    "made": ("How this was made", "How it was made"),
}

_HOW = {
    "groups": """
Every layer of the model has seven weight matrices, the blocks: query, key, value and output of attention; up, gate and
down of the MLP. A compact model replaces them by neuronal groups: each neuron has a short vector, its state, and a
weight is a function of two states. The length of a state is the group's rank.

Each square is a block, each column a layer, and the number is the percentage of its parameters that is kept. Squares
chained together share one group; dashed squares were left dense. Point at a square, or reach it with Tab and the arrow
keys, for its rank and its group.
""",
    "losses": """
The distance of each block's weights from those of the dense model: 0 % is unchanged, 100 % is a difference as large as
the weights themselves.

A large number is not always a large loss. A conversion puts its errors where inputs are rare and outputs matter little,
so that much of the difference hardly affects the outputs. Perplexity and the samples show the actual loss.
""",
    "pareto": """
Perplexity measures how poorly a model predicts text it has not seen: lower is better, and a model that guesses among N
equally likely tokens has perplexity N. Each line is a method, each point a model; further left is smaller. No model was
trained after the conversion. A dashed vertical line is the size of a model of this report.
""",
    "depth": """
Perturb the activations of one token a little before the first layer: does the perturbation decay or grow through the
layers? The stability of a token is that rate per layer, relative to the token's own stream. Blue tokens forget small
perturbations; orange, underlined ones amplify them.

The potential is the share of a token's motion that the rest of the prompt drives: near 0 % the token moves as if it
were alone. The bars above each text are the same numbers, token by token. Point at a token, or reach the text with Tab
and move with the arrow keys, for its numbers. The first token has no context, and is neither coloured nor
counted.
""",
    "sequence": """
Perturb the model's memory of some tokens a little: how much of that is in its memory of the tokens that follow?
Each coloured segment is one such experiment; its rate per token is below 0 (blue) where the perturbation decays. The
first segment is only perturbed, and the remainder at the end is too short to measure.
""",
    "training": """
The course of training, step by step. The loss is measured on the training text and is noisy from step to step;
perplexity is measured at intervals on held-out text.
""",
    "samples": """
The same prompt, continued by each model. Each model takes the most likely token every time, so that the results are
deterministic.
""",
    "made": """
The exact command, the versions it ran with, and the settings of each input from its own files.
""",
}


def how(section: str) -> tuple[str, ...]:
    """The paragraphs that explain a section."""
    return tuple(" ".join(paragraph.split()) for paragraph in _HOW[section].strip().split("\n\n"))
