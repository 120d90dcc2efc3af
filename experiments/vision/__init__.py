"""Conversion of image classifiers by all methods that have a meaning there; `python -m experiments.vision`."""
