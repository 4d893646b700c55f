"""The OASIS of the street scenes as `train_backbone.py` left it; for research only, see README.md."""

from __future__ import annotations

from pathlib import Path

from pairs import NUM_LABELS, SIZE
from retroexit_oasis import OASISGenerator
from safetensors.torch import load_file

__all__ = ["WEIGHTS", "generator", "load"]

WEIGHTS = Path(__file__).with_name("backbone.safetensors")
CHANNELS, HIDDEN, Z_DIM = 16, 32, 16


def generator() -> OASISGenerator:
    """Make the generator, untrained: a quarter as wide as published."""
    return OASISGenerator(NUM_LABELS, Z_DIM, CHANNELS, SIZE, HIDDEN)


def load(weights: Path = WEIGHTS) -> OASISGenerator:
    """Load the trained generator, in float32 and eval mode."""
    model = generator()
    stored = load_file(weights)
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in stored.items()})
    return model.eval()
