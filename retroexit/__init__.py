"""Early exits for any trained image decoder."""
