"""Reading somebody else's generator: record one execution, find its stages, cut it after one of them."""
