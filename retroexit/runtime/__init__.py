"""Run a wrapped generator elsewhere, and for many callers: export, bundles, the scheduler."""

from retroexit.runtime.bundle import Bundle, BundleError, load_bundle
from retroexit.runtime.export import export

__all__ = ["Bundle", "BundleError", "export", "load_bundle"]
