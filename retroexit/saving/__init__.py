"""What is written to a model's folder, and what is checked on the way back.

Imports `retroexit.routing` and what lies below it.
"""
