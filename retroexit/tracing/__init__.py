"""Record one execution of a generator as a `torch.fx` graph.

Imports `retroexit.core` and `retroexit.errors`.
"""
