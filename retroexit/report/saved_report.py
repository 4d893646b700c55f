"""The parts of a report, saved beside it, so that it can be written again without measuring again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from retroexit.core.files import read_json, reading, replacing, sha256_of, write_json
from retroexit.errors import CheckpointError
from retroexit.evaluation.sweep import Evaluation
from retroexit.report.strips import Strip

EVALUATION: Final = "evaluation.json"
_TEXTS: Final = "report.json"
_IMAGES: Final = "strips"
_ADVICE: Final = "Remove report.json for a report without images, or run 'retroexit evaluate' again."


@dataclass(frozen=True)
class SavedReport:
    """Texts and images of a report."""

    title: str | None = None  # heading of the page, or None if unknown
    command: str | None = None  # command line that measured
    strips: list[Strip] = field(default_factory=list)  # images


def save_report(folder: Path, report: SavedReport) -> None:
    """Write texts and images of a report into its folder."""
    from PIL import Image

    for old in (folder / _IMAGES).glob("*-*.png"):
        old.unlink()
    rows = []
    for i, strip in enumerate(report.strips):
        images = []
        for j, (caption, pixels) in enumerate(strip.images):
            file = f"{_IMAGES}/{i}-{j}.png"
            with replacing(folder / file) as opened:
                Image.fromarray(pixels).save(opened, "png", optimize=True)
            images.append([caption, file, sha256_of(folder / file)])
        rows.append({"label": strip.label, "chosen": strip.chosen, "images": images})
    texts = {"title": report.title, "command": report.command, "strips": rows}
    write_json(folder / _TEXTS, texts)


def read_report(folder: Path) -> SavedReport:
    """Read what `save_report` wrote, an empty report if there is nothing; `CheckpointError` if it is damaged."""
    path = folder / _TEXTS
    if not path.exists():
        return SavedReport()
    with reading(path, _ADVICE):
        texts = read_json(path, _ADVICE)
        strips = [
            Strip(row["label"], [(c, _pixels(folder, *file)) for c, *file in row["images"]], row["chosen"])
            for row in texts["strips"]
        ]
        return SavedReport(texts["title"], texts["command"], strips)


def _pixels(folder: Path, file: str, digest: str) -> np.ndarray:
    from PIL import Image

    path = folder / file
    if path.resolve().parent != (folder / _IMAGES).resolve():
        raise ValueError(f"{file!r} is not in {_IMAGES}/")
    with reading(path, _ADVICE):
        if sha256_of(path) != digest:
            raise ValueError(f"it is another image than {_TEXTS} names")
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))


def find_report(folder: str | Path) -> Path:
    """Find the report in the folder itself, or in ``report`` of a model's folder; else `CheckpointError`."""
    folder = Path(folder)
    for place in (folder, folder / "report"):
        if (place / EVALUATION).is_file():
            return place
    raise CheckpointError(
        f"no {EVALUATION} in {folder} or {folder / 'report'}. Run 'retroexit evaluate' first, or pass the "
        "folder that it wrote."
    )


def read_evaluation(folder: Path) -> Evaluation:
    """Read the numbers of a report; `CheckpointError` if the file is no evaluation."""
    path = folder / EVALUATION
    with reading(path, advice := "Run 'retroexit evaluate' again."):
        values = read_json(path, advice)
        del values["digest"]
        return Evaluation(**values)


def model_facts(folder: Path, evaluation: Evaluation) -> tuple[Path, dict[str, Any]] | None:
    """Find folder and ``model.json`` of the model in the report's folder or above, if it was evaluated there."""
    fingerprint = str(evaluation.about.get("fingerprint") or "")
    for place in (folder, folder.parent):
        try:
            manifest = read_json(place / "model.json")
        except CheckpointError:
            continue
        if fingerprint and str(manifest.get("fingerprint", "")).startswith(fingerprint):
            return place, manifest
    return None


def hashes(manifest: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Label the hashes that identify a model's files."""
    labels = {
        "fingerprint": "generator",
        "weights_sha256": "branches and predictor",
        "bank_sha256": "bank",
        "calibration_sha256": "calibration",
        "digest": "model.json",
    }
    return [(label, str(manifest[name])) for name, label in labels.items() if manifest.get(name)]
