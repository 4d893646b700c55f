"""Measure every exit of every sample against the backbone, and calibrate on the result.

Imports `retroexit.routing` and what lies below it.
"""
