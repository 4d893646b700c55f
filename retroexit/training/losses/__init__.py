"""Terms of the training loss that compare a branch's image with the backbone's, their weights, their sum.

Imports what `retroexit.training` may import. The terms of equations 1, 3 and 4 are in `terms`, `adversary` and
`perceptual`, the
presets ``"oasis"`` and ``"megaportraits"`` in `plan`; LPIPS and
MS-SSIM come from `retroexit.metrics`. Plug-ins add terms with the hook ``retroexit_losses``.

Departure from the paper: the ground truth of every term, the adversarial one included, is the backbone's
image, since a fit has the generator's inputs alone.
"""

from __future__ import annotations

from retroexit.training.losses.perceptual import PERCEPTUAL, Perceptual
from retroexit.training.losses.plan import TrainingLoss
from retroexit.training.losses.terms import L1, Gaze

__all__ = ["L1", "PERCEPTUAL", "Gaze", "Perceptual", "TrainingLoss"]
