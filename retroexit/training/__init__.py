"""Fit a wrapped generator: cache, bank, branches, predictor. May import the model and the layers below it."""
