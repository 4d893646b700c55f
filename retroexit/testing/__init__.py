"""The test that an adapter's author calls: `check_adapter`. May import all but `cli` and `demo`."""

from retroexit.testing.conformance import AdapterReport, check_adapter

__all__ = ["AdapterReport", "check_adapter"]
