"""Which terms a branch is trained on, with which weights, and the weighted sum of them.

Preset ``"oasis"`` is equation 3, ``"megaportraits"`` equation 4. The paper says that all terms should contribute alike;
so their weights, all 1, are equalised, see `Equaliser`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor, nn

from retroexit.core.files import check_finite, read_torch, reading
from retroexit.core.identity import fingerprint
from retroexit.core.nested import is_number
from retroexit.errors import OptionError, PluginError, TrainingError, WeightsError, warn
from retroexit.metrics import QualityMetric
from retroexit.plugins.description import Description
from retroexit.plugins.host import host
from retroexit.plugins.training_types import BatchTerm, Objective, Term, TrainingBatch
from retroexit.training.losses.terms import Adversarial, Adversary, Equaliser, FeatureMatching, Gaze, find_objective

QUALITY, LPIPS = "quality", "lpips"
ADVERSARIAL, FEATURE_MATCHING, GAZE = "adversarial", "feature-matching", "gaze"

DEFAULT_LOSSES: Final[Mapping[str, float]] = MappingProxyType({"l1": 1.0, QUALITY: 1.0})
"""L1 and the metric, both from the first step, since L1 alone leaves LPIPS high."""

PRESETS: Final = {
    "oasis": {ADVERSARIAL: 1.0, "vgg": 1.0, LPIPS: 1.0},
    "megaportraits": dict.fromkeys((ADVERSARIAL, "vgg", "ms-ssim", "l1", FEATURE_MATCHING, GAZE), 1.0),
}
"""Weight of every term of the paper's losses, by name."""

_EQUALISE_STEPS = 50


@dataclass(frozen=True)
class LossOptions:
    """What branches are trained on.

    Attributes:
        losses: Weight of every term by name, ``"quality"`` being the metric; or a preset: ``"oasis"`` (equation 3),
            ``"megaportraits"`` (equation 4).
        equalise: Whether weights are multiplied such that the gradients of all terms have the same length, measured
            over the first 50 steps, or this many; ``None``: for presets alone.
        instead: Terms that replace others: ``{"vgg": "features-alex"}``.
        loss_weights: File with the weights of a term's network, by the name of the term.
        discriminator: Start of every branch's discriminator: the generator's trained one; a file with the state dict of
            the adapter's; ``"auto"``: the adapter's, untrained, with a warning; or ``None``.
        adversarial: ``"hinge"``, ``"non-saturating"`` or a `retroexit.plugins.training_types.Objective`; ``None``: the
            adapter's, else ``"hinge"`` for ``"megaportraits"``, else ``"non-saturating"``.
        discriminator_lr: Learning rate of the discriminators.
        gaze: Gaze network of the term ``"gaze"``.
    """

    losses: Mapping[str, float] | str = field(default_factory=lambda: DEFAULT_LOSSES)
    equalise: bool | int | None = None
    instead: Mapping[str, str] | None = None
    loss_weights: Mapping[str, str | Path] | None = None
    discriminator: nn.Module | str | Path | None = "auto"
    adversarial: Objective | str | None = None
    discriminator_lr: float = 4e-4
    gaze: nn.Module | None = None


def find_weights(losses: Mapping[str, float] | str, instead: Mapping[str, str] | None = None) -> dict[str, float]:
    """Return the weight of every term by name, after replacements; terms of weight 0 are left out."""
    if isinstance(losses, str):
        if losses not in PRESETS:
            raise OptionError(
                f"losses must be weights by name or one of {', '.join(map(repr, PRESETS))}, got {losses!r}"
            )
        losses = PRESETS[losses]
    numbers = list(losses.values()) if isinstance(losses, Mapping) else []
    if not all(is_number(number) and 0 <= number < math.inf for number in numbers) or not sum(numbers) > 0:
        raise OptionError(f"losses must have weights >= 0 by name, one of them > 0, got {losses!r}")
    weights = {name: float(weight) for name, weight in losses.items() if weight > 0}
    instead = instead or {}
    for name, other in instead.items():
        if name not in weights or other in weights:
            raise OptionError(
                f"instead must replace one of the losses {', '.join(weights)} by another one, got {other!r} "
                f"instead of {name!r}"
            )
    return {instead.get(name, name): weight for name, weight in weights.items()}


@dataclass(frozen=True)
class LossPlan:
    """What the losses of all branches are made from; raises `OptionError` if a term lacks something."""

    weights: Mapping[str, float]  # weight of every term by name
    terms: Mapping[str, Term | BatchTerm] = field(default_factory=dict)  # shared by branches
    discriminator: nn.Module | None = None  # starting point of every branch's adversary, or None
    objective: Objective | None = None  # what branch and discriminator minimise
    equalise: int = 0  # steps during which weights are equalised; 0 leaves them as they are
    discriminator_lr: float = 4e-4
    image_range: tuple[float, float] = (-1.0, 1.0)  # of the discriminator's images

    def __post_init__(self) -> None:
        if self.equalise < 0:
            raise OptionError(f"equalise must be >= 0, got {self.equalise}")
        competes = self.discriminator is not None and self.objective is not None
        for name in self.weights:
            is_adversarial = name in (ADVERSARIAL, FEATURE_MATCHING)
            if competes if is_adversarial else name in self.terms:
                continue
            rest = {other: weight for other, weight in self.weights.items() if other != name}
            part = "a discriminator" if is_adversarial else "a gaze network" if name == GAZE else "a term"
            argument = "discriminator" if is_adversarial else "gaze" if name == GAZE else "terms"
            raise OptionError(
                f"the loss {name!r} needs {part}, got none. Pass {argument}=..., or leave the term out: losses={rest}."
            )

    def for_branch(self) -> TrainingLoss:
        """Make the loss of one branch; its adversary starts as a copy of the discriminator."""
        adversary, terms = None, dict(self.terms)
        if {ADVERSARIAL, FEATURE_MATCHING} & set(self.weights):
            assert self.discriminator is not None and self.objective is not None
            adversary = Adversary(self.discriminator, self.objective, self.discriminator_lr, self.image_range)
            if ADVERSARIAL not in self.weights:
                adversary.module.eval()  # it is not trained
            terms |= {ADVERSARIAL: Adversarial(adversary), FEATURE_MATCHING: FeatureMatching(adversary)}
        return TrainingLoss(
            {name: (weight, terms[name]) for name, weight in self.weights.items()},
            adversary=adversary if ADVERSARIAL in self.weights else None,
            equaliser=Equaliser(list(self.weights), self.equalise) if self.equalise else None,
        )

    def describe(self) -> dict[str, Any]:
        """Return what a resumed fit must have in common with its first run, as JSON types."""
        facts: dict[str, Any] = {"weights": dict(self.weights), "equalise": self.equalise}
        if {ADVERSARIAL, FEATURE_MATCHING} & set(self.weights):
            assert self.discriminator is not None and self.objective is not None
            facts["objective"] = self.objective.name
            facts["discriminator"] = fingerprint(self.discriminator)
            facts["discriminator_lr"] = self.discriminator_lr
        gaze = self.terms.get(GAZE)
        return facts | ({GAZE: fingerprint(gaze.network)} if isinstance(gaze, Gaze) else {})


def plan_losses(
    generator: nn.Module,
    options: LossOptions,
    metric: QualityMetric | None,
    *,
    description: Description | None = None,
    missing: dict[str, WeightsError] | None = None,
) -> LossPlan:
    """Plan what branches are trained on, with the plug-ins' description of the generator by default.

    ``metric`` is the term ``"quality"``. ``missing`` collects the terms whose weights are not available and which are
    left out; with ``None`` they are an error.
    """
    weights = find_weights(options.losses, options.instead)
    equalise = isinstance(options.losses, str) if options.equalise is None else options.equalise
    discriminator, objective = None, None
    if {ADVERSARIAL, FEATURE_MATCHING} & set(weights):
        description = host().describe(generator) if description is None else description
        discriminator = _discriminator(generator, description, options.discriminator)
        described = None if description is None else description.adversarial
        default = "hinge" if options.losses == "megaportraits" else "non-saturating"
        objective = find_objective(options.adversarial or described or default)
    pixel_range = None if description is None else description.image_range
    terms = _terms(weights, metric, options.loss_weights or {}, missing)
    if options.gaze is not None:
        terms[GAZE] = Gaze(options.gaze)
    return LossPlan(
        {name: weight for name, weight in weights.items() if not missing or name not in missing},
        terms,
        discriminator=discriminator,
        objective=objective,
        equalise=_EQUALISE_STEPS if equalise is True else int(equalise),
        discriminator_lr=options.discriminator_lr,
        image_range=pixel_range or (-1.0, 1.0),
    )


def _terms(
    weights: Mapping[str, float],
    metric: QualityMetric | None,
    files: Mapping[str, str | Path],
    missing: dict[str, WeightsError] | None,
) -> dict[str, Term | BatchTerm]:
    for name in files:
        if name not in weights:
            raise OptionError(f"loss_weights must name one of {', '.join(weights)}, got {name!r}")
    terms: dict[str, Term | BatchTerm] = {}
    for name in weights:
        if name in (ADVERSARIAL, FEATURE_MATCHING, GAZE) or (missing and name in missing):
            continue
        try:
            terms[name] = _term(name, metric, files.get(name))
        except WeightsError as error:
            if missing is None:
                raise
            missing[name] = error
    return terms


def _term(name: str, metric: QualityMetric | None, file: str | Path | None) -> Term | BatchTerm:
    metric_name = None if metric is None else metric.name
    if name == LPIPS:
        name = metric_name if (metric_name or "").startswith("lpips-") and metric_name else "lpips-alex"
    if metric is not None and file is None and name in (QUALITY, metric_name):
        return metric
    options = {} if file is None else {"weights": file}
    is_metric = name not in host().names("loss") and name in host().names("metric")
    return host().metric(name, **options) if is_metric else host().loss(name, **options)


def _discriminator(
    generator: nn.Module, description: Description | None, source: nn.Module | str | Path | None
) -> nn.Module | None:
    if source is None or isinstance(source, nn.Module):
        return source
    if not isinstance(source, (str, Path)):
        raise OptionError(f"discriminator must be a module, a file, 'auto' or None, got {source!r}")
    module = None if description is None else _described_discriminator(description, generator)
    if source == "auto":
        if module is not None:
            warn(
                f"the discriminator {type(module).__name__} is untrained. Pass the generator's own, trained, "
                "as discriminator=module or discriminator=file.",
                5,
            )
        return module
    if module is None:
        raise OptionError(
            f"no adapter makes a discriminator for {type(generator).__name__} to load {str(source)!r} into. "
            "Pass discriminator=module."
        )
    path, advice = Path(source), f"Pass a file with a state dict of {type(module).__name__} as discriminator."
    state = read_torch(path, advice, WeightsError)
    with reading(path, advice, WeightsError):
        module.load_state_dict(state)
    check_finite(module.state_dict(), path, WeightsError)
    return module


def _described_discriminator(description: Description, generator: nn.Module) -> nn.Module | None:
    if description.discriminator is None:
        return None
    owner, advice = f"the discriminator of {description.name}", "Correct it, or pass discriminator=module."
    try:
        module: Any = description.discriminator(generator)
    except Exception as error:
        raise PluginError(f"{owner} raised {type(error).__name__}: {error}. {advice}") from error
    if not isinstance(module, nn.Module):
        raise PluginError(f"{owner} must be a torch.nn.Module, got a {type(module).__name__}")
    return module


class TrainingLoss:
    """A weighted sum of terms on images in [-1, 1]; every branch has its own.

    ``terms`` are weight and term by name. The adversary is trained after every step of the branch.
    """

    def __init__(
        self,
        terms: Mapping[str, tuple[float, Term | BatchTerm]],
        *,
        adversary: Adversary | None = None,
        equaliser: Equaliser | None = None,
    ) -> None:
        self.terms, self.adversary, self.equaliser = dict(terms), adversary, equaliser

    @property
    def needs_inputs(self) -> bool:
        """Whether ``batch.args`` and ``batch.kwargs`` are read."""
        terms = [term for _, term in self.terms.values() if isinstance(term, BatchTerm)]
        is_read = self.adversary is not None and self.adversary.needs_inputs
        return is_read or any(term.needs_inputs for term in terms)

    def __call__(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, float]]:
        """Compare a branch's images with the backbone's; returns the loss, and its terms without weights."""
        values = {name: _value(name, term, batch) for name, (_, term) in self.terms.items()}
        if self.adversary is not None:
            self.adversary.forget()
        weights = {name: weight for name, (weight, _) in self.terms.items()}
        if self.equaliser is not None:
            self.equaliser.observe(values, batch.image)
            weights = {name: weight * self.equaliser.factor(name) for name, weight in weights.items()}
        total = batch.image.new_zeros(())
        for name, value in values.items():
            total = total + weights[name] * value
        return total, {name: float(value.detach()) for name, value in values.items()}

    def to(self, device: torch.device) -> TrainingLoss:
        """Move terms and adversary to a device."""
        for _, term in self.terms.values():
            move: Any = getattr(term, "to", None)
            if callable(move):
                move(device)
        if self.adversary is not None:
            self.adversary.module.to(device)
        return self

    def state(self) -> dict[str, Tensor]:
        """Return the equaliser's tensors for a checkpoint; the adversary has a state of its own."""
        state = {} if self.equaliser is None else self.equaliser.state()
        return {f"equaliser.{name}": value for name, value in state.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load what `state` returned."""
        if self.equaliser is not None:
            self.equaliser.load_state({name.removeprefix("equaliser."): v for name, v in state.items()})


def _value(name: str, term: Term | BatchTerm, batch: TrainingBatch) -> Tensor:
    value = term.of_batch(batch) if isinstance(term, BatchTerm) else term(batch.image, batch.target)
    if not isinstance(value, Tensor) or value.shape not in ((), batch.image.shape[:1]):
        raise TrainingError(
            f"the loss {name!r} must return a scalar or one number per image, got "
            f"{tuple(value.shape) if isinstance(value, Tensor) else value!r} for images of shape "
            f"{tuple(batch.image.shape)}. Report this to the authors of the plug-in."
        )
    return value.float().mean()
