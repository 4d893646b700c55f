"""Choosing the exit of a sample: predictor, policies, calibration. May import `retroexit.wrapping` and below."""
