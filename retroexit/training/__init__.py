"""Fitting a wrapped generator: cache its features, fill the bank, train branches and predictor."""
