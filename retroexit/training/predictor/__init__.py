"""Train the predictor of each exit's quality loss (paper section 3.4).

Imports what `retroexit.training` may import.
"""
