"""Terms of the training loss and their sum. Unlike in the paper, the ground truth is the backbone's image."""

from retroexit.training.losses.perceptual import PERCEPTUAL, Perceptual
from retroexit.training.losses.plan import TrainingLoss
from retroexit.training.losses.terms import L1, MSE, Gaze

__all__ = ["L1", "MSE", "PERCEPTUAL", "Gaze", "Perceptual", "TrainingLoss"]
