"""Split a generator whose recording cannot be cut, by running its forward again behind the cut.

Imports what `retroexit.split` may import.
"""
