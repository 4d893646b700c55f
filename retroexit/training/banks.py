"""A guidance bank from a stream of inputs; their features are never all in memory, nor on disk.

Keys of every input pass by, a bounded sample of them is thinned, and only inputs that own a surviving key run
once more for their values (paper, section 4.1: 500 maps x 100 noises x 128 patches).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.errors import OptionError
from retroexit.fingerprint import fingerprint
from retroexit.guidance.bank import GuidanceBank
from retroexit.guidance.reservoir import Reservoir
from retroexit.guidance.slopes import with_slopes
from retroexit.model import EarlyExitGenerator
from retroexit.retrieval import Retriever
from retroexit.taps import Taps
from retroexit.training.inputs import Samples, drawing_from

__all__ = ["stream_bank"]


def stream_bank(
    model: EarlyExitGenerator,
    samples: Samples,
    retriever: Retriever,
    *,
    batch: int = 4,
    eps: float = 0.0,
    max_candidates: int = 200_000,
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
        scratch: Folder to keep these in, rather than in memory. A build that was interrupted goes on from it
            to the same bank; whoever calls this removes it in the end.
        progress: Whether to show bars on a terminal.

    Returns:
        The bank; the model's own is left as it is.

    Raises:
        OptionError: If the model takes no guide.
        BankError: If features or values do not fit together.
        CheckpointError: If ``scratch`` holds candidates of something else, or damaged ones.
    """
    if not model.is_recorded:
        args, kwargs = samples.gather([0])
        model.record(*args, **kwargs)
    taps, guidance = model.anatomy.taps, model.options.guidance
    if taps is None or guidance is None:
        raise OptionError(
            "asked for a bank; found a model wrapped without guidance. Pass guidance=...", model
        )
    device = next((p.device for p in model.generator.parameters()), torch.device("cpu"))

    facts = {
        "fingerprint": fingerprint(model.generator),
        "generator": type(model.generator).__name__,
        "key_tap": taps.key_tap,
        "value_tap": taps.value_cut.feature.name,
        "inputs": len(samples),
    }
    # Inputs may be drawn as they are asked for and too many to hash: the first one stands for all.
    identity = {**facts, "patch": taps.patch, "batch": batch, "first": Samples([samples.items[0]]).digest()}
    candidates = Reservoir(max_candidates, seed=samples.seed, folder=scratch, identity=identity)
    done = candidates.seen // math.prod(candidates.grid)

    def keys() -> Iterator[tuple[Tensor, list[int]]]:
        off = None if progress else True
        with tqdm(total=len(samples), initial=done, desc="keys", disable=off) as bar:
            for indices, args, kwargs in samples.batches(batch, done):
                with torch.no_grad(), drawing_from(samples.seed + indices[0], device):
                    _, keyed = model.split.begin(args, kwargs)
                yield taps.query(keyed, args, kwargs), indices
                bar.update(len(indices))

    last: tuple[int, Tensor] = (-1, torch.empty(0))

    def values(wanted: list[int]) -> Tensor:
        # Whole batches as for the keys, so that noise drawn inside the generator is the same once more.
        nonlocal last
        found = []
        for index in wanted:
            begin = index - index % batch
            if last[0] != begin:
                args, kwargs = samples.gather(range(begin, min(begin + batch, len(samples))))
                with drawing_from(samples.seed + begin, device):
                    last = begin, model.anatomy.guidance_values(args, kwargs)
            found.append(last[1][index - begin])
        return torch.stack(found)

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
        meta=facts,
        progress=progress,
    )
    if not guidance.order:
        return bank
    return with_slopes(bank, _maps(model, taps, samples, batch, device), len(samples) * taps.queries)


def _maps(
    model: EarlyExitGenerator, taps: Taps, samples: Samples, batch: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run all inputs once more, for their key and value features; the draws are those of the first time."""
    for indices, args, kwargs in samples.batches(batch):
        with torch.no_grad(), drawing_from(samples.seed + indices[0], device):
            _, keyed = model.split.begin(args, kwargs)
        with drawing_from(samples.seed + indices[0], device):
            yield taps.query(keyed, args, kwargs), model.anatomy.guidance_values(args, kwargs)
