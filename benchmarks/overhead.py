"""Time of every exit against its MACs, as shares of the backbone's, and where the time of a routed call goes.

    python benchmarks/overhead.py [--only latent street style upscaler] [--batches 1 8] [--compile] [--layers]

The parts of a call (prefix, predictor, branch) and calls of the backbone are timed by turns in one process; given are
medians, of CPU time with one thread. Branches are not trained: their time does not depend on it. The last column is at
most 1.15 where time follows the MACs. What lies before a branch are the generator's own stages: their time over their
MACs is the floor. ``--layers`` lists the
layers of each branch that take most of its time.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import argument_parser, machine_line, take_turns, write_json
from no_settings import MAKE
from torch import nn

import retroexit
from retroexit.core.samples import Samples
from retroexit.model import EarlyExitGenerator
from retroexit.report.text_tables import table
from retroexit.routing.predictor import Predictor

_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def backbone(name: str, arguments: Any) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any], list[dict[str, Any]]]:
    """A generator, inputs for one sample, and how it is wrapped: without settings, and as its example does."""
    if name == "upscaler":
        sys.path.insert(0, str(_EXAMPLES / "upscaler"))
        from network import real_esrgan

        return real_esrgan(), (torch.rand(1, 3, 32, 32),), {}, [{}]
    example = MAKE[name](Path(arguments.shared), arguments.out)
    args, kwargs = Samples(example.train).gather([0])
    hand = {"latent": {"branch": "subpixel", "macs": (0.025, 0.036, 0.065, 0.1, 0.15)}}
    ways = [{}, *([hand[name]] if name in hand else []), next(iter(example.hand.values()))]
    return example.generator, args, kwargs, ways


def repeated(value: Any, count: int) -> Any:
    """Repeat one sample to a batch."""
    if isinstance(value, torch.Tensor):
        return value.repeat(count, *(1,) * (value.dim() - 1))
    return [repeated(v, count) for v in value] if isinstance(value, list) else value


def parts(model: EarlyExitGenerator, args: Any, kwargs: Any) -> dict[str, Any]:
    """The parts of a call as functions: prefix and predictor, and each route as a whole."""
    begun = model.split.begin(args, kwargs)
    split = model.split
    sides: dict[str, Any] = {
        "backbone": lambda _: model.generator(*args, **kwargs),
        "final exit": lambda _: model(*args, **kwargs),
        "prefix": lambda _: split.begin(args, kwargs),
        "predictor": lambda _: model.router.predict(begun),
    }
    values = begun.values
    for index, branch in enumerate(model.branches):
        values = values if index == 0 else split.advance(values, index)
        crossing = split.crossing(values, index)
        sides[f"branch {index + 1}"] = lambda _, branch=branch, crossing=crossing: branch(*crossing)
        sides[f"exit {index + 1}"] = lambda _, index=index: model(*args, exit=index + 1, **kwargs)
    return sides


def add_predictor(model: EarlyExitGenerator, args: Any, kwargs: Any) -> None:
    """Give a model that is not fitted a predictor with random weights."""
    if model.router.predictor is None:
        feature = model.features(*args, **kwargs)[0]
        predictor = Predictor(feature.shape[1], len(model.branches), dims=feature.dim() - 2, reads="features")
        model.router.predictor = predictor.to(feature.device).eval()


def shares(model: EarlyExitGenerator, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """The time of every exit, from the times of `parts`, against its MACs; one row per exit."""
    full, rows = seconds["backbone"], []
    for exit_, place in zip(model.exits, model.decomposition.places, strict=False):
        time, branch = (seconds[f"{part} {exit_.index}"] / full for part in ("exit", "branch"))
        row = {"exit": exit_.index, "kind": exit_.kind, "macs": exit_.share, "time": time, "ratio": time / exit_.share}
        row |= {"macs before": place.cumulative, "time before": time - branch}
        rows.append(row | {"branch macs": exit_.share - place.cumulative, "branch": branch})
    return rows


def layers(branch: nn.Module, crossing: list[torch.Tensor], turns: int) -> list[tuple[str, float]]:
    """Median seconds of the leaf modules of a branch, largest first."""
    spent, begins = defaultdict(list), dict[str, float]()
    hooks = []
    for path, module in branch.named_modules():
        if next(module.children(), None) is None:
            begin = lambda *_, path=path: begins.__setitem__(path, time.perf_counter())  # noqa: E731
            end = lambda *_, path=path: spent[path].append(time.perf_counter() - begins[path])  # noqa: E731
            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    for _ in range(turns):
        branch(*crossing)
    for hook in hooks:
        hook.remove()
    medians = [(path, float(np.median(times))) for path, times in spent.items()]
    return sorted(medians, key=lambda pair: -pair[1])


@torch.no_grad()
def compare(name: str, settings: dict[str, Any], count: int, arguments: Any) -> list[dict[str, Any]]:
    """Time one way to wrap one generator at one batch size; returns a row per exit."""
    generator, args, kwargs, _ = backbone(name, arguments)
    model = retroexit.wrap(generator, example_inputs=args, example_kwargs=kwargs, **settings)
    add_predictor(model, args, kwargs)
    args, kwargs = repeated(list(args), count), {key: repeated(value, count) for key, value in kwargs.items()}
    if arguments.compile:
        model.compile(dynamic=True)
        generator.compile()
    turns = take_turns(parts(model, args, kwargs), arguments.turns)
    clock = int(arguments.threads == 1)  # 1: of the CPU
    seconds = {side: float(np.median(t[clock])) for side, t in turns.items()}
    full = seconds["backbone"]
    print(
        f"\n{name}, batch {count}, {'compiled' if arguments.compile else 'eager'}: final exit / backbone "
        f"{seconds['final exit'] / full:.3f}, prefix {seconds['prefix'] / full:.1%}, predictor "
        f"{seconds['predictor'] / full:.2%} of the backbone's {1000 * full:.1f} ms"
    )
    about = {"generator": name, "batch": count, "final": seconds["final exit"] / full}
    rows = [{**about, **row} for row in shares(model, seconds)]
    for exit_ in model.exits[:-1]:
        if arguments.layers:
            values = model.split.begin(args, kwargs).values
            for index in range(1, exit_.index):
                values = model.split.advance(values, index)
            module = model.branches[exit_.index - 1]
            top = layers(module, model.split.crossing(values, exit_.index - 1), arguments.turns)[:6]
            print(f"  exit {exit_.index}: " + ", ".join(f"{path} {part / full:.1%}" for path, part in top))
    columns = ["macs", "time", "macs before", "time before", "branch macs", "branch"]
    shown = [[str(r["exit"]), r["kind"], *(f"{r[name]:.1%}" for name in columns), f"{r['ratio']:.2f}"] for r in rows]
    head = ["exit", "kind", "MACs", "time", "MACs before", "time before", "its MACs", "its time"]
    print(table([*head, "time / MACs"], shown), flush=True)
    return rows


def main() -> None:
    """Run all, and print a table for each."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shared", default=Path(__file__).resolve().parents[2] / "shared", help="folder with data")
    parser.add_argument("--out", type=Path, default=Path("runs/no-settings"), help="folder of encoded samples")
    parser.add_argument(
        "--only", nargs="+", choices=[*MAKE, "upscaler"], default=["latent", "street", "style", "upscaler"]
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="compile backbone, segments and branches")
    parser.add_argument("--layers", action="store_true", help="list the slowest layers of every branch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine_line())
    rows = []
    for name in arguments.only:
        for settings in backbone(name, arguments)[3]:
            for count in arguments.batches:
                rows += compare(name, settings, count, arguments)
                write_json(arguments.json, rows=rows)
    good = sum(row["ratio"] <= 1.15 for row in rows)
    print(f"\n{good} of {len(rows)} exits take at most 1.15 times their share of the MACs")


if __name__ == "__main__":
    main()
