"""Shared ground: nested structures, modules, samples, MAC counting, files. May import `retroexit.errors`."""
