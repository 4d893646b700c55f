"""Thin branches: which widths change together, the narrowed copy of a tail, its starting weights.

Imports `retroexit.split` and what lies below it.
"""
