"""What every layer stands on: nested structures, modules, samples, MAC counting and files.

Imports only `retroexit.errors`.
"""
