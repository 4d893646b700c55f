"""Find out which channels of a decoder scale together, and choose their widths.

Imports what `retroexit.branch` may import.
"""
