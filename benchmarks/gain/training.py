"""One branch, trained with one kind of guide and tested."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import Case
from torch import Tensor, nn
from tqdm import tqdm

import retroexit
from retroexit.core.images import ImageRange
from retroexit.core.samples import Samples
from retroexit.guidance import GuidanceBank, with_slopes
from retroexit.model import EarlyExitGenerator
from retroexit.plugins import host
from retroexit.training.cache import IMAGE, FeatureCache, guidance_names
from retroexit.training.steps import Cropper

__all__ = ["CONTROLS", "Bench", "Schedule", "noise", "shuffled"]

Guides = Callable[[Sequence[int]], Tensor]
CONTROLS = ("shuffled", "noise")


@dataclass(frozen=True)
class Schedule:
    """How a branch is trained: Adam, one cosine after a warm-up, L1 plus the metric, no running average.

    Attributes:
        steps: Optimiser steps.
        batch: Samples (or crops) per step.
        lr: Largest learning rate.
        bfloat16: Whether to compute in bfloat16 where autocast says so.
    """

    steps: int = 300
    batch: int = 8
    lr: float = 4e-3
    bfloat16: bool = True

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        warm = max(1, self.steps // 10)
        if step < warm:
            return self.lr * (0.1 + 0.9 * step / warm)
        done = (step - warm) / max(1, self.steps - warm)
        return self.lr * (0.001 + 0.999 * 0.5 * (1 + math.cos(math.pi * done)))


class Bench:
    """Trains and tests the variants of one case; what several of them need is computed once."""

    def __init__(self, case: Case, out: Path, schedule: Schedule, progress: bool = True) -> None:
        self.case, self.out, self.schedule, self.progress = case, out, schedule, progress
        self.limits = ImageRange(*case.image_range)

    def caches(self, model: EarlyExitGenerator) -> tuple[FeatureCache, FeatureCache]:
        """Features of the inputs to fit on and of those to test on."""
        taps = model.decomposition.taps
        if taps is None:  # what crosses the cuts is the same with every guide
            probe = self.case.wrap(next(iter(self.case.variants.values())), 0)
            return self.caches(probe)
        name = f"{taps.key_tap}-{taps.value_cut.feature.name}"
        train, test = (
            FeatureCache.build(
                model, Samples(items), self.out / "cache" / f"{name}-{part}", progress=self.progress
            )
            for part, items in (("train", self.case.train), ("test", self.case.test))
        )
        return train, test

    def bank(self, model: EarlyExitGenerator, cache: FeatureCache) -> GuidanceBank:
        """Fill a bank from the inputs to fit on, or read it where another run has filled it."""
        taps, guidance = model.decomposition.taps, model.options.guidance
        assert taps is not None and guidance is not None
        key, value = guidance_names(taps, model.split.cuts[0].feature.name)
        settings = [taps.key_tap, taps.value_cut.feature.name, *_settings_of(guidance).values()]
        folder = self.out / "banks" / "-".join(_plain(part) for part in settings)
        back_end = host().retriever(guidance.retriever)
        if not folder.exists():
            bank = GuidanceBank.build(
                ((cache.read(key, rows), list(rows)) for rows in _chunks(len(cache), 16)),
                lambda rows: cache.read(value, rows),
                patch=taps.patch,
                size=guidance.size,
                thin=guidance.thin,
                retriever=back_end(),
                progress=self.progress,
            )
            if guidance.order:
                maps = ((cache.read(key, rows), cache.read(value, rows)) for rows in _chunks(len(cache), 16))
                bank = with_slopes(bank, maps, len(cache) * taps.queries)
            bank.save(folder)
        return GuidanceBank.load(folder, retriever_class=type(back_end()))

    def run(self, variant: str, exit_index: int, seed: int) -> dict[str, Any]:
        """Train one branch with one kind of guide and measure it on every input to test on."""
        name, control = _parted(variant)
        guidance = None if name == "none" else self.case.variants[name]
        model = self.case.wrap(guidance, seed)
        train, test = self.caches(model)
        row: dict[str, Any] = {
            "variant": variant,
            "exit": exit_index,
            **dataclasses.asdict(self.schedule),
            "seed": seed,
            "macs": model.exits[exit_index - 1].macs,
            "backbone_macs": model.exits[-1].macs,
            "search_macs": 0,
        }
        guides, test_guides, swapped = None, None, None
        if guidance is not None:
            bank = self.bank(model, train)
            guides, _ = self._guides(model, bank, train, control, seed, own=False)
            test_guides, distance = self._guides(model, bank, test, control, seed + 1, own=True)
            swapped = shuffled(test_guides, len(test), seed + 2)
            row |= {"keys": len(bank), "width": bank.retriever.width, "distance": distance}
            row["search_macs"] = 0 if control else model.decomposition.search_macs(bank)
        begin = time.perf_counter()
        self._train(model, exit_index - 1, train, guides, seed, _plain(f"{variant}-{exit_index}-{seed}"))
        row["seconds"] = time.perf_counter() - begin
        row["losses"] = self._losses(model, exit_index - 1, test, test_guides)
        if swapped is not None and not control:
            row["swapped"] = self._losses(model, exit_index - 1, test, swapped)
            taps = model.decomposition.taps
            if taps is not None and taps.gives_image:
                row["alone"] = self._compared(test, test_guides)
        return row

    def _guides(
        self,
        model: EarlyExitGenerator,
        bank: GuidanceBank,
        cache: FeatureCache,
        control: str,
        seed: int,
        own: bool,
    ) -> tuple[Guides, list[float]]:
        """Search once for every sample; an input that is in the bank must not find its own keys."""
        taps = model.decomposition.taps
        assert taps is not None
        key, _ = guidance_names(taps, model.split.cuts[0].feature.name)
        found = [
            bank.search(cache.read(key, rows), None if own else torch.as_tensor(rows))
            for rows in _chunks(len(cache), 64)
        ]
        ids = torch.cat([part.ids for part in found])
        distance = torch.cat([part.distances.sqrt().flatten(1).mean(1) for part in found])
        retrieved: Guides = lambda rows: bank.glue(  # noqa: E731
            ids[torch.as_tensor(list(rows))], feature=cache.read(key, rows)
        )
        if control == "shuffled":
            retrieved = shuffled(retrieved, len(cache), seed)
        elif control == "noise":
            retrieved = noise(retrieved, len(cache), seed)
        return retrieved, distance.tolist()

    def _train(
        self,
        model: EarlyExitGenerator,
        index: int,
        cache: FeatureCache,
        guides: Guides | None,
        seed: int,
        name: str,
    ) -> None:
        """Train one branch; every variant sees the same samples and windows. Goes on where it stopped."""
        plan, branch = self.schedule, model.branches[index]
        names, cropper = _crossing(model, index), self._cropper(model, cache, index)
        optimizer = torch.optim.Adam(branch.parameters(), lr=plan.lr, betas=(0.9, 0.99))
        state = self.out / f"{name}-{plan.steps}.pt"
        begin = 0
        if state.exists():
            saved = torch.load(state, weights_only=True)
            branch.load_state_dict(saved["branch"])
            optimizer.load_state_dict(saved["optimizer"])
            begin = saved["step"]
        branch.train()
        off = None if self.progress else True
        for step in tqdm(range(begin, plan.steps), desc=name, leave=False, disable=off):
            random = np.random.default_rng([seed, step])
            rows = random.choice(len(cache), plan.batch, replace=False).tolist()
            windows = cropper.offsets(plan.batch, random)
            values = [cropper(cache.read(name, rows), windows) for name in names]
            guide = None if guides is None else cropper(guides(rows), windows)
            for group in optimizer.param_groups:
                group["lr"] = plan.rate(step)
            with torch.autocast("cpu", torch.bfloat16, enabled=plan.bfloat16):
                image = model.image(branch(*values, guide=guide))
            pair = image, cropper(cache.read(IMAGE, rows), windows)
            image, target = (self.limits.to_signed(x.float()) for x in pair)
            loss = (image - target).abs().mean() + self.case.metric(image, target).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(branch.parameters(), 1.0)
            optimizer.step()
            if (step + 1) % 100 == 0:
                kept = {"branch": branch.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                torch.save(kept, state.with_suffix(".part"))
                os.replace(state.with_suffix(".part"), state)
        branch.eval()
        state.unlink(missing_ok=True)  # its numbers are kept

    def _cropper(self, model: EarlyExitGenerator, cache: FeatureCache, index: int) -> Cropper:
        image = cache.read(IMAGE, [0])
        sizes = [tuple(cache.read(name, [0]).shape[2:]) for name in _crossing(model, index)]
        taps = model.decomposition.taps
        sizes += [] if taps is None else [taps.guide.size]
        return Cropper.for_maps(
            self.case.crop, tuple(image.shape[2:]), [s for s in sizes if len(s) == image.dim() - 2]
        )

    @torch.no_grad()
    def _losses(
        self, model: EarlyExitGenerator, index: int, cache: FeatureCache, guides: Guides | None
    ) -> list[float]:
        names, branch = _crossing(model, index), model.branches[index]

        def render(rows: Sequence[int]) -> Tensor:
            guide = None if guides is None else guides(rows)
            values = (cache.read(name, rows) for name in names)
            return model.image(branch(*values, guide=guide))

        return self._compared(cache, render)

    def _compared(self, cache: FeatureCache, render: Guides) -> list[float]:
        """Loss of every image that is rendered, to the backbone's."""
        found = []
        for rows in _chunks(len(cache), 4):
            images = render(rows), cache.read(IMAGE, rows)
            found.append(self.case.metric(*(self.limits.to_signed(image).float() for image in images)))
        return [round(float(loss), 5) for loss in torch.cat(found)]


def shuffled(guides: Guides, count: int, seed: int) -> Guides:
    """Give every input the guide of another one."""
    order = np.random.default_rng([seed, 7]).permutation(count)
    other = np.empty(count, int)
    other[order] = np.roll(order, 1)
    return lambda rows: guides([int(other[row]) for row in rows])


def noise(guides: Guides, count: int, seed: int) -> Guides:
    """Give every input noise, always the same, with the guides' mean and spread in each channel."""
    some = guides(range(min(count, 16)))
    axes = [0, *range(2, some.dim())]
    mean, spread = some.mean(axes, keepdim=True), some.std(axes, keepdim=True)
    draw = lambda row: torch.randn(some.shape[1:], generator=torch.Generator().manual_seed(1000 * seed + row))  # noqa: E731
    return lambda rows: mean + spread * torch.stack([draw(row) for row in rows])


def _crossing(model: EarlyExitGenerator, index: int) -> list[str]:
    return [node.name for node in model.split.cuts[index].crossing]


def _parted(variant: str) -> tuple[str, str]:
    name, _, control = variant.partition(" ")
    return name, control


def _settings_of(guidance: retroexit.Guidance) -> dict[str, Any]:
    """What decides about keys and values; branches enter differently from the same bank."""
    return {
        f.name: getattr(guidance, f.name)
        for f in dataclasses.fields(guidance)
        if f.name not in ("inject", "key")
    }


def _plain(value: object) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in str(value))


def _chunks(count: int, size: int) -> list[list[int]]:
    return [list(range(begin, min(begin + size, count))) for begin in range(0, count, size)]
