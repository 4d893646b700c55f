"""Build a guidance bank from a stream of inputs, whose features are neither all in memory nor on disk."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset

from retroexit.core.identity import fingerprint
from retroexit.core.modules import device_of
from retroexit.core.progress import progress_bar
from retroexit.core.samples import Samples, drawing_from
from retroexit.core.workers import in_order
from retroexit.errors import OptionError
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.building import Candidates, build_bank, with_slopes
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
    backbone = _Backbone(model, samples, batch)
    bank = build_bank(
        backbone.all_keys(candidates.seen // taps.queries, progress),
        backbone.values,
        run=in_order,
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
    return with_slopes(bank, in_order(backbone.maps, backbone.begins()), len(samples) * taps.queries)


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


class _Backbone:
    """Computes key and value features of inputs in batches, with the same random numbers whenever one is run again."""

    def __init__(self, model: EarlyExitGenerator, samples: Samples, batch: int) -> None:
        self.model, self.samples, self.batch = model, samples, batch
        self._last: tuple[int, Tensor] | None = None  # first input and value features of the last batch

    def begins(self, first: int = 0) -> range:
        """First input of every batch, from input ``first`` on."""
        return range(first, len(self.samples), self.batch)

    def all_keys(self, first: int, progress: bool) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield the maps that keys are cut from, with their inputs."""
        with progress_bar(total=len(self.samples), initial=first, desc="keys", show=progress) as bar:
            for begin, feature in zip(self.begins(first), in_order(self.keys, self.begins(first)), strict=True):
                indices = list(self._rows(begin))
                yield feature, indices
                bar.update(len(indices))

    @torch.no_grad()
    def keys(self, begin: int) -> Tensor:
        """Compute the map that keys are cut from; run no later stage, and none if a function returns it."""
        model, (args, kwargs) = self.model, self.samples.gather(self._rows(begin))
        taps = model.decomposition.taps
        assert taps is not None
        with self._seeded(begin):
            if taps.key is None:
                return model.split.key_feature(args, kwargs)
            rows = len(self._rows(begin)) * model.split.batched.get(taps.key_node, 1)
            return taps.query(torch.empty(rows), args, kwargs)

    def values(self, indices: list[int]) -> Tensor:
        """Compute the value features of inputs, in the batches of their keys."""
        rows = []
        for index in indices:
            begin = index - index % self.batch
            if self._last is None or self._last[0] != begin:
                args, kwargs = self.samples.gather(self._rows(begin))
                with self._seeded(begin):
                    self._last = begin, self.model.decomposition.guidance_values(args, kwargs)
            rows.append(self._last[1][index - begin])
        return torch.stack(rows)

    def maps(self, begin: int) -> tuple[Tensor, Tensor]:
        """Run inputs again for their key and value features."""
        args, kwargs = self.samples.gather(self._rows(begin))
        taps = self.model.decomposition.taps
        assert taps is not None
        with torch.no_grad(), self._seeded(begin):
            key_feature = self.model.split.begin(args, kwargs).key_feature
        with self._seeded(begin):
            return taps.query(key_feature, args, kwargs), self.model.decomposition.guidance_values(args, kwargs)

    def _rows(self, begin: int) -> range:
        return range(begin, min(begin + self.batch, len(self.samples)))

    def _seeded(self, begin: int) -> AbstractContextManager[None]:
        return drawing_from(self.samples.seed + begin, device_of(self.model.generator))
