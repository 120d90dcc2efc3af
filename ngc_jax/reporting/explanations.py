"""What each section of a report shows and how to read it, for somebody who has not seen one before."""

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
weight is what two states make of each other. A state has as many numbers as the group's rank.

Each square is a block, each column a layer, and the number is the percentage of its parameters that is kept. Squares
chained together share one group; dashed squares were left dense. Point at a square, or reach it with Tab and the arrow
keys, for its rank and its group.
""",
    "losses": """
How far the weights of each block are from those of the dense model: 0 % is unchanged, 100 % is a difference as large as
the weights themselves.

A large number is not always a large loss. A conversion puts its errors where inputs are rare and outputs matter little,
so that much of such a difference is hardly felt. Perplexity, and what the models write, tell what was.
""",
    "pareto": """
Perplexity says how surprised a model is by text it has not seen: lower is better, and a model that guesses among N
equally likely tokens has perplexity N. Each line is a method, each point a model; further left is smaller. Nothing was
trained after the conversion. A dashed upright line is the size of a model of this report.
""",
    "depth": """
Disturb what the model makes of one token a little, before the first layer: does the disturbance fade or grow on its way
up? The stability of a token is that rate per layer, relative to the token's own stream. Blue tokens forget small
disturbances; orange, underlined ones amplify them.

The potential is the share of a token's motion that the rest of the prompt drives: near 0 % the token moves as if it
stood alone. The bars above each text are the same numbers, token by token. Point at a token, or reach the text with Tab
and move with the arrow keys, for its numbers. The first token has nothing before it, and is neither coloured nor
counted.
""",
    "sequence": """
Disturb what the model remembers of some tokens a little: how much of that is in its memory of the tokens that follow?
Each coloured stretch is one such experiment; its rate per token is below 0 (blue) where the disturbance fades. The
first stretch is only disturbed, and what is left at the end is too short to measure.
""",
    "training": """
What training did, step by step. The loss is measured on the text that is trained on and is noisy from step to step;
perplexity is measured on text held out, now and then.
""",
    "samples": """
The same beginning, continued by each model. Each takes the likeliest token every time, so that nothing is left to
chance.
""",
    "made": """
The exact command, the versions it ran with, and the settings of each input as its own files hold them.
""",
}


def how(section: str) -> tuple[str, ...]:
    """The paragraphs that explain a section."""
    return tuple(" ".join(paragraph.split()) for paragraph in _HOW[section].strip().split("\n\n"))
