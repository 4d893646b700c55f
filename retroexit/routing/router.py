"""Calls whose exits are chosen by the predictor, and what makes that choice keep its word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retroexit.errors import OptionError, TrainingError
from retroexit.routing.calibration import Calibration
from retroexit.routing.latency import Latency, time_exits
from retroexit.routing.ood_guard import GUIDE_LIMIT, OODCounter
from retroexit.routing.predict import LossPrediction, guide_distance, predict_losses, reads_of
from retroexit.routing.predictor import Predictor
from retroexit.routing.render import leave_in_turn
from retroexit.routing.request import RoutingRequest
from retroexit.routing.video import StickyRouter
from retroexit.split.split import SplitGenerator, Values

if TYPE_CHECKING:
    from retroexit.guidance.bank import GuidanceBank, Retrieved
    from retroexit.wrapping.build import Decomposition, WrapOptions

__all__ = ["Policy", "RoutedCalls"]

Policy = Callable[[Tensor, "Tensor | None"], Tensor]


class RoutedCalls(nn.Module):
    """The part of `retroexit.model.EarlyExitGenerator` that chooses exits."""

    # What the class itself brings: the generator in pieces, its branches and its bank.
    options: WrapOptions
    branches: nn.ModuleList
    bank: GuidanceBank | None
    about: dict[str, Any]
    if TYPE_CHECKING:

        @property
        def decomposition(self) -> Decomposition: ...  # noqa: D102
        @property
        def split(self) -> SplitGenerator: ...  # noqa: D102
        @property
        def is_recorded(self) -> bool: ...  # noqa: D102
        @property
        def _folded(self) -> int: ...

        record: Callable[..., None]
        route: Callable[..., Any]
        _leave: Callable[..., Any]
        _guide: Callable[..., Tensor | None]
        _need_bank: Callable[[], GuidanceBank]

    def __init__(self) -> None:
        super().__init__()
        self.predictor: Predictor | None = None
        self.calibration: Calibration | None = None
        self.latency: Latency | None = None
        self.drift = OODCounter()

    def overhead(self) -> list[int]:
        """MACs that a routed call pays besides the route itself, per exit and for one sample.

        Every routed sample pays for the predictor, the drift guard within it counted; a sample that leaves
        at a branch pays for the search in the bank too, and every sample where the predictor reads the
        distance to its guide.
        """
        predictor = self.decomposition.predictor_macs(self.predictor)
        search = self.decomposition.search_macs(self.bank)
        always = reads_of(self.predictor, None) == "features+distance"
        return [predictor + search] * len(self.branches) + [predictor + search * always]

    def shares(self) -> Tensor:
        """Compute of a routed sample at every exit as a share of the backbone's, ``(K + 1,)``."""
        backbone = self.decomposition.backbone_macs
        macs = torch.tensor([*self.decomposition.route_macs, backbone]) + torch.tensor(self.overhead())
        return macs / backbone

    def routed(
        self,
        *inputs: Any,
        threshold: float | Tensor | None = None,
        budget: float | Tensor | None = None,
        deadline_ms: float | None = None,
        choose: Policy | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Tensor]:
        """Render images as ``model(*inputs, threshold=...)`` does, and tell where each sample left.

        Args:
            *inputs: The generator's positional inputs.
            threshold: See `forward`.
            budget: See `forward`.
            deadline_ms: See `forward`.
            choose: A policy of your own: gives exits ``(N,)`` for predicted losses ``(N, K)``, which are
                infinite for inputs too far from the fitting set, and the limits ``(K,)`` or ``(N, K)`` that
                the threshold sets them.
            **kwargs: The generator's keyword inputs.

        Returns:
            A value with the structure of the generator's output, and exit indices ``(N,)`` from 1, ``K + 1``
            for the backbone.

        Raises:
            OptionError, InputMismatchError, TrainingError, BankError: See `forward`.
        """
        request = RoutingRequest(threshold, budget, deadline_ms)
        if not request and choose is None:
            raise OptionError("asked for a routed call; found neither threshold, budget nor deadline_ms.")
        if not self.is_recorded:
            self.record(*inputs, **kwargs)
        return self._routed(inputs, kwargs, request, choose)

    def predict(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Predict the quality loss of every branch exit.

        Args:
            *inputs: The generator's positional inputs.
            **kwargs: The generator's keyword inputs.

        Returns:
            Predicted losses ``(N, K)``.

        Raises:
            TrainingError: If there is no predictor yet.
        """
        return self.predict_losses(*inputs, **kwargs).predicted

    def predict_losses(self, *inputs: Any, **kwargs: Any) -> LossPrediction:
        """Predict losses, and tell which samples are too far from the fitting set to be trusted to them."""
        if not self.is_recorded:
            self.record(*inputs, **kwargs)
        with torch.no_grad():
            begun = self.split.begin(inputs, kwargs)
            return self._predict(begun.values, begun.key_feature, inputs, kwargs)

    def choose_exits(
        self,
        *inputs: Any,
        threshold: float | Tensor | None = None,
        budget: float | Tensor | None = None,
        deadline_ms: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Tell where each sample would leave: exit indices ``(N,)`` from 1, ``K + 1`` for the backbone."""
        if not self.is_recorded:
            self.record(*inputs, **kwargs)
        with torch.no_grad():
            begun = self.split.begin(inputs, kwargs)
            request = RoutingRequest(threshold, budget, deadline_ms)
            return self._exits(begun.values, begun.key_feature, inputs, kwargs, request)[0]

    # What routing goes by.

    def calibrate(
        self,
        inputs: Sequence[Any],
        alpha: float = 0.05,
        confidence: float = 0.95,
        **settings: Any,
    ) -> Calibration:
        """Make thresholds promises: P(loss > threshold) <= alpha on inputs like these; see `Calibration`.

        Args:
            inputs: Samples without the batch axis that nothing was fitted on, drawn as later inputs will be.
            alpha: Share of inputs that may lose more than the threshold, in (0, 1).
            confidence: Probability over the draw of these inputs that the promise holds, in (0, 1).
            **settings: ``metric`` (by default the one of the fit), ``weights``, ``rule``, ``seed``,
                ``batch``, ``progress``.

        Returns:
            The calibration, which is now part of the model and saved with it.

        Raises:
            OptionError: If there are too few inputs, with the number needed.
            TrainingError: If there is no predictor yet.
        """
        from retroexit.api import calibrate

        return calibrate(self, inputs, alpha, confidence, **settings)  # type: ignore[arg-type]

    def measure_latency(self, *inputs: Any, runs: int = 20, **kwargs: Any) -> Latency:
        """Time every exit on this machine for calls like this one, for ``deadline_ms``.

        Args:
            *inputs: The generator's positional inputs; their batch size is the one that deadlines hold for.
            runs: Timed calls per exit.
            **kwargs: The generator's keyword inputs.

        Returns:
            The times, which are now part of the model and saved with it.
        """
        if not self.is_recorded:
            self.record(*inputs, **kwargs)
        values = self.split.begin(inputs, kwargs).values
        rows = self._samples(values)

        def call(k: int) -> None:
            if self.predictor is None:
                self.route(inputs, kwargs, exit=k)
            else:
                self._routed(
                    inputs, kwargs, RoutingRequest(), lambda *_: torch.full((rows,), k), counted=False
                )

        with torch.no_grad():
            device = self.split.crossing(values, 0)[0].device
            self.latency = time_exits(call, len(self.branches) + 1, rows, device, runs)
        return self.latency

    def video(self, hysteresis: float = 0.1) -> StickyRouter:
        """Route the frames of a video, without flicker between exits: ``with model.video() as step: ...``.

        Args:
            hysteresis: See `StickyRouter`.
        """
        return StickyRouter(self, hysteresis)

    # How exits are chosen.

    def _samples(self, values: Values) -> int:
        return len(self.split.crossing(values, 0)[0]) // self._folded

    def _predict(self, values: Values, key_feature: Tensor, args: Any, kwargs: Any) -> LossPrediction:
        if self.predictor is None:
            raise TrainingError(
                "asked for a threshold; found no predictor. Run retroexit.fit first, or choose with exit=k.",
                self,
            )

        def search() -> Retrieved:
            taps = self.decomposition.taps
            assert taps is not None
            return self._need_bank().search(taps.query(key_feature, args, kwargs))

        source = self.options.predictor_inputs
        return predict_losses(self.predictor, self.split, values, (args, kwargs), source, search)

    def _choose(
        self, request: RoutingRequest, prediction: LossPrediction, policy: Policy | None = None
    ) -> Tensor:
        predicted = prediction.guarded if self.drift.enabled else prediction.predicted
        if policy is None:
            shares = None if request.budget is None else self.shares()
            return request.choose(predicted, shares, self.calibration)
        limits = None if request.threshold is None else request.limits(predicted, self.calibration)
        exits, last = policy(predicted, limits).to(predicted.device), len(self.branches) + 1
        if exits.shape != predicted.shape[:1] or not bool(((exits >= 1) & (exits <= last)).all()):
            raise OptionError(
                f"asked a policy for the exits of {len(predicted)} samples; found {exits.tolist()}. Give one "
                f"number from 1 to {last} for each.",
                exits,
            )
        return exits

    def _exits(
        self,
        values: Values,
        key_feature: Tensor,
        args: Any,
        kwargs: Any,
        request: RoutingRequest,
        policy: Policy | None = None,
    ) -> tuple[Tensor, Retrieved | None, Tensor | None]:
        """Choose exits; gives what was looked up on the way, and who is too far, where that was asked."""
        if policy is None and not request.weighs_losses:
            last = torch.full((self._samples(values),), len(self.branches) + 1, device=key_feature.device)
            return request.in_time(last, self.latency), None, None
        prediction = self._predict(values, key_feature, args, kwargs)
        exits, found, far = self._choose(request, prediction, policy), prediction.found, prediction.far
        if self.drift.enabled and request.deadline_ms is None:  # which would not allow for the backbone
            exits, found, strange = self._within_reach(exits, found, key_feature, args, kwargs)
            far = far | strange
        return request.in_time(exits, self.latency), found, far

    def _within_reach(
        self, exits: Tensor, found: Retrieved | None, key_feature: Tensor, args: Any, kwargs: Any
    ) -> tuple[Tensor, Retrieved | None, Tensor]:
        """Send samples whose guides are too far from them to the backbone; who takes no guide needs none."""
        limit, taps, far = (
            self.about.get(GUIDE_LIMIT),
            self.decomposition.taps,
            torch.zeros_like(exits).bool(),
        )
        early = (exits <= len(self.branches)).nonzero()[:, 0]
        if limit is None or taps is None or self._folded > 1 or not len(early):
            return exits, found, far
        if found is None:
            found = (
                self._need_bank()
                .search(taps.query(key_feature, args, kwargs)[early])
                .spread(early, len(exits))
            )
        distance = guide_distance(found.distances)[:, 0].to(exits.device)
        far[early] = distance[early] > limit
        return exits.masked_fill(far, len(self.branches) + 1), found, far

    def is_ood(
        self, values: Values, key_feature: Tensor, args: Any, kwargs: dict[str, Any], exits: Tensor
    ) -> Tensor:
        """Ask the drift guard who is too far from what predictor and bank have seen, bool ``(N,)``.

        Args:
            values: What crosses the first cut.
            key_feature: The feature that keys are cut from.
            args: The generator's inputs.
            kwargs: Those by keyword.
            exits: The first exit that each sample takes anything from, ``(N,)``, from 1.
        """
        if not self.drift.enabled or self.predictor is None:
            return torch.zeros(self._samples(values), dtype=torch.bool)
        prediction = self._predict(values, key_feature, args, kwargs)
        strange = self._within_reach(
            exits.to(key_feature.device), prediction.found, key_feature, args, kwargs
        )[2]
        return prediction.far.to(strange.device) | strange

    def _routed(
        self,
        args: Any,
        kwargs: Any,
        request: RoutingRequest,
        policy: Policy | None = None,
        counted: bool = True,
    ) -> tuple[Any, Tensor]:
        with torch.no_grad():
            begun = self.split.begin(args, kwargs)
            values, key_feature = begun.values, begun.key_feature
            exits, found, far = self._exits(values, key_feature, args, kwargs, request, policy)
            if far is not None and self.drift.enabled and counted:
                self.drift.note(far)
        if not self.split.mixes or (self.decomposition.taps is not None and self._folded > 1):
            # The batch cannot be divided: everybody takes the deepest exit chosen.
            exits = exits.max().expand_as(exits)
        early = (exits <= len(self.branches)).nonzero()[:, 0]
        # One search for all that leave early, none for the others.
        guide = self._guide(key_feature, args, kwargs, early, found)

        def leave(part: Values, index: int, rows: Tensor) -> Any:
            own = None if guide is None else guide[torch.searchsorted(early, rows)]
            return self._leave(part, index, own)

        return leave_in_turn(self.split, values, exits, leave), exits
