"""How a generator was wrapped, in plain JSON types and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from retroexit.branch.widths.plan import Pin, WidthPlan, WidthRule
from retroexit.errors import CheckpointError
from retroexit.guidance.keys import key_name
from retroexit.guidance.options import Guidance
from retroexit.model import EarlyExitGenerator
from retroexit.wrapping.options import WrapOptions

__all__ = ["options_from_json", "plan_to_json", "with_key", "wrap_settings"]


def wrap_settings(model: EarlyExitGenerator) -> dict[str, Any]:
    """Say in plain JSON types how a recorded generator was wrapped, attach points aside."""
    options, decomposition = model.options, model.decomposition
    by_place = dict(zip(options.attach_at, options.rules, strict=True))
    rules = [by_place[p.path] if p.path in by_place else by_place[p.index] for p in decomposition.places]
    return {
        "rules": [{"scale": r.scale, "min_channels": r.min_channels, "name": r.name} for r in rules],
        "tap": options.tap,
        "stages": [stage.path for stage in decomposition.split.decoder.stages],
        "guidance": _guidance_to_json(options.guidance),
        "init": options.init,
        "image": options.image,
        "image_range": options.image_range,
        "self_test": options.self_test,
        "seed": options.seed,
    }


def _guidance_to_json(guidance: Guidance | None) -> dict[str, Any] | None:
    """Write settings as plain data; a key function goes by its name."""
    if guidance is None:
        return None
    plain = {field.name: getattr(guidance, field.name) for field in dataclasses.fields(guidance)}
    return {**plain, "key": key_name(guidance.key) if callable(guidance.key) else None}


def with_key(
    options: WrapOptions,
    manifest: dict[str, Any],
    given: Callable[..., Tensor] | None,
    known: Callable[..., Tensor] | None,
    folder: Path,
) -> WrapOptions:
    """Put back the key function of a bank of frames: the one handed over, or the adapter's if it is that."""
    saved = (manifest["options"]["guidance"] or {}).get("key")
    if saved is None:
        if given is not None:
            raise CheckpointError(
                f"asked to load {folder} with the key function {key_name(given)!r}; found that it was saved "
                "without one. Leave key out.",
                given,
            )
        return options
    if given is None and (known is None or key_name(known) != saved):
        raise CheckpointError(
            f"asked to load {folder}; found that its bank of frames is searched with keys from the function "
            f"{saved!r}, which is not saved with it. Pass it as retroexit.load(..., key=...), or install the "
            "plug-in that it comes from.",
            folder,
        )
    assert options.guidance is not None
    guidance = dataclasses.replace(options.guidance, key=known if given is None else given)
    return dataclasses.replace(options, guidance=guidance)


def options_from_json(manifest: dict[str, Any], found: dict[str, Any]) -> WrapOptions:
    """Read what `wrap_settings` and `plan_to_json` wrote; ``found`` is what an adapter knows."""
    saved = dict(manifest["options"])
    guidance = saved.pop("guidance")
    if guidance is not None:
        # A key function is put back later: where it is missing, the file is not to blame.
        guidance = Guidance(**{**guidance, "key": None, "patch": tuple(guidance["patch"])})
    image, image_range = saved.pop("image"), saved.pop("image_range")
    return WrapOptions(
        attach_at=tuple(manifest["attach_at"]),
        rules=tuple(WidthRule(**rule) for rule in saved.pop("rules")),
        stages=tuple(saved.pop("stages")),
        guidance=guidance,
        image=tuple(image) if isinstance(image, list) else image,
        image_range=None if image_range is None else tuple(image_range),
        plans=tuple(_plan_from_json(plan) for plan in manifest["plans"]),
        **saved,
        **found,
    )


def plan_to_json(plan: WidthPlan | None) -> dict[str, Any] | None:
    """Write the widths of a branch as plain data."""
    if plan is None:
        return None
    return {
        "shapes": {name: list(shape) for name, shape in plan.shapes.items()},
        "attributes": [[path, name, value] for (path, name), value in plan.attributes.items()],
        "entry": plan.entry,
        "pins": [dataclasses.asdict(pin) for pin in plan.pins],
        "built": {path: list(channels) for path, channels in plan.built.items()},
    }


def _plan_from_json(saved: dict[str, Any] | None) -> WidthPlan | None:
    if saved is None:
        return None
    return WidthPlan(
        sizes={},
        shapes={name: tuple(shape) for name, shape in saved["shapes"].items()},
        attributes={(p, n): tuple(v) if isinstance(v, list) else v for p, n, v in saved["attributes"]},
        entry=saved["entry"],
        pins=tuple(Pin(**pin) for pin in saved["pins"]),
        built={path: (int(c_in), int(c_out)) for path, (c_in, c_out) in saved.get("built", {}).items()},
    )
