"""Share a fitted model on the Hugging Face hub: the folder that ``model.save`` writes, and a model card."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from retroexit.core.files import replacing
from retroexit.errors import CheckpointError, MissingExtraError, cause_of
from retroexit.routing.calibration import Calibration
from retroexit.wrapping.exits import Exit

__all__ = ["local_folder", "model_card", "push"]

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingExtraError(
            "the hub needs huggingface_hub, got no such package. Run: pip install 'retroexit[hub]'"
        ) from error
    return huggingface_hub


def local_folder(name: str | Path, **options: Any) -> Path:
    """Return a folder, or download ``"user/name"`` from the hub unless there is such a folder, or a folder ``user``.

    ``options`` are those of `huggingface_hub.snapshot_download`: ``revision``, ``token``, ``local_files_only``.

    Raises:
        CheckpointError: If there is no such repository, or the hub cannot be reached.
        MissingExtraError: If huggingface_hub is not installed.
    """
    folder = Path(name)
    is_name = isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None
    if not is_name or folder.exists() or folder.parent.exists():
        return folder
    try:
        return Path(_hub().snapshot_download(name, **options))
    except MissingExtraError:
        raise
    except Exception as error:  # of the network, of the hub, of the client
        raise CheckpointError(
            f"{name} must be a folder here or a repository on the hub, got {cause_of(error)[:200]}. Check the name, or "
            "pass the path of a folder that model.save wrote."
        ) from error


def push(
    save: Callable[[Path], object],
    card: str,
    repository: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload early exits",
    **options: Any,
) -> str:
    """Save a model and upload it with its card; returns the commit's address. See ``model.push_to_hub``."""
    hub = _hub()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save(folder)
        with replacing(folder / "README.md") as file:
            file.write(card.encode())
        api = hub.HfApi(token=token)
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        ignored = ["*.lock"]
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=message, ignore_patterns=ignored, **options
        )
    return str(commit.commit_url)


def model_card(
    generator: str,
    exits: Sequence[Exit],
    calibration: Calibration | None,
    about: dict[str, Any],
    *,
    repository: str = "user/name",
    license: str | None = None,
    base_model: str | None = None,
) -> str:
    """Write a model card in Markdown: how to load it, exits, promise, what it was fitted on, licence."""
    facts = {"library_name": "retroexit", "license": license, "base_model": base_model}
    lines = ["---", *[f"{key}: {value}" for key, value in facts.items() if value], "tags:", "- early-exit", "---", ""]
    lines += [
        f"# {generator} with early exits",
        "",
        "Branches, predictor and settings of `retroexit`. The generator's own weights are not part of it and have a "
        "licence of their own.",
        "",
        "```python",
        "import retroexit",
        "",
        f'model = retroexit.from_pretrained("{repository}", generator, example_inputs)',
        "images = model(*inputs, threshold=0.1)",
        "```",
        "",
        "## Exits",
        "",
        "| exit | attached after | MACs | share of the backbone | parameters of the branch |",
        "|---|---|---|---|---|",
    ]
    for exit in exits:
        place = exit.attach_at or "backbone"
        parameters = f"{exit.parameters:,}" if exit.attach_at else ""
        lines.append(f"| {exit.index} | {place} | {exit.macs:,} | {100 * exit.share:.1f} % | {parameters} |")
    promise = "None: a threshold is compared with predicted losses." if calibration is None else f"{calibration}."
    lines += ["", "## Promise", "", promise]
    fit = {key: value for key, value in about.items() if isinstance(value, (str, int, float))}
    fit |= {"metric": about["metric"].get("name")} if isinstance(about.get("metric"), dict) else {}
    if fit:
        lines += ["", "## Fit", "", "| | |", "|---|---|", *[f"| {key} | {value} |" for key, value in fit.items()]]
    return "\n".join([*lines, ""])
