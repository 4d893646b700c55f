"""Quality metrics and their weights.

Imports `retroexit.core` and `retroexit.errors`.
"""
