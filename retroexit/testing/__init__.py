"""The test that an adapter's author calls: `check_adapter`.

Imports everything except `retroexit.cli` and `retroexit.demo`.
"""

from retroexit.testing.conformance import AdapterReport, check_adapter

__all__ = ["AdapterReport", "check_adapter"]
