"""A guidance bank from a stream of inputs; their features are never all in memory, nor on disk.

Keys of every input pass by, a bounded number of them wait to be thinned, and only inputs that own a surviving
key run once more, as far as their values (paper, section 4.1: 500 maps x 100 noises x 128 patches).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.core.modules import device_of, fingerprint
from retroexit.core.samples import Samples, drawing_from
from retroexit.errors import CheckpointError, OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.candidates import Candidates
from retroexit.guidance.filling import hold_candidates
from retroexit.guidance.first_order import with_slopes
from retroexit.guidance.taps import Taps
from retroexit.model import EarlyExitGenerator
from retroexit.retrieval import Retriever

__all__ = ["stream_bank", "stream_banks"]


def stream_bank(
    model: EarlyExitGenerator,
    samples: Samples,
    retriever: Retriever,
    *,
    batch: int = 4,
    eps: float = 0.0,
    max_candidates: int = 100_000,
    scratch: Path | None = None,
    progress: bool = True,
) -> GuidanceBank:
    """Build the bank of a wrapped generator from inputs that are run as they come.

    Args:
        model: A wrapped generator with guidance; it need not be fitted.
        samples: Its inputs, any number; their seed is that of all random choices.
        retriever: Unbuilt index.
        batch: Inputs per pass.
        eps: Farthest point sampling stops when no candidate is farther than this from the kept keys.
        max_candidates: Keys held before thinning.
        scratch: Folder to note all that is done in, once a minute. A build that was interrupted goes on from
            it to the same bank; whoever calls this removes it in the end.
        progress: Whether to show bars on a terminal.

    Returns:
        The bank; the model's own is left as it is.

    Raises:
        OptionError: If the model takes no guide.
        BankError: If features or values do not fit together.
        CheckpointError: If ``scratch`` holds candidates of something else, of other inputs, or damaged ones.
    """
    if not model.is_recorded:
        args, kwargs = samples.gather([0])
        model.record(*args, **kwargs)
    taps, guidance = model.decomposition.taps, model.options.guidance
    if taps is None or guidance is None:
        raise OptionError(
            "asked for a bank; found a model wrapped without guidance. Pass guidance=...", model
        )
    device = device_of(model.generator)

    facts = {
        "fingerprint": fingerprint(model.generator),
        "generator": type(model.generator).__name__,
        "key_tap": taps.key_tap,
        "value_tap": taps.value_cut.feature.name,
        "inputs": len(samples),
    }
    candidates = hold_candidates(
        guidance.thin,
        max_candidates,
        size=guidance.size,
        seed=samples.seed,
        folder=None if scratch is None else scratch / "keys",
        identity={**facts, "patch": taps.patch, "batch": batch},
    )
    done = candidates.seen // math.prod(candidates.grid)
    off = None if progress else True
    _check_passed(samples, batch, done, candidates, off)

    def keys() -> Iterator[tuple[Tensor, list[int]]]:
        with tqdm(total=len(samples), initial=done, desc="keys", disable=off) as bar:
            for indices, args, kwargs in samples.batches(batch, done):
                passed = _passed(candidates.passed, args, kwargs)
                with torch.no_grad(), drawing_from(samples.seed + indices[0], device):
                    feature = _query(model, taps, args, kwargs, len(indices))
                candidates.passed = passed
                yield feature, indices
                bar.update(len(indices))

    values = _Values(model, samples, batch, device)
    bank = GuidanceBank.build(
        keys(),
        values,
        patch=taps.patch,
        size=guidance.size,
        thin=guidance.thin,
        retriever=retriever,
        eps=eps,
        seed=samples.seed,
        candidates=candidates,
        folder=None if scratch is None else scratch / "values",
        meta=facts,
        progress=progress,
    )
    if not guidance.order:
        return bank
    return with_slopes(bank, _maps(model, taps, samples, batch, device), len(samples) * taps.queries)


def stream_banks(
    model: EarlyExitGenerator,
    samples: Samples,
    identities: Sequence[str],
    retriever: Callable[[], Retriever],
    *,
    skip: Collection[str] = (),
    scratch: Path | None = None,
    **options: Any,
) -> Iterator[tuple[str, GuidanceBank]]:
    """Build one bank for each identity, as for the frames of each source face (paper, section 4.2).

    Branches are trained with the bank of all; for one identity, set its own: ``model.bank = bank``.

    Args:
        model: See `stream_bank`.
        samples: Inputs of all identities, in any order.
        identities: Whom each sample shows, one name per sample. Names are used as names of folders.
        retriever: Makes an unbuilt index.
        skip: Identities that have their bank already.
        scratch: See `stream_bank`; each identity gets a folder in it.
        options: Handed to `stream_bank`.

    Yields:
        A name and its bank, in the order of first occurrence. ``source`` counts the samples of that identity.

    Raises:
        OptionError: If there is not one name per sample, or one cannot name a folder.
        RetroExitError: Whatever `stream_bank` raises.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(identities):
        rows.setdefault(name, []).append(row)
    wrong = [n for n in rows if not isinstance(n, str) or Path(n).name != n or n in ("", ".", "..")]
    if len(identities) != len(samples) or wrong:
        found = f"the name {wrong[0]!r}" if wrong else f"{len(identities)} names for {len(samples)} samples"
        raise OptionError(
            f"asked for a bank per identity; found {found}. Give one name per sample that a folder can have.",
            identities,
        )
    for name, chosen in rows.items():
        if name in skip:
            continue
        own = Samples(_Some(samples.items, chosen), samples.seed)
        folder = None if scratch is None else scratch / name
        yield name, stream_bank(model, own, retriever(), scratch=folder, **options)


class _Values:
    """Value features of single inputs, with the noise that was drawn when their keys passed by.

    Noise that is drawn inside the generator repeats only where the whole batch runs once more; where none is
    drawn, as the first batch shows, only the inputs that are asked for run.
    """

    def __init__(self, model: EarlyExitGenerator, samples: Samples, batch: int, device: torch.device) -> None:
        self._model, self._samples, self._batch, self._device = model, samples, batch, device
        self._draws: bool | None = None
        self._last: tuple[int, Tensor] = (-1, torch.empty(0))

    def __call__(self, wanted: list[int]) -> Tensor:
        found: list[Tensor] = []
        while len(found) < len(wanted):
            left = wanted[len(found) :][: self._batch]
            found.extend(self._run(left, left[0]) if self._draws is False else [self._in_batch(left[0])])
        return torch.stack(found)

    def _in_batch(self, index: int) -> Tensor:
        begin = index - index % self._batch
        if self._last[0] != begin:
            rows = range(begin, min(begin + self._batch, len(self._samples)))
            self._last = begin, self._run(rows, begin)
        return self._last[1][index - begin]

    def _run(self, rows: Sequence[int], seed: int) -> Tensor:
        args, kwargs = self._samples.gather(rows)
        with drawing_from(self._samples.seed + seed, self._device):
            before = _drawn(self._device)
            found = self._model.decomposition.guidance_values(args, kwargs)
            self._draws = bool(self._draws) or not torch.equal(before, _drawn(self._device))
        return found


def _drawn(device: torch.device) -> Tensor:
    """State of the generator's source of random numbers; it changes when some are drawn."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return torch.cat(states)


def _query(model: EarlyExitGenerator, taps: Taps, args: Any, kwargs: Any, count: int) -> Tensor:
    """Give the map that keys are cut from; run no stage behind it, and none where a function gives it."""
    if taps.key is None:
        return model.split.key_feature(args, kwargs)
    return taps.query(torch.empty(count * model.split.batched.get(taps.key_node, 1)), args, kwargs)


def _passed(before: str, args: Any, kwargs: Any) -> str:
    """Add a batch of inputs to the digest of all before it."""
    return hashlib.sha256((before + Samples([(args, kwargs)]).digest()).encode()).hexdigest()


def _check_passed(samples: Samples, batch: int, done: int, candidates: Candidates, off: bool | None) -> None:
    """Refuse to go on where an input that has passed is another now; only reads inputs, runs nothing."""
    if not done:
        return
    passed = ""
    with tqdm(total=done, desc="inputs seen before", disable=off) as bar:
        for indices, args, kwargs in Samples(_Some(samples.items, range(done)), samples.seed).batches(batch):
            passed = _passed(passed, args, kwargs)
            bar.update(len(indices))
    if passed != candidates.passed:
        raise CheckpointError(
            f"asked to go on with a bank after {done} inputs; found that these are not the inputs that it "
            "was begun with. Use another folder, or remove the unfinished one.",
            samples,
        )


class _Some(Sequence[Any]):
    """Some samples of a sequence that need not know slices."""

    def __init__(self, items: Sequence[Any], rows: Sequence[int]) -> None:
        self._items, self._rows = items, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._items[self._rows[index]]


def _maps(
    model: EarlyExitGenerator, taps: Taps, samples: Samples, batch: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run all inputs once more, for their key and value features; the draws are those of the first time."""
    for indices, args, kwargs in samples.batches(batch):
        with torch.no_grad(), drawing_from(samples.seed + indices[0], device):
            key_feature = model.split.begin(args, kwargs).key_feature
        with drawing_from(samples.seed + indices[0], device):
            yield taps.query(key_feature, args, kwargs), model.decomposition.guidance_values(args, kwargs)
