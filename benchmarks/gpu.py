"""Everything that a GPU changes, in one run: times, exports, precisions and memory of the demo's generator and a VAE.

    python benchmarks/gpu.py                                       # on a GPU, made for eight minutes
    python benchmarks/gpu.py --device cpu --size small --steps 3   # a rehearsal without one

No data and no downloads: the decoder of diffusers' AutoencoderKL has random weights, and its published size with
``--size full``. A section that fails prints its error, and the next one runs. Times are medians of turns that alternate
in one process, each between two waits for the GPU. Losses are mean absolute differences to the backbone's own float32
image, as shares of that image's standard deviation. Sections that would begin after ``--limit`` seconds are left out.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batching import SECONDS, serve
from common import argument_parser, machine_line, synchronize, take_turns, write_json
from exported import compare
from overhead import add_predictor, parts, shares
from torch import nn

import retroexit
from retroexit.core.nested import rebuild
from retroexit.core.samples import Samples, moved
from retroexit.demo import load_scene_generator, scene_inputs
from retroexit.errors import silence
from retroexit.model import EarlyExitGenerator
from retroexit.report.text_tables import table

Rows = list[dict[str, Any]]
_NEEDS = "needs CUDA"


class NeedsCUDA(Exception):
    """A section cannot run on the CPU."""

    def __init__(self) -> None:
        super().__init__(_NEEDS)


@dataclass
class Bench:
    """A generator, its samples on the CPU, and how it is wrapped and fitted."""

    generator: nn.Module
    samples: list[Any]
    wrapping: dict[str, Any]
    options: argparse.Namespace
    model: EarlyExitGenerator | None = None

    def inputs(self, count: int) -> tuple[Any, Any]:
        """Positional and keyword inputs of a batch, on the device."""
        gathered = Samples(self.samples).gather([row % len(self.samples) for row in range(count)])
        args, kwargs = moved(gathered, self.options.device)
        return args, kwargs

    def wrap(self) -> EarlyExitGenerator:
        """Wrap the generator."""
        args, kwargs = self.inputs(1)
        return retroexit.wrap(self.generator, example_inputs=args, example_kwargs=kwargs, **self.wrapping)

    def routable(self) -> EarlyExitGenerator:
        """The model of the earlier sections; a predictor with random weights where no fit left one."""
        self.model = self.model or self.wrap()
        args, kwargs = self.inputs(1)
        add_predictor(self.model, args, kwargs)
        return self.model

    def medians(self, sides: dict[str, Callable[[int], object]]) -> dict[str, float]:
        """Median milliseconds of each side."""
        times = take_turns(sides, self.options.turns)
        return {name: 1000 * float(np.median(taken[0])) for name, taken in times.items()}


def vae(options: argparse.Namespace) -> Bench:
    """The decoder of an AutoencoderKL with random weights: Stable Diffusion's at 512x512 pixels, or a small one."""
    from diffusers import AutoencoderKL

    is_full = options.size == "full"
    widths, side = ((128, 256, 512, 512), 64) if is_full else ((16, 32, 32), 16)
    blocks = {name: (kind,) * len(widths) for name, kind in _BLOCKS.items()}
    sizes = {"latent_channels": 4, "layers_per_block": 2 if is_full else 1, "norm_num_groups": 32 if is_full else 8}
    generator = AutoencoderKL(block_out_channels=widths, **sizes, **blocks).decoder.eval().to(options.device)
    wrapping = {"adapter": False, "image_range": (-4, 4)} | (
        {} if is_full else {"min_channels": 8, "branch": "subpixel"}
    )
    return Bench(generator, list(torch.randn(16 if is_full else 4, 4, side, side)), wrapping, options)


_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def demo(options: argparse.Namespace) -> Bench:
    """The generator that comes with the library."""
    wrapping: dict[str, Any] = {"attach_at": [2, 4], "scale": 1 / 3, "min_channels": 12}
    is_full = options.size == "full"
    if not is_full:
        wrapping |= {"attach_at": [4], "branch": "copy"}  # one branch, and no pilot in the fit
    generator = load_scene_generator().to(options.device)
    return Bench(generator, scene_inputs(16 if is_full else 4, seed=1), wrapping, options)


def peak(call: Callable[[], object], device: str) -> tuple[float, str]:
    """Seconds of a call, and the MiB that it takes at its peak beside what was allocated before."""
    is_cuda = device == "cuda"
    if is_cuda:
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    call()
    synchronize()
    taken = time.perf_counter() - begin
    return taken, f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}" if is_cuda else _NEEDS


@torch.no_grad()
def losses(model: EarlyExitGenerator, args: Any, kwargs: Any, target: torch.Tensor) -> list[float]:
    """Loss of every exit, the backbone's last."""
    images = [model.image(output).float() for output in model.all_exits(*args, **kwargs)]
    return [float((image - target).abs().mean() / target.std()) for image in images]


# Sections; each returns the rows of its table.


def wrapping(bench: Bench) -> Rows:
    """Wrap."""

    def run() -> None:
        bench.model = bench.wrap()

    seconds, memory = peak(run, bench.options.device)
    model, (args, kwargs) = bench.routable(), bench.inputs(2)
    with torch.no_grad():
        pairs = zip(*(map(model.image, (model(*args, **kwargs), bench.generator(*args, **kwargs)))), strict=True)
        is_same = all(torch.equal(a, b) for a, b in pairs)
    return [{"seconds": f"{seconds:.2f}", "peak MiB": memory, "exits": len(model.exits), "bit for bit": is_same}]


def fitting(bench: Bench, bfloat16: bool = False) -> Rows:
    """Fit a model of its own; the float32 one is used from here on."""
    model, options = bench.wrap(), bench.options
    settings = {"steps": options.steps, "predictor_steps": options.steps, "batch": 4, "crop": 64, "metric": "ms-ssim"}
    with tempfile.TemporaryDirectory() as folder:
        seconds, memory = peak(
            lambda: retroexit.fit(
                model, bench.samples, folder, bfloat16=bfloat16, cache_batch=4, progress=False, **settings
            ),
            options.device,
        )
    if not bfloat16:
        bench.model = model
    args, kwargs = bench.inputs(4)
    with torch.no_grad():
        target = model.image(bench.generator(*args, **kwargs))
    rows = [{"steps": options.steps, "branches": len(model.branches), "seconds": f"{seconds:.1f}", "peak MiB": memory}]
    return [
        rows[0] | {f"loss {k}": f"{loss:.3f}" for k, loss in enumerate(losses(model, args, kwargs, target)[:-1], 1)}
    ]


def fitting_bfloat16(bench: Bench) -> Rows:
    """Fit in bfloat16."""
    return fitting(bench, bfloat16=True)


@torch.no_grad()
def time_shares(bench: Bench) -> Rows:
    """Time of every exit against its MACs."""
    rows = []
    for count in bench.options.batches:
        model, (args, kwargs) = bench.routable(), bench.inputs(count)
        times = bench.medians(parts(model, args, kwargs))
        parts_shown = {name: f"{times[name] / times['backbone']:.1%}" for name in ("prefix", "predictor")}
        for row in shares(model, times):
            percents = {name: f"{row[name]:.1%}" for name in ("macs", "time", "branch")}
            head = {"batch": count, "backbone ms": f"{times['backbone']:.2f}", **parts_shown, "exit": row["exit"]}
            rows.append(head | {"kind": row["kind"], **percents, "time / MACs": f"{row['ratio']:.2f}"})
    return rows


@torch.no_grad()
def mixed_batches(bench: Bench) -> Rows:
    """Samples whose exits differ: one call, the scheduler, one by one, and the backbone for all."""
    count = max(bench.options.batches)
    SECONDS.clear()  # of another generator
    model, (args, kwargs), last = bench.routable(), bench.inputs(count), len(bench.routable().exits)
    exits = [1 + row % last for row in range(count)]
    singles = [
        moved(Samples(bench.samples).gather([row % len(bench.samples)]), bench.options.device) for row in range(count)
    ]
    samples = [moved(bench.samples[row % len(bench.samples)], bench.options.device) for row in range(count)]
    choose = lambda losses, _limits: torch.tensor(exits, device=losses.device)  # noqa: E731
    mixed = model.image(model.routed(*args, choose=choose, **kwargs)[0])
    alone = torch.cat([model.image(model(*a, exit=e, **k)) for (a, k), e in zip(singles, exits, strict=True)])
    sides: dict[str, Callable[[int], object]] = {
        "one by one": lambda _: [model(*a, exit=e, **k) for (a, k), e in zip(singles, exits, strict=True)],
        "one mixed batch": lambda _: model.routed(*args, choose=choose, **kwargs),
        "scheduler": lambda _: serve(model, samples, exits, count, time.perf_counter),
        "backbone, one batch": lambda _: model(*args, **kwargs),
    }
    difference = f"{float((mixed - alone).abs().max()):.1e}"
    times = bench.medians(sides)
    speed = {name: {"ms": f"{t:.1f}", "x one by one": f"{times['one by one'] / t:.2f}"} for name, t in times.items()}
    rows = [{"batch": count, "side": name, **cells} for name, cells in speed.items()]
    rows[1]["largest difference"] = difference
    return rows


@torch.no_grad()
def precision(bench: Bench) -> Rows:
    """Exits in bfloat16 against float32."""
    count = max(bench.options.batches)
    model, (args, kwargs) = bench.routable(), bench.inputs(count)
    target = model.image(bench.generator(*args, **kwargs))
    twin = copy.deepcopy(model).to(torch.bfloat16)
    half_args, half_kwargs = rebuild((args, kwargs), lambda x: x.bfloat16())
    exits = range(1, len(model.exits) + 1)
    sides = {("float32", k): lambda _, k=k: model(*args, exit=k, **kwargs) for k in exits}
    sides |= {("bfloat16", k): lambda _, k=k: twin(*half_args, exit=k, **half_kwargs) for k in exits}
    times: Any = bench.medians(sides)  # type: ignore[arg-type]
    lost = {"float32": losses(model, args, kwargs, target), "bfloat16": losses(twin, half_args, half_kwargs, target)}
    rows = []
    for k in exits:
        row = {"batch": count, "exit": k}
        for name, of_exit in lost.items():
            row |= {f"{name} ms": f"{times[name, k]:.2f}", f"{name} loss": f"{of_exit[k - 1]:.4f}"}
        rows.append(row | {"times as fast": f"{times['float32', k] / times['bfloat16', k]:.2f}"})
    return rows


@torch.no_grad()
def memory(bench: Bench) -> Rows:
    """Peak memory of calls, beside weights and inputs."""
    if bench.options.device != "cuda":
        raise NeedsCUDA
    count = max(bench.options.batches)
    model, (args, kwargs) = bench.routable(), bench.inputs(count)
    calls = {"backbone": lambda: bench.generator(*args, **kwargs)}
    for k in range(1, len(model.exits)):
        calls[f"exit {k}"] = lambda k=k: model(*args, exit=k, **kwargs)
    exits = 1 + torch.arange(count, device="cuda") % len(model.exits)
    calls["mixed batch"] = lambda: model.routed(*args, choose=lambda _losses, _limits: exits, **kwargs)
    calls["all exits"] = lambda: model.all_exits(*args, **kwargs)
    return [{"batch": count, "call": name, "peak MiB": peak(call, "cuda")[1]} for name, call in calls.items()]


def export(bench: Bench, format: str) -> Rows:
    """Export, and compare every route."""
    model, (args, kwargs) = bench.routable(), bench.inputs(1)
    with tempfile.TemporaryDirectory() as folder:
        begin, threads = time.perf_counter(), torch.get_num_threads()
        rows = compare(model, args, kwargs, Path(folder) / "bundle", format, 3, threads, verify=False)
        seconds = time.perf_counter() - begin
    return [
        {
            "exit": row["exit"],
            "largest difference": f"{row['difference']:.1e}",
            "of": f"{row['largest']:.2g}",
            "eager ms": f"{1000 * row['eager']:.2f}",
            "exported ms": f"{1000 * row['exported']:.2f}",
            "all, s": f"{seconds:.1f}",
        }
        for row in rows
    ]


def export_torch(bench: Bench) -> Rows:
    """Export by torch.export."""
    return export(bench, "torch")


def export_onnx(bench: Bench) -> Rows:
    """Export to ONNX."""
    return export(bench, "onnx")


MODES: dict[str, dict[str, Any]] = {"compiled": {}, "CUDA graphs": {"mode": "reduce-overhead"}}
"""Options of ``model.compile``. On the CPU the rehearsal traces only, which needs no C++ compiler."""


@torch.no_grad()
def routed_calls(bench: Bench) -> Rows:
    """Routed calls: eager, compiled, and by CUDA graphs."""
    count, is_cuda = max(bench.options.batches), bench.options.device == "cuda"
    model, (args, kwargs) = bench.routable(), bench.inputs(count)
    exits = 1 + torch.arange(count, device=bench.options.device) % len(model.exits)

    def routed(model: EarlyExitGenerator) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return model.image(model.routed(*args, choose=lambda _losses, _limits: exits, **kwargs)[0])

    expected, rows = routed(model), []
    sides: dict[str, Callable[[int], object]] = {
        "backbone": lambda _: bench.generator(*args, **kwargs),
        "eager": lambda _: routed(model),
    }
    firsts: dict[str, dict[str, Any]] = {}
    for name, options in MODES.items():
        twin = copy.deepcopy(model)
        try:
            if options and not is_cuda:
                raise NeedsCUDA
            twin.compile(**(options if is_cuda else {"backend": "eager"}))
            begin = time.perf_counter()
            image = routed(twin).clone()
            synchronize()
            firsts[name] = {"first call, s": f"{time.perf_counter() - begin:.1f}"}
            firsts[name]["largest difference"] = f"{float((image - expected).abs().max()):.1e}"
            routed(twin)
            sides[name] = lambda _, twin=twin: routed(twin)
        except Exception as error:
            rows.append({"batch": count, "call": name, "error": brief(error)})
    times = bench.medians(sides)
    shown = [
        {"batch": count, "call": name, "ms": f"{t:.2f}", "of eager": f"{t / times['eager']:.2f}"} | firsts.get(name, {})
        for name, t in times.items()
    ]
    return shown + rows


SECTIONS: dict[str, Callable[[Bench], Rows]] = {
    "wrap": wrapping,
    "fit": fitting,
    "time against MACs": time_shares,
    "mixed batches": mixed_batches,
    "bfloat16": precision,
    "memory": memory,
    "fit in bfloat16": fitting_bfloat16,
    "export torch": export_torch,
    "export onnx": export_onnx,
    "routed calls": routed_calls,
}


def brief(error: Exception) -> str:
    """Type and beginning of an error."""
    message = " ".join(str(error).split())
    return message if isinstance(error, NeedsCUDA) else f"{type(error).__name__}: {message}"[:300]


def run(bench: Bench, name: str, is_late: bool) -> Rows:
    """Run one section; an error becomes its row."""
    if is_late:
        return [{"error": "left out, no time left"}]
    try:
        with silence():
            return SECTIONS[name](bench)
    except Exception as error:
        if not isinstance(error, NeedsCUDA):
            traceback.print_exc()
        return [{"error": brief(error)}]


def main() -> None:
    """Run all, and print a table for each section."""
    parser = argument_parser(__doc__, threads=torch.get_num_threads())
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("small", "full"), default="full")
    parser.add_argument("--steps", type=int, default=200, help="training steps per branch")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", help="by default 1 and 16, with --size small 1 and 4")
    parser.add_argument("--generators", nargs="+", choices=("demo", "vae"), default=["demo", "vae"])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--limit", type=float, default=420, help="no section begins after so many seconds")
    options = parser.parse_args()
    options.batches = options.batches or ([1, 16] if options.size == "full" else [1, 4])
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, got none. Pass --device cpu --size small --steps 3.")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "no GPU"
    print(f"{device}, {machine_line()}")
    begin, results = time.perf_counter(), {}
    for generator in options.generators:
        bench = {"demo": demo, "vae": vae}[generator](options)
        for section in options.sections:
            started = time.perf_counter()
            rows = run(bench, section, started - begin > options.limit)
            results[f"{generator}, {section}"] = rows
            head = list(dict.fromkeys(key for row in rows for key in row))
            print(f"\n{generator}, {section} ({time.perf_counter() - started:.1f} s)")
            print(table(head, [[str(row.get(key, "")) for key in head] for row in rows]), flush=True)
            write_json(options.json, device=device, results=results)
    failed = [
        name
        for name, rows in results.items()
        if any("needs CUDA" not in row.get("error", "needs") for row in rows if "error" in row)
    ]
    print(f"\n{time.perf_counter() - begin:.0f} s; failed: {', '.join(failed) or 'nothing'}")


if __name__ == "__main__":
    main()
