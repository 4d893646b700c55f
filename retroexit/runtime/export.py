"""Export a wrapped generator as programs without branches in their graphs, with a manifest: a bundle.

Which programs run is decided outside of them. A condition inside an exported graph would hold the weights of both
sides (``If`` of ONNX), or not export at all (`torch.cond`).
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from retroexit.core.files import sealed, sha256_of, staged, versions, writing
from retroexit.core.modules import device_of
from retroexit.core.nested import flatten, rebuild
from retroexit.core.samples import smaller_maps
from retroexit.errors import InputMismatchError, MissingExtraError, OptionError, RecordingError
from retroexit.model import EarlyExitGenerator, check_wrapped
from retroexit.runtime.bundle import KIND, MANIFEST, SCHEMA, load_bundle
from retroexit.runtime.programs import Named, NoiseMode, Program, Programs
from retroexit.tracing.record import unobserved

Format = Literal["onnx", "torch", "aoti"]
_ENDINGS = {"onnx": "onnx", "torch": "pt2", "aoti": "aoti.pt2"}
_LARGEST_ONNX = 1_500_000_000  # bytes of weights in one file, which may have 2 GiB

Axes = dict[str, dict[int, str]]
"""By value, the axes that vary: ``"N"`` with the batch, ``"*"`` with the size of the inputs."""


def export(model: EarlyExitGenerator, folder: str | Path, format: Format = "onnx", *, verify: bool = True) -> Path:
    """Write a wrapped generator to a folder that `load_bundle` runs without this library.

    Stem, segments, branches and predictor are programs of their own, so each weight is written once. The batch may have
    any size, and the inputs too where the decoder allows it. Guidance bank and calibration lie beside them.

    Args:
        model: What `retroexit.wrap` or `retroexit.load` returns, recorded.
        folder: A new folder, or an earlier bundle, which is replaced.
        format: ``"onnx"``; ``"torch"``: programs of `torch.export`; ``"aoti"``: packages of AOTInductor, which a C++
            compiler makes for this machine.
        verify: Whether to run every exit of the bundle and compare it with the model.

    Returns:
        The folder.

    Raises:
        OptionError: If the format is unknown, or the model cannot be exported, with the reason.
        NotRecordedError: If there are no exits yet.
        MissingExtraError: If the packages for ONNX are not installed.
        CheckpointError: If the folder holds other things.
    """
    check_wrapped(model)
    if format not in _ENDINGS:
        raise OptionError(f"format must be one of {', '.join(map(repr, _ENDINGS))}, got {format!r}.")
    if format == "onnx":
        _require_onnx()
    model.decomposition.check_generator()
    _refuse(model)
    folder, programs = Path(folder), Programs(model)
    with _plain(model):
        args, kwargs = _two_samples(model)
        values = programs.observe(args, kwargs)
        axes, exported = _export_all(programs, values, args, kwargs)
        with staged(folder, owns=_owned(folder)) as fresh:
            with writing(fresh):
                facts = {n: _write(fresh, programs.all[n], e, format, values, axes) for n, e in exported.items()}
                manifest = _describe(model, programs, values, axes)
                manifest |= {"programs": facts, "format": format, **_write_arrays(fresh, model, programs, values)}
                manifest["files"] = {path.name: sha256_of(path) for path in sorted(fresh.iterdir())}
                (fresh / MANIFEST).write_text(sealed(manifest, allow_nan=False), encoding="utf-8")
            if verify:
                _verify(model, programs, fresh, values, args, kwargs)
    return folder


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"format='onnx' needs onnx, onnxruntime and onnxscript, got no {error.name}. Run: pip install "
            "'retroexit[onnx]'"
        ) from error


def _refuse(model: EarlyExitGenerator) -> None:
    """Raise `OptionError` for what has no programs."""
    split = model.split
    if split.decoder.replayed:
        raise OptionError(
            f"{type(model.generator).__name__} must be cut to be exported, but {split.decoder.replayed.rstrip('.')}. "
            "Attach exits to a submodule whose forward does not depend on the values of tensors."
        )
    kinds = {tensor.dtype for tensor in (*model.generator.parameters(), *model.branches.parameters())}
    if torch.bfloat16 in kinds:
        raise OptionError("the model must be float32 or float16 for an export, got bfloat16. Call model.float() first.")


@contextmanager
def _plain(model: EarlyExitGenerator) -> Iterator[None]:
    """Leave buffers and random states alone, and drop what PyTorch's exporters say about themselves."""
    with torch.no_grad(), unobserved(model.generator), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Axes.


def _two_samples(model: EarlyExitGenerator) -> tuple[Any, Any]:
    """Example inputs of at least two samples: a size of 1 would be fixed in the programs."""
    example, split = model.split.example_now(), model.split
    return (example[0], example[1]) if split.batch > 1 or not split.any_batch else _one_more(example, split.batch)


def _one_more(example: Any, batch: int) -> tuple[Any, Any]:
    def larger(leaf: Any) -> Any:
        is_batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch
        return torch.cat([leaf, leaf[:1] * 0.9 if leaf.is_floating_point() else leaf[:1]]) if is_batched else leaf

    args, kwargs = rebuild((example[0], example[1]), larger)
    return args, kwargs


def _twice_the_size(inputs: Any) -> Any:
    def doubled(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.dim() < 3:
            return leaf
        return leaf.repeat(1, 1, *(2,) * (leaf.dim() - 2))

    return rebuild(inputs, doubled)


def _find_axes(programs: Programs, values: Named, args: Any, kwargs: Any) -> tuple[Axes, Axes]:
    """Compare shapes with those of a larger batch, and of other sizes; returns the axes of each."""
    split = programs.split
    by_batch: Axes = {name: {} for name in values}
    by_size: Axes = {name: {} for name in values}
    if split.any_batch:
        count = next(x.shape[0] for _, x in flatten((args, kwargs)) if isinstance(x, Tensor) and x.dim())
        by_batch = _differences(values, programs.observe(*_one_more((args, kwargs), count)), "N")
    smaller = smaller_maps((args, kwargs))
    for other in (smaller, _twice_the_size((args, kwargs)) if smaller is None else None):
        if other is None or not split.any_batch:
            continue
        try:
            by_size = _differences(values, programs.observe(*other), "*")
        except (InputMismatchError, RuntimeError):
            continue
    return by_batch, by_size


def _differences(values: Named, others: Named, mark: str) -> Axes:
    return {
        name: {axis: mark for axis, (a, b) in enumerate(zip(value.shape, others[name].shape, strict=True)) if a != b}
        for name, value in values.items()
    }


def _export_all(programs: Programs, values: Named, args: Any, kwargs: Any) -> tuple[Axes, dict[str, Any]]:
    """Export every program with as many free axes as all of them allow."""
    by_batch, by_size = _find_axes(programs, values, args, kwargs)
    both = {name: by_size[name] | by_batch[name] for name in values}
    draws, error = programs.split.decoder.recording.draws, None
    for axes in [both, by_batch] if any(by_size.values()) else [by_batch]:
        try:
            return axes, {name: _export(p, values, axes, draws) for name, p in programs.all.items()}
        except OptionError:
            raise
        except Exception as cause:  # the exporter raises errors of many types
            error = cause
    raise OptionError(
        f"{type(programs.model.generator).__name__} cannot be exported: torch.export raised {type(error).__name__}: "
        f"{' '.join(str(error).split())[:300]}. Attach exits elsewhere, or change that forward."
    ) from error


def _export(program: Program, values: Named, axes: Axes, draws: bool) -> Any:
    names = [*program.inputs, *program.noise]
    free = {name: dict.fromkeys(axes[name], torch.export.Dim.DYNAMIC) for name in names}
    inputs = tuple(values[name].contiguous() for name in names)  # as arrays are passed
    options: dict[str, Any] = {"dynamic_shapes": (tuple(free.values()),)}
    try:
        exported = torch.export.export(program, inputs, strict=False, **options)
    except Exception:  # the other way reads Python itself, so that len(x) does not fix a size
        exported = torch.export.export(program, inputs, strict=True, **options)
    for node in exported.graph.nodes if draws else ():
        tags = getattr(node.target, "tags", ())
        # Attention draws only for dropout.
        if torch.Tag.nondeterministic_seeded in tags and "attention" not in str(node.target):
            raise OptionError(
                f"random numbers of an export must be normal or uniform, got {node.target} in {program.name}. Draw "
                "them before the call and pass them to the generator."
            )
    return exported


# Files.


def _owned(folder: Path) -> set[str]:
    """Names of the files of an earlier bundle, which may be replaced."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {MANIFEST, *manifest["files"]} if manifest["kind"] == KIND else set()
    except (OSError, ValueError, TypeError, KeyError):
        return set()


def _write(folder: Path, program: Program, exported: Any, format: str, values: Named, axes: Axes) -> dict[str, Any]:
    """Write one program; returns its entry in the manifest."""
    path = folder / f"{program.name}.{_ENDINGS[format]}"
    inputs = [*program.inputs, *program.noise]
    if format == "onnx":
        size = sum(tensor.numel() * tensor.element_size() for tensor in exported.state_dict.values())
        names: dict[str, Any] = {"input_names": inputs, "output_names": program.returned}
        converted: Any = torch.onnx.export(exported, verbose=False, **names)
        for node in converted.model.graph:
            node.metadata_props.clear()  # stack traces, several times the size of the graph
        converted.save(path, external_data=size > _LARGEST_ONNX)
    elif format == "torch":
        torch.export.save(exported, path)
    else:
        torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
    nodes = {node.name: node for node in exported.graph.nodes}
    shapes = {n: nodes[u].meta["val"].shape for n, u in zip(inputs, exported.graph_signature.user_inputs, strict=True)}
    entries = {name: {"name": name, "shape": _dims(shape), **_dtype(values[name])} for name, shape in shapes.items()}
    noise = [
        {**entries[name], "kind": kind, "number": list(values).index(name), "batched": axes[name].get(0) == "N"}
        for name, kind in zip(program.noise, program.kinds, strict=True)
    ]
    outputs = [
        {"name": name, "shape": _marked(values[name], axes[name]), **_dtype(values[name])} for name in program.returned
    ]
    return {"file": path.name, "inputs": [entries[name] for name in program.inputs], "outputs": outputs, "noise": noise}


def _dims(shape: Any) -> list[int | str]:
    return [side if isinstance(side, int) else str(side) for side in shape]


def _marked(value: Tensor, axes: dict[int, str]) -> list[int | str]:
    """Shape with ``N`` for the batch and ``*`` for any size."""
    return [axes.get(axis, side) for axis, side in enumerate(value.shape)]


def _dtype(value: Tensor) -> dict[str, str]:
    return {"dtype": str(value.dtype).removeprefix("torch.")}


def _write_arrays(folder: Path, model: EarlyExitGenerator, programs: Programs, values: Named) -> dict[str, Any]:
    """Write bank and calibration; returns their entries in the manifest."""
    bank, taps, calibration = model.bank, model.guide.taps, model.calibration
    facts: dict[str, Any] = {"bank": None, "router": None}
    if taps is not None and bank is not None:
        keys = bank.retriever.keys
        mean = keys.mean(axis=0, dtype=np.float64).astype(np.float32)
        np.savez(folder / "bank.npz", keys=keys, values=np.asarray(bank.values), mean=mean)
        place = {"file": "bank.npz", "query": programs.query, "order": bank.order}
        sizes = {"patch": list(bank.patch), "value_patch": list(bank.value_patch)}
        facts["bank"] = {**place, **sizes, **_dtype(values["guide"])}
    if model.predictor is None:
        return facts
    arrays, limits = (dict[str, Any](), None) if calibration is None else calibration.table()
    np.savez(folder / "router.npz", **arrays)
    router = model.router
    facts["router"] = {
        "file": "router.npz",
        "feature": programs.feature,
        "reads_distance": router.reads == "features+distance",
        "guard": router.ood_counter.enabled,
        "guide_limit": router.guide_limit if taps is not None and model.split.rows_per_sample == 1 else None,
        "shares": router.shares().tolist(),
        "limits": limits,
        "promise": None if calibration is None else str(calibration),
        "feature_size": None if calibration is None else calibration.about.get("feature_size"),
    }
    return facts


def _describe(model: EarlyExitGenerator, programs: Programs, values: Named, axes: Axes) -> dict[str, Any]:
    """What the manifest says besides programs and files."""
    split = model.split
    by_path = dict(zip(split.decoder.recording.inputs, programs.inputs, strict=True))
    call = []
    for path, leaf in flatten(split.example):
        entry: dict[str, Any] = {"path": list(path)}
        if isinstance(leaf, Tensor):
            name = by_path.get(path)  # None for a tensor that was passed twice
            entry |= {"value": name, **_dtype(leaf)}
            entry["shape"] = list(leaf.shape) if name is None else _marked(values[name], axes[name])
        else:
            entry["frozen"] = repr(leaf)
        call.append(entry)
    batch = values[programs.feature].shape[0] // split.rows_per_sample
    rows = {name: values[name].shape[0] // batch for name, marks in axes.items() if marks.get(0) == "N"}
    image_range = model.options.image_range
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "device": str(device_of(model.generator)),
        "versions": versions(),
        "generator": type(model.generator).__name__,
        "exits": [dataclasses.asdict(exit) for exit in model.exits],
        "image_range": None if image_range is None else list(image_range),
        "route": programs.route,
        "call": call,
        "batch": batch,
        "mixes": split.mixes and (model.guide.taps is None or split.rows_per_sample == 1),
        "rows": rows,
    }


def _verify(model: EarlyExitGenerator, programs: Programs, folder: Path, values: Named, args: Any, kwargs: Any) -> None:
    """Compare every exit of a bundle with the model."""
    bundle = load_bundle(folder)
    arrays_args, arrays_kwargs = rebuild((args, kwargs), lambda x: x.cpu().numpy() if isinstance(x, Tensor) else x)
    noise = {name: value.cpu().numpy() for name, value in values.items() if name.startswith("noise_")}
    for exit in range(1, len(model.exits) + 1):
        with NoiseMode(programs.noise_of_route(values, exit)):
            expected = model.image(model.route(args, kwargs, exit=exit)).float().cpu().numpy()
        images, _ = bundle.run(*arrays_args, exit=exit, draws=noise, **arrays_kwargs)
        difference = float(np.abs(images.astype(np.float32) - expected).max())
        scale = max(1.0, float(np.abs(expected).max()))
        tolerance = 1e-3 if images.dtype == np.float32 else 2e-2
        if not difference <= tolerance * scale:
            raise RecordingError(
                f"the export must give the model's images, got a difference of {difference:.2g} at exit {exit}. Pass "
                "another format."
            )
