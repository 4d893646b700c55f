"""Damage every kind of file that is read, ten thousand times, and count what reading it does.

Each damaged file is read in a forked process with a time limit. "Changed in silence" is a result that differs
from that of the whole files, without an error; it, foreign exceptions and crashes must be 0. "Valid" is a
manifest with another value and a new digest that is accepted: an edit, which no digest can tell from the original.

Example:
    python benchmarks/damage.py
"""

from __future__ import annotations

import collections
import hashlib
import importlib.util
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import argument_parser, machine_line, write_json
from retroexit_stylegan import load_generator
from retroexit_stylegan.generator import StyleGANGenerator
from torch import Tensor, nn

import retroexit
from retroexit.cli import options as config
from retroexit.core.files import write_json as write_sealed
from retroexit.core.samples import Samples
from retroexit.evaluation.sweep import Evaluation
from retroexit.guidance.building import Candidates
from retroexit.metrics import LPIPS, QualityMetric
from retroexit.metrics.weights import empty_lpips
from retroexit.plugins.host import host
from retroexit.report.saved_report import SavedReport, model_facts, read_evaluation, read_report, save_report
from retroexit.report.strips import Strip
from retroexit.training.cache import FeatureCache
from retroexit.training.losses.plan import LossOptions, plan_losses
from retroexit.training.predictor import _read_losses as read_losses
from retroexit.training.settings import FitSettings, check_same

_spec = importlib.util.spec_from_file_location("damaging", Path(__file__).parents[1] / "tests/damage.py")
assert _spec is not None and _spec.loader is not None
damaging = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(damaging)

INPUTS = torch.randn(10, 4, 6, 6, generator=torch.Generator().manual_seed(1))
WRONG = ("foreign exception", "changed in silence", "crash")
COLUMNS = ("refused", "repaired", "same result", "valid", *WRONG)


@dataclass(frozen=True)
class Kind:
    """Files of one kind: ``read`` reads the folder and returns what counts of the result."""

    name: str
    folder: Path
    files: list[Path]
    read: Callable[[], Any]


class Small(nn.Module):
    """A decoder of three stages."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.rgb = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Render ``(N, 4, H, W)`` as ``(N, 3, H, W)``."""
        for stage in self.stages:
            x = stage(x).relu()
        return torch.tanh(self.rgb(x))


class Distance(QualityMetric):
    """Mean absolute difference."""

    name = "distance"

    def compare(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``(N,)``."""
        return (a - b).abs().mean((1, 2, 3))


def wrapped() -> retroexit.EarlyExitGenerator:
    """Wrap the small decoder, with a bank that has an index of its own."""
    guidance = retroexit.Guidance(value_after=2, size=20, retriever="hnswlib")
    options: dict[str, Any] = {"stages": [f"stages.{i}" for i in range(3)], "self_test": False, "adapter": False}
    example = (INPUTS[:2],)
    return retroexit.wrap(
        Small().eval(), [1], 1.0, guidance=guidance, example_inputs=example, min_channels=1, **options
    )


def saved_model(root: Path) -> list[Kind]:
    """A fitted model, its cache, and what an interrupted fit leaves."""
    model, folder, generator, other = wrapped(), root / "fit", Small().eval(), wrapped()
    settings: dict[str, Any] = {"steps": 2, "predictor_steps": 2, "progress": False, "calibrate": 0.3}
    inputs = INPUTS.repeat(10, 1, 1, 1) + torch.linspace(0, 1, 100).view(-1, 1, 1, 1)
    retroexit.fit(model, inputs, folder, metric=Distance(), alpha=0.4, confidence=0.6, latency=1, **settings)
    shutil.copytree(folder, root / "model", ignore=shutil.ignore_patterns("cache", "branches", "losses*", "fit*"))

    def read_model() -> Any:
        loaded = retroexit.load(root / "model", generator, adapter=False)
        bank, router = loaded.bank, loaded.router
        assert bank is not None and router.predictor is not None and router.calibration is not None
        nearest = bank.retriever.search(bank.retriever.keys[:5])
        return (
            *(loaded._saved_weights or {}).items(),
            *router.predictor.state_dict().items(),
            *(bank.retriever.keys, bank.values, bank.source, bank.meta, nearest.ids),
            *(router.calibration.losses, router.calibration.settings(), router.latency, router.guide_limit),
            *(loaded.options, loaded.about),
        )

    samples, work = Samples(INPUTS), root / "cache"

    def read_cache() -> Any:
        cache = FeatureCache.build(model, samples, work, progress=False)
        return [cache.read(path.stem, range(len(cache))) for path in sorted(work.glob("*.npy"))]

    read_cache()
    record = retroexit.core.files.read_json(folder / "fit.json")
    size = (len(inputs) - round(0.3 * len(inputs)), 1)
    resumed = _trainer(other, folder / "branches")

    def read_resume() -> Any:
        check_same(folder / "fit.json", {k: v for k, v in record.items() if k != "digest"})
        assert resumed.resume()
        return [*resumed._state().items(), read_losses(folder / "losses.safetensors", size)]

    def files(below: Path, *patterns: str) -> list[Path]:
        return sorted(path for pattern in patterns for path in below.glob(pattern) if path.is_file())

    place, resume = root / "model", files(folder, "fit.json", "losses.*", "branches/*")
    return [
        Kind("model.json", place, files(place, "model.json"), read_model),
        Kind("weights", place, files(place, "weights*"), read_model),
        Kind("calibration", place, files(place, "calibration*"), read_model),
        Kind("bank and index", place, files(place, "bank-*/**/*"), read_model),
        Kind("feature cache", work, files(work, "*"), read_cache),
        Kind("resume state", folder, resume, read_resume),
    ]


def _trainer(model: retroexit.EarlyExitGenerator, folder: Path) -> Any:
    from retroexit.core.samples import ImageRange
    from retroexit.training.losses.plan import LossPlan
    from retroexit.training.losses.terms import L1
    from retroexit.training.trainer import BranchTrainer

    loss = LossPlan({"l1": 1.0}, {"l1": L1()}).for_branch()
    return BranchTrainer(model, 0, loss, ImageRange(-1, 1), FitSettings(steps=2), folder)


def unfinished_bank(root: Path) -> Kind:
    """Keys that a bank is built from."""
    folder = root / "candidates"
    keys, tags = torch.rand(30, 6).numpy(), torch.arange(60).view(30, 2).numpy()
    candidates = Candidates(40, size=8, folder=folder)
    candidates.add(keys, tags)
    candidates.store()

    def read() -> Any:
        again = Candidates(40, size=8, folder=folder)
        return again.keys, again.tags, again.seen

    return Kind("unfinished bank", folder, sorted(folder.iterdir()), read)


def report(root: Path) -> list[Kind]:
    """Numbers and texts of a report."""
    folder = root / "report"
    loss = torch.rand(20, 2, generator=torch.Generator().manual_seed(0)).numpy()
    evaluation = Evaluation(loss, loss / 2, [1.0, 2.0, 3.0], [0.1, 0.1, 0.1], {"name": "distance"})  # type: ignore[arg-type]
    images = [(f"exit {i}", (loss[:9, :1] * 200).astype("uint8").repeat(27, 1).reshape(9, 9, 3)) for i in (1, 2)]
    save_report(folder, SavedReport("title", "command", [Strip("easiest", images, 0)]))
    (folder / "evaluation.json").write_text(evaluation.to_json())

    def texts() -> Any:
        saved = read_report(folder)
        return saved.title, saved.command, [(s.label, s.chosen, s.images) for s in saved.strips]

    def numbers() -> Any:
        return read_evaluation(folder).to_json(), model_facts(folder, evaluation)

    text_files = [folder / "report.json", *sorted((folder / "strips").iterdir())]
    return [
        Kind("evaluation.json", folder, [folder / "evaluation.json"], numbers),
        Kind("report.json and images", folder, text_files, texts),
    ]


def metric_weights(root: Path) -> Kind:
    """Weights of LPIPS, in both formats of torch, which a fit has recorded."""
    folder = root / "metric"
    folder.mkdir()
    network = empty_lpips("squeeze")
    torch.manual_seed(0)
    trunk = {f"features.{n.partition('.')[2]}": torch.rand(v.shape) for n, v in network.net.state_dict().items()}
    heads = {n: torch.rand(v.shape) for n, v in network.state_dict().items() if n.startswith("lin") and "lins" not in n}
    content = {"backbone": trunk, "lin": heads}
    torch.save(content, folder / "zip.pth")
    torch.save(content, folder / "old.pth", _use_new_zipfile_serialization=False)
    recorded = {n: LPIPS("squeeze", folder / n).describe() for n in ("zip.pth", "old.pth")}
    for name, facts in recorded.items():
        write_sealed(root / f"{name}.json", {"metric": facts})

    def read() -> Any:
        for name in recorded:
            check_same(root / f"{name}.json", {"metric": LPIPS("squeeze", folder / name).describe()})

    return Kind("metric weights", folder, sorted(folder.iterdir()), read)


def stylegan(root: Path) -> list[Kind]:
    """A StyleGAN checkpoint in three formats, with a model fitted to it; and its discriminator."""
    from safetensors.torch import save_file

    folder, saved = root / "stylegan", root / "stylegan-model"
    folder.mkdir()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"z_dim": 8, "w_dim": 8, "resolution": 16, "num_mapping_layers": 2, "channels": [8, 8, 4]}
    generator = StyleGANGenerator(c_dim=0, conv_clamp=None, image_channels=3, **sizes).eval()
    state = generator.state_dict()
    torch.save(state, folder / "zip.pth")
    torch.save({"G_ema": state}, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "a.safetensors")
    retroexit.wrap(generator, 1, 0.5, self_test=False).save(saved)

    def read() -> Any:
        for path in files:
            retroexit.load(saved, load_generator(path), example_inputs=None)

    files = sorted(folder.iterdir())
    place = root / "discriminator"
    place.mkdir()
    description = host().describe(generator)
    assert description.discriminator is not None
    module = description.discriminator(generator)
    for name, is_zip in (("zip.pth", True), ("old.pth", False)):
        torch.save(module.state_dict(), place / name, _use_new_zipfile_serialization=is_zip)

    def plan(name: str) -> dict[str, Any]:
        options = LossOptions(losses={"l1": 1.0, "adversarial": 0.1}, discriminator=place / name)
        return {"loss": plan_losses(generator, options, None, description=description).describe()}

    write_sealed(root / "discriminator.json", plan("zip.pth"))

    def read_discriminators() -> Any:
        for name in ("zip.pth", "old.pth"):
            check_same(root / "discriminator.json", plan(name))

    return [
        Kind("StyleGAN checkpoint", folder, files, read),
        Kind("discriminator", place, sorted(place.iterdir()), read_discriminators),
    ]


def configuration(root: Path) -> Kind:
    """A TOML file of options, compared with the record of the fit that it was used for."""
    path = root / "config" / "fit.toml"
    path.parent.mkdir()
    lines = ["# options of a fit", "steps = 300", "batch = 8", "lr = 0.004", "held-out = 0.25", "seed = 3"]
    path.write_text("\n".join(lines) + "\n")
    names = {"steps": int, "batch": int, "lr": float, "held_out": float, "seed": int}

    def read() -> dict[str, Any]:
        params = [SimpleNamespace(opts=[f"--{n.replace('_', '-')}"], name=n) for n in (*names, "config")]
        context: Any = SimpleNamespace(command=SimpleNamespace(params=params), default_map=None)
        config._read_config(context, path)
        values = context.default_map or {}
        try:
            settings = FitSettings(**{name: names[name](values[name]) for name in values})
        except ValueError as error:  # where click would refuse the text
            raise retroexit.errors.OptionError(str(error)) from error
        record = {name: getattr(settings, name) for name in names}
        if (root / "config.json").exists():
            check_same(root / "config.json", record)
        return record

    write_sealed(root / "config.json", read())
    return Kind("configuration", path.parent, [path], read)


def digest(result: Any) -> str:
    """Hash a result by its numbers."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            value = value.detach().numpy()
        if hasattr(value, "tobytes"):
            total.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        elif isinstance(value, (tuple, list)):
            for part in value:
                add(part)
        else:
            total.update(repr(value).encode())

    add(result)
    return total.hexdigest()


def outcome(kind: Kind, whole: str, done: str) -> tuple[str, str]:
    """Read a damaged folder; return a column and the message of the error."""
    records: list[Any] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("retroexit").addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as messages:
            result = digest(kind.read())
    except retroexit.errors.RetroExitError as error:
        return "refused", str(error)
    except Exception as error:
        return "foreign exception", f"{type(error).__name__}: {error}"
    finally:
        logging.getLogger("retroexit").removeHandler(handler)
    if result != whole and damaging.RESEALED in done:
        return "valid", ""
    if result != whole:
        return "changed in silence", ""
    return ("repaired" if records or messages else "same result"), ""


def count(kind: Kind, mutations: int, seed: int) -> tuple[collections.Counter[str], list[str]]:
    """Damage the files of a kind this many times; return the columns, and what went wrong."""
    whole, counts, wrong = digest(kind.read()), collections.Counter[str](), list[str]()
    keep = Path(tempfile.mkdtemp()) / "whole"
    shutil.copytree(kind.folder, keep)
    number = 0
    while number < mutations:

        def work(report: Callable[[Any], None], begin: int = number) -> None:
            torch.set_num_threads(1)  # the thread pool of the parent does not exist in a forked process
            for done in damaging.mutations(kind.files, mutations, seed, begin):
                report([done, "began", ""])
                with damaging.time_limit(10):
                    report([done, *outcome(kind, whole, done)])

        reports, end = damaging.in_child(work, seconds=600)
        results = [entry for entry in reports if entry[1] != "began"]
        number += len(results)
        for done, column, message in results:
            counts[column] += 1
            if column in WRONG:
                wrong.append(f"{kind.name}: {column}: {done}: {message[:200]}")
        if end:
            counts["crash"] += 1
            number += 1
            wrong.append(f"{kind.name}: crash: {reports[-1][0] if reports else ''}: {end.strip().splitlines()[-1]}")
        shutil.rmtree(kind.folder)
        shutil.copytree(keep, kind.folder)
    shutil.rmtree(keep.parent)
    return counts, wrong


def kinds(root: Path) -> list[Kind]:
    """Make whole files of every kind."""
    return [
        *saved_model(root),
        unfinished_bank(root),
        *report(root),
        metric_weights(root),
        *stylegan(root),
        configuration(root),
    ]


def main() -> None:
    """Print a row for each kind of file."""
    parser = argument_parser(__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="mutations in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="kinds whose name holds this text")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    begin, rows, wrong = time.perf_counter(), [], list[str]()
    with tempfile.TemporaryDirectory() as root:
        every = kinds(Path(root))
        print(f"| file | mutations | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}")
        for number, kind in enumerate(every):
            share = arguments.count // len(every) + (number < arguments.count % len(every))
            if arguments.only and arguments.only not in kind.name:
                continue
            counts, problems = count(kind, share, arguments.seed + number)
            wrong += problems
            rows.append({"file": kind.name, "mutations": share, **{c: counts[c] for c in COLUMNS}})
            print("| " + " | ".join(str(value) for value in rows[-1].values()) + " |", flush=True)
    print(f"| all | {' | '.join(str(sum(r[c] for r in rows)) for c in ('mutations', *COLUMNS))} |")
    print(f"{time.perf_counter() - begin:.0f} s; {machine_line()}")
    print("\n".join(wrong), file=sys.stderr)
    if arguments.json:
        write_json(arguments.json, {"rows": rows, "wrong": wrong})


if __name__ == "__main__":
    main()
