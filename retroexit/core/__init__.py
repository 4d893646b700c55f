"""Shared ground of all layers: nested structures, modules, samples, images, MAC counting and files.

Imports only `retroexit.errors`.
"""
