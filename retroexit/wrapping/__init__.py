"""Turn options into a recorded generator with branches: attach points, decomposition, exits.

Imports `retroexit.plugins`, `retroexit.guidance`, `retroexit.branch` and what lies below them.
"""
