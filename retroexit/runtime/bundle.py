"""Run an exported generator with early exits: NumPy and onnxruntime alone, or torch for its own two formats.

This file imports nothing else of the library and can be copied beside a bundle.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Bundle", "BundleError", "load_bundle"]

Array = np.ndarray[Any, Any]
Values = dict[str, Array]
Dims = Sequence[int | str]

MANIFEST = "manifest.json"
KIND, SCHEMA = "retroexit bundle", 1
_QUERIES = 2048  # queries of one block of the search
_CHOOSING = ("threshold", "budget", "budget_ms")


class BundleError(ValueError):
    """A bundle is damaged or of another version, or does not take these inputs or options."""


@dataclass
class Program:
    """One compiled piece of the generator."""

    inputs: list[dict[str, Any]]  # name, shape and dtype; a dimension is a number or the name of a size
    outputs: list[dict[str, Any]]
    noise: list[dict[str, Any]]  # the last inputs, which are drawn: name, shape, dtype and kind
    run: Callable[[list[Array]], list[Array]]


def load_bundle(folder: str | Path, *, threads: int | None = None) -> Bundle:
    """Check every file of a bundle that `retroexit.export` wrote, and load its programs.

    Args:
        folder: The folder.
        threads: Threads of each operation in onnxruntime; by default one per core.

    Raises:
        BundleError: If a file is missing, damaged, or of another version.
        ImportError: If onnxruntime (or torch, for the formats torch and aoti) is not installed.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    for name, digest in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"{folder} must hold {name}, got no such file. Copy the whole folder again.")
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != digest:
            raise BundleError(
                f"{path} is damaged: its SHA-256 must be {digest[:12]}..., got {actual[:12]}.... Copy it again."
            )
    runner = _onnx_runner if manifest["format"] == "onnx" else _torch_runner
    programs = {}
    for name, facts in manifest["programs"].items():
        run = runner(folder / facts["file"], facts, manifest["format"], threads, manifest["device"])
        programs[name] = Program(facts["inputs"], facts["outputs"], facts["noise"], run)
    return Bundle(manifest, programs, *(_read_arrays(folder, manifest[key]) for key in ("bank", "router")))


def _read_manifest(path: Path) -> dict[str, Any]:
    advice = "Copy it again, or export the model again."
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        facts = {key: value for key, value in manifest.items() if key != "digest"}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        if manifest.get("digest") != digest:
            raise ValueError("it does not match its own digest")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BundleError(f"cannot read {path}: {error}. {advice}") from error
    version = (manifest.get("kind"), manifest.get("schema"))
    if version != (KIND, SCHEMA):
        raise BundleError(f"{path} must be of a {KIND!r} of version {SCHEMA}, got {version[0]!r} of {version[1]}.")
    return manifest


def _read_arrays(folder: Path, facts: dict[str, Any] | None) -> Values:
    if facts is None:
        return {}
    with np.load(folder / facts["file"], allow_pickle=False) as file:
        return dict(file)


def _onnx_runner(
    path: Path, facts: dict[str, Any], _format: str, threads: int | None, _device: str
) -> Callable[[list[Array]], list[Array]]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("a bundle of ONNX programs needs onnxruntime. Run: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # The threads of one program must not keep the cores from the next one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=onnxruntime.get_available_providers())
    names = [entry["name"] for entry in (*facts["inputs"], *facts["noise"])]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def _torch_runner(
    path: Path, _facts: dict[str, Any], format: str, _threads: int | None, device: str
) -> Callable[[list[Array]], list[Array]]:
    import torch

    program: Any
    program = torch.export.load(path).module() if format == "torch" else torch._inductor.aoti_load_package(str(path))

    def run(arrays: list[Array]) -> list[Array]:
        with torch.no_grad():
            outputs = program(*(torch.from_numpy(np.array(array)).to(device) for array in arrays))
        return [output.cpu().numpy() for output in outputs]

    return run


@dataclass
class Begun:
    """A call that has run to the first cut."""

    values: Values  # by name, with the guides
    exits: Array  # (N,) from 1
    draw: _Draws
    losses: Array | None = None  # predicted, (N, K), infinite out of distribution


class Bundle:
    """An exported generator with early exits. Made by `load_bundle`.

    Attributes:
        manifest: What was exported: exits with their MACs, the promise, inputs, shapes and dtypes.
        programs: The pieces by name.
        milliseconds: What `measure_latency` measured.
    """

    milliseconds: Array | None = None

    def __init__(
        self, manifest: dict[str, Any], programs: dict[str, Program], bank: Values, calibration: Values
    ) -> None:
        self.manifest, self.programs = manifest, programs
        self._bank, self._calibration = bank, calibration
        self._route: list[list[str]] = manifest["route"]  # programs up to each cut, then to the end
        self._rows: dict[str, int] = manifest["rows"]  # rows of one sample, of the values that depend on the batch

    @property
    def exits(self) -> int:
        """Number of exits, the backbone included."""
        return len(self.manifest["exits"])

    def __repr__(self) -> str:
        lines = [f"exit {e['index']}: {100 * e['share']:.1f} % of the MACs" for e in self.manifest["exits"]]
        promise = (self.manifest["router"] or {}).get("promise")
        return "\n".join([f"Bundle ({self.manifest['format']})", *lines, *[f"threshold: {promise}"] * bool(promise)])

    def run(
        self,
        *inputs: Any,
        exit: int | None = None,
        threshold: float | Sequence[float] | None = None,
        budget: float | None = None,
        budget_ms: float | None = None,
        seed: int | None = None,
        draws: Values | None = None,
        **kwargs: Any,
    ) -> tuple[Array, Array]:
        """Render images, every sample by its exit; a stage that no sample needs does not run.

        Args:
            *inputs: The generator's positional inputs, arrays with the batch axis.
            exit: Exit of all samples, from 1; the last one is the backbone. By default the backbone.
            threshold: Largest quality loss to accept, one number or one per sample; see `retroexit`.
            budget: Mean share of the backbone's compute to spend.
            budget_ms: Mean milliseconds of a sample to spend, by what `measure_latency` measured.
            seed: Of the random numbers that the generator draws, where it draws any: NumPy's ``default_rng``. The
                numbers of a sample depend on the seed and its place in the batch. By default they differ every time.
            draws: Some of these random numbers themselves, by the names in the manifest.
            **kwargs: The generator's keyword inputs.

        Returns:
            Images ``(N, C, ...)`` in the order of the batch, and the exit of each sample ``(N,)`` from 1.

        Raises:
            BundleError: If inputs or options do not fit.
        """
        return self._render(self.begin(inputs, kwargs, exit, threshold, budget, seed, draws, budget_ms=budget_ms))

    def _render(self, begun: Begun) -> tuple[Array, Array]:
        values, exits, rows, parts = begun.values, begun.exits, np.arange(len(begun.exits)), []
        for index in range(self.exits):
            if index:
                values = self._advance(values, index, rows, begun.draw)
            leaves = exits[rows] == index + 1
            if index + 1 == self.exits:
                parts.append((rows, values["image"]))
            elif leaves.any():
                part = self._select(values, leaves)
                parts.append((rows[leaves], self._leave(part, index + 1, rows[leaves], begun.draw)))
                if leaves.all():
                    break
                values, rows = self._select(values, ~leaves), rows[~leaves]
        return self._merge(parts, len(exits)), exits

    def begin(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        exit: int | Array | None = None,
        threshold: Any = None,
        budget: Any = None,
        seed: int | None = None,
        draws: Values | None = None,
        strict: bool = False,
        budget_ms: Any = None,
    ) -> Begun:
        """Run to the first cut and choose exits; see `run`. `finish` renders what is returned.

        ``exit`` may be an array ``(N,)``, 0 for the samples whose exit a threshold chooses. ``strict`` sends these to
        the backbone where the promise does not hold.
        """
        values = self._bind(tuple(args), kwargs)
        count = self._count(values)
        draw, everyone = _Draws(seed, draws or {}, count), np.arange(count)
        options = {"exit": exit, "threshold": threshold, "budget": budget, "budget_ms": budget_ms}
        self._check_options(options, draws or {}, count)
        values = self._advance(values, 0, everyone, draw)
        exits: Array = np.full(count, self.exits if exit is None else exit)
        nearest: tuple[Array, Array] | None = None
        losses: Array | None = None
        if strict and threshold is not None and self._is_void(values):
            exits = np.where(exits > 0, exits, self.exits)
        elif any(options[name] is not None for name in _CHOOSING):
            chosen, nearest, losses = self._choose(values, options, draw)
            exits = chosen if exit is None else np.where(exits > 0, exits, chosen)
        if self.manifest["bank"] is not None and (exits < self.exits).any():
            early = np.flatnonzero(exits < self.exits)
            guides = self._guides(values, early, nearest, draw)
            values["guide"] = np.zeros((count, *guides.shape[1:]), guides.dtype)
            values["guide"][early] = guides
        return Begun(values, exits, draw, losses)

    def finish(self, values: Values, exit: int) -> Array:
        """Render samples at the first cut, from one call or several of `begin`, at one exit."""
        count = self._count(values)
        draw, rows = _Draws(None, {}, count), np.arange(count)
        for index in range(1, min(exit, self.exits - 1)):
            values = self._advance(values, index, rows, draw)
        if exit == self.exits:
            return self._advance(values, exit - 1, rows, draw)["image"]
        return self._leave(values, exit, rows, draw)

    def _advance(self, values: Values, index: int, rows: Array, draw: _Draws) -> Values:
        for name in self._route[index]:
            values = values | self._call(name, values, rows, draw)
        return values

    def _leave(self, values: Values, exit: int, rows: Array, draw: _Draws) -> Array:
        return self._call(f"branch_{exit}", values, rows, draw)["image"]

    def measure_latency(self, *inputs: Any, runs: int = 9, **kwargs: Any) -> Array:
        """Time every exit by turns, for ``budget_ms`` in calls like this one; the predictor is counted.

        Returns:
            Median milliseconds of one sample at every exit, the backbone last, ``(K + 1,)``.
        """
        count, threshold = self._count(self._bind(inputs, kwargs)), None if self.manifest["router"] is None else 0.0
        seconds = np.empty((runs + 2, self.exits))
        for turn in range(runs + 2):  # two turns warm up
            for index in range(self.exits):
                begin = time.perf_counter()
                self._render(self.begin(inputs, kwargs, np.full(count, index + 1), threshold))
                seconds[turn, index] = time.perf_counter() - begin
        self.milliseconds = (1000 * np.median(seconds[2:], 0) / count).astype(np.float32)
        return self.milliseconds

    def predict(self, *inputs: Any, seed: int | None = None, **kwargs: Any) -> Array:
        """Predict the loss of every branch exit, ``(N, K)``; infinite for samples out of distribution."""
        values = self._bind(inputs, kwargs)
        count = self._count(values)
        draw = _Draws(seed, {}, count)
        return self._losses(self._advance(values, 0, np.arange(count), draw), draw)[0]

    # Inputs.

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Values:
        """Find the arrays among the arguments, and compare their form with the exported one."""
        leaves = {json.dumps(path): leaf for path, leaf in _leaves([list(args), kwargs], ())}
        call: list[dict[str, Any]] = self.manifest["call"]
        expected, values, count = {json.dumps(entry["path"]): entry for entry in call}, {}, list[int]()
        for path in {**expected, **leaves}:
            if path not in leaves or path not in expected:
                raise BundleError(f"inputs must be at {list(expected)} as in the export, got {list(leaves)}.")
        for path, leaf in leaves.items():
            entry = expected[path]
            if "frozen" in entry:
                if repr(leaf) != entry["frozen"]:
                    raise BundleError(
                        f"{path} must be {entry['frozen']} as in the export, got {leaf!r}. Export with that."
                    )
            elif entry["value"] is not None:
                values[entry["value"]] = self._checked(path, np.asarray(leaf), entry, count)
        return values

    def _checked(self, path: str, array: Array, entry: dict[str, Any], count: list[int]) -> Array:
        """Compare an input with the exported one: ``N`` is the batch, ``*`` any size."""
        count += [side for side, dim in zip(array.shape, entry["shape"], strict=False) if dim == "N"]
        expected = [count[0] if dim == "N" else dim for dim in entry["shape"]]
        if len(expected) != array.ndim or any(
            dim not in ("*", side) for side, dim in zip(array.shape, expected, strict=True)
        ):
            shape = ", ".join(map(str, expected))
            raise BundleError(f"the input at {path} must have the shape ({shape}), got {array.shape}.")
        dtype = np.dtype(entry["dtype"])
        if array.dtype != dtype and not (array.dtype.kind == dtype.kind == "f"):
            raise BundleError(f"the input at {path} must be {dtype}, got {array.dtype}. Convert it.")
        return np.ascontiguousarray(array, dtype)

    def _count(self, values: Values) -> int:
        batched = (len(array) // self._rows[name] for name, array in values.items() if name in self._rows)
        return next(batched, int(self.manifest["batch"]))

    def _check_options(self, options: dict[str, Any], draws: Values, count: int) -> None:
        unknown = {*draws} - {entry["name"] for program in self.programs.values() for entry in program.noise}
        if unknown:
            raise BundleError(f"draws must have the names of the manifest, got {sorted(unknown)}.")
        passed = {name: value for name, value in options.items() if value is not None}
        exit = passed.get("exit")
        if isinstance(exit, np.ndarray):  # made by the scheduler, beside a threshold
            del passed["exit"]
        elif exit is not None and (not isinstance(exit, (int, np.integer)) or not 1 <= exit <= self.exits):
            raise BundleError(f"exit must be an integer from 1 to {self.exits}, the backbone, got {exit!r}.")
        if len(passed) > 1:
            raise BundleError(f"{', '.join(options)} exclude each other, got {passed}. Pass one.")
        for name, value in passed.items():
            number = np.asarray(value)
            if number.dtype.kind not in "fiu" or number.shape not in ((), (count,)):
                raise BundleError(f"{name} must be one number or one per sample ({count},), got {value!r}.")
            if not (np.isfinite(number).all() and (number >= 0).all()):
                raise BundleError(f"{name} must be finite and >= 0, got {value!r}.")
        if passed.keys() & {*_CHOOSING} and self.manifest["router"] is None:
            raise BundleError("choosing exits needs a predictor, but the export had none. Fit first, or pass exit=k.")

    # Running.

    def _call(self, name: str, values: Values, rows: Array, draw: _Draws) -> Values:
        """Run a program on some samples of the batch, whose numbers are ``rows``."""
        program = self.programs[name]
        arrays = [values[entry["name"]] for entry in program.inputs]
        sizes = {
            dim: side
            for entry, array in zip(program.inputs, arrays, strict=True)
            for dim, side in zip(entry["shape"], array.shape, strict=True)
            if isinstance(dim, str)
        }
        arrays += [draw(entry, sizes, rows) for entry in program.noise]
        outputs = program.run([np.ascontiguousarray(array) for array in arrays])
        return {entry["name"]: array for entry, array in zip(program.outputs, outputs, strict=True)}

    def _select(self, values: Values, chosen: Array) -> Values:
        return {
            name: array[np.repeat(chosen, self._rows[name])] if name in self._rows else array
            for name, array in values.items()
        }

    def _merge(self, parts: list[tuple[Array, Array]], count: int) -> Array:
        if len(parts) == 1:
            return parts[0][1]
        first, size = parts[0][1], self._rows["image"]
        merged = np.empty((count, size, *first.shape[1:]), first.dtype)
        for rows, images in parts:
            merged[rows] = images.reshape(len(rows), size, *first.shape[1:])
        return merged.reshape(count * size, *first.shape[1:])

    # Choosing exits.

    def _losses(self, values: Values, draw: _Draws) -> tuple[Array, tuple[Array, Array] | None]:
        router = self.manifest["router"]
        nearest = None
        if router["reads_distance"]:
            nearest = self._search(values, draw)
            values = {**values, "distance": _mean_distance(nearest[1])}
        out = self._call("predictor", values, np.arange(self._count(values)), draw)
        losses = np.where(np.isfinite(out["losses"]), out["losses"], np.float32(np.inf))
        if router["guard"]:
            losses = np.where(out["ood"][:, None] > 1, np.float32(np.inf), losses)
        return losses, nearest

    def _choose(
        self, values: Values, options: dict[str, Any], draw: _Draws
    ) -> tuple[Array, tuple[Array, Array] | None, Array]:
        router, threshold = self.manifest["router"], options["threshold"]
        losses, nearest = self._losses(values, draw)
        if threshold is None:
            exits = self._by_budget(losses, "budget" if options["budget_ms"] is None else "budget_ms", options)
        else:
            limits = np.stack([self._limit(float(tau)) for tau in np.ravel(threshold)])[:, None]
            good = np.pad(losses <= limits, ((0, 0), (0, 1)), constant_values=True)
            exits = good.argmax(1) + 1
            self._check_promise(values)
        early = np.flatnonzero(exits < self.exits)
        if router["guide_limit"] is not None and len(early):
            if nearest is None:
                nearest = self._search(values, draw)
            far = _mean_distance(nearest[1])[:, 0] > router["guide_limit"]
            exits[far], losses[far] = self.exits, np.inf
        if not self.manifest["mixes"]:
            exits[:] = exits.max()
        return exits, nearest, losses

    def _limit(self, tau: float) -> np.float32:
        """Largest prediction at which a sample may leave early under a threshold."""
        promise = self.manifest["router"]["limits"]
        if promise is None:
            return np.float32(tau)
        if promise["thresholds"] is not None:  # the promise holds for these
            tau = max((t for t in promise["thresholds"] if t <= tau), default=-math.inf)
            if tau < 0:
                return np.float32(-np.inf)
        most = min(promise["largest"] * tau, promise["highest"])
        if promise["ratio"] is not None:
            return np.float32(min(promise["ratio"] * tau, most))
        step = np.searchsorted(self._calibration["steps"], np.float32(tau), side="right")
        worst, *others = (min(float(limit), most) for limit in self._calibration["limits"][step])
        return np.float32(worst * (worst / others[0] if others and worst > 0 else 1.0))

    def _by_budget(self, losses: Array, name: str, options: dict[str, Any]) -> Array:
        if "predicted" not in self._calibration:
            raise BundleError(f"{name}={options[name]} needs a calibration, but the export had none. Calibrate first.")
        costs = np.asarray(self.manifest["router"]["shares"], np.float32) if name == "budget" else self.milliseconds
        if costs is None:
            raise BundleError(
                f"{name}={options[name]} needs measured times. Call bundle.measure_latency(*inputs) first."
            )
        budgets = np.broadcast_to(np.asarray(options[name], float), len(losses))
        multipliers = {budget: self._multiplier(budget, name, costs) for budget in set(budgets.tolist())}
        return _weigh(losses, np.array([multipliers[budget] for budget in budgets.tolist()]), costs)

    def _multiplier(self, budget: float, name: str, costs: Array) -> float:
        """Lowest multiplier at which the calibration set spends a budget on average."""
        predicted = self._calibration["predicted"]

        def spent(multiplier: float) -> float:
            return float(costs[_weigh(predicted, np.full(len(predicted), multiplier), costs) - 1].mean(dtype=float))

        if spent(math.inf) > budget * (1 + 1e-6):
            raise BundleError(f"{name} must be >= {spent(math.inf):.3f}, the cost of the cheapest exit, got {budget}.")
        low, high = 0.0, 1e-6
        if spent(low) <= budget:
            return low
        while spent(high) > budget:
            if high > 1e12:
                return math.inf
            low, high = high, 4 * high
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (low, middle) if spent(middle) <= budget else (middle, high)
        return high

    def _is_void(self, values: Values) -> bool:
        router = self.manifest["router"]
        return router["feature_size"] not in (None, list(values[router["feature"]].shape[2:]))

    def _check_promise(self, values: Values) -> None:
        router = self.manifest["router"]
        if self._is_void(values):
            size = list(values[router["feature"]].shape[2:])
            warnings.warn(
                f"the promise is void for this call: feature size is {size}, calibrated was {router['feature_size']}.",
                stacklevel=4,
            )

    # Guides.

    def _query(self, values: Values, draw: _Draws) -> Array:
        """Patches of the map that keys are cut from, ``(N, h, w, D)``."""
        facts = self.manifest["bank"]
        if "key" in self.programs:
            values = self._call("key", values, np.arange(self._count(values)), draw)
        feature = values[facts["query"]]
        sizes = [side // step for side, step in zip(feature.shape[2:], facts["patch"], strict=True)]
        pairs = [n for pair in zip(sizes, facts["patch"], strict=True) for n in pair]
        axes = len(sizes)
        parted = feature.reshape(*feature.shape[:2], *pairs)
        order = (0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2))
        return parted.transpose(order).reshape(len(feature), *sizes, -1).astype(np.float32)

    def _search(self, values: Values, draw: _Draws) -> tuple[Array, Array]:
        """Find the nearest key of every patch: rows of the bank, and squared distances, both ``(N, h, w)``."""
        cells = self._query(values, draw)
        queries, keys, mean = cells.reshape(-1, cells.shape[-1]), self._bank["keys"], self._bank["mean"]
        centred = keys - mean
        norms = np.einsum("nd,nd->n", centred, centred)
        ids = np.concatenate(
            [
                (norms - 2 * (queries[top : top + _QUERIES] - mean) @ centred.T).argmin(1)
                for top in range(0, len(queries), _QUERIES)
            ]
        )
        gap = queries - keys[ids]
        return ids.reshape(cells.shape[:-1]), np.einsum("nd,nd->n", gap, gap).reshape(cells.shape[:-1])

    def _guides(self, values: Values, early: Array, nearest: tuple[Array, Array] | None, draw: _Draws) -> Array:
        """Glue the guides of some samples, ``(R, C, ...)``."""
        facts = self.manifest["bank"]
        ids = (self._search(values, draw) if nearest is None else nearest)[0][early]
        patches = self._bank["values"][ids]  # (R, h, w, ph, pw, C)
        if facts["order"]:  # numbers and their slopes: v + S (q - k)
            offsets = self._query(values, draw)[early] - self._bank["keys"][ids]
            linear = patches.reshape(*ids.shape, -1, 1 + offsets.shape[-1]).astype(np.float32)
            followed = linear[..., 0] + np.einsum("...vd,...d->...v", linear[..., 1:], offsets)
            patches = followed.reshape(*ids.shape, *facts["value_patch"], -1)
        axes = len(facts["patch"])
        order = (0, 1 + 2 * axes, *(axis for i in range(1, 1 + axes) for axis in (i, i + axes)))
        sides = [n * p for n, p in zip(ids.shape[1:], facts["value_patch"], strict=True)]
        guide = patches.transpose(order).reshape(len(ids), -1, *sides)
        return guide.astype(facts["dtype"])


class _Draws:
    """The random numbers of one call."""

    def __init__(self, seed: int | None, noise: Values, count: int) -> None:
        self._root: Any = np.random.SeedSequence(seed).entropy
        self._noise, self._count = noise, count

    def __call__(self, entry: dict[str, Any], sizes: dict[str, int], rows: Array) -> Array:
        """Draw the noise of some samples of the batch; it is that of the whole batch, without the others."""
        shape = [_size(dim, sizes) for dim in entry["shape"]]
        per_sample = shape[0] // len(rows) if entry["batched"] else 0
        if per_sample:
            shape[0] = per_sample * self._count
        if entry["name"] in self._noise:
            drawn = np.asarray(self._noise[entry["name"]])
            if list(drawn.shape) != shape:
                raise BundleError(f"noise {entry['name']} must have the shape {tuple(shape)}, got {drawn.shape}.")
        else:
            source = np.random.default_rng([self._root, entry["number"]])
            drawn = source.standard_normal(shape) if entry["kind"] == "normal" else source.random(shape)
        drawn = drawn.astype(entry["dtype"])
        if not per_sample:
            return drawn
        return drawn.reshape(self._count, per_sample, *shape[1:])[rows].reshape(-1, *shape[1:])


def _weigh(losses: Array, multipliers: Array, costs: Array) -> Array:
    """Exit of the least predicted loss plus multiplier times cost, ``(N,)``."""
    padded = np.pad(losses, ((0, 0), (0, 1)))
    free = np.isinf(multipliers)
    exits = (padded + np.where(free, 0, multipliers).astype(np.float32)[:, None] * costs).argmin(1) + 1
    cheapest = np.where(np.isfinite(losses).any(1), costs.argmin() + 1, padded.shape[1])
    return np.where(free, cheapest, exits)


def _size(dim: int | str, sizes: dict[str, int]) -> int:
    """Evaluate ``4``, ``s0`` or ``8*s0``."""
    if isinstance(dim, int):
        return dim
    match = re.fullmatch(r"(?:(\d+)\*)?(\w+)", dim)
    assert match is not None
    return int(match[1] or 1) * sizes[match[2]]


def _mean_distance(squared: Array) -> Array:
    distances: Array = np.sqrt(np.maximum(squared, 0)).reshape(len(squared), -1).mean(1, keepdims=True)
    return distances.astype(np.float32)


def _leaves(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, (tuple, list)):
        pairs: Any = enumerate(value)
    elif isinstance(value, dict):
        pairs = value.items()
    else:
        yield path, value
        return
    for key, child in pairs:
        yield from _leaves(child, (*path, key))
