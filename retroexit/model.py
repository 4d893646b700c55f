"""The wrapped generator: its routes, routed calls, batches whose samples leave at different exits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.core.nested import clone_strided
from retroexit.errors import BankError, CheckpointError, NotRecordedError, OptionError
from retroexit.guidance.bank import GuidanceBank, Retrieved
from retroexit.routing.request import RoutingRequest
from retroexit.routing.router import RoutedCalls
from retroexit.split.split import SplitGenerator, Values
from retroexit.wrapping.build import Decomposition, WrapOptions, decompose
from retroexit.wrapping.exits import Exit, list_exits

__all__ = ["EarlyExitGenerator"]


class EarlyExitGenerator(RoutedCalls):
    """A generator with early exits. Made by `retroexit.wrap`.

    ``model(*inputs)`` is the generator, bit for bit. ``exit=k`` leaves at exit k, ``threshold=t`` routes
    every sample to the cheapest exit whose predicted quality loss is at most ``t``, ``budget=b`` spends a
    share of the backbone's compute, ``deadline_ms=d`` keeps a call within measured times.

    Attributes:
        generator: The user's generator, never changed.
        options: How it was wrapped.
        branches: The thin branches, cheapest first. Empty until the generator has been recorded.
        predictor: The predictor, or ``None`` before `retroexit.fit`.
        calibration: What makes a threshold a promise, or ``None`` before `calibrate`: a threshold is then
            what the predictor expects.
        latency: Measured times of the exits, or ``None`` before `measure_latency`.
        drift: Counts inputs that are too far from the fitting set and went to the backbone.
    """

    def __init__(self, generator: nn.Module, options: WrapOptions) -> None:
        super().__init__()
        self.generator = generator
        self.options = options
        self.branches = nn.ModuleList()
        self.about: dict[str, Any] = {}
        self._decomposition: Decomposition | None = None
        self._bank: GuidanceBank | None = None
        self._saved: dict[str, Tensor] | None = None
        self._lock = threading.Lock()
        self.eval()

    # Recording.

    @property
    def is_recorded(self) -> bool:
        """Tell whether the generator has been recorded, so that exits exist."""
        return self._decomposition is not None

    def record(self, *inputs: Any, **kwargs: Any) -> None:
        """Record the generator on these inputs and build the branches, unless that is done already.

        Raises:
            RetroExitError: Whatever keeps the generator from being wrapped; see `retroexit.wrap`.
        """
        with self._lock:
            if self._decomposition is None:
                decomposition, branches = decompose(self.generator, self.options, inputs, kwargs)
                decomposition.check_bank(self._bank)
                self.branches.extend(branches)
                if self._saved is not None:
                    self._load_saved(self._saved)
                self._decomposition = decomposition

    @property
    def bank(self) -> GuidanceBank | None:
        """The guidance bank; one of another backbone, other taps or other patches cannot be set.

        Raises:
            BankError: On setting one that does not fit, or one of a model without guidance.
        """
        return self._bank

    @bank.setter
    def bank(self, bank: GuidanceBank | None) -> None:
        if self._decomposition is not None:  # else it is compared once the taps are known
            self._decomposition.check_bank(bank)
        self._bank = bank

    def restore(self, weights: dict[str, Tensor]) -> None:
        """Give the branches saved weights, now or when the generator is recorded.

        Raises:
            CheckpointError: If they do not fit.
        """
        self._saved = weights
        if self.is_recorded:
            self._load_saved(weights)

    def _load_saved(self, weights: dict[str, Tensor]) -> None:
        try:
            self.branches.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(
                "asked to load saved branches; found that they do not fit: "
                f"{str(error).splitlines()[-1].strip()}",
                self,
            ) from error
        self._saved = None

    def save(self, folder: str | Path) -> Path:
        """Write branches, predictor, bank and settings to a folder; the generator itself is not saved.

        Raises:
            NotRecordedError: If there are no branches yet.
        """
        from retroexit.load import save_model

        return save_model(self, folder)

    @property
    def decomposition(self) -> Decomposition:
        """What is known of the generator once it has been recorded.

        Raises:
            NotRecordedError: If it has not.
        """
        if self._decomposition is None:
            raise NotRecordedError(
                "asked for the exits; found that the generator has not been recorded yet. Call the model "
                "once, or pass example_inputs to retroexit.wrap.",
                self,
            )
        return self._decomposition

    @property
    def split(self) -> SplitGenerator:
        """The generator in pieces."""
        return self.decomposition.split

    @property
    def exits(self) -> list[Exit]:
        """The K branch exits, cheapest first, then the backbone."""
        return list_exits(self.decomposition, self.branches, self.generator)

    # Calls.

    def forward(
        self,
        *inputs: Any,
        exit: int | None = None,
        threshold: float | Tensor | None = None,
        budget: float | Tensor | None = None,
        deadline_ms: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render images.

        Args:
            *inputs: The generator's positional inputs.
            exit: Leave at this exit, from 1; ``K + 1`` is the backbone.
            threshold: Largest quality loss to accept, ``>= 0``, one for all or one per sample ``(N,)``; each
                sample takes the cheapest exit predicted to keep it, or, once the model is calibrated, the
                cheapest that keeps the promise of its `Calibration`.
            budget: Mean share of the backbone's compute to spend, predictor and retrieval counted, on inputs
                like those of the calibration; see `RoutingRequest`. One for all, or one per sample ``(N,)``.
            deadline_ms: Milliseconds that this call may take, by `measure_latency`; also as a limit on what
                a threshold or budget chooses.
            **kwargs: The generator's keyword inputs.

        Returns:
            A value with the structure of the generator's output.

        Raises:
            OptionError: If request exclude one another, cannot be met, or are out of range.
            InputMismatchError: If the inputs differ from the recording where that matters.
            TrainingError: If there is no predictor, calibration or measured time yet, and one is needed.
            BankError: If the branches take a guide and there is no bank yet.
        """
        own: dict[str, Any] = {"exit": exit, "threshold": threshold, "budget": budget}
        own |= {"deadline_ms": deadline_ms}
        for name in self.options.shadowed:
            value = own.pop(name)
            if value is not None:
                kwargs[name] = value
        return self.route(inputs, kwargs, **own)

    def route(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        *,
        exit: int | None = None,
        threshold: float | Tensor | None = None,
        budget: float | Tensor | None = None,
        deadline_ms: float | None = None,
    ) -> Any:
        """Render images, with the generator's arguments apart from ours.

        Args:
            args: The generator's positional inputs.
            kwargs: The generator's keyword inputs.
            exit: See `forward`.
            threshold: See `forward`.
            budget: See `forward`.
            deadline_ms: See `forward`.

        Returns:
            A value with the structure of the generator's output.
        """
        args, kwargs = tuple(args), dict(kwargs or {})
        request = RoutingRequest(threshold, budget, deadline_ms)
        if exit is not None and request:
            named = " and ".join(f"{name}={value}" for name, value in request.given().items())
            raise OptionError(
                f"asked for exit={exit} and {named}; found two ways to choose an exit. Pass one of them.",
                exit,
            )
        if not self.is_recorded:
            self.record(*args, **kwargs)
        if request:
            return self._routed(args, kwargs, request)[0]
        if exit is None or self._check_exit(exit) == len(self.branches) + 1:
            return self.generator(*args, **kwargs)
        with torch.no_grad():
            begun = self.split.begin(args, kwargs)
            values, key_feature = begun.values, begun.key_feature
            guide = self._guide(key_feature, args, kwargs)
            for index in range(1, exit):
                values = self.split.advance(values, index)
        return self._leave(values, exit - 1, guide)

    def all_exits(self, *inputs: Any, **kwargs: Any) -> list[Any]:
        """Render every exit from one pass over the backbone.

        Args:
            *inputs: The generator's positional inputs.
            **kwargs: The generator's keyword inputs.

        Returns:
            K + 1 outputs, cheapest exit first. The last one, the backbone's, carries no gradient here.
        """
        if not self.is_recorded:
            self.record(*inputs, **kwargs)
        with torch.no_grad():
            begun = self.split.begin(inputs, kwargs)
            values, key_feature = begun.values, begun.key_feature
            guide = self._guide(key_feature, inputs, kwargs)
        outputs = []
        for index in range(len(self.branches)):
            if index:
                with torch.no_grad():
                    values = self.split.advance(values, index)
            # What a branch draws, the rest of the backbone draws too: the generator's own numbers for
            # everybody.
            with torch.random.fork_rng(devices=self.split.cuda_devices):
                outputs.append(self._leave(values, index, guide))
        with torch.no_grad():
            outputs.append(self.split.finish(values))
        return outputs

    def image(self, output: Any) -> Tensor:
        """Find the image ``(N, C, ...)`` in an output."""
        return self.split.place_of(output)

    def unwrap(self) -> nn.Module:
        """Give the generator back, as it came."""
        return self.generator

    def train(self, mode: bool = True) -> EarlyExitGenerator:
        """Set the mode of branches and predictor; the generator keeps its own."""
        generator = self._modules.pop("generator", None)
        try:
            super().train(mode)
        finally:
            if generator is not None:
                self._modules["generator"] = generator
        return self

    def __repr__(self) -> str:
        """Show the exits as a table, and say what a threshold means."""
        from retroexit.report.text_tables import exit_table

        reason = self.decomposition.split.decoder.replayed if self.is_recorded else ""
        lines = [exit_table(self), *([f"replayed, since {reason}"] if reason else [])]
        if self.calibration is not None:
            lines.append(f"threshold: a promise, {self.calibration}")
        elif self.predictor is not None:
            lines.append("threshold: what the predictor expects; model.calibrate(inputs) makes it a promise")
        return "\n".join(lines)

    # How samples leave.

    def _leave(self, values: Values, index: int, guide: Tensor | None) -> Any:
        crossing = self.split.crossing(values, index)
        written = self.decomposition.written[index]
        branch = self.branches[index]
        self.split.check_precision(branch)
        return branch(*(clone_strided(v) if i in written else v for i, v in enumerate(crossing)), guide=guide)

    def _guide(
        self,
        key_feature: Tensor,
        args: Any,
        kwargs: Any,
        rows: Tensor | None = None,
        found: Retrieved | None = None,
    ) -> Tensor | None:
        """Retrieve the guide of all samples, or of some rows only, where the branches take one."""
        taps = self.decomposition.taps
        if taps is None or (rows is not None and not len(rows)):
            return None
        bank, query = self._need_bank(), None
        if found is None or bank.order:
            query = taps.query(key_feature, args, kwargs)
            query = query if rows is None else query[rows]
        if found is None:
            assert query is not None
            return bank.guide(query).to(key_feature)
        ids = found.ids if rows is None else found.ids[rows.to(found.ids.device)]
        return bank.glue(ids, feature=query).to(key_feature)

    def _need_bank(self) -> GuidanceBank:
        if self.bank is None:
            raise BankError(
                "asked for a branch that takes a guide; found no guidance bank. Run retroexit.fit, or set "
                "model.bank.",
                self,
            )
        return self.bank

    @property
    def _folded(self) -> int:
        """Rows of one sample in the first attach point's feature, into which frames may be folded."""
        return self.split.batched.get(self.split.cuts[0].crossing[0]) or 1

    def _check_exit(self, exit: int) -> int:
        if isinstance(exit, bool) or not isinstance(exit, int) or not 1 <= exit <= len(self.branches) + 1:
            raise OptionError(
                f"asked for exit={exit!r}; found exits 1 to {len(self.branches) + 1}, the last one the "
                "backbone.",
                exit,
            )
        return exit
