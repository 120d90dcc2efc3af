"""Choose the groups of a compact model and their ranks, from numbers only, without the arrays of a model.

- candidates: the groups that a topology allows;
- ranks: uniform ranks, and ranks allocated by measured losses (`RankRule`);
- allocate: one Lagrange multiplier over the curves loss against stored parameters;
- widths: how many hidden neurons every MLP keeps.
"""
