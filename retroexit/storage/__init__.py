"""Save and load wrapped generators: safetensors and JSON, never pickles, and not the generator itself."""

from retroexit.storage.models import load_model, save_model, versions
from retroexit.storage.settings import wrap_settings
from retroexit.storage.tensors import read_tensors, sha256_of, write_tensors

__all__ = [
    "load_model",
    "read_tensors",
    "save_model",
    "sha256_of",
    "versions",
    "wrap_settings",
    "write_tensors",
]
