"""What a branch is trained on: terms that compare its image with the backbone's, weighed and added.

==================  ==========================================  ===================  =======================
Name                Term                                        Equation             Written in
==================  ==========================================  ===================  =======================
adversarial         OASIS: N + 1 classes, LabelMix              1, L_OASIS in 3      the adapter's objective
adversarial         hinge                                       1, L_Adv in 4        `training.adversary`
adversarial         non-saturating                              1                    `training.adversary`
vgg, vgg16          features of VGG19 (of VGG16), ImageNet      L_VGG in 3 and 4     `losses.perceptual`
features-alex,      the same on a network whose weights can     stand in for L_VGG   `losses.perceptual`
-squeeze, -random   be had, on request alone
lpips, lpips-*      LPIPS                                       L_LPIPS in 3         `evaluation.quality`
ms-ssim             1 - MS-SSIM                                 L_MS-SSIM in 4       `evaluation.quality`
l1                  mean absolute difference                    L_1 in 4             `losses.terms`
feature-matching    the discriminator's features                L_FM in 4            `losses.terms`
gaze                directions that a gaze network sees         L_GL in 4            `losses.terms`
quality             the metric of the fit                       -                    any metric
==================  ==========================================  ===================  =======================

Weights are given, or equalised: `training.weighing`. Equations 3 and 4 as a whole are `training.presets`.
Plug-ins offer further terms through the hook ``retroexit_losses``.

Departure from the paper: the ground truth of every term, the adversarial one included, is the backbone's
image, since a fit has the generator's inputs alone.
"""

from __future__ import annotations

from retroexit.training.losses.perceptual import PERCEPTUAL, Perceptual
from retroexit.training.losses.terms import L1, QUALITY, BatchTerm, FeatureMatching, Gaze, Term
from retroexit.training.losses.total import TrainingLoss

__all__ = [
    "L1",
    "PERCEPTUAL",
    "QUALITY",
    "BatchTerm",
    "FeatureMatching",
    "Gaze",
    "Perceptual",
    "Term",
    "TrainingLoss",
]
