"""Fit a wrapped generator: feature cache, guidance bank, branches, predictor.

Imports the model and the layers below it; never load, report, the API or the command line.
"""
