"""Find stages l_1..l_N of a recording, where each ends, where to branch. May import `tracing` and below."""
