"""A model with a promise, its bundle in a folder, and the bundle."""

import pytest
from runtime_models import wrapped

import retroexit


@pytest.fixture(scope="module")
def model():
    return wrapped(rule={})


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return retroexit.export(model, tmp_path_factory.mktemp("export") / "bundle")


@pytest.fixture(scope="module")
def bundle(folder):
    return retroexit.load_bundle(folder, threads=1)
