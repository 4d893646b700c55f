"""Preview a street scene in many styles at an early exit, and finish the one that is chosen.

retroexit demo --out retroexit-demo
python examples/draft_and_refine.py retroexit-demo/lpips-alex docs/draft-and-refine.jpg
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import retroexit
from retroexit.core.modules import count_macs
from retroexit.demo import load_scene_generator, scene_inputs
from retroexit.demo.run import TEST_SEED
from retroexit.report.text_tables import table

COLUMNS, SCALE, GAP, LINE = 4, 2, 8, 24


def pixels(image: Tensor, scale: int) -> Image.Image:
    """Turn ``(3, H, W)`` in [-1, 1] into a picture, enlarged."""
    array = ((image / 2 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    picture = Image.fromarray(array)
    return picture.resize((scale * picture.width, scale * picture.height), Image.Resampling.LANCZOS)


def sheet(previews: Tensor, chosen: int, refined: Tensor) -> Image.Image:
    """Set previews ``(N, 3, H, W)`` in rows, and the chosen one below, large, before and after."""
    height, width = (SCALE * side for side in previews.shape[2:])
    rows = -(-len(previews) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (width + GAP) + GAP, rows * (height + LINE) + 2 * height + LINE + GAP), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=16)
    places = [
        (number % COLUMNS * (width + GAP) + GAP, number // COLUMNS * (height + LINE) + GAP)
        for number in range(len(previews))
    ]
    for number, (x, y) in enumerate(places):
        page.paste(pixels(previews[number], SCALE), (x, y))
        draw.text((x, y + height + 2), f"preview {number}", fill=(30, 30, 30), font=font)
    x, y = places[chosen]
    draw.rectangle((x - 3, y - 3, x + width + 2, y + height + 2), outline=(220, 40, 40), width=3)
    top = rows * (height + LINE) + GAP
    for number, (image, text) in enumerate(((previews[chosen], "the preview"), (refined, "finished"))):
        x = GAP + number * 2 * (width + GAP)
        page.paste(pixels(image, 2 * SCALE), (x, top))
        draw.text((x, top + 2 * height + 2), f"{chosen}, {text}", fill=(30, 30, 30), font=font)
    return page


def milliseconds(calls: list[Callable[[], object]], runs: int = 15) -> list[float]:
    """Time calls in turns, on a processor; returns the median CPU time of each."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        for call, times in zip(calls, taken, strict=True):
            begin = time.process_time()
            call()
            times.append(1000 * (time.process_time() - begin))
    return [statistics.median(times) for times in taken]


def main() -> None:
    """Draw previews, finish one, print what both cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with the demo's fitted model")
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("--scene", type=int, default=3, help="number of the test scene that is drawn")
    parser.add_argument("--candidates", type=int, default=8, help="number of styles")
    parser.add_argument("--exit", type=int, default=1, help="exit of the previews")
    parser.add_argument("--choose", type=int, default=5, help="number of the preview to finish")
    arguments = parser.parse_args()

    samples = scene_inputs(max(arguments.candidates, arguments.scene + 1), TEST_SEED)
    styles = torch.stack([style for _, style in samples[: arguments.candidates]])
    labels = samples[arguments.scene][0].expand(len(styles), -1, -1, -1).contiguous()
    model = retroexit.load(arguments.model, load_scene_generator(), (labels[:1], styles[:1]))
    chosen = [arguments.choose]
    with torch.no_grad():
        draft = model.draft(labels, styles, exit=arguments.exit)
        refined = draft.finish(chosen)
        whole = model(labels, styles)
        assert torch.allclose(refined, whole[chosen], atol=1e-5)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        sheet(draft.image, arguments.choose, refined[0]).save(arguments.out, quality=90, optimize=True)
        calls = {
            f"all {len(styles)}, generator": lambda: model(labels, styles),
            f"all {len(styles)}, draft": lambda: model.draft(labels, styles, exit=arguments.exit),
            f"finish {len(chosen)}": lambda: draft.finish(chosen),
            f"finish all {len(styles)}": draft.finish,
        }
        macs = [count_macs(call) for call in calls.values()]
        times = milliseconds(list(calls.values()))
    names = [*calls, f"draft, and finish {len(chosen)}"]
    macs.append(macs[1] + macs[2])
    times.append(times[1] + times[2])
    rows = [
        [name, f"{count / 1e9:.2f}", f"{count / macs[0]:.1%}", f"{taken:.0f}", f"{taken / times[0]:.0%}"]
        for name, count, taken in zip(names, macs, times, strict=True)
    ]
    print(table(["what", "GMACs", "", "CPU ms", ""], rows))
    print(f"the draft holds {draft.nbytes / 2**20:.1f} MiB; wrote {arguments.out}")


if __name__ == "__main__":
    main()
