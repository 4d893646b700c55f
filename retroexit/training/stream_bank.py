"""Build a guidance bank from a stream of inputs, whose features are neither all in memory nor on disk."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from retroexit.core.identity import fingerprint
from retroexit.core.modules import device_of
from retroexit.core.progress import progress_bar
from retroexit.core.samples import Samples, drawing_from
from retroexit.errors import OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.building import Candidates, build_bank, with_slopes
from retroexit.guidance.provider import Taps
from retroexit.model import EarlyExitGenerator
from retroexit.retrieval import Retriever


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
    """Build the bank of a wrapped generator with guidance, fitted or not, from any number of inputs.

    Args:
        model: The wrapped generator.
        samples: Its inputs; their seed is that of all random choices.
        retriever: Unbuilt index.
        batch: Inputs per pass.
        eps: Farthest point sampling stops when no candidate is farther than this from the chosen keys.
        max_candidates: Keys held before thinning.
        scratch: Folder from which an interrupted build resumes, to the same bank; the caller removes it.
        progress: Show progress bars on a terminal.

    Raises:
        OptionError: If the model was wrapped without guidance.
        CheckpointError: If ``scratch`` belongs to another build or other inputs, or is damaged.
    """
    if not model.is_recorded:
        args, kwargs = samples.gather([0])
        model.record(*args, **kwargs)
    taps, guidance = model.decomposition.taps, model.options.guidance
    if taps is None or guidance is None:
        raise OptionError("the model has no guidance. Pass guidance=... to retroexit.wrap.")
    meta = {
        "fingerprint": fingerprint(model.generator),
        "generator": type(model.generator).__name__,
        "key_tap": taps.key_tap,
        "value_tap": taps.value_cut.feature.name,
        "inputs": len(samples),
    }
    digest = None if scratch is None else samples.digest()
    identity = {**meta, "patch": taps.patch, "batch": batch, "samples": digest}
    choice: Any = {"size": guidance.size, "thin": guidance.thin, "seed": samples.seed}
    candidates = Candidates(max_candidates, **choice, folder=scratch, identity=identity)
    bank = build_bank(
        _keys(model, taps, samples, batch, candidates.seen // taps.queries, progress),
        _values(model, samples, batch),
        patch=taps.patch,
        retriever=retriever,
        eps=eps,
        **choice,
        candidates=candidates,
        meta=meta,
        progress=progress,
    )
    if not guidance.order:
        return bank
    return with_slopes(bank, _maps(model, taps, samples, batch), len(samples) * taps.queries)


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
    """Build one bank per identity, as for the frames of each source face (paper, section 4.2).

    Yields name and bank in the order of first occurrence; ``source`` counts the samples of that identity.
    ``identities`` has one name per sample; those of ``skip`` are left out; the rest is as in `stream_bank`. Branches
    are trained with the bank of all identities; to serve one of them, set ``model.bank = bank``.
    """
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(identities):
        rows.setdefault(name, []).append(row)
    wrong = [n for n in rows if not isinstance(n, str) or Path(n).name != n or n in ("", ".", "..")]
    if len(identities) != len(samples) or wrong:
        problem = f"the name {wrong[0]!r}" if wrong else f"{len(identities)} names for {len(samples)} samples"
        raise OptionError(f"identities must be one name per sample, each valid as a folder's name, got {problem}")
    for name, chosen in rows.items():
        if name not in skip:
            subset: Any = Subset(samples.items, chosen)  # type: ignore[arg-type]
            folder = None if scratch is None else scratch / name
            bank = stream_bank(model, Samples(subset, samples.seed), retriever(), scratch=folder, **options)
            yield name, bank


def _keys(
    model: EarlyExitGenerator, taps: Taps, samples: Samples, batch: int, first: int, progress: bool
) -> Iterator[tuple[Tensor, list[int]]]:
    """Compute the maps that keys are cut from; run no later stage, and none if a function returns them."""
    with progress_bar(total=len(samples), initial=first, desc="keys", show=progress) as bar:
        for indices, args, kwargs in samples.batches(batch, first):
            with torch.no_grad(), drawing_from(samples.seed + indices[0], device_of(model.generator)):
                if taps.key is None:
                    feature = model.split.key_feature(args, kwargs)
                else:
                    rows = len(indices) * model.split.batched.get(taps.key_node, 1)
                    feature = taps.query(torch.empty(rows), args, kwargs)
            yield feature, indices
            bar.update(len(indices))


def _values(model: EarlyExitGenerator, samples: Samples, batch: int) -> Callable[[list[int]], Tensor]:
    """Return a function for the value features of inputs, run in the batches of their keys: noise repeats."""

    @functools.lru_cache(maxsize=1)
    def values(begin: int) -> Tensor:
        args, kwargs = samples.gather(range(begin, min(begin + batch, len(samples))))
        with drawing_from(samples.seed + begin, device_of(model.generator)):
            return model.decomposition.guidance_values(args, kwargs)

    return lambda indices: torch.stack([values(i - i % batch)[i % batch] for i in indices])


def _maps(model: EarlyExitGenerator, taps: Taps, samples: Samples, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Run all inputs again for their key and value features, with the same random numbers."""
    device = device_of(model.generator)
    for indices, args, kwargs in samples.batches(batch):
        with torch.no_grad(), drawing_from(samples.seed + indices[0], device):
            key_feature = model.split.begin(args, kwargs).key_feature
        with drawing_from(samples.seed + indices[0], device):
            yield taps.query(key_feature, args, kwargs), model.decomposition.guidance_values(args, kwargs)
