"""One branch, trained with one kind of guide and tested."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Case
from torch import Tensor

from retroexit.core.samples import ImageRange, Samples
from retroexit.guidance import GuidanceBank, build_bank, with_slopes
from retroexit.model import EarlyExitGenerator
from retroexit.plugins import host
from retroexit.training.cache import IMAGE, FeatureCache, chunks, guidance_names
from retroexit.training.losses import L1, TrainingLoss
from retroexit.training.settings import FitSettings
from retroexit.training.steps import Cropper, Steps
from retroexit.training.trainer import BranchTrainer, train_branches

Guides = Callable[[Sequence[int]], Tensor]
CONTROLS = ("shuffled", "noise")
SCHEDULE = ("steps", "lr", "clip", "ema", "bfloat16")


class Bench:
    """Trains and tests the variants of one case; what several of them need is computed once.

    Args:
        case: Generator and inputs.
        out: Folder for features, banks and checkpoints.
        schedule: How a branch is trained, as `fit` does it, with L1 and the case's metric.
        batch: Samples (or crops) per step.
    """

    def __init__(self, case: Case, out: Path, schedule: FitSettings, batch: int) -> None:
        self.case, self.out, self.schedule, self.batch = case, out, schedule, batch
        self.limits = ImageRange(*case.image_range)

    def caches(self, model: EarlyExitGenerator) -> tuple[FeatureCache, FeatureCache]:
        """Features of the inputs to fit on and of those to test on."""
        taps = model.decomposition.taps
        if taps is None:  # what crosses the cuts is the same with every guide
            return self.caches(self.case.wrap(next(iter(self.case.variants.values())), 0))
        folder = self.out / "cache" / f"{taps.key_tap}-{taps.value_cut.feature.name}"
        parts = (("train", self.case.train), ("test", self.case.test))
        train, test = (
            FeatureCache.build(model, Samples(items), folder.with_name(f"{folder.name}-{part}"))
            for part, items in parts
        )
        return train, test

    def bank(self, model: EarlyExitGenerator, cache: FeatureCache) -> GuidanceBank:
        """Fill a bank from the inputs to fit on, or read it where an earlier run has filled it."""
        taps, guidance = model.decomposition.taps, model.options.guidance
        assert taps is not None and guidance is not None
        key, value = guidance_names(taps, model.split.cuts[0].feature.name)
        # Branches read the same bank in different ways, so `inject` does not name it.
        settings = dataclasses.asdict(dataclasses.replace(guidance, inject="input", key=None))
        names = [taps.key_tap, taps.value_cut.feature.name, *settings.values()]
        folder = self.out / "banks" / "-".join(map(_file_name, names))
        retriever = host().retriever(guidance.retriever)()
        if not folder.exists():
            bank = build_bank(
                ((cache.read(key, rows), list(rows)) for rows in chunks(len(cache), 16)),
                lambda rows: cache.read(value, rows),
                patch=taps.patch,
                size=guidance.size,
                thin=guidance.thin,
                retriever=retriever,
            )
            if guidance.order:
                maps = ((cache.read(key, rows), cache.read(value, rows)) for rows in chunks(len(cache), 16))
                bank = with_slopes(bank, maps, len(cache) * taps.queries)
            bank.save(folder)
        return GuidanceBank.load(folder, retriever_class=type(retriever))

    def run(self, variant: str, exit_index: int, seed: int) -> dict[str, Any]:
        """Train one branch with one kind of guide and measure it on every input to test on."""
        name, _, control = variant.partition(" ")
        guidance = None if name == "none" else self.case.variants[name]
        model = self.case.wrap(guidance, seed)
        train, test = self.caches(model)
        row: dict[str, Any] = {
            "variant": variant,
            "exit": exit_index,
            **{name: getattr(self.schedule, name) for name in SCHEDULE},
            "batch": self.batch,
            "seed": seed,
            "macs": model.exits[exit_index - 1].macs,
            "backbone_macs": model.exits[-1].macs,
            "search_macs": 0,
        }
        guides, test_guides, swapped = None, None, None
        if guidance is not None:
            bank = self.bank(model, train)
            guides, _ = self._guides(model, bank, train, control, seed, in_bank=True)
            test_guides, distance = self._guides(model, bank, test, control, seed + 1, in_bank=False)
            swapped = shuffled(test_guides, len(test), seed + 2)
            row |= {"keys": len(bank), "width": bank.retriever.width, "distance": distance}
            row["search_macs"] = 0 if control else bank.macs_per_search(model.decomposition.taps.queries)
        begin = time.perf_counter()
        self._train(model, exit_index - 1, train, guides, seed, _file_name(f"{variant}-{exit_index}-{seed}"))
        row["seconds"] = time.perf_counter() - begin
        row["losses"] = self._losses(model, exit_index - 1, test, test_guides)
        if swapped is not None and not control:
            row["swapped"] = self._losses(model, exit_index - 1, test, swapped)
            taps = model.decomposition.taps
            if taps is not None and taps.gives_image:
                row["alone"] = self._compared(test, test_guides)
        return row

    def _guides(
        self, model: EarlyExitGenerator, bank: GuidanceBank, cache: FeatureCache, control: str, seed: int, in_bank: bool
    ) -> tuple[Guides, list[float]]:
        """Search once for every sample; a sample of the bank does not get its own keys."""
        taps = model.decomposition.taps
        assert taps is not None
        key, _ = guidance_names(taps, model.split.cuts[0].feature.name)
        parts = chunks(len(cache), 64)
        results = [bank.search(cache.read(key, rows), torch.as_tensor(rows) if in_bank else None) for rows in parts]
        ids = torch.cat([part.ids for part in results])
        distance = torch.cat([part.distances.sqrt().flatten(1).mean(1) for part in results])
        retrieved: Guides = lambda rows: bank.glue(  # noqa: E731
            ids[torch.as_tensor(list(rows))], feature=cache.read(key, rows)
        )
        if control == "shuffled":
            retrieved = shuffled(retrieved, len(cache), seed)
        elif control == "noise":
            retrieved = noise(retrieved, len(cache), seed)
        return retrieved, distance.tolist()

    def _train(
        self, model: EarlyExitGenerator, index: int, cache: FeatureCache, guides: Guides | None, seed: int, name: str
    ) -> None:
        """Train one branch as `fit` does; every variant sees the same samples and windows."""
        sizes = [tuple(cache.read(value, [0]).shape[2:]) for value in _crossing(model, index)]
        if model.decomposition.taps is not None:
            sizes.append(model.decomposition.taps.guide.size)
        image_size = tuple(cache.read(IMAGE, [0]).shape[2:])
        maps = [size for size in sizes if len(size) == len(image_size)]
        cropper = Cropper.for_maps(self.case.crop, image_size, maps)
        rows, device = list(range(len(cache))), torch.device("cpu")
        samples = Samples(self.case.train)
        steps = Steps(cache, samples, rows, cropper, self.limits, guides, self.batch, seed, device)
        loss = TrainingLoss({"l1": (1.0, L1()), "quality": (1.0, self.case.metric)})
        folder = self.out / "unfinished" / f"{name}-{self.schedule.steps}"
        folder.mkdir(parents=True, exist_ok=True)
        trainer = BranchTrainer(model, index, loss, self.limits, self.schedule, folder)
        train_branches([trainer], steps, self.schedule)
        shutil.rmtree(folder)

    @torch.no_grad()
    def _losses(self, model: EarlyExitGenerator, index: int, cache: FeatureCache, guides: Guides | None) -> list[float]:
        names, branch = _crossing(model, index), model.branches[index]

        def render(rows: Sequence[int]) -> Tensor:
            guide = None if guides is None else guides(rows)
            return model.image(branch(*(cache.read(name, rows) for name in names), guide=guide))

        return self._compared(cache, render)

    def _compared(self, cache: FeatureCache, render: Guides) -> list[float]:
        """Loss of every rendered image to the backbone's."""
        losses = []
        for rows in chunks(len(cache), 4):
            images = render(rows), cache.read(IMAGE, rows)
            losses.append(self.case.metric(*(self.limits.to_signed(image).float() for image in images)))
        return [round(float(loss), 5) for loss in torch.cat(losses)]


def shuffled(guides: Guides, count: int, seed: int) -> Guides:
    """Give every input the guide of another one."""
    order = np.random.default_rng([seed, 7]).permutation(count)
    other = np.empty(count, int)
    other[order] = np.roll(order, 1)
    return lambda rows: guides([int(other[row]) for row in rows])


def noise(guides: Guides, count: int, seed: int) -> Guides:
    """Give every input fixed noise with the guides' mean and spread in each channel."""
    some = guides(range(min(count, 16)))
    axes = [0, *range(2, some.dim())]
    mean, spread = some.mean(axes, keepdim=True), some.std(axes, keepdim=True)
    draw = lambda row: torch.randn(some.shape[1:], generator=torch.Generator().manual_seed(1000 * seed + row))  # noqa: E731
    return lambda rows: mean + spread * torch.stack([draw(row) for row in rows])


def _crossing(model: EarlyExitGenerator, index: int) -> list[str]:
    return [node.name for node in model.split.cuts[index].crossing]


def _file_name(value: object) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in str(value))
