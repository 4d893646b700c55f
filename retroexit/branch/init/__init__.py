"""Starting weights of branches.

Imports what `retroexit.branch` may import.
"""
