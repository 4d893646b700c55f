"""The checks that an adapter's author calls: `retroexit.testing.check_adapter.check_adapter`.

Imports everything but `retroexit.cli` and `retroexit.demo`.
"""
