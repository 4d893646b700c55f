"""Record one execution of a generator as a `torch.fx` graph. May import `core` and `errors`."""
