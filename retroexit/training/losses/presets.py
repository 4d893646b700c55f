"""Equations 3 and 4 of the paper by name, and the plan from which every branch gets a loss of its own.

====================  ===============================================================  ================
Preset                Terms                                                            Equation
====================  ===============================================================  ================
``"oasis"``           adversarial + vgg + lpips                                        3, section 4.1
``"megaportraits"``   adversarial + vgg + ms-ssim + l1 + feature-matching + gaze       4, section 4.2
====================  ===============================================================  ================

The paper leaves the coefficients to its supplement and says what they are for: that all terms contribute
alike. That is what equalised weights do, so all of these are 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from retroexit.core.identity import fingerprint
from retroexit.errors import OptionError
from retroexit.plugins.hookspecs import RESERVED
from retroexit.training.losses.adversary import Adversarial, Adversary, AdversarySettings
from retroexit.training.losses.equalise import Equaliser
from retroexit.training.losses.objectives import Objective
from retroexit.training.losses.terms import BatchTerm, FeatureMatching, Gaze, Term
from retroexit.training.losses.total import TrainingLoss

__all__ = [
    "ADVERSARIAL",
    "FEATURE_MATCHING",
    "GAZE",
    "LPIPS",
    "PRESETS",
    "SPECIAL",
    "LossPlan",
    "Preset",
    "find_weights",
]

ADVERSARIAL, FEATURE_MATCHING, GAZE, LPIPS = "adversarial", "feature-matching", "gaze", "lpips"

SPECIAL = RESERVED["retroexit_losses"]
"""Names of terms that are made from what a fit is given; nobody can offer others under them."""


@dataclass(frozen=True)
class Preset:
    """One of the paper's losses.

    Attributes:
        weights: Weight of every term by name.
        objective: Form of the adversarial term where neither the user nor an adapter names one.
    """

    weights: Mapping[str, float]
    objective: str = "non-saturating"


PRESETS = {
    "oasis": Preset({ADVERSARIAL: 1.0, "vgg": 1.0, LPIPS: 1.0}),
    "megaportraits": Preset(
        {ADVERSARIAL: 1.0, "vgg": 1.0, "ms-ssim": 1.0, "l1": 1.0, FEATURE_MATCHING: 1.0, GAZE: 1.0}, "hinge"
    ),
}
"""The paper's losses by name."""


def find_weights(
    losses: Mapping[str, float] | str, instead: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Read which terms are wanted, and with which weights.

    Args:
        losses: Weights by name, or the name of a preset.
        instead: Terms that take the place of others, by the name of the others: ``{"vgg": "features-alex"}``.

    Returns:
        Weights by name; terms of weight 0 are left out.

    Raises:
        OptionError: If there is no such preset, no weight above 0, or nothing that could be replaced.
    """
    if isinstance(losses, str):
        if losses not in PRESETS:
            raise OptionError(
                f"asked for losses={losses!r}; found no such preset. There are "
                f"{', '.join(map(repr, PRESETS))}; or pass weights by name.",
                losses,
            )
        losses = PRESETS[losses].weights
    given = list(losses.values()) if isinstance(losses, Mapping) else []
    numbers = all(isinstance(weight, (int, float)) and 0 <= weight < math.inf for weight in given)
    if not numbers or not sum(given) > 0:
        raise OptionError(
            f"asked for losses={losses!r}; found no weights >= 0 by name of which one is above 0.", losses
        )
    wanted = {name: float(weight) for name, weight in losses.items() if weight > 0}
    instead = instead or {}
    for name, other in instead.items():
        if name not in wanted or other in wanted:
            raise OptionError(
                f"asked for {other!r} instead of {name!r}; found the losses {', '.join(wanted)}. Replace one "
                "of these by one that is not among them.",
                instead,
            )
    return {instead.get(name, name): weight for name, weight in wanted.items()}


@dataclass(frozen=True)
class LossPlan:
    """What the losses of all branches are made from.

    Attributes:
        weights: Weight of every term by name.
        terms: The terms that branches share, by name; `SPECIAL` ones but the first two are made here.
        discriminator: Where every branch's adversary begins, or ``None``.
        objective: How they compete.
        gaze: The gaze network, or ``None``.
        equalise: Steps during which weights are equalised; 0 takes them as given.
        adversary: How discriminators are trained.

    Raises:
        OptionError: If a term lacks what it is made from.
    """

    weights: Mapping[str, float]
    terms: Mapping[str, Term | BatchTerm] = field(default_factory=dict)
    discriminator: nn.Module | None = None
    objective: Objective | None = None
    gaze: nn.Module | None = None
    equalise: int = 0
    adversary: AdversarySettings = field(default_factory=AdversarySettings)

    def __post_init__(self) -> None:
        if self.equalise < 0:
            raise OptionError(f"asked for equalise={self.equalise}; found no integer >= 0.", self.equalise)
        lacking = {
            ADVERSARIAL: self.discriminator is None or self.objective is None,
            FEATURE_MATCHING: self.discriminator is None or self.objective is None,
            GAZE: self.gaze is None,
        }
        for name in self.weights:
            if lacking.get(name, name not in self.terms):
                self._refuse(name)
        if self.gaze is not None:
            object.__setattr__(self, "terms", {**self.terms, GAZE: Gaze(self.gaze)})

    def for_branch(self) -> TrainingLoss:
        """Make the loss of one branch; its adversary begins as a copy of the discriminator."""
        adversary = None
        if {ADVERSARIAL, FEATURE_MATCHING} & set(self.weights):
            assert self.discriminator is not None and self.objective is not None
            adversary = Adversary(self.discriminator, self.objective, self.adversary)
            if ADVERSARIAL not in self.weights:
                adversary.module.eval()  # it only looks, and nothing of it may change
        terms: dict[str, tuple[float, Term | BatchTerm]] = {}
        for name, weight in self.weights.items():
            if name == ADVERSARIAL and adversary is not None:
                terms[name] = weight, Adversarial(adversary)
            elif name == FEATURE_MATCHING and adversary is not None:
                terms[name] = weight, FeatureMatching(adversary)
            else:
                terms[name] = weight, self.terms[name]
        equaliser = Equaliser(list(terms), self.equalise) if self.equalise else None
        trained = adversary if ADVERSARIAL in self.weights else None
        return TrainingLoss(terms, adversary=trained, equaliser=equaliser)

    def describe(self) -> dict[str, Any]:
        """Say what a resumed fit must have in common with its beginning, as plain JSON types."""
        found: dict[str, Any] = {"weights": dict(self.weights), "equalise": self.equalise}
        if {ADVERSARIAL, FEATURE_MATCHING} & set(self.weights):
            assert self.discriminator is not None and self.objective is not None
            found["objective"] = self.objective.name
            found["discriminator"] = fingerprint(self.discriminator)
            found["discriminator_lr"] = self.adversary.lr
        if GAZE in self.weights:
            assert self.gaze is not None
            found[GAZE] = fingerprint(self.gaze)
        return found

    def _refuse(self, name: str) -> None:
        rest = {other: weight for other, weight in self.weights.items() if other != name}
        what = {
            ADVERSARIAL: "no discriminator. Pass the generator's own as discriminator=module",
            FEATURE_MATCHING: "no discriminator. Pass the generator's own as discriminator=module",
            GAZE: "no gaze network. Pass one as gaze=module",
        }.get(name, "no such term. Pass it in terms")
        raise OptionError(
            f"asked for the loss {name!r}; found {what}, or leave the term out: losses={rest}.", name
        )
