"""What `retroexit.testing.check_adapter` looks at, one file for each kind of question."""
