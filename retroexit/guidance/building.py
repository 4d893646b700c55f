"""Build a bank: hold keys of a stream in bounded memory, thin them, compute the values of those chosen.

`with_slopes` goes beyond the paper, whose guide jumps from one key's value to another's (section 3.3). With slopes it
is ``v + S (q - k)``, and a few hundred pairs describe an image better than 100,000 plain ones.
"""

import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retroexit.core.files import MANIFEST, read_array, read_manifest, reading, staged, write_array, write_manifest
from retroexit.core.progress import progress_bar
from retroexit.errors import BankError, CheckpointError, OptionError
from retroexit.guidance.bank import GuidanceBank, cut
from retroexit.guidance.sampling import Thinning, coverage, farthest_points
from retroexit.guidance.sampling import thin as choose
from retroexit.retrieval import Retriever
from retroexit.retrieval.base import as_matrix

_KIND, _SCHEMA = "stream of keys", 3
_FILES = ("keys.npy", "tags.npy")
_MORE = 4  # survivors of one piece per key of the bank
_STORED = 60.0  # seconds between two writes of the candidates, at least
_SHARE = 20  # and this many times the duration of the last write
_VALUE_BATCH = 8  # inputs whose value features are computed at once
_PER_NUMBER = 20  # patches that a linear map is fitted to, on average, for every number of a key
_RIDGE = 1e-2  # of the mean variance of a key's numbers
_LARGEST = 2 * 2**30  # bytes of the sums that are held while fitting


class Candidates:
    """Keys of a stream, in bounded memory, independent of how the stream is batched.

    All keys are held while they fit. Then, with ``"fps"``, the newest keys are thinned to a few; when these fill half
    of the memory, they are thinned in turn. With other ways of thinning, a uniform sample is held (a reservoir). A
    stream that `store` wrote to ``folder`` is resumed, if ``identity``, what the keys belong to, is the same.
    """

    def __init__(
        self,
        most: int,
        *,
        size: int,
        thin: Thinning = "fps",
        seed: int = 0,
        folder: Path | None = None,
        identity: dict[str, Any] | None = None,
    ) -> None:
        if most < 1:
            raise OptionError(f"max_candidates must be >= 1, got {most}")
        self.seen = self.held = 0  # keys that were added so far, and that are held
        self.shape: tuple[int, ...] = ()  # of the features that they were cut from
        self.grid: tuple[int, ...] = ()  # of the patches of each
        facts = {**(identity or {}), "max_candidates": most, "size": size, "thin": thin, "seed": seed}
        self._identity = json.loads(json.dumps(facts))
        self._folder, self._seed = folder, seed
        self._farthest = thin == "fps"
        self._most = max(most, 2 * size) if self._farthest else most
        self._survive = min(_MORE * size, self._most // 2)
        self._thinned = 0  # how many of those held are survivors
        self._reach = 0.0
        self._random = np.random.default_rng(seed)
        self._arrays: list[np.ndarray] = []  # keys and tags, with room for all that may be held
        if folder is not None and (folder / MANIFEST).exists():
            self._resume(folder)

    @property
    def keys(self) -> np.ndarray:
        """The keys held, float32 ``(held, D)``."""
        return self._arrays[0][: self.held]

    @property
    def tags(self) -> np.ndarray:
        """The integers of these keys, int64 ``(held, T)``."""
        return self._arrays[1][: self.held]

    @property
    def reach(self) -> float:
        """Largest distance from a key ever seen to the nearest one held; infinity if unknown."""
        return self._reach if self._farthest or self.seen <= self._most else math.inf

    def add(self, keys: np.ndarray, tags: np.ndarray) -> None:
        """Add keys, float32 ``(b, D)``, each with a row of integers, ``(b, T)``."""
        if not self.seen:  # memory is only taken up as it is written
            self._arrays = [np.empty((self._most, part.shape[1]), part.dtype) for part in (keys, tags)]
        (self._add_all if self._farthest else self._add_sample)(keys, tags)
        self.seen += len(keys)

    def _add_sample(self, keys: np.ndarray, tags: np.ndarray) -> None:
        number = self.seen + np.arange(len(keys))
        # Key number t goes to slot t while there is room, then to a random one of t + 1, if that exists.
        draws = (self._random.random(len(keys)) * (number + 1)).astype(np.int64)
        slot = np.where(number < self._most, number, draws)
        into = slot < self._most
        for array, part in zip(self._arrays, (keys, tags), strict=True):
            array[slot[into]] = part[into]  # of equal slots the last one wins
        self.held = min(self.seen + len(keys), self._most)

    def _add_all(self, keys: np.ndarray, tags: np.ndarray) -> None:
        start = 0
        while start < len(keys):
            if self.held == self._most:
                self._make_room()
            count = min(len(keys) - start, self._most - self.held)
            for array, part in zip(self._arrays, (keys, tags), strict=True):
                array[self.held : self.held + count] = part[start : start + count]
            self.held, start = self.held + count, start + count

    def _make_room(self) -> None:
        """Thin the newest keys, or all once survivors take half of the memory."""
        begin = self._thinned if self._thinned < self._most // 2 else 0
        rows, radius = farthest_points(self.keys[begin:], self._survive, seed=self._seed)
        self._reach = max(self._reach, radius) if begin else self._reach + radius
        self._thinned = self.held = begin + len(rows)
        for place, row in enumerate(np.sort(rows) + begin, begin):  # in place, in ascending order
            for array in self._arrays:
                array[place] = array[row]

    def store(self) -> None:
        """Write everything to the folder, in one step; without a folder nothing is done."""
        if self._folder is None or not self.seen:
            return
        with staged(self._folder, owns=(MANIFEST, *_FILES)) as fresh:
            for name, array in zip(_FILES, (self.keys, self.tags), strict=True):
                write_array(fresh / name, array)
            facts = {
                "kind": _KIND,
                "schema": _SCHEMA,
                "identity": self._identity,
                "state": [self.seen, self.held, self._thinned, self._reach, self.shape, self.grid],
                "random": self._random.bit_generator.state,
            }
            write_manifest(fresh, facts, _FILES)

    def _resume(self, folder: Path) -> None:
        facts = read_manifest(folder, _KIND, _SCHEMA)
        with reading(folder / MANIFEST, f"Remove {folder}."):
            self._restore(folder, facts)

    def _restore(self, folder: Path, facts: dict[str, Any]) -> None:
        saved, now = facts["identity"], self._identity
        names = sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name))
        changes = ", ".join(f"{name} was {saved.get(name)}, is {now.get(name)}" for name in names)
        if changes:
            what = f"the unfinished bank in {folder} belongs to another build: {changes}"
            raise CheckpointError(f"{what}. Use another folder, or remove this one.")
        self.seen, self.held, self._thinned, self._reach, shape, grid = facts["state"]
        self.shape, self.grid = tuple(shape), tuple(grid)
        self._random.bit_generator.state = facts["random"]
        for name in _FILES:
            saved_rows = read_array(folder, name, facts, mmap="r")
            array = np.empty((self._most, saved_rows.shape[1]), saved_rows.dtype)
            array[: self.held] = saved_rows
            self._arrays.append(array)


@torch.no_grad()
def build_bank(
    features: Iterable[tuple[Tensor, Tensor | list[int]]],
    values_of: Callable[[list[int]], Tensor],
    *,
    patch: tuple[int, ...] = (1, 1),
    size: int = 1024,
    thin: Thinning = "fps",
    retriever: Retriever,
    eps: float = 0.0,
    seed: int = 0,
    max_candidates: int = 100_000,
    candidates: Candidates | None = None,
    meta: dict[str, Any] | None = None,
    run: Callable[[Callable[[list[int]], Tensor], Sequence[list[int]]], Iterable[Tensor]] = map,
    progress: bool = False,
) -> GuidanceBank:
    """Cut key features into patches, thin them, and compute the values of those chosen.

    Args:
        features: Batches of key features ``(N, C, H, W)`` with the index of each input ``(N,)``; read once.
        values_of: Returns the value features ``(len, Cv, Hv, Wv)`` of some inputs, whose sides must be multiples of the
            grid of key patches.
        patch: Size of a key's patch, ``(ph, pw)``.
        size: Number of keys in the bank, at most.
        thin: See `sampling.thin`.
        retriever: Unbuilt index; it receives the chosen keys.
        eps: Farthest point sampling stops when no candidate is farther than this from the chosen keys.
        seed: Of all random choices.
        max_candidates: Keys held in memory before thinning.
        candidates: Holds them instead; a resumed stream continues where it stopped.
        meta: Facts to record, plain data.
        run: Calls ``values_of`` with lists of inputs one after the other, as `map` does.
        progress: Show progress bars on a terminal.

    Raises:
        BankError: If there are no features, batches differ in shape, or values do not fit the keys.
        RetrieverError, OptionError: If a feature is not finite, or an option is out of range.
    """
    if candidates is None:
        candidates = Candidates(max_candidates, size=size, thin=thin, seed=seed)
    patch = tuple(patch)
    _collect(features, patch, candidates)
    rows = choose(candidates.keys, size, thin, eps=eps, seed=seed).numpy()
    keys = candidates.keys[rows]
    radius, mean = coverage(candidates.keys, keys)
    within = candidates.reach + radius
    source, cells = candidates.tags[rows].T
    values = _compute_values(functools.partial(run, values_of), source, cells, candidates.grid, progress)
    retriever.build(keys)
    thinning: dict[str, Any] = {"how": thin, "size": size, "eps": eps, "seed": seed, "seen": candidates.seen}
    thinning |= {"candidates": candidates.held, "radius": radius, "mean": mean}  # both of the candidates
    thinning["within"] = within if math.isfinite(within) else None  # of all keys seen
    facts = {**(meta or {}), "patch": list(patch), "thinning": thinning}
    return GuidanceBank(retriever=retriever, values=values, source=source, meta=facts)


def _collect(
    features: Iterable[tuple[Tensor, Tensor | list[int]]], patch: tuple[int, ...], candidates: Candidates
) -> None:
    """Cut features into keys and add them to the candidates, with input index and location."""
    stored, pause = time.monotonic(), _STORED
    for feature, inputs in features:
        if candidates.shape and feature.shape[1:] != candidates.shape:
            raise BankError(
                f"key features must have one shape, got {tuple(feature.shape[1:])} after {candidates.shape}. "
                "Build the bank from inputs of one size."
            )
        if len(inputs) != len(feature):
            raise BankError(f"{len(feature)} key features came with {len(inputs)} input indices")
        cells = cut(feature, patch)
        grid = tuple(cells.shape[1:-1])
        owner = np.repeat(np.asarray(inputs, np.int64), math.prod(grid))
        cell = np.tile(np.arange(math.prod(grid)), len(feature))
        candidates.add(as_matrix(cells.reshape(-1, cells.shape[-1]), "keys"), np.stack([owner, cell], axis=1))
        candidates.shape, candidates.grid = tuple(feature.shape[1:]), grid
        if time.monotonic() - stored > pause:
            begin = time.monotonic()
            candidates.store()
            stored = time.monotonic()
            pause = max(_STORED, _SHARE * (stored - begin))
    if not candidates.seen:
        raise BankError("a bank needs at least 1 feature, but the stream was empty")
    candidates.store()


def _compute_values(
    values_of: Callable[[Sequence[list[int]]], Iterable[Tensor]],
    source: np.ndarray,
    cells: np.ndarray,
    grid: tuple[int, ...],
    progress: bool,
) -> np.ndarray:
    """Compute the value patch of every chosen key, float16 ``(n, ph, pw, Cv)``."""
    inputs = np.unique(source)
    values = np.empty(0, np.float16)
    batches = [inputs[start : start + _VALUE_BATCH] for start in range(0, len(inputs), _VALUE_BATCH)]
    features = iter(values_of([batch.tolist() for batch in batches]))
    for number, batch in enumerate(progress_bar(batches, desc="values", show=progress)):
        rows = np.flatnonzero(np.isin(source, batch))
        feature = next(features)
        size = tuple(feature.shape[2:])
        fits = len(feature) == len(batch) and len(size) == len(grid)
        if not fits or any(side % count for side, count in zip(size, grid, strict=True)):
            raise BankError(
                f"value features {tuple(feature.shape)} do not fit {len(batch)} inputs with {grid} keys "
                "each: every side must be a multiple of the grid of keys. Change the stage or the patch."
            )
        patch = tuple(side // count for side, count in zip(size, grid, strict=True))
        parts = _channels_last(cut(feature, patch), patch).unflatten(0, (len(batch), -1))
        part = parts[np.searchsorted(batch, source[rows]), cells[rows]].to("cpu", torch.float16).numpy()
        if not np.isfinite(part).all():
            raise BankError(
                "values must be finite in float16, but the value feature reaches "
                f"{float(feature.abs().max()):.3g}. Tap another stage."
            )
        if not number:
            values = np.empty((len(source), *part.shape[1:]), np.float16)
        if part.shape[1:] != values.shape[1:]:
            raise BankError(f"value features must have one shape, got {part.shape[1:]} after {values.shape[1:]}")
        values[rows] = part
    return values


def _channels_last(cells: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Reorder the numbers of patches, ``(N, h, w, C * ph * pw) -> (N * h * w, ph, pw, C)``."""
    return cells.reshape(-1, cells.shape[-1] // math.prod(patch), *patch).movedim(1, -1)


@torch.no_grad()
def with_slopes(bank: GuidanceBank, maps: Iterable[tuple[Tensor, Tensor]], patches: int) -> GuidanceBank:
    """Fit a linear map to the patches around every key, by ridge regression; returns a bank of order 1.

    Args:
        bank: A bank of plain values; not changed.
        maps: Batches of key features ``(N, D, H, W)`` with the value features of the same inputs; read once. Every
            patch counts for the few keys nearest to it.
        patches: Number of key patches in all of them.
    """
    if bank.order:
        raise BankError("the bank has slopes already. Pass a bank of plain values.")
    n, width, place = len(bank), bank.retriever.width, bank.values.shape[1:]
    needed = 4 * n * (1 + width) * (width + math.prod(place))
    if needed > _LARGEST:
        raise OptionError(
            f"slopes must fit in {_LARGEST >> 30} GB, but {n} pairs of {width} numbers with values {place} "
            f"take {needed / 2**30:.0f} GB. Use a smaller bank (size=...) or values (value_after='image')."
        )
    sums = _Sums(n, width, math.prod(place))
    near = min(bank.retriever.distinct, max(1, math.ceil(_PER_NUMBER * width * n / patches)))
    keys, values = torch.from_numpy(np.array(bank.retriever.keys)), torch.from_numpy(np.array(bank.values))
    values = values.float().flatten(1)
    for feature, value in maps:
        cells = cut(feature.detach().cpu().float(), bank.patch)
        grid = cells.shape[1:-1]
        parts = cut(value.detach().cpu().float(), bank.value_patch)
        if parts.shape[1:-1] != grid or parts.shape[-1] != values.shape[1]:
            raise BankError(
                f"value features {tuple(value.shape)} with key features {tuple(feature.shape)} do not fit "
                f"the bank's values {place}"
            )
        flat = _channels_last(parts, place[:-1]).flatten(1)
        rows = torch.from_numpy(as_matrix(cells.reshape(-1, width), "keys"))
        ids = bank.retriever.search(rows, near).ids.flatten()
        order = ids.argsort()
        start = 0
        for pair, count in zip(*(t.tolist() for t in ids.unique(return_counts=True)), strict=True):
            near_pair = order[start : start + count] // near
            sums.add(pair, rows[near_pair] - keys[pair], flat[near_pair] - values[pair])
            start += count
    constant, slopes = sums.solve()
    linear = torch.cat([(values + constant)[:, None], slopes], 1).transpose(1, 2)  # (n, ph * pw * C, 1 + D)
    packed = linear.reshape(n, *place[:-1], place[-1] * (1 + width)).to(torch.float16).numpy()
    if not np.isfinite(packed).all():
        raise BankError("slopes must be finite in float16, but some are not")
    meta = {**bank.meta, "order": 1}
    return GuidanceBank(retriever=bank.retriever, values=packed, source=bank.source.numpy(), meta=meta)


class _Sums:
    """Moments of the patches around every pair: offsets x from its key, y from its value."""

    def __init__(self, n: int, width: int, numbers: int) -> None:
        self.count = torch.zeros(n, 1)
        self.x, self.y = torch.zeros(n, width), torch.zeros(n, numbers)
        self.xx, self.xy = torch.zeros(n, width, width), torch.zeros(n, width, numbers)

    def add(self, pair: int, x: Tensor, y: Tensor) -> None:
        """Add patches ``(m, D)`` and ``(m, P)`` to those of a pair."""
        self.count[pair] += len(x)
        self.x[pair] += x.sum(0)
        self.y[pair] += y.sum(0)
        self.xx[pair].addmm_(x.T, x)
        self.xy[pair].addmm_(x.T, y)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return every pair's constant ``(n, P)`` and slopes ``(n, D, P)``; zero without patches."""
        count = self.count.clamp_min(1)
        x, y = self.x / count, self.y / count
        slopes = torch.empty_like(self.xy)
        for pair in range(len(x)):
            xx = (self.xx[pair] / count[pair] - torch.outer(x[pair], x[pair])).double()
            xy = (self.xy[pair] / count[pair] - torch.outer(x[pair], y[pair])).double()
            # Twice as strong if there are as many numbers as patches: directions without data stay 0.
            ridge = _RIDGE * (1 + len(xx) / count[pair]) * xx.diagonal().mean()
            slopes[pair] = torch.linalg.solve(xx + (ridge + 1e-12) * torch.eye(len(xx)), xy).float()
        return y - torch.einsum("nd,ndp->np", x, slopes), slopes
