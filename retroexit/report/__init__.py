"""Tables, figures and the HTML page of an evaluation.

Imports `retroexit.evaluation` and what lies below it.
"""
