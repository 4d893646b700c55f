"""The wrapped generator: its routes, routed calls, batches whose samples leave at different exits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retroexit.decoder.batches import merge
from retroexit.decoder.split import SplitGenerator, Values
from retroexit.decoder.structure import twin
from retroexit.errors import BankError, CheckpointError, NotRecordedError, OptionError, TrainingError
from retroexit.exits import Exit, list_exits
from retroexit.guidance.bank import GuidanceBank
from retroexit.regions.router import RegionRouter, check_goal
from retroexit.routing.policy import assign_exits, check_threshold
from retroexit.routing.predictor import Predictor
from retroexit.wrapping import Anatomy, WrapOptions, build_anatomy

__all__ = ["EarlyExitGenerator"]


class EarlyExitGenerator(nn.Module):
    """A generator with early exits. Made by `retroexit.wrap`.

    ``model(*inputs)`` is the generator, bit for bit. ``exit=k`` leaves at exit k, ``threshold=t`` routes
    every sample to the cheapest exit whose predicted quality loss is at most ``t``.

    Attributes:
        generator: The user's generator, never changed.
        options: How it was wrapped.
        branches: The thin branches, cheapest first. Empty until the generator has been recorded.
        bank: The guidance bank, or ``None``.
        predictor: The predictor, or ``None`` before `retroexit.fit`.
        regions: Chooses exits inside the image, or ``None`` before `retroexit.regions.fitting.fit_regions`.
    """

    def __init__(self, generator: nn.Module, options: WrapOptions) -> None:
        super().__init__()
        self.generator = generator
        self.options = options
        self.branches = nn.ModuleList()
        self.predictor: Predictor | None = None
        self.regions: RegionRouter | None = None
        self.bank: GuidanceBank | None = None
        self.about: dict[str, Any] = {}
        self._anatomy: Anatomy | None = None
        self._saved: dict[str, Tensor] | None = None
        self._lock = threading.Lock()
        self.eval()

    # Recording.

    @property
    def is_recorded(self) -> bool:
        """Tell whether the generator has been recorded, so that exits exist."""
        return self._anatomy is not None

    def record(self, *inputs: Any, **kwargs: Any) -> None:
        """Record the generator on these inputs and build the branches, unless that is done already.

        Raises:
            RetroExitError: Whatever keeps the generator from being wrapped; see `retroexit.wrap`.
        """
        with self._lock:
            if self._anatomy is None:
                anatomy, branches = build_anatomy(self.generator, self.options, inputs, kwargs)
                self.branches.extend(branches)
                if self._saved is not None:
                    self._load_saved(self._saved)
                self._anatomy = anatomy

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
        from retroexit.storage import save_model

        return save_model(self, folder)

    @property
    def anatomy(self) -> Anatomy:
        """What is known of the generator once it has been recorded.

        Raises:
            NotRecordedError: If it has not.
        """
        if self._anatomy is None:
            raise NotRecordedError(
                "asked for the exits; found that the generator has not been recorded yet. Call the model "
                "once, or pass example_inputs to retroexit.wrap.",
                self,
            )
        return self._anatomy

    @property
    def split(self) -> SplitGenerator:
        """The generator in pieces."""
        return self.anatomy.split

    @property
    def exits(self) -> list[Exit]:
        """The K branch exits, cheapest first, then the backbone."""
        return list_exits(self.anatomy, self.branches, self.generator)

    def overhead(self) -> list[int]:
        """MACs that a routed call pays besides the route itself, per exit and for one sample.

        Every routed sample pays for the predictor; a sample that leaves at a branch pays for the search in
        the bank too.
        """
        predictor = self.anatomy.predictor_macs(self.predictor)
        search = self.anatomy.search_macs(self.bank)
        return [predictor + search] * len(self.branches) + [predictor]

    # Calls.

    def forward(
        self,
        *inputs: Any,
        exit: int | None = None,
        threshold: float | None = None,
        regions: bool | str = False,
        **kwargs: Any,
    ) -> Any:
        """Render images.

        Args:
            *inputs: The generator's positional inputs.
            exit: Leave at this exit, from 1; ``K + 1`` is the backbone.
            threshold: Largest quality loss to accept, ``>= 0``; each sample takes the cheapest exit predicted
                to keep it.
            regions: Whether parts of an image may leave at different exits, with a threshold: ``True`` or
                ``"image"`` keeps the image's loss below it, ``"tiles"`` that of every tile. What an output
                holds besides the image is then what the image's own exit gives.
            **kwargs: The generator's keyword inputs.

        Returns:
            A value with the structure of the generator's output.

        Raises:
            RegionError: If no part of this generator's images can be made alone.
            OptionError: If both are given, or one is out of range.
            InputMismatchError: If the inputs differ from the recording where that matters.
            TrainingError: If a threshold is given and there is no predictor yet.
            BankError: If the branches take a guide and there is no bank yet.
        """
        clash = self.options.shadowed
        if clash:
            own = {"exit": exit, "threshold": threshold, "regions": regions or None}
            kwargs.update({name: own[name] for name in clash if own[name] is not None})
            exit = None if "exit" in clash else exit
            threshold = None if "threshold" in clash else threshold
            regions = False if "regions" in clash else regions
        return self.route(inputs, kwargs, exit=exit, threshold=threshold, regions=regions)

    def route(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        *,
        exit: int | None = None,
        threshold: float | None = None,
        regions: bool | str = False,
    ) -> Any:
        """Render images, with the generator's arguments apart from ours.

        Args:
            args: The generator's positional inputs.
            kwargs: The generator's keyword inputs.
            exit: See `forward`.
            threshold: See `forward`.
            regions: See `forward`.

        Returns:
            A value with the structure of the generator's output.
        """
        args, kwargs = tuple(args), dict(kwargs or {})
        if exit is not None and threshold is not None:
            raise OptionError(
                f"asked for exit={exit} and threshold={threshold}; found two ways to choose an exit. Pass "
                "one of them.",
                exit,
            )
        if exit is not None and regions is not False:
            raise OptionError(
                f"asked for regions={regions!r} and exit={exit}; found two ways to choose an exit. Pass one "
                "of them.",
                exit,
            )
        if not self.is_recorded:
            self.record(*args, **kwargs)
        if regions is not False:
            return self._regions(args, kwargs, threshold, regions)[0]
        if threshold is not None:
            return self._routed(args, kwargs, check_threshold(threshold))[0]
        if exit is None or self._check_exit(exit) == len(self.branches) + 1:
            return self.generator(*args, **kwargs)
        with torch.no_grad():
            values, keyed = self.split.begin(args, kwargs)
            guide = self._guide(keyed, args, kwargs)
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
            values, keyed = self.split.begin(inputs, kwargs)
            guide = self._guide(keyed, inputs, kwargs)
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

    def routed(
        self, *inputs: Any, threshold: float, regions: bool | str = False, **kwargs: Any
    ) -> tuple[Any, Tensor]:
        """Render images as ``model(*inputs, threshold=...)`` does, and tell where each sample left.

        Args:
            *inputs: The generator's positional inputs.
            threshold: Largest quality loss to accept, ``>= 0``.
            regions: See `forward`.
            **kwargs: The generator's keyword inputs.

        Returns:
            A value with the structure of the generator's output, and exit indices ``(N,)`` from 1, ``K + 1``
            for the backbone; with regions one per tile, ``(N, tiles...)``.

        Raises:
            OptionError, InputMismatchError, TrainingError, BankError: See `forward`.
        """
        if not self.is_recorded:
            self.record(*inputs, **kwargs)
        if regions is not False:
            return self._regions(inputs, kwargs, threshold, regions)
        return self._routed(inputs, kwargs, check_threshold(threshold))

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
        if not self.is_recorded:
            self.record(*inputs, **kwargs)
        with torch.no_grad():
            values, _ = self.split.begin(inputs, kwargs)
            return self._predicted(values, inputs, kwargs)

    def choose_exits(self, *inputs: Any, threshold: float, **kwargs: Any) -> Tensor:
        """Tell where each sample would leave: exit indices ``(N,)`` from 1, ``K + 1`` for the backbone."""
        return assign_exits(self.predict(*inputs, **kwargs), threshold)

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
        """Show the exits as a table."""
        from retroexit.tables import exit_table

        reason = self.anatomy.split.decoder.replayed if self.is_recorded else ""
        return exit_table(self) + (f"\nreplayed, since {reason}" if reason else "")

    # How samples leave.

    def _leave(self, values: Values, index: int, guide: Tensor | None) -> Any:
        crossing = self.split.crossing(values, index)
        written = self.anatomy.written[index]
        branch = self.branches[index]
        self.split.check_precision(branch)
        return branch(*(twin(v) if i in written else v for i, v in enumerate(crossing)), guide=guide)

    def _guide(self, keyed: Tensor, args: Any, kwargs: Any, rows: Tensor | None = None) -> Tensor | None:
        """Retrieve the guide of all samples, or of some rows only, where the branches take one."""
        taps = self.anatomy.taps
        if taps is None or (rows is not None and not len(rows)):
            return None
        if self.bank is None:
            raise BankError(
                "asked for a branch that takes a guide; found no guidance bank. Run retroexit.fit, or set "
                "model.bank.",
                self,
            )
        query = taps.query(keyed, args, kwargs)
        return self.bank.guide(query if rows is None else query[rows]).to(keyed)

    @property
    def _folded(self) -> int:
        """Rows of one sample in the first attach point's feature, into which frames may be folded."""
        return self.split.batched.get(self.split.cuts[0].crossing[0]) or 1

    def _predicted(self, values: Values, args: Any, kwargs: Any) -> Tensor:
        if self.predictor is None:
            raise TrainingError(
                "asked for a threshold; found no predictor. Run retroexit.fit first, or choose with exit=k.",
                self,
            )
        source = self.options.predictor_inputs
        reads = source(*args, **kwargs) if source is not None else self.split.crossing(values, 0)[0]
        found: Tensor = self.predictor(reads)
        size = self._folded
        if source is None and size > 1:  # a sample's frames leave together
            return found.unflatten(0, (-1, size)).mean(dim=1)
        return found

    def _routed(self, args: Any, kwargs: Any, threshold: float) -> tuple[Any, Tensor]:
        with torch.no_grad():
            values, keyed = self.split.begin(args, kwargs)
            exits = assign_exits(self._predicted(values, args, kwargs), threshold)
        if not self.split.mixes or (self.anatomy.taps is not None and self._folded > 1):
            # The batch cannot be divided: everybody takes the deepest exit chosen.
            exits = exits.max().expand_as(exits)
        early = (exits <= len(self.branches)).nonzero()[:, 0]
        guide = self._guide(
            keyed, args, kwargs, early
        )  # one search for all that leave early, none for the others
        rows = torch.arange(len(exits), device=exits.device)
        parts: list[tuple[Tensor, Any]] = []
        for index in range(len(self.branches)):
            leaving = exits[rows] == index + 1
            if bool(leaving.any()):
                here = leaving.nonzero()[:, 0]
                everybody = len(here) == len(rows)
                chosen = values if everybody else self.split.select(values, here)
                own_guide = None if guide is None else guide[torch.searchsorted(early, rows[here])]
                parts.append((rows[here], self._leave(chosen, index, own_guide)))
                stay = (~leaving).nonzero()[:, 0]
                if everybody:
                    break
                values, rows = self.split.select(values, stay), rows[stay]
            if index + 1 < len(self.branches):
                with torch.no_grad():
                    values = self.split.advance(values, index + 1)
        else:
            with torch.no_grad():
                parts.append((rows, self.split.finish(values)))
        return merge(parts, len(exits), self.split.output_rows), exits

    def _regions(
        self, args: Any, kwargs: Any, threshold: float | None, regions: bool | str
    ) -> tuple[Any, Tensor]:
        if threshold is None:
            raise OptionError(
                f"asked for regions={regions!r}; found no threshold. Pass threshold=... as well.", regions
            )
        if self.regions is None:
            raise TrainingError("asked for regions; found no tile predictor. Run fit_regions first.", self)
        return self.regions.route(self, args, kwargs, check_threshold(threshold), check_goal(regions))

    def _check_exit(self, exit: int) -> int:
        if isinstance(exit, bool) or not isinstance(exit, int) or not 1 <= exit <= len(self.branches) + 1:
            raise OptionError(
                f"asked for exit={exit!r}; found exits 1 to {len(self.branches) + 1}, the last one the "
                "backbone.",
                exit,
            )
        return exit
