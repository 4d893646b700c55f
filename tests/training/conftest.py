"""Fixtures for fitting."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def decoders() -> ModuleType:
    """The file of small generators beside this one."""
    path = Path(__file__).with_name("decoders.py")
    spec = importlib.util.spec_from_file_location("training_decoders", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
