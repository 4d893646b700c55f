"""``retroexit report``: write the report of an evaluation again, without measuring again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["report"]


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that evaluate wrote, or the model's folder.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the page; where the numbers are, by default.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    threshold: Annotated[list[float] | None, typer.Option(min=0, help="Thresholds of the table.")] = None,
    unguided: Annotated[
        Path | None, typer.Option(help="Folder of an evaluation without guidance, for figure 8.")
    ] = None,
) -> None:
    """Write one HTML page and summary.json from what evaluate measured.

    The page holds the headline, exits, thresholds, the promise, the paper's figures, images, what was
    counted, versions and hashes. It asks nothing of the network.

    Example:
        retroexit report runs/decoder --threshold 0.05 --threshold 0.1
    """
    from retroexit.report.report import write_report
    from retroexit.report.saved_report import find_report, model_facts, read_evaluation, read_report
    from retroexit.saving.model_files import read_calibration

    place = find_report(folder)
    evaluation, saved = read_evaluation(place), read_report(place)
    model = model_facts(place, evaluation)
    page = write_report(
        out or place,
        evaluation,
        saved.strips,
        title=title or saved.title or f"{evaluation.about.get('generator', 'A generator')} with early exits",
        headline=saved.headline,
        command=saved.command,
        thresholds=threshold or None,
        unguided=None if unguided is None else read_evaluation(find_report(unguided)),
        calibration=None if model is None else read_calibration(model[0], model[1].get("calibration_sha256")),
    )
    typer.echo(f"report: {page}")
    typer.echo(f"numbers: {page.with_name('summary.json')}")
