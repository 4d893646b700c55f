"""Turn options into a recorded generator with branches. May import `retroexit.plugins` and below."""
