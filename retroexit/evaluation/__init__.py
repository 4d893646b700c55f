"""Quality and cost of the exits on test inputs, and what routing would do with them at any threshold.

Imports `retroexit.training` and what lies below it.
"""
