"""The samples that branches are trained on: cached or computed as they are needed.

Imports what `retroexit.training` may import.
"""
