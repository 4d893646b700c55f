"""Settings of Sphinx: sphinx-build -W -b html docs docs/_build."""

import sys
from pathlib import Path
from typing import Any

from pygments.lexers.special import TextLexer

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "adapters")]

project = "retroexit"
author = "The retroexit authors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
autosummary_generate = False
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "retroexit"
myst_heading_anchors = 3
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False


def setup(app: Any) -> None:
    """Show diagrams, which are for hosts that draw them, as text."""
    app.add_lexer("mermaid", TextLexer)
