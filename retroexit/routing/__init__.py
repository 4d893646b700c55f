"""Choosing the exit: a predictor of every exit's quality loss, and policies that read it."""
