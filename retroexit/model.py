"""The wrapped generator, composed of its pieces, branches, guides and router."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Unpack

import torch
from torch import Tensor, nn

from retroexit.core.identity import unwrapped
from retroexit.core.modules import compile_alone, without_autocast
from retroexit.core.samples import plain_numbers
from retroexit.errors import CheckpointError, GeneratorError, NotRecordedError, OptionError, silence
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.provider import GuideProvider
from retroexit.hub import model_card, push
from retroexit.measuring import calibrate, refuse_fitted
from retroexit.metrics import QualityMetric
from retroexit.plugins.host import host
from retroexit.routing.calibration import Calibration, Thresholds
from retroexit.routing.draft import Draft
from retroexit.routing.latency import Latency, time_exits
from retroexit.routing.policy import Policy, RoutingOptions, RoutingRequest, check_exit
from retroexit.routing.render import render, render_at, render_branch
from retroexit.routing.router import LossPrediction, Router
from retroexit.routing.session import Session
from retroexit.saving import write_model
from retroexit.split.rows import merge
from retroexit.split.split import Begun, SplitGenerator
from retroexit.wrapping.decomposition import Decomposition, decompose, decompose_again, settle
from retroexit.wrapping.exits import Exit, exit_table, list_exits
from retroexit.wrapping.options import WrapOptions


def _part(owner: str, name: str, doc: str) -> Any:
    """Make a property that reads and sets an attribute of the router or of the guide provider."""

    def get(model: EarlyExitGenerator) -> Any:
        return getattr(getattr(model, owner), name)

    def put(model: EarlyExitGenerator, value: Any) -> None:
        setattr(getattr(model, owner), name, value)

    return property(get, put, doc=doc)


def check_generator(generator: Any) -> nn.Module:
    """Check what `wrap` and `load` take, else `GeneratorError`; returns the generator without a compiler's cover."""
    if isinstance(generator, type):
        raise GeneratorError(
            f"generator must be a module, got the class {generator.__name__}. Pass an instance with trained "
            f"weights, {generator.__name__}(...).eval()."
        )
    if not isinstance(generator, nn.Module):
        raise GeneratorError(
            f"generator must be a torch.nn.Module, got a {type(generator).__name__}. Pass the trained generator."
        )
    if isinstance(generator, EarlyExitGenerator):
        raise GeneratorError(
            "generator must be a plain generator, got one that has early exits already. Pass model.generator."
        )
    return unwrapped(generator)


def check_wrapped(model: Any) -> None:
    """Raise `GeneratorError` unless a model is what `wrap` returns."""
    if not isinstance(model, EarlyExitGenerator):
        raise GeneratorError(
            f"model must be what retroexit.wrap returns, got a {type(model).__name__}. Wrap the generator first."
        )


class EarlyExitGenerator(nn.Module):
    """A generator with early exits. Made by `retroexit.wrap`.

    ``model(*inputs)`` is the generator, bit for bit. ``exit=k`` leaves at exit k, ``threshold=t`` routes every sample
    to the cheapest exit whose predicted quality loss is at most ``t``, ``budget=b`` spends a share of the backbone's
    compute, ``deadline_ms=d`` keeps a call within measured times; see `RoutingOptions`.

    Attributes that it does not have itself are those of ``whole``, which may be set, else of the generator.

    Attributes:
        generator: The user's generator, never changed.
        whole: A copy of the autoencoder that the generator is the decoder of, with exits in it; else ``None``.
        options: How it was wrapped.
        branches: The thin branches, cheapest first. Empty until the generator has been recorded.
        guide: Looks up guides in the guidance bank.
        router: Chooses exits; owns predictor, calibration and measured times.
        about: Facts about the fit, as JSON types.
    """

    def __init__(self, generator: nn.Module, options: WrapOptions) -> None:
        super().__init__()
        self.generator = generator
        self.options = options
        self.branches = nn.ModuleList()
        self.guide = GuideProvider()
        self.router = Router(options.predictor_inputs)
        self.about: dict[str, Any] = {}
        vars(self).update(whole=None)  # not a submodule, since the generator is a part of it
        self._decomposition: Decomposition | None = None
        self._saved_weights: dict[str, Tensor] | None = None
        self._compile_options: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self.training = False
        self.router.eval()

    # Calls.

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Render images.

        Gradients reach inputs that require one, with ``exit=k``.

        Args:
            *inputs: The generator's positional inputs.
            **kwargs: The generator's keyword inputs, and `RoutingOptions`. An option that the generator's own forward
                takes goes to the generator; use `route` then.

        Returns:
            A value with the structure of the generator's output.

        Raises:
            OptionError: If options exclude each other, cannot be met, or are out of range.
            InputMismatchError: If the inputs differ from the recording where that matters.
            TrainingError: If there is no predictor, calibration or measured time yet, and one is needed.
            BankError: If the branches take a guide and there is no bank yet.
        """
        request, args, kwargs = RoutingRequest.parse(inputs, kwargs, self.options.shadowed)
        return self._render(request, args, kwargs)[0]

    def route(
        self, args: Sequence[Any], kwargs: dict[str, Any] | None = None, **options: Unpack[RoutingOptions]
    ) -> Any:
        """Do as `forward`, with the generator's positional and keyword arguments apart from the options."""
        return self._render(RoutingRequest(**dict[str, Any](options)), tuple(args), dict(kwargs or {}))[0]

    def routed(self, *inputs: Any, choose: Policy | None = None, **kwargs: Any) -> tuple[Any, Tensor]:
        """Do as `forward`, and return the exit of each sample too: ``(N,)`` from 1, ``K + 1`` for the backbone.

        ``choose`` is a policy of your own, see `RoutingOptions`.
        """
        request, args, kwargs = RoutingRequest.parse(inputs, kwargs, choose=choose)
        if not request.is_routed:
            raise OptionError("a routed call needs threshold, budget, deadline_ms or choose, got none of them.")
        output, exits = self._render(request, args, kwargs)
        assert exits is not None
        return output, exits

    def draft(self, *inputs: Any, choose: Policy | None = None, **kwargs: Any) -> Draft:
        """Render as `routed` does, with ``exit=k`` too, and keep what is needed to finish samples later.

        Example:
            >>> with model.draft(x, exit=1) as draft:
            ...     show(draft.image)
            ...     best = draft.finish([3])  # model(x)[[3]], without running the stages before exit 1 again
        """
        request, args, kwargs = RoutingRequest.parse(inputs, kwargs, choose=choose)
        if request.is_plain:
            raise OptionError(
                "a draft needs exit, threshold, budget, deadline_ms or choose, got none of them. Pass exit=1 for the "
                "cheapest exit."
            )
        begun = self._begin(args, kwargs)
        return Draft(self.split, self.branches, self.guide, begun, self.router.choose(begun, request))

    def choose_exits(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Choose the exit of each sample without rendering it: ``(N,)`` from 1, ``K + 1`` for the backbone."""
        request, args, kwargs = RoutingRequest.parse(inputs, kwargs)
        return self.router.choose(self._begin(args, kwargs), request, count=False).exits

    def predict(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Predict the quality loss of every branch exit, ``(N, K)``; `TrainingError` if there is no predictor yet."""
        return self.predict_losses(*inputs, **kwargs).losses

    def predict_losses(self, *inputs: Any, **kwargs: Any) -> LossPrediction:
        """Predict losses as `predict` does, and which samples are out of distribution."""
        return self.router.predict(self._begin(inputs, kwargs))

    def all_exits(self, *inputs: Any, **kwargs: Any) -> list[Any]:
        """Render every exit from one pass over the backbone: K + 1 outputs, the backbone's last, without gradient."""
        begun = self._begin(inputs, kwargs)
        with torch.no_grad():
            guide, values = self.guide.guide(begun), begun.values
        outputs = []
        for index, branch in enumerate(self.branches):
            if index:
                with torch.no_grad():
                    values = self.split.advance(values, index)
            # Random numbers that a branch draws are drawn again by the backbone: all get the generator's own.
            # The state is the process's: without draws, other threads' numbers are left alone.
            draws = self.split.decoder.recording.draws
            with torch.random.fork_rng(devices=self.split.cuda_devices, enabled=draws):
                outputs.append(render_branch(self.split, branch, index, values, guide))
        with torch.no_grad():
            outputs.append(self.split.finish(values))
        return outputs

    def features(self, *inputs: Any, **kwargs: Any) -> list[Tensor]:
        """Feature maps at the attach points, first to last, each ``(N, C, ...)``."""
        values = self._begin(inputs, kwargs).values
        features = []
        with torch.no_grad():
            for index in range(len(self.split.cuts)):
                values = self.split.advance(values, index) if index else values
                # The next stage may write into its input.
                features.append(self.split.crossing(values, index)[0].clone())
        return features

    def session(self, *, threshold: float, **options: Any) -> Session:
        """Begin a video, to be rendered without flicker of its exits, see `Session`.

        Args:
            threshold: Largest quality loss to accept, as in a call.
            **options: ``hysteresis``, the share of the threshold by which a cheaper exit has to be better, in [0, 1),
                by default 0.1; ``deadline_ms`` for every frame; ``videos``, the number of videos side by side, by
                default 1.
        """

        def join(parts: list[tuple[Tensor, Any]], count: int) -> Any:
            return merge(parts, count, self.split.output_rows)

        return Session(self.routed, join, threshold=threshold, **options)

    def image(self, output: Any) -> Tensor:
        """Find the image ``(N, C, ...)`` in an output."""
        return self.split.place_of(output)

    def _render(
        self, request: RoutingRequest, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Tensor | None]:
        self._ensure_recorded(args, kwargs)
        exit = None if request.exit is None else check_exit(request.exit, self.router.exits)
        if request.is_plain or exit == self.router.exits:
            return self.generator(*args, **kwargs), None
        begun = self.split.begin(args, kwargs)  # feature (N, C, h, w) and live values at the first cut
        if exit is not None:
            return render_at(self.split, self.branches, exit, self.guide, begun), None
        choice = self.router.choose(begun, request)  # losses (N, K) -> exits (N,)
        output = render(self.split, self.branches, self.guide, begun, choice)  # images (N, 3, H, W), in order
        return output, choice.exits

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Begun:
        self._ensure_recorded(args, kwargs)
        return self.split.begin(args, kwargs)

    def overhead(self) -> list[int]:
        """MACs of predictor and retrieval in a routed call, per exit and for one sample; see `Router.overhead`."""
        return self.router.overhead()

    # Recording.

    @property
    def is_recorded(self) -> bool:
        """Whether the generator has been recorded, so that exits exist."""
        return self._decomposition is not None

    def record(self, *inputs: Any, **kwargs: Any) -> None:
        """Record the generator on these inputs once and build the branches; raises as `retroexit.wrap`."""
        self._ensure_recorded(inputs, kwargs)

    def _ensure_recorded(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if self._decomposition is not None and self.split.is_current(self.branches):
            return
        if torch.compiler.is_compiling():
            raise NotRecordedError(
                "the generator must be recorded before it is compiled or exported, got a model without exits for "
                "this device and precision. Call the model once, or pass example_inputs to retroexit.wrap.",
                self,
            )
        with self._lock, without_autocast(self.generator):
            if self._decomposition is None:
                decomposition, branches = decompose(self.generator, self.options, args, kwargs)
                self.options = decomposition.options
                nn.ModuleList(branches).eval()
            elif not self.split.is_current(self.branches):
                old: list[Any] = list(self.branches)
                decomposition, branches = decompose_again(self.options, self.decomposition, old)
                if self.bank is not None:
                    self.bank.meta["fingerprint"] = decomposition.identity.fingerprint
            else:
                return
            self.guide.attach(decomposition.split.generator, decomposition.taps)
            self.router.attach(decomposition, self.guide)
            self.branches = nn.ModuleList(branches)
            self.branches.training = False
            if self._saved_weights is not None:
                self._load_weights(self._saved_weights)
            self._decomposition = decomposition
            if self._compile_options is not None:
                self.compile(**self._compile_options)

    def compile(self, **options: Any) -> None:
        """Compile every segment, branch and the predictor by `torch.compile`, each as one graph for any batch and size.

        Calls without routing options are the generator's own and are not compiled. Compilation waits for the first
        calls: a batch of one sample is compiled apart, and on the CPU one of 16 and more. Call it again after a fit.

        Args:
            **options: Options of `torch.compile`, such as ``backend`` or ``mode``.
        """
        self._compile_options = options
        if self._decomposition is None:
            return
        pieces = [*self.split.stems, *self.split.segments[1:], self.split.rest, *self.branches]
        for piece in pieces:
            piece._compiled_call_impl = compile_alone(piece._call_impl, **options)
        self.router.compile(**options)

    @property
    def decomposition(self) -> Decomposition:
        """The recorded generator, cut at its attach points; `NotRecordedError` if it has not been recorded."""
        if self._decomposition is None:
            raise NotRecordedError(
                "the generator has not been recorded yet, so there are no exits. Call the model once, or pass "
                "example_inputs to retroexit.wrap.",
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
        shares = None if self.latency is None else self.latency.shares()
        return list_exits(self.decomposition, self.branches, self.generator, shares)

    # What fitting adds.

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "predictor":  # nn.Module would register the predictor here instead of calling the setter
            self.router.predictor = value
            return
        whole = vars(self).get("whole")
        is_own = whole is None or name in vars(self) or name in self._modules or hasattr(type(self), name)
        if not is_own and hasattr(whole, name):  # such as the sizes of tiles
            setattr(whole, name, value)
        else:
            super().__setattr__(name, value)

    predictor: nn.Module | None = _part("router", "predictor", "The predictor, or ``None`` before `retroexit.fit`.")
    calibration: Calibration | None = _part("router", "calibration", "A `Calibration`, or ``None`` before `calibrate`.")
    latency: Latency | None = _part("router", "latency", "Measured times, or ``None`` before `measure_latency`.")
    bank: GuidanceBank | None = _part("guide", "bank", "The guidance bank, or ``None``.")

    def calibrate(
        self,
        inputs: Sequence[Any],
        alpha: float = 0.05,
        confidence: float = 0.95,
        *,
        metric: QualityMetric | str | None = None,
        weights: str | Path | None = None,
        groups: Sequence[Any] | None = None,
        thresholds: Thresholds = None,
        **settings: Any,
    ) -> Calibration:
        """Make thresholds promises: P(loss > threshold) <= alpha on inputs like these; see `Calibration`.

        Args:
            inputs: Samples without the batch axis that nothing was fitted on, drawn as later inputs will be.
            alpha: Share of inputs that may lose more than the threshold, in (0, 1).
            confidence: Probability over the draw of these inputs that the promise holds, in (0, 1).
            metric: Quality metric, or its name; by default the one that the model was fitted with.
            weights: File with the metric's weights.
            groups: The drive, speaker or session of each input; the promise is then for inputs of a new group.
            thresholds: Thresholds that the promise holds for together, or ``"all"``; by default one at a time.
            **settings: ``rule``, ``seed``, ``batch``, ``progress``.

        Returns:
            The calibration, which is now part of the model and saved with it.

        Raises:
            OptionError: If too few inputs or groups stand behind the promise, with the number needed; if metric, image
                size or range are not those of the fit; if the model was fitted on some of the inputs.
            GeneratorError: If the generator has changed since it was recorded.
            TrainingError: If there is no predictor yet.
        """
        if self._decomposition is not None:
            self._decomposition.check_generator()
        refuse_fitted(self, inputs)
        fitted_with = self.about.get("metric", {}).get("name", "lpips-alex")
        measure = host().metric(metric or fitted_with, weights)
        promise: Any = {"alpha": alpha, "confidence": confidence, "groups": groups, "thresholds": thresholds}
        self.calibration = calibrate(self, inputs, measure, **promise, **settings)
        return self.calibration

    def measure_latency(self, *inputs: Any, runs: int = 20, **kwargs: Any) -> Latency:
        """Time every exit ``runs`` times on this machine for calls like this one, for ``deadline_ms`` and `Time`.

        The times, which are returned, are now part of the model and saved with it. Call it again on another machine.
        """
        begun = self._begin(inputs, kwargs)
        rows = begun.samples

        def call(k: int) -> None:
            if k > self.router.exits:
                self.generator(*inputs, **kwargs)
                return
            if self.predictor is None:
                self.route(inputs, kwargs, exit=k)
                return
            request = RoutingRequest(choose=lambda *_: torch.full((rows,), k))
            begun = self._begin(inputs, kwargs)
            choice = self.router.choose(begun, request, count=False)
            render(self.split, self.branches, self.guide, begun, choice)

        device = begun.key_feature.device
        self.latency = time_exits(call, self.router.exits, rows, device, plain_numbers(runs))
        return self.latency

    # Saving.

    def save(self, folder: str | Path) -> Path:
        """Write branches, predictor, bank and settings, not the generator, to a folder, in place of an earlier save.

        Raises:
            GeneratorError: If the generator has changed since it was recorded.
            NotRecordedError: If there are no branches yet.
        """
        parts = (self.generator, self.options, self.decomposition, self.branches, self.router, self.bank)
        return write_model(folder, *parts, self.about)

    def push_to_hub(
        self, repository: str, *, license: str | None = None, base_model: str | None = None, **options: Any
    ) -> str:
        """Save to a repository on the Hugging Face hub, with a model card; returns the commit's address.

        Args:
            repository: ``"user/name"``, made if missing.
            license: Licence of the branches, by the hub's name for it, such as ``"mit"``.
            base_model: Repository of the generator.
            **options: ``private``, ``token``, ``message``, and what `huggingface_hub.HfApi.upload_folder` takes.

        Raises:
            MissingExtraError: If huggingface_hub is not installed.
            GeneratorError, NotRecordedError: See `save`.
        """
        facts = (type(self.generator).__name__, self.exits, self.calibration, self.about)
        card = model_card(*facts, repository=repository, license=license, base_model=base_model)
        return push(self.save, card, repository, **options)

    def _save_in_pipeline(self, save_directory: Any) -> NoReturn:
        """Refuse: a pipeline would be saved without its autoencoder. The adapter of diffusers names this method."""
        raise GeneratorError(
            f"a pipeline must be saved with its own autoencoder, got one with early exits for {save_directory}. Put "
            "the autoencoder back and save again; model.save(folder) or model.push_to_hub writes the exits. What "
            "retroexit.enable(pipe, folder) puts in may stay."
        )

    def restore(self, weights: dict[str, Tensor]) -> None:
        """Give the branches saved weights, now or once recorded; `CheckpointError` if they do not fit."""
        self._saved_weights = weights
        if self.is_recorded:
            self._load_weights(weights)

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        try:
            self.branches.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise CheckpointError(f"the saved branches do not fit this model: {reason}") from error
        self._saved_weights = None

    # Copies.

    def __getstate__(self) -> dict[str, Any]:
        """State for `copy.deepcopy` and `pickle`: what `save` writes, the generator and the example inputs."""
        state = {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_decomposition")}
        if self._decomposition is not None:
            self.split.check_generator()
            branches = list(self.branches)
            state["options"] = settle(self.options, self._decomposition, branches)
            state["_saved_weights"] = self.branches.state_dict()
            state["_branch_facts"] = [branch.facts() for branch in branches]  # type: ignore[operator]
            state["_example"] = self.split.example_now()
        state["_modules"] = self._modules | {"branches": nn.ModuleList()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        example, facts = state.pop("_example", None), state.pop("_branch_facts", ())
        super().__setstate__(state)
        self._lock, self._decomposition = threading.Lock(), None
        if example is not None:
            with silence():  # the user has seen them
                self.record(*example[0], **example[1])
            for branch, values in zip(self.branches, facts, strict=True):
                branch.restore_facts(values)  # type: ignore[operator]

    # The module.

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            whole = vars(self).get("whole")
            owner = vars(self).get("_modules", {}).get("generator") if whole is None else whole
            if owner is None or name.startswith("_") or not hasattr(owner, name):
                raise
            return getattr(owner, name)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> EarlyExitGenerator:
        super()._apply(fn, recurse)
        parts = () if self.whole is None else self.whole.children()
        for part in parts:
            if getattr(part, "model", None) is not self:
                part._apply(fn)
        return self

    def unwrap(self) -> nn.Module:
        """Return the generator, unchanged."""
        return self.generator

    def train(self, mode: bool = True) -> EarlyExitGenerator:
        """Do nothing, so that a parent's ``train()`` cannot change what exits render.

        `retroexit.fit` trains branches; to train one yourself, call ``branches[k].train()``.
        """
        return self

    def __repr__(self) -> str:
        """Show the exits as a table, and what a threshold means."""
        name = type(self.generator).__name__
        if not self.is_recorded:
            places = list(self.options.attach_at or ["suggested stages"])
            return f"{name} with early exits at {places}, not recorded yet: call it once to see its exits."
        lines = [exit_table(name, self.options, self.exits)]
        if self.split.decoder.replayed:
            lines.append(f"replayed, since {self.split.decoder.replayed}")
        if self.calibration is not None:
            kind = "a promise, " if self.calibration.is_promise else ""
            lines.append(f"threshold: {kind}{self.calibration}")
            lines += [f"the promise is void: {reason}" for reason in self.router.void()]
        elif self.predictor is not None:
            lines.append("threshold: compared with predictions; model.calibrate(inputs) makes it a promise")
        return "\n".join(lines)
