"""Terms of the training loss that compare a branch's image with the backbone's, their weights and their sum.

Imports what `retroexit.training` may import. Departure from the paper: the ground truth of every term, the
adversarial one included, is the backbone's image, since a fit has the generator's inputs alone.
"""

from __future__ import annotations

from retroexit.training.losses.perceptual import PERCEPTUAL, Perceptual
from retroexit.training.losses.plan import TrainingLoss
from retroexit.training.losses.terms import L1, Gaze

__all__ = ["L1", "PERCEPTUAL", "Gaze", "Perceptual", "TrainingLoss"]
