"""What an image costs in every step, in time, memory and disk, and what 10^3, 10^6 and 10^9 images would cost.

    python benchmarks/growth.py [--images 64] [--steps 20] [--ray 2]

The generator of the demo is fitted and measured with one thread. Costs of an image are measured, in CPU time, which
other work on the machine disturbs little; the table of large numbers is arithmetic with them: seconds = images x (first
process + each / workers), see docs/growth.md. ``--ray`` also measures the images with so many workers, in wall time; it
takes minutes where Ray starts slowly.
"""

from __future__ import annotations

import contextlib
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from common import argument_parser, machine_line, write_json

import retroexit
from retroexit.core.samples import Samples
from retroexit.demo.generator import scene_inputs
from retroexit.demo.run import pick_metric, wrap_scene_generator
from retroexit.guidance.building import Candidates
from retroexit.measuring import Measurement, limits_of
from retroexit.model import EarlyExitGenerator
from retroexit.report.text_tables import table
from retroexit.training import fit as fitting
from retroexit.training.cache import bytes_per_sample

_IMAGES, _WORKERS = (10**3, 10**6, 10**9), (1, 16, 1024)
_PARTS = {
    "_features": "features",
    "_bank": "bank",
    "_guides": "guides",
    "_train": "training",
    "exit_losses": "labels",
    "fit_predictor": "predictor",
}
Costs = dict[str, float]


def peak() -> float:
    """Largest memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextlib.contextmanager
def timed(seconds: Costs, name: str, clock: Callable[[], float] = time.process_time) -> Iterator[None]:
    """Record the duration of a block."""
    begin = clock()
    yield
    seconds[name] = clock() - begin


def parts_of_fit(model: EarlyExitGenerator, inputs: Any, metric: Any, steps: int) -> Costs:
    """Fit, and return the seconds of its parts."""
    seconds: Costs = {}

    def watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with timed(seconds, name):
                return function(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        for attribute, name in _PARTS.items():
            function = getattr(fitting, attribute)
            stack.enter_context(patch.object(fitting, attribute, watched(function, name)))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        retroexit.fit(model, inputs, folder, metric=metric, steps=steps, predictor_steps=steps, progress=False)
    return seconds


def first_process(samples: Samples, model: EarlyExitGenerator) -> Costs:
    """Seconds per image of what one process does alone: look at all samples, thin the keys of a stream."""
    seconds: Costs = {}
    with timed(seconds, "checks"):  # those of a calibration
        samples.check_alike()
        samples.distinct()
        samples.digest()
    per_image = {"checks": seconds["checks"] / len(samples)}
    taps, bank = model.decomposition.taps, model.bank
    assert taps is not None and bank is not None
    keys = torch.randn(8 * taps.queries, bank.retriever.width).numpy()
    tags = torch.zeros(len(keys), 2).long().numpy()
    for thin in ("fps", "random"):
        candidates, count = Candidates(20 * len(bank), size=len(bank), thin=thin), 0  # type: ignore[arg-type]
        name = f"thinning by {thin}"
        with timed(seconds, name):
            while candidates.seen < 2.5 * 20 * len(bank):  # thinned at least twice
                candidates.add(keys + count, tags)
                count += 8
        per_image[name] = seconds[name] / count
    return per_image


def measured(images: int, steps: int, ray: int | None) -> dict[str, Any]:
    """Measure the costs: seconds per image and per step, bytes per image, MB per process."""
    megabytes = {"libraries": peak()}
    model, metric = wrap_scene_generator(), pick_metric("auto", None, print)
    megabytes["with the model"] = peak()
    inputs = scene_inputs(2 * images, 3)
    samples = Samples(inputs[images:])
    parts = parts_of_fit(model, inputs[:images], metric, steps)
    megabytes["training"] = peak()
    run = Measurement(model, samples, metric, limits_of(model, samples, metric, 8))
    seconds: Costs = {}
    run.losses(progress=False)  # warms up
    with timed(seconds, "measuring"):
        run.losses(progress=False)
    args, kwargs = samples.gather(range(8))
    with torch.no_grad(), timed(seconds, "backbone"):
        model.generator(*args, **kwargs)
    with torch.no_grad(), timed(seconds, "keys"):
        model.split.key_feature(args, kwargs)
    if ray is not None:
        wall = time.perf_counter
        with timed(seconds, "ray in all", wall), retroexit.ray_workers(ray):
            for name in ("ray, first pass", "ray, second pass"):
                with timed(seconds, name, wall):
                    run.losses(progress=False)
    taps, bank = model.decomposition.taps, model.bank
    assert taps is not None and bank is not None
    feature = run.feature()
    each = {name: parts[name] / images for name in ("features", "bank", "guides", "labels")}
    each |= {"calibration or evaluation": seconds["measuring"] / images, "backbone alone": seconds["backbone"] / 8}
    each["keys of a stream"] = seconds["keys"] / 8
    return {
        "each": each,
        "first": first_process(samples, model),
        "step": parts["training"] / steps,
        "ray": {name: value for name, value in seconds.items() if name.startswith("ray")},
        "bytes": {
            "input": sum(x.numel() * x.element_size() for x in inputs[0]),
            "cached features": bytes_per_sample(model, samples),
            "keys": 4 * taps.queries * bank.retriever.width,
            "first feature, which the predictor is trained on": feature.numel() * feature.element_size(),
            "pair of the bank": 4 * bank.retriever.width + bank.values[0].nbytes,
        },
        "megabytes": megabytes,
    }


def grown(costs: dict[str, Any]) -> list[list[str]]:
    """Hours for numbers of images and workers, and what limits them."""
    each, first, rows = costs["each"], costs["first"], []
    steps = {
        "bank of a stream": (each["keys of a stream"], first["thinning by fps"]),
        "the same, --thin random": (each["keys of a stream"], first["thinning by random"]),
        "features and labels": (each["features"] + each["labels"], first["checks"]),
        "calibration or evaluation": (each["calibration or evaluation"], first["checks"]),
    }
    for name, (shared, alone) in steps.items():
        for images in _IMAGES:
            hours = [images * (alone + shared / workers) / 3600 for workers in _WORKERS]
            enough = shared / alone  # workers at which the first process takes as long as all others
            rows.append([name, f"{images:.0e}", *(f"{h:.3g}" for h in hours), f"{enough:,.0f}"])
    return rows


def main() -> None:
    """Measure, print, and write the numbers."""
    parser = argument_parser(__doc__)
    parser.add_argument("--images", type=int, default=64, help="images per step")
    parser.add_argument("--steps", type=int, default=20, help="training steps")
    parser.add_argument("--ray", type=int, help="measure with so many workers of Ray too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine_line())
    costs = measured(arguments.images, arguments.steps, arguments.ray)
    rows = [[name, f"{1000 * value:.3g}"] for name, value in costs["each"].items()]
    rows += [[f"{name}, in the first process", f"{1000 * value:.3g}"] for name, value in costs["first"].items()]
    print(table(["step", "ms per image"], [*rows, ["training step of all branches", f"{1000 * costs['step']:.0f}"]]))
    print(table(["per image", "kB"], [[name, f"{size / 1e3:,.1f}"] for name, size in costs["bytes"].items()]))
    print(table(["peak memory of a process", "MB"], [[name, f"{mb:,.0f}"] for name, mb in costs["megabytes"].items()]))
    for name, value in costs["ray"].items():
        print(f"{name}: {value:.1f} s for {arguments.images} images")
    hours = [f"hours, {workers} worker{'s' * (workers > 1)}" for workers in _WORKERS]
    print(table(["step", "images", *hours, "workers that one process can feed"], grown(costs)))
    write_json(arguments.json, **costs)


if __name__ == "__main__":
    main()
