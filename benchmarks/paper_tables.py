"""Count the computational routes of the paper's Tables 1 and 2 and print them beside the paper's numbers.

What the paper prints as GFLOPs are giga multiply-accumulates. It does not say which counter it used. One
count serves both tables here: multiply-accumulates of convolutions, and one addition per output for each
bias, as ptflops counts. It holds in every cell of Table 1 (within 1 GMAC), and in every cell of Table 2 that
any reading fits. Two other counts hold in fewer:

* Multiply-accumulates alone, which retroexit prints everywhere and which stand beside ours here. They are up
  to 0.26 GMACs less, and miss Table 1 by 0.01 beyond its GMAC in exit 2 at 1/2 and by 0.04 in exit 4.
* thop's count by layer types, where a normalisation costs four operations per number: within 0.91 in Table 1,
  but 213.40 for the backbone of Table 2, 0.40 too many.

Both tables leave out guidance, the convolutions that resize it, predictor and retrieval; what these add is
printed at the end.

Branches are built by `retroexit.wrap` at the full widths on small maps and then counted at the full size on
PyTorch's meta device, where nothing is computed.

    python benchmarks/paper_tables.py --json runs/paper_tables.json
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from retroexit_megaportraits import MegaPortraitsG2d
from retroexit_megaportraits import retroexit_describe as describe_megaportraits
from retroexit_oasis import OASISGenerator
from retroexit_oasis import retroexit_describe as describe_oasis
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import retroexit
from retroexit.core.modules import count_macs
from retroexit.routing.predictor import Predictor

SCALES = {"1/2": 1 / 2, "1/3": 1 / 3, "1/4": 1 / 4, "1/6": 1 / 6, "1/15": 1 / 15}
TABLE_1: dict[str, tuple[int, ...]] = {
    "1/2": (157, 171, 193, 227, 319),
    "1/3": (137, 154, 182, 227, 319),
    "1/4": (120, 138, 168, 227, 319),
}
TABLE_2: dict[str, tuple[int, ...]] = {
    "1/3": (65, 100, 136, 213),
    "1/6": (51, 89, 135, 213),
    "1/15": (47, 85, 127, 213),
}
ENLARGED = 8
"""How many times larger maps are than those that branches are built on."""


@dataclass(frozen=True)
class Count:
    """Cost of one route in GMACs.

    Attributes:
        macs: Multiply-accumulates of convolutions and matrix products.
        biases: Additions of biases.
        resizing: Share of the convolutions that resize the guide, which the paper leaves out.
    """

    macs: float
    biases: float
    resizing: float = 0.0

    @property
    def total(self) -> float:
        """What stands for the paper's number."""
        return self.macs + self.biases

    def without_resizing(self) -> Count:
        """Leave out the convolutions that resize the guide."""
        return Count(self.macs - self.resizing, self.biases)


Rows = dict[str, list[Count]]
"""Counts of all exits, the backbone last, by scale."""


class BiasCounter(TorchDispatchMode):
    """Counts one addition per output for every bias of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.additions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and args[2] is not None:
            self.additions += result.numel()
        return result


def on_meta(module: nn.Module) -> nn.Module:
    """Copy a module without its numbers."""
    return copy.deepcopy(module).to("meta")


def enlarged(shape: Sequence[int]) -> Tensor:
    """Make an empty map of the full size from a shape ``(N, C, h, w)`` of the small one."""
    return torch.empty(*shape[:2], *(ENLARGED * side for side in shape[2:]), device="meta")


def count(module: nn.Module, *args: Tensor, **kwargs: Any) -> Count:
    """Count one call."""
    with torch.no_grad(), BiasCounter() as counter:
        module(*args, **kwargs)
    return Count(count_macs(module, *args, **kwargs) / 1e9, counter.additions / 1e9)


def resizing(branch: nn.Module, guide: Tensor) -> float:
    """Cost of the convolutions that bring the guide to the size of each map, in GMACs."""
    resizers = [module.resize for module in branch.modules() if getattr(module, "resize", None) is not None]
    return sum(count_macs(resizer, guide) for resizer in resizers) / 1e9


def routes(models: dict[str, Any], backbone: Count) -> Rows:
    """Count all routes of a generator that is wrapped at several scales, at the full size.

    A route costs what the backbone does, less the rest of it behind the attach point, plus the branch.
    """
    rows: Rows = {scale: [] for scale in models}
    for index, cut in enumerate(next(iter(models.values())).split.cuts):
        crossing = [enlarged(node.meta["shape"]) for node in cut.crossing]
        rest = None
        for scale, model in models.items():
            rest = rest or count(on_meta(model.split.tail(index)), *crossing)
            thin, guide, more = on_meta(model.branches[index]), None, 0.0
            if model.decomposition.value_cut is not None:
                guide = enlarged(model.decomposition.value_cut.feature.meta["shape"])
                more = resizing(thin, guide)
            cost = count(thin, *crossing, guide=guide)
            macs, biases = backbone.macs - rest.macs + cost.macs, backbone.biases - rest.biases + cost.biases
            rows[scale].append(Count(macs, biases, more))
    return {scale: [*row, backbone] for scale, row in rows.items()}


def oasis(scales: Sequence[str], guidance: Any = None) -> Rows:
    """Count OASIS of 256x512 with 35 labels and branches after l_1 to l_4, floor 64 (section 4.1)."""
    with torch.device("meta"):
        full, label = OASISGenerator().eval(), torch.empty(1, 35, 256, 512)
    backbone = count(full, label)
    small = OASISGenerator(crop=(256 // ENLARGED, 512 // ENLARGED)).eval()
    description = describe_oasis(small)
    return routes({s: wrap(small, description, [1, 2, 3, 4], s, guidance=guidance) for s in scales}, backbone)


def megaportraits(tap: Any, floor: int, guidance: Any = None) -> Rows:
    """Count G2d of 512x512 with branches after, or before, l_2, l_4 and l_6 (section 4.2)."""
    with torch.device("meta"):
        full, feature = MegaPortraitsG2d().eval(), torch.empty(1, 1536, 64, 64)
    backbone = count(full, feature)
    small = MegaPortraitsG2d(size=64 // ENLARGED).eval()
    description = describe_megaportraits(small)
    options = {"tap": tap, "min_channels": floor, "guidance": guidance}
    return routes({s: wrap(small, description, [2, 4, 6], s, **options) for s in TABLE_2}, backbone)


def wrap(generator: nn.Module, description: Any, attach_at: list[int | str], scale: str, **options: Any) -> Any:
    # Widths do not depend on the starting weights, and fresh ones are made faster.
    return retroexit.wrap(
        generator, attach_at, SCALES[scale], adapter=description, init="scratch", self_test=False, **options
    )


def show(title: str, paper: dict[str, tuple[int, ...]], rows: Rows) -> None:
    """Print ours beside the paper's, cell by cell."""
    print(f"\n{title}\n  scale exit  paper    ours    diff   MACs alone  diff   (GMACs)")
    for scale, row in paper.items():
        for number, (theirs, ours) in enumerate(zip(row, rows[scale], strict=True), 1):
            place = "BB" if number == len(row) else str(number)
            print(
                f"  {scale:>5} {place:>4} {theirs:>6} {ours.total:>7.2f} "
                f"{ours.total - theirs:>+7.2f}   {ours.macs:>7.2f} {ours.macs - theirs:>+7.2f}"
            )


def show_left_out(plain: list[Count], guided: list[Count], images: Rows) -> None:
    """Print what the paper's counts leave out: guidance, resizing, predictor and retrieval."""
    print("\nWhat Table 1 leaves out, at scale 1/4 (GMACs per image)")
    for number, (without, with_guide) in enumerate(zip(plain[:-1], guided[:-1], strict=True), 1):
        wider = with_guide.macs - with_guide.resizing - without.macs
        print(f"  exit {number}: guide of 512 channels {wider:.2f}, resizing it {with_guide.resizing:.2f}")
    with torch.device("meta"):
        by_inputs = count_macs(Predictor(35, 4), torch.empty(1, 35, 256, 512)) / 1e9
        by_feature = count_macs(Predictor(1024, 4), torch.empty(1, 1024, 8, 16)) / 1e9
    print(f"  predictor: {by_inputs:.3f} from the label map, {by_feature:.3f} from the first feature")
    for entries in (1024, 100_000, 6_400_000):
        search = 8 * 16 * entries * 1024 / 1e9
        print(f"  retrieval: {search:.2f} for an exact search of 128 patches among {entries} keys")
    shares = ", ".join(f"{count.resizing:.3f}" for count in images["1/15"][:-1])
    print(f"What Table 2 leaves out: resizing a guide image for every module, {shares} at exits 1 to 3")


def as_json(what: str, first: Rows, after: Rows, before: Rows) -> dict[str, Any]:
    """Arrange one kind of count as the JSON file has it."""

    def numbers(rows: Rows) -> dict[str, list[float]]:
        return {scale: [getattr(count, what) for count in row] for scale, row in rows.items()}

    return {"table1": numbers(first), "table2": {"after": numbers(after), "before": numbers(before)}}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare our counts with the paper's Tables 1 and 2.")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    path: Path | None = parser.parse_args().json
    image = retroexit.Guidance(value_after="to_rgb", inject="every_stage")
    # Reading a generator is Python's work: threads do not help it, processes do.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn, torch.set_num_threads, (1,)) as pool:
        alone = [pool.submit(oasis, [scale]) for scale in TABLE_1]
        with_guide = pool.submit(oasis, ["1/4"], guidance=True)
        behind = pool.submit(megaportraits, "after", floor=24, guidance=image)
        in_front = pool.submit(megaportraits, "before", floor=64)
        first = {scale: row for job in alone for scale, row in job.result().items()}
        guided, with_images, before = with_guide.result(), behind.result(), in_front.result()
    after = {scale: [count.without_resizing() for count in row] for scale, row in with_images.items()}
    show("Table 1, OASIS 256x512, branches after l_1 to l_4, floor 64, guidance not counted", TABLE_1, first)
    show("Table 2, G2d 512x512, after l_2, l_4, l_6, floor 24, image guide at every module", TABLE_2, after)
    show("Table 2, G2d 512x512, before l_2, l_4, l_6, floor 64, no guide", TABLE_2, before)
    show_left_out(first["1/4"], guided["1/4"], with_images)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tables = {
            **as_json("total", first, after, before),
            "macs_alone": as_json("macs", first, after, before),
            "unit": "GMACs, with one addition per output for each bias; macs_alone: without",
        }
        path.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
