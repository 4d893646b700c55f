"""Cut a recorded generator after its stages and run the pieces, or its forward again where it cannot be cut.

Imports `retroexit.stages` and what lies below it.
"""
