"""Choose an exit for every sample of a batch (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from retroexit.core.modules import compile_alone, count_macs
from retroexit.core.nested import tensors
from retroexit.errors import OptionError, TrainingError, warn
from retroexit.guidance.provider import GuideProvider
from retroexit.retrieval import SearchResult
from retroexit.routing.calibration import Calibration
from retroexit.routing.latency import Latency
from retroexit.routing.policy import RoutingRequest, Time, assign_by_budget, assign_exits, check_exit
from retroexit.routing.predictor import OODCounter, Predictor
from retroexit.routing.render import Choice
from retroexit.split.split import Begun
from retroexit.wrapping.decomposition import Decomposition


@dataclass(frozen=True, eq=False)
class LossPrediction:
    """Predicted losses of a batch."""

    losses: Tensor  # predicted loss of each branch exit, (N, K)
    is_ood: Tensor  # which samples are out of distribution, bool (N,)
    retrieved: SearchResult | None = None  # of the search in the bank, where the predictor reads the distance

    @property
    def guarded(self) -> Tensor:
        """Predicted losses, infinite for samples that are out of distribution."""
        return self.losses.masked_fill(self.is_ood[:, None], torch.inf)


class Router(nn.Module):
    """Chooses exits from predicted losses, measured times and the out-of-distribution guard.

    Attributes:
        predictor: Predicts losses ``(N, K)``; ``None`` before `retroexit.fit`.
        calibration: Makes a threshold a promise; ``None`` before ``model.calibrate``.
        latency: Measured times of the exits; ``None`` before ``model.measure_latency``.
        ood_counter: Counts samples that were out of distribution and went to the backbone.
        guide_limit: Mean distance of an input's patches to their guides beyond which it is out of distribution;
            ``None`` for no limit.
    """

    def __init__(self, predictor_inputs: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.predictor: nn.Module | None = None
        self.calibration: Calibration | None = None
        self.latency: Latency | None = None
        self.ood_counter = OODCounter()
        self.guide_limit: float | None = None
        self.predictor_inputs = predictor_inputs
        self._decomposition: Decomposition | None = None
        self._guide = GuideProvider()
        self._predictor_macs: tuple[nn.Module, tuple[int, ...], int] | None = None
        self._void: tuple[Calibration | None, dict[str, str]] = (None, {})
        self._estimate = estimate

    def __getstate__(self) -> dict[str, Any]:
        # The decomposition and the provider of guides belong to one recording: a copy is attached to its own.
        own = {"_decomposition": None, "_guide": GuideProvider(), "_predictor_macs": None, "_estimate": estimate}
        return self.__dict__ | own

    def attach(self, decomposition: Decomposition, guide: GuideProvider) -> None:
        """Take the exits of a recorded generator and the provider of their guides."""
        self._decomposition, self._guide = decomposition, guide

    def compile(self, **options: Any) -> None:
        """Compile the prediction, with options of `torch.compile`."""
        self._estimate = compile_alone(estimate, **options)

    # Choosing.

    @torch.no_grad()
    def choose(self, begun: Begun, request: RoutingRequest, count: bool = True) -> Choice:
        """Choose an exit for every sample of a batch at the first cut; `ood_counter` counts it if ``count``.

        Raises:
            OptionError: If the request cannot be met.
            TrainingError: If a predictor, calibration or measured time is needed and missing.
            BankError: If the guidance bank is needed and missing.
        """
        exit = self.exits if request.exit is None else check_exit(request.exit, self.exits)
        exits = torch.full((begun.samples,), exit, device=begun.key_feature.device)
        if request.exit is not None:
            return Choice(exits)
        retrieved, losses = None, None
        if request.needs_losses:
            prediction = self.predict(begun)
            exits, retrieved, is_ood = (self._assign(prediction, request), prediction.retrieved, prediction.is_ood)
            # Under a deadline a sample cannot be sent to the backbone afterwards.
            if self.ood_counter.enabled and request.deadline_ms is None:
                exits, retrieved, is_far = self._check_guides(exits, retrieved, begun)
                is_ood = is_ood | is_far
            if self.ood_counter.enabled:
                losses = prediction.losses.masked_fill(is_ood[:, None], torch.inf)
                if count:
                    self.ood_counter.add(is_ood)
            else:
                losses = prediction.losses
        if request.deadline_ms is not None:
            exits = exits.max().clamp_max(self._last_in_time(request.deadline_ms, exits)).expand_as(exits)
        if not self._divides:
            exits = exits.max().expand_as(exits)  # the batch leaves together, at the deepest exit chosen
        if request.threshold is not None and self.calibration is not None:
            self._check_promise(prediction, exits, begun.feature, request)
        return Choice(exits, retrieved, losses)

    @torch.no_grad()
    def predict(self, begun: Begun) -> LossPrediction:
        """Predict the loss of every branch exit; `TrainingError` if there is no predictor."""
        if self.predictor is None:
            raise TrainingError(
                "choosing exits needs a predictor, but the model has none. Run retroexit.fit first, or choose "
                "with exit=k."
            )
        inputs, retrieved, reads = [begun.feature], None, self.reads
        if self.needs_adapter:
            assert self.predictor_inputs is not None
            inputs = [self.predictor_inputs(*begun.args, **begun.kwargs)]
        elif reads == "inputs":
            inputs = [input_map(begun.args, begun.kwargs, begun.feature.dim() - 2)]
        elif reads == "features+distance":
            retrieved = self._guide.retrieve(begun)
            inputs.append(guide_distance(retrieved.distances).to(begun.feature.device))
        losses, distance = self._estimate(self.predictor, inputs, 1 if reads == "inputs" else self._rows_per_sample)
        return LossPrediction(losses, distance > 1, retrieved)

    def _guarded(self, prediction: LossPrediction) -> Tensor:
        """Predicted losses ``(N, K)``, infinite out of distribution unless the guard is off."""
        return prediction.guarded if self.ood_counter.enabled else prediction.losses

    def _assign(self, prediction: LossPrediction, request: RoutingRequest) -> Tensor:
        losses = self._guarded(prediction)
        if request.choose is not None:
            limits = None if request.threshold is None else self._limits(losses, request.threshold)
            exits = request.choose(losses, limits).to(losses.device)
            if exits.shape != losses.shape[:1] or not bool(((exits >= 1) & (exits <= self.exits)).all()):
                raise OptionError(
                    f"a policy must give one exit from 1 to {self.exits} for each of {len(losses)} samples, got "
                    f"{exits.tolist()}."
                )
            return exits
        if request.threshold is not None:
            return assign_exits(losses, self._limits(losses, request.threshold))
        assert request.budget is not None
        return self._by_budget(losses, request.budget)

    def _limits(self, losses: Tensor, threshold: float | Tensor) -> Tensor:
        """Largest prediction that each exit may have under a threshold, ``(K,)`` or ``(N, K)``."""
        _check_count(threshold, "threshold", losses)
        if self.calibration is not None:
            return self.calibration.limits(threshold).to(losses)
        if isinstance(threshold, Tensor) and threshold.dim():
            return threshold.to(losses)[:, None].expand_as(losses)
        return losses.new_full((losses.shape[1],), float(threshold))

    def _by_budget(self, losses: Tensor, budget: float | Tensor | Time) -> Tensor:
        """Spend a budget on inputs like the calibration set on average."""
        if self.calibration is None:
            raise TrainingError(
                f"budget={budget} needs a calibration, but the model has none. Call model.calibrate(inputs) first."
            )
        costs = self.shares()
        if isinstance(budget, Time):
            latency = self._measured(f"budget={budget}")
            latency.check(f"budget={budget}", latency.batch, losses.device)
            costs, budget = budget.costs(latency)
        _check_count(budget, "budget", losses)
        budgets = torch.as_tensor(budget, dtype=torch.float64)
        multipliers = [self.calibration.lagrange_multiplier(costs, b) for b in budgets.reshape(-1).tolist()]
        return assign_by_budget(losses, costs, torch.tensor(multipliers, dtype=torch.float64))

    def _check_guides(
        self, exits: Tensor, retrieved: SearchResult | None, begun: Begun
    ) -> tuple[Tensor, SearchResult | None, Tensor]:
        """Send samples that are too far from their guides to the backbone, which needs no guide."""
        is_far = torch.zeros_like(exits).bool()
        early = (exits < self.exits).nonzero()[:, 0]
        if self.guide_limit is None or self._guide.taps is None or self._rows_per_sample > 1 or not len(early):
            return exits, retrieved, is_far
        if retrieved is None:
            retrieved = self._guide.retrieve(begun, early).spread(early, len(exits))
        distance = guide_distance(retrieved.distances)[:, 0].to(exits.device)
        is_far[early] = distance[early] > self.guide_limit
        return exits.masked_fill(is_far, self.exits), retrieved, is_far

    def _last_in_time(self, deadline_ms: float, exits: Tensor) -> int:
        latency = self._measured(f"deadline_ms={deadline_ms:g}")
        return latency.last_within(deadline_ms, len(exits), exits.device)

    def _measured(self, option: str) -> Latency:
        if self.latency is None:
            raise TrainingError(
                f"{option} needs measured times, but the model has none. Call model.measure_latency(*inputs) on this "
                "machine first."
            )
        return self.latency

    def _check_promise(
        self, prediction: LossPrediction, exits: Tensor, feature: Tensor, request: RoutingRequest
    ) -> None:
        """Warn, once per kind and calibration, where the promise does not cover a call."""
        assert request.threshold is not None
        reasons = self.differences(feature)
        losses = self._guarded(prediction)
        promised = assign_exits(losses, self._limits(losses, request.threshold))
        if not bool(((exits == promised) | (exits == self.exits)).all()):
            reasons["exits"] = "the samples of a batch left together, at another exit than the limits give some of them"
            if request.choose is not None:
                reasons["exits"] = "hysteresis or a policy of your own took other exits than the limits give"
            elif request.deadline_ms is not None:
                reasons["exits"] = "a deadline took other exits than the limits give"
        for kind, reason in reasons.items():
            if kind not in self._reasons:
                self._reasons[kind] = reason
                warn(f"the promise is void for this call: {reason}.", 6)

    def differences(self, feature: Tensor | None) -> dict[str, str]:
        """List in what a call differs from the calibration, by kind: the guard, size of the feature, precision."""
        reasons = {} if self.ood_counter.enabled else {"guard": "the guard against other inputs is off"}
        facts = {} if feature is None else circumstances(feature)
        for name, value in facts.items():
            calibrated = {} if self.calibration is None else self.calibration.about
            if calibrated.get(name, value) != value:
                reasons[name] = f"{name.replace('_', ' ')} is {value}, calibrated was {calibrated[name]}"
        return reasons

    @property
    def _reasons(self) -> dict[str, str]:
        """Why the promise of this calibration was void in some calls, by kind."""
        if self._void[0] is not self.calibration:
            self._void = (self.calibration, {})
        return self._void[1]

    # Facts.

    def void(self, feature: Tensor | None = None) -> list[str]:
        """List why the promise does not hold: with the present settings, in calls so far, or for a feature."""
        if self.calibration is None:
            return []
        return list((self.differences(feature) | self._reasons).values())

    @property
    def promised(self) -> tuple[float, ...] | None:
        """The thresholds that the calibration promises, empty for any; ``None`` without a calibration."""
        if self.calibration is None:
            return None
        return self.calibration.thresholds if isinstance(self.calibration.thresholds, tuple) else ()

    @property
    def reads(self) -> str:
        """What the predictor reads: ``"features"``, ``"inputs"`` or ``"features+distance"``."""
        choice = self.predictor.reads if isinstance(self.predictor, Predictor) else None
        return choice or ("features" if self.predictor_inputs is None else "inputs")

    @property
    def needs_adapter(self) -> bool:
        """Whether the predictor reads a map that an adapter makes from the inputs."""
        return self.predictor_inputs is not None and self.reads == "inputs"

    @property
    def exits(self) -> int:
        """Number of exits, K + 1."""
        return len(self._recorded.places) + 1

    def overhead(self) -> list[int]:
        """MACs of predictor and search in a routed call, per exit and for one sample.

        The search is paid at a branch, and everywhere if the predictor reads the distance to the guide.
        """
        predictor, search = self._count_predictor(), self._guide.search_macs()
        always = self.reads == "features+distance"
        return [predictor + search] * (self.exits - 1) + [predictor + search * always]

    def shares(self) -> Tensor:
        """Compute of a routed sample at every exit as a share of the backbone's, ``(K + 1,)``."""
        backbone = self._recorded.backbone_macs
        macs = torch.tensor([*self._recorded.route_macs, backbone]) + torch.tensor(self.overhead())
        return macs / backbone

    def _count_predictor(self) -> int:
        """MACs of the predictor for one sample."""
        if self.predictor is None:
            return 0
        shape = getattr(self.predictor, "input_shape", None) or self._recorded.feature_shape
        # The cache holds the predictor itself: an id() could be that of an earlier, freed one.
        if self._predictor_macs is None or self._predictor_macs[:2] != (self.predictor, shape):
            device = next((p.device for p in self.predictor.parameters()), torch.device("cpu"))
            macs = count_macs(self.predictor, torch.zeros(1, *shape, device=device))
            self._predictor_macs = (self.predictor, shape, macs)
        return self._predictor_macs[2]

    @property
    def _recorded(self) -> Decomposition:
        assert self._decomposition is not None, "the model records its generator before it routes"
        return self._decomposition

    @property
    def _divides(self) -> bool:
        """Whether samples of one batch may leave at different exits."""
        return self._recorded.split.mixes and (self._guide.taps is None or self._rows_per_sample == 1)

    @property
    def _rows_per_sample(self) -> int:
        """Rows of one sample in the first feature, into which frames may be folded."""
        return self._recorded.split.rows_per_sample


def estimate(predictor: nn.Module, inputs: Sequence[Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """Run a predictor on what it reads, where each sample has some rows.

    Returns:
        Losses ``(N, K)`` in float32, infinite where they are not finite, and the distance ``(N,)`` of each sample from
        the fitting set, 0 for a predictor that measures none.
    """
    if isinstance(predictor, Predictor):
        losses, distance = predictor.predict_losses(*inputs)  # (rows, K), (rows,)
    else:
        losses = predictor(*inputs)
        distance = losses.new_zeros(losses.shape[0])
    if rows > 1:  # the frames of a sample leave together
        losses = losses.unflatten(0, (-1, rows)).mean(dim=1)
        distance = distance.unflatten(0, (-1, rows)).amax(dim=1)
    losses = losses.float()  # limits are compared in float32
    return torch.where(losses.isfinite(), losses, torch.inf), distance  # what is not finite says nothing


def circumstances(feature: Tensor) -> dict[str, Any]:
    """Size and precision of the first feature ``(N, C, ...)``, which a promise is tied to, as JSON types."""
    kind = feature.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else feature.dtype
    return {"feature_size": list(feature.shape[2:]), "precision": str(dtype).removeprefix("torch.")}


def guide_distance(squared: Tensor) -> Tensor:
    """Mean distance of a sample's patches to their guides: squared distances ``(N, ...) -> (N, 1)``."""
    return squared.clamp_min(0).sqrt().flatten(1).mean(1, keepdim=True)


def input_map(args: Any, kwargs: Any, dims: int) -> Tensor:
    """Put all tensors of a generator's inputs into one float32 map ``(N, C, ...)`` with ``dims`` spatial axes.

    Maps are resized to the largest one; vectors are spread over it; other tensors are left out. `OptionError` if no
    input is a map or a vector.
    """
    usable = [t.float() for t in tensors((args, kwargs)) if t.dim() > 0 and not t.is_complex()]
    maps = [t for t in usable if t.dim() == dims + 2]
    vectors = [t[:, None] if t.dim() == 1 else t for t in usable if t.dim() in (1, 2) and t.dim() != dims + 2]
    if not maps and not vectors:
        raise OptionError(
            "predict_from='inputs' needs a map (N, C, ...) or a vector (N, D) among the inputs, got neither. "
            "Use predict_from='features'."
        )
    size = max((t.shape[2:] for t in maps), key=lambda s: s.numel(), default=torch.Size((1,) * dims))
    parts = [t if t.shape[2:] == size else functional.interpolate(t, tuple(size)) for t in maps]
    parts += [t[(...,) + (None,) * dims].expand(*t.shape, *size) for t in vectors]
    return torch.cat(parts, 1)


def _check_count(values: float | Tensor, name: str, losses: Tensor) -> None:
    if isinstance(values, Tensor) and values.dim() and len(values) != len(losses):
        raise OptionError(f"{name} must be one number or one per sample, got {len(values)} for {len(losses)} samples.")
