"""Making thin branches: which widths move together, cloning and narrowing a tail, starting weights."""
