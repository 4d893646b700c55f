"""Let the tests run in a checkout, where the plug-in is not installed."""

import importlib.metadata
import sys
from pathlib import Path

from retroexit.plugins import host

if not importlib.metadata.entry_points(group="retroexit", name="example"):
    sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
    import retroexit_example

    host().register(retroexit_example, "example")
