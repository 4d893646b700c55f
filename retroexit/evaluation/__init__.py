"""Measuring quality and cost of the exits, and showing both."""
