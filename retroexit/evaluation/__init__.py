"""Quality and cost of exits on test inputs, and of routing. May import `retroexit.training` and below."""
