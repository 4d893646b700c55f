"""Cut a recorded generator after its stages and run the pieces.

Imports `retroexit.stages` and what lies below it.
"""
