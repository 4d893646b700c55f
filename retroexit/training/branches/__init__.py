"""Train the branches against the backbone's output (paper section 3.2).

Imports what `retroexit.training` may import.
"""
