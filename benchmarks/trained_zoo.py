"""Wrap, fit and calibrate trained networks of other people with no settings, and measure what is saved.

The networks are the entries of the NTIRE 2024 challenge on efficient super-resolution (public repository
Amazingren/NTIRE2024_ESR, MIT), read from a checkout. They enlarge by four and are already minimal. They are fitted
in a fixed budget of CPU time on crops of street photographs and of drawn scenes, and tested on photographs: MACs saved
under the promise that 5 % of the images at most lose more than the threshold, and PSNR to the photograph before and
after. A row that fails says why.

    python benchmarks/trained_zoo.py --checkout ../NTIRE2024_ESR --shared ../shared --minutes 5
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import argument_parser, machine_line, write_json
from PIL import Image
from torch import Tensor, nn

import retroexit
from retroexit.fit import prepare
from retroexit.training.fit import estimate_fit
from retroexit.wrapping.exits import table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from scene_pictures import paint_scene

THRESHOLDS = (0.02, 0.05)
LOSSES = {"lpips": 1.0, "mse": 10.0}
HEADER = (
    "network",
    "GMACs",
    "exits at %",
    "PSNR",
    "saved .02",
    ".05",
    "dB lost .02",
    ".05",
    "wrap s",
    "fit s",
    "failed",
)
CROP = 128  # pixels of a photograph, four times the input's
CRAFT = {"upscale": 4, "in_chans": 3, "img_size": 64, "window_size": 16, "img_range": 1.0, "depths": [2] * 4}
CRAFT |= {"embed_dim": 48, "num_heads": [6] * 4, "mlp_ratio": 2, "resi_connection": "1conv"}
R2NET = {"in_channels": 3, "out_channels": 3, "feature_channels": 48, "upscale": 4, "bias": False, "rep": "plain"}
ERRN = {"in_channels": 3, "out_channels": 3, "feature_channels": 40, "upscale": 4}
SPAN = {"num_in_ch": 3, "num_out_ch": 3, "upscale": 4}
ENTRIES: dict[str, tuple[str, str, dict[str, Any], str, float]] = {
    # name: module, class, arguments, weights, largest pixel value
    "RLFN": ("team00_RLFN", "RLFN_Prune", {}, "team00_rlfn.pth", 255),
    "PFDN-lite": ("team01_PFDNLITE", "PFDN_Lite", {}, "team01_pfdnlite.pth", 1),
    "LKFN": ("team03_LKFN", "LKFN", {}, "team03_lkfn.pth", 1),
    "RCN": ("team04_RCN", "RCN", {"feature_channels": 40, "mid_channels": 40}, "team04_rcn.pth", 1),
    "RLFN-mogai": ("team05_RLFF", "RLFN_mogai", {}, "team05_RLFN_mogai.pth", 1),
    "DVMSR": ("team07_DVMSR", "DVMSR", {}, "team07_DVMSR.pth", 1),
    "SMRN": ("team10_SMRN", "SMRN", {}, "team10_SMRN.pth", 1),
    "EFQN": ("team11_EFQN", "QuickSRNetLarge", {}, "team11_EFQN.pt", 1),
    "RLFN-B": ("team13_RLFN_B", "RLFN_B", {}, "team13_model2.pth", 255),
    "EMaxGMan": ("team15_EMaxGMan", "EMaxGMan", {}, "team15_EMaxGMan.pth", 1),
    "LightRLFN": ("team16_LightRLFN", "LightRLFN", {}, "team16_LightRLFN.pth", 1),
    "ASR": ("team17_AdvancedSR", "ASR_Prune", {}, "team17_AdvancedSR.pth", 255),
    "DIRN": ("team19_DIRN", "DIRN", {}, "team19_DIRN.pth", 1),
    "SlimRLFN": ("team21_SlimRLFN", "SlimRLFN", {}, "team21_slimrlfn.pth", 255),
    "GFMN": ("team22_GFMN", "GFMN", {}, "team22_gfmn.pth", 1),
    "SAFMN++": (
        "team23_safmnpp",
        "SAFMNPP",
        {"dim": 36, "n_blocks": 6, "ffn_scale": 1.5, "upscaling_factor": 4},
        "team23_safmnpp.pth",
        1,
    ),
    "SMFAN": ("team24_smfan", "SMFAN", {}, "team24_smfan.pth", 1),
    "EERN": ("team25_EERN", "EERN", {}, "team25_EERN.pt", 255),
    "RDEN": ("team26_RDEN", "RDEN", {}, "team26_RDEN.pth", 1),
    "MSN": ("team28_MSN", "MSN", {}, "team28_MSN.pth", 1),
    "R2Net": ("team29_R2Net", "R2Net", R2NET, "team29_R2Net.pth", 1),
    "RFDN": ("team30_RFDN", "RFDN", {}, "team30_RFDN.pkl", 255),
    "AGDN": ("team31_AGDN", "AGDN", {"num_feat": 24, "upscale": 4}, "team31_agdn.pth", 1),
    "IFADNet": ("team33_IFADNet", "IFADNet", {"deploy": True}, "team33_IFADNet.pth", 1),
    "CRAFT": ("team34_craft", "CRAFT", CRAFT, "team34_craft.pth", 255),
    "SPAN": ("team38_SPAN", "SPAN30", {**SPAN, "feature_channels": 28}, "team38_span_ch28_slim.pth", 1),
    "SPAN-tiny": ("team39_SPANtiny", "SPAN30", {**SPAN, "feature_channels": 26}, "team39_spantiny_ch26_slim.pth", 1),
    "HARN": ("team41_HARN", "HARN", {}, "team41_harn.pth", 1),
    "DepthRLFN": ("team42_DepthRLFN", "RLFN_PruneLocal", {}, "team42_DepthRLFN.pth", 1),
    "EGFMN": ("team43_EGFMN", "EGFMN", {}, "team43_EGFMN.pth", 1),
    "LSANet": ("team44_LSANet", "LSANet", {"deploy": True}, "team44_LSANet.pth", 1),
    "DIPNet": ("team45_VRTDIP", "DIPNet", {}, "team45_VRTDIP.pth", 1),
    "ERRN": ("team46_ERRN", "ERRN", ERRN, "team46_ERRN.pth", 1),
}


def load(name: str, checkout: Path) -> tuple[nn.Module, float]:
    """Load an entry in eval mode; gives it and its largest pixel value."""
    module, kind, arguments, file, limit = ENTRIES[name]
    network = getattr(importlib.import_module(f"models.{module}"), kind)(**arguments)
    weights = torch.load(checkout / "model_zoo" / file, map_location="cpu", weights_only=True)
    for key in ("params_ema", "params"):
        weights = weights.get(key, weights)
    network.load_state_dict(weights, strict=not name.startswith("SPAN"))  # these two hold buffers of their training
    return network.eval(), float(limit)


def pairs(pictures: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Crops of pictures, shrunk by four and as they are: ``(S, 3, 32, 32)`` and ``(S, 3, 128, 128)`` in [0, 1]."""
    small, large = [], []
    for index, picture in enumerate(pictures):
        left = (index * 37) % (picture.shape[1] - CROP + 1)
        crop = Image.fromarray(picture[:CROP, left : left + CROP])
        for image, images in ((crop.resize((CROP // 4,) * 2, Image.Resampling.BICUBIC), small), (crop, large)):
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)
    return torch.stack(small), torch.stack(large)


def photographs(split: str, shared: Path, rows: slice = slice(None)) -> list[np.ndarray]:
    """Read photographs of a split."""
    names = (shared / f"data/street/{split}.txt").read_text().split()[rows]
    return [np.array(Image.open(shared / f"data/street/256x128/image/{n}.jpg").convert("RGB")) for n in names]


def scenes(count: int) -> list[np.ndarray]:
    """Paint street scenes at twice their usual size."""
    return [paint_scene(seed, (CROP, 2 * CROP)).image for seed in range(count)]


def psnr(images: Tensor, references: Tensor) -> float:
    """Mean PSNR in dB of images in [0, 1]."""
    error = (images.clamp(0, 1) - references).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


def steps_in(model: Any, inputs: list[Tensor], weights: Path, seconds: float, is_bfloat16: bool) -> int:
    """Steps of a fit that fill a budget, from the time of two of them."""
    job = prepare(model, inputs, weights=weights, losses=LOSSES, bfloat16=is_bfloat16)
    cost = estimate_fit(model, job.inputs, job.settings, job.plan, job.limits)
    return max(50, int((seconds - len(inputs) / job.settings.batch * cost.backbone_seconds) / cost.step_seconds))


def row(name: str, data: dict[str, tuple[Tensor, Tensor]], arguments: Any) -> dict[str, Any]:
    """Wrap, fit, calibrate and test one network."""
    network, limit = load(name, arguments.checkout)
    begin = time.process_time()
    inputs = {split: list(small * limit) for split, (small, _) in data.items()}
    model = retroexit.wrap(network, example_inputs=(inputs["fit"][0][None],))
    wrapped = time.process_time() - begin
    with torch.no_grad():
        backbone = torch.cat([network(x[None]) for x in inputs["test"]])
        if not torch.equal(model(inputs["test"][0][None]), backbone[:1]):
            raise AssertionError("the wrapped network renders another image")
    weights = arguments.shared / "data/weights/lpips_alex_v0.1.pth"
    steps = arguments.steps or steps_in(model, inputs["fit"], weights, 60 * arguments.minutes, arguments.bfloat16)
    begin = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        options: Any = {"losses": LOSSES, "bfloat16": arguments.bfloat16}
        retroexit.fit(model, inputs["fit"], folder, weights=weights, steps=steps, **options)
    fitted = time.process_time() - begin
    model.calibrate(inputs["calibrate"], weights=weights, thresholds=THRESHOLDS)
    references = data["test"][1]
    result: dict[str, Any] = {"name": name, "wrap_seconds": wrapped, "fit_seconds": fitted, "steps": steps}
    result |= {"gmacs": model.exits[-1].macs / 1e9, "shares": [e.share for e in model.exits[:-1]]}
    result["psnr"] = psnr(backbone / limit, references)
    costs = torch.tensor([e.macs for e in model.exits]) + torch.tensor(model.overhead())
    for tau in THRESHOLDS:
        with torch.no_grad():
            images, exits = zip(*(model.routed(x[None], threshold=tau) for x in inputs["test"]), strict=True)
        routes = torch.cat(exits) - 1
        result[f"saved_{tau}"] = 1 - float(costs[routes].double().mean()) / model.exits[-1].macs
        result[f"lost_{tau}"] = result["psnr"] - psnr(torch.cat(images) / limit, references)
    return result


def main() -> None:
    """Run the networks one by one and print the table."""
    parser = argument_parser(__doc__)
    parser.add_argument("--checkout", type=Path, required=True, help="folder with models/ and model_zoo/")
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/weights and data/street")
    parser.add_argument("--minutes", type=float, default=5.0, help="CPU minutes of each fit")
    parser.add_argument("--steps", type=int, help="steps of each fit instead of a time")
    parser.add_argument("--bfloat16", action="store_true", help="train in bfloat16: faster where it is native")
    parser.add_argument("--only", nargs="+", choices=ENTRIES, default=list(ENTRIES), metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sys.path.insert(0, str(arguments.checkout))
    data = {
        "fit": pairs(photographs("train", arguments.shared, slice(0, None, 2)) + scenes(60)),
        "calibrate": pairs(photographs("train", arguments.shared, slice(1, None, 2))),
        "test": pairs(photographs("test", arguments.shared, slice(0, None, 4))),
    }
    print(machine_line())
    results, cells = [], []
    for name in arguments.only:
        try:
            result = row(name, data, arguments)
        except Exception as error:
            traceback.print_exc()
            result = {"name": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
            cells.append([name, *[""] * 9, result["error"][:80]])
        else:
            shares = " ".join(f"{100 * share:.0f}" for share in result["shares"])
            numbers = [f"{100 * result[f'saved_{tau}']:.1f} %" for tau in THRESHOLDS]
            numbers += [f"{result[f'lost_{tau}']:.2f}" for tau in THRESHOLDS]
            times = [f"{result['wrap_seconds']:.1f}", f"{result['fit_seconds']:.0f}"]
            cells.append([name, f"{result['gmacs']:.2f}", shares, f"{result['psnr']:.2f}", *numbers, *times, ""])
        results.append(result)
        print(table(HEADER, cells), flush=True)
        write_json(arguments.json, rows=results)


if __name__ == "__main__":
    main()
