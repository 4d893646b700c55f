"""Find the stages l_1..l_N of a recorded decoder, where each ends, and where to attach branches.

Imports `retroexit.tracing` and what lies below it.
"""
