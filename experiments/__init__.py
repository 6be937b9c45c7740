"""Experiments on the paper's data sets: ``python -m experiments.NAME --help``."""
