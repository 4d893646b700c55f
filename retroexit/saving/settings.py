"""How a generator was wrapped, as JSON types."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from retroexit.branch.widths.plan import Pin, WidthPlan, WidthRule
from retroexit.errors import CheckpointError
from retroexit.guidance.provider import Guidance, key_name
from retroexit.wrapping.decomposition import Decomposition
from retroexit.wrapping.options import WrapOptions

__all__ = ["options_from_json", "options_to_json", "plan_to_json", "with_key"]


def options_to_json(options: WrapOptions, decomposition: Decomposition) -> dict[str, Any]:
    """Write how a recorded generator was wrapped, attach points aside, as JSON types."""
    rules = [options.rule_of(place) for place in decomposition.places]
    return {
        "rules": [{"scale": r.scale, "min_channels": r.min_channels, "name": r.name} for r in rules],
        "tap": options.tap,
        "stages": {stage.path: stage.end for stage in decomposition.split.decoder.stages},
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
    key: Callable[..., Tensor] | None,
    adapter_key: Callable[..., Tensor] | None,
    folder: Path,
) -> WrapOptions:
    """Put back the key function of a bank of frames: the user's, or the adapter's if its name is the saved one.

    Raises:
        CheckpointError: If it is missing, or given where none was saved.
    """
    saved = (manifest["options"]["guidance"] or {}).get("key")
    if saved is None:
        if key is not None:
            raise CheckpointError(
                f"{folder} was saved without a key function, got key={key_name(key)!r}. Leave key out.", key
            )
        return options
    if key is None and (adapter_key is None or key_name(adapter_key) != saved):
        raise CheckpointError(
            f"{folder} needs the key function {saved!r}, which is not saved with it. Pass "
            "retroexit.load(..., key=...), or install the plug-in that it comes from.",
            folder,
        )
    assert options.guidance is not None
    guidance = dataclasses.replace(options.guidance, key=adapter_key if key is None else key)
    return dataclasses.replace(options, guidance=guidance)


def options_from_json(manifest: dict[str, Any], knowledge: dict[str, Any]) -> WrapOptions:
    """Read what `options_to_json` and `plan_to_json` wrote; ``knowledge`` is what an adapter adds."""
    saved = dict(manifest["options"])
    guidance = saved.pop("guidance")
    if guidance is not None:
        # The key function is put back by `with_key`: a missing one is no damage of the file.
        guidance = Guidance(**{**guidance, "key": None, "patch": tuple(guidance["patch"])})
    image, image_range = saved.pop("image"), saved.pop("image_range")
    return WrapOptions(
        attach_at=tuple(manifest["attach_at"]),
        rules=tuple(WidthRule(**rule) for rule in saved.pop("rules")),
        stages={str(path): str(end) for path, end in saved.pop("stages").items()},
        guidance=guidance,
        image=tuple(image) if isinstance(image, list) else image,
        image_range=None if image_range is None else tuple(image_range),
        plans=tuple(_plan_from_json(plan) for plan in manifest["plans"]),
        **saved,
        **knowledge,
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
