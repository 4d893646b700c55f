"""Run a wrapped generator elsewhere, and for many callers: export, bundles, the scheduler."""

from retroexit.runtime.bundle import Bundle, BundleError, load_bundle
from retroexit.runtime.export import export
from retroexit.runtime.scheduler import Rendered, Scheduler

__all__ = ["Bundle", "BundleError", "Rendered", "Scheduler", "export", "load_bundle"]
