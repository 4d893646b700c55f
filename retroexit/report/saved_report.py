"""What a report is made of, kept beside it, so that it can be written again without measuring again.

The numbers are in ``evaluation.json``; words and places of images are in ``report.json``, the images, at
their full size, in ``strips/``. What belongs to the model is read from ``model.json`` in its own folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from retroexit.errors import CheckpointError
from retroexit.evaluation.sweep import Evaluation
from retroexit.report.strips import Strip

__all__ = [
    "EVALUATION",
    "Kept",
    "find_report",
    "hashes",
    "keep",
    "model_facts",
    "read_evaluation",
    "read_kept",
]

EVALUATION: Final = "evaluation.json"
_WORDS: Final = "report.json"
_IMAGES: Final = "strips"


@dataclass(frozen=True)
class Kept:
    """Words and images of a report.

    Attributes:
        title: Heading of the page, or ``None`` where none was kept.
        headline: First sentence, where it was given.
        command: The command that measured.
        strips: Images.
    """

    title: str | None = None
    headline: str | None = None
    command: str | None = None
    strips: list[Strip] = field(default_factory=list)


def keep(folder: Path, kept: Kept) -> None:
    """Write words and images of a report into its folder."""
    from PIL import Image

    (folder / _IMAGES).mkdir(parents=True, exist_ok=True)
    for old in (folder / _IMAGES).glob("*-*.png"):
        old.unlink()
    rows = []
    for i, strip in enumerate(kept.strips):
        images = []
        for j, (caption, pixels) in enumerate(strip.images):
            file = f"{_IMAGES}/{i}-{j}.png"
            Image.fromarray(pixels).save(folder / file, optimize=True)
            images.append([caption, file])
        rows.append({"label": strip.label, "chosen": strip.chosen, "images": images})
    words = {"title": kept.title, "headline": kept.headline, "command": kept.command, "strips": rows}
    (folder / _WORDS).write_text(json.dumps(words, indent=1) + "\n", encoding="utf-8")


def read_kept(folder: Path) -> Kept:
    """Read what `keep` wrote; empty where there is nothing, as in reports of an earlier version.

    Raises:
        CheckpointError: If it is damaged, or an image is missing.
    """
    path = folder / _WORDS
    if not path.exists():
        return Kept()
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        strips = [
            Strip(row["label"], [(c, _pixels(folder, file)) for c, file in row["images"]], row["chosen"])
            for row in words["strips"]
        ]
        return Kept(words["title"], words["headline"], words["command"], strips)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"asked for the report of {folder}; found {_WORDS} or an image that it names damaged "
            f"({type(error).__name__}: {error}). Remove {_WORDS} for a report without images, or run "
            "retroexit evaluate again.",
            path,
        ) from error


def _pixels(folder: Path, file: str) -> np.ndarray:
    from PIL import Image

    path = folder / file
    if path.resolve().parent != (folder / _IMAGES).resolve():
        raise ValueError(f"{file!r} is not in {_IMAGES}/")
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def find_report(folder: str | Path) -> Path:
    """Find where an evaluation was written: the folder itself, or ``report`` in a model's folder.

    Raises:
        CheckpointError: If there is none.
    """
    folder = Path(folder)
    for place in (folder, folder / "report"):
        if (place / EVALUATION).is_file():
            return place
    raise CheckpointError(
        f"asked for the report of {folder}; found no {EVALUATION} there nor in {folder / 'report'}. Run "
        "'retroexit evaluate' first, or name the folder that it wrote.",
        folder,
    )


def read_evaluation(folder: Path) -> Evaluation:
    """Read the numbers of a report.

    Raises:
        CheckpointError: If the file is no evaluation.
    """
    path = folder / EVALUATION
    try:
        return Evaluation.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"asked for the report of {folder}; found {path} damaged: {error}. Run retroexit evaluate again.",
            path,
        ) from error


def model_facts(folder: Path, evaluation: Evaluation) -> tuple[Path, dict[str, Any]] | None:
    """Find the model that was evaluated, in the report's folder or the one above it.

    Returns:
        Its folder and ``model.json``; ``None`` where there is no model, or that of another generator.
    """
    own = str(evaluation.about.get("fingerprint") or "")
    for place in (folder, folder.parent):
        try:
            manifest = dict(json.loads((place / "model.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        if own and str(manifest.get("fingerprint", "")).startswith(own):
            return place, manifest
    return None


def hashes(manifest: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Name the hashes by which a model's files can be told from others."""
    names = ("fingerprint", "weights_sha256", "bank_sha256", "calibration_sha256", "digest")
    said = {
        "fingerprint": "generator",
        "weights_sha256": "branches and predictor",
        "bank_sha256": "bank",
        "calibration_sha256": "calibration",
        "digest": "model.json",
    }
    return [(said[name], str(manifest[name])) for name in names if manifest.get(name)]
