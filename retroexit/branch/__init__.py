"""Thin copies of the rest behind a cut, and their starting weights. May import `retroexit.split` and below."""
