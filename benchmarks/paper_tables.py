"""Count the computational routes of the paper's Tables 1 and 2 and print them beside the paper's numbers.

What the paper prints as GFLOPs are giga multiply-accumulates. It does not say which counter it used, so every
route is counted twice: *MACs*, those of convolutions and matrix products alone, as retroexit prints them
everywhere; and *layers*, as thop counts them, where normalisation and upsampling layers cost something too.
Table 1 is compared by layers (two of its cells are 0.01 and 0.04 too far off in MACs), Table 2 by MACs.

Branches are built by `retroexit.wrap` at the full widths on small maps and then counted at the full size on
PyTorch's meta device, where nothing is computed.

    python benchmarks/paper_tables.py --json runs/paper_tables.json
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from retroexit_megaportraits import MegaPortraitsG2d
from retroexit_megaportraits import retroexit_describe as describe_megaportraits
from retroexit_oasis import OASISGenerator
from retroexit_oasis import retroexit_describe as describe_oasis
from torch import Tensor, nn

import retroexit
from retroexit.evaluation.macs import count_macs, thop_macs
from retroexit.routing.predictor import Predictor

SCALES = {"1/2": 1 / 2, "1/3": 1 / 3, "1/4": 1 / 4, "1/6": 1 / 6, "1/15": 1 / 15}
TABLE_1 = {
    "1/2": (157, 171, 193, 227, 319),
    "1/3": (137, 154, 182, 227, 319),
    "1/4": (120, 138, 168, 227, 319),
}
TABLE_2 = {"1/3": (65, 100, 136, 213), "1/6": (51, 89, 135, 213), "1/15": (47, 85, 127, 213)}
ENLARGED = 8
"""How many times larger maps are than those that branches are built on."""

Counter = Callable[..., int]


@dataclass(frozen=True)
class Count:
    """Cost of one route in GMACs.

    Attributes:
        macs: Convolutions and matrix products.
        layers: By layer type, with normalisation and upsampling layers.
        resizing: Share of the convolutions that resize the guide, in ``macs`` and ``layers`` alike.
    """

    macs: float
    layers: float
    resizing: float = 0.0

    def without_resizing(self) -> Count:
        """Leave out the convolutions that resize the guide, as the paper does."""
        return Count(self.macs - self.resizing, self.layers - self.resizing)


def on_meta(module: nn.Module) -> nn.Module:
    """Copy a module without its numbers."""
    return copy.deepcopy(module).to("meta")


def enlarged(shape: Sequence[int]) -> Tensor:
    """Make an empty map of the full size from a shape ``(N, C, h, w)`` of the small one."""
    return torch.empty(*shape[:2], *(ENLARGED * side for side in shape[2:]), device="meta")


def count(module: nn.Module, *args: Tensor) -> Count:
    """Count one call in both ways."""
    return Count(count_macs(module, *args) / 1e9, thop_macs(module, *args) / 1e9)


class Guided(nn.Module):
    """A branch with its guide as a positional argument, which is all that thop can hand over."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, guide: Tensor, *crossing: Tensor) -> Any:
        """Render an image."""
        return self.branch(*crossing, guide=guide)


def resizing_gmacs(branch: nn.Module, guide: Tensor) -> float:
    """Cost of the convolutions that bring the guide to the size of each map."""
    resizers = [module.resize for module in branch.modules() if getattr(module, "resize", None) is not None]
    return sum(count_macs(resizer, guide) for resizer in resizers) / 1e9


def routes(model: Any, backbone: Count) -> list[Count]:
    """Count all routes of a wrapped generator at the full size.

    A route costs what the backbone does, less the rest of it behind the attach point, plus the branch.
    """
    split, found = model.anatomy.split, []
    for index, branch in enumerate(model.branches):
        crossing = [enlarged(node.meta["shape"]) for node in split.cuts[index].crossing]
        rest, thin, resizing = count(on_meta(split.tail(index)), *crossing), on_meta(branch), 0.0
        if branch.needs_guide:
            guide = enlarged(model.anatomy.value_cut.feature.meta["shape"])
            resizing, cost = resizing_gmacs(thin, guide), count(Guided(thin), guide, *crossing)
        else:
            cost = count(thin, *crossing)
        found.append(
            Count(
                backbone.macs - rest.macs + cost.macs, backbone.layers - rest.layers + cost.layers, resizing
            )
        )
    return [*found, backbone]


def oasis(scales: Sequence[str], guidance: Any = None) -> dict[str, list[Count]]:
    """Count OASIS of 256x512 with 35 labels and branches after l_1 to l_4, floor 64 (section 4.1)."""
    with torch.device("meta"):
        full, label = OASISGenerator().eval(), torch.empty(1, 35, 256, 512)
    backbone = count(full, label)
    small = OASISGenerator(crop=(256 // ENLARGED, 512 // ENLARGED)).eval()
    found = {}
    for scale in scales:
        model = wrap(small, describe_oasis(small), [1, 2, 3, 4], scale, guidance=guidance)
        found[scale] = routes(model, backbone)
    return found


def megaportraits(tap: Any, floor: int, guidance: Any = None) -> dict[str, list[Count]]:
    """Count G2d of 512x512 with branches after, or before, l_2, l_4 and l_6 (section 4.2)."""
    with torch.device("meta"):
        full, feature = MegaPortraitsG2d().eval(), torch.empty(1, 1536, 64, 64)
    backbone = count(full, feature)
    small = MegaPortraitsG2d(size=64 // ENLARGED).eval()
    found = {}
    for scale in TABLE_2:
        model = wrap(
            small,
            describe_megaportraits(small),
            [2, 4, 6],
            scale,
            tap=tap,
            min_channels=floor,
            guidance=guidance,
        )
        found[scale] = routes(model, backbone)
    return found


def wrap(generator: nn.Module, known: Any, attach_at: list[int | str], scale: str, **options: Any) -> Any:
    # Widths do not depend on the starting weights, and fresh ones are made faster.
    return retroexit.wrap(
        generator, attach_at, SCALES[scale], adapter=known, init="scratch", self_test=False, **options
    )


def show(title: str, paper: dict[str, tuple[int, ...]], found: dict[str, list[Count]]) -> None:
    """Print ours beside the paper's, cell by cell."""
    print(f"\n{title}\n  scale exit  paper    MACs    diff  layers    diff   (GMACs)")
    for scale, row in paper.items():
        for number, (want, got) in enumerate(zip(row, found[scale], strict=True), 1):
            place = "BB" if number == len(row) else str(number)
            print(
                f"  {scale:>5} {place:>4} {want:>6} {got.macs:>7.2f} {got.macs - want:>+7.2f} "
                f"{got.layers:>7.2f} {got.layers - want:>+7.2f}"
            )


def show_left_out(plain: list[Count], guided: list[Count], images: dict[str, list[Count]]) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare our counts with the paper's Tables 1 and 2.")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    path: Path | None = parser.parse_args().json
    first = oasis(list(TABLE_1))
    guided = oasis(["1/4"], guidance=True)
    image = retroexit.Guidance(value_after="to_rgb", inject="every_stage")
    with_images = megaportraits("after", floor=24, guidance=image)
    after = {scale: [count.without_resizing() for count in row] for scale, row in with_images.items()}
    before = megaportraits("before", floor=64)
    show("Table 1, OASIS 256x512, branches after l_1 to l_4, floor 64, guidance not counted", TABLE_1, first)
    show("Table 2, G2d 512x512, after l_2, l_4, l_6, floor 24, image guide at every module", TABLE_2, after)
    show("Table 2, G2d 512x512, before l_2, l_4, l_6, floor 64, no guide", TABLE_2, before)
    show_left_out(first["1/4"], guided["1/4"], with_images)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        tables: dict[str, Any] = {
            "table1": {scale: [count.layers for count in row] for scale, row in first.items()},
            "table2": {
                "after": {scale: [count.macs for count in row] for scale, row in after.items()},
                "before": {scale: [count.macs for count in row] for scale, row in before.items()},
            },
            "unit": {"table1": "GMACs by layers (thop)", "table2": "GMACs of convolutions and products"},
            "table1_macs": {scale: [count.macs for count in row] for scale, row in first.items()},
        }
        path.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
