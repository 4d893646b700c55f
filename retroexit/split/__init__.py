"""Cut a recorded generator after its stages and run the pieces. May import `retroexit.stages` and below."""
