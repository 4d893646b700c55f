"""Backbone features and images for training: computed once and kept on disk, or computed in every step."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from retroexit.core.files import new_array, read_json, read_npy, reading, write_json
from retroexit.core.identity import fingerprint
from retroexit.core.modules import device_of
from retroexit.core.progress import progress_bar
from retroexit.core.samples import Samples, drawing_from, moved
from retroexit.core.workers import in_order
from retroexit.errors import CheckpointError, OptionError, TrainingError
from retroexit.guidance.provider import Taps
from retroexit.model import EarlyExitGenerator

# Crossing values are stored under the names of their nodes, which are identifiers; these are not.
IMAGE, GUIDANCE_KEY, GUIDANCE_VALUE = "backbone-image", "guidance-key", "guidance-value"

_SCHEMA, _STATE = 2, "cache.json"

Window: TypeAlias = tuple[slice, ...]
"""Part of a map ``(C, ...)``, without its channel axis."""

Crop: TypeAlias = Callable[[tuple[int, ...]], list[Window] | None]
"""Returns the window of each sample for maps of a size, or ``None`` for the whole map."""


def cut_out(value: Tensor, windows: list[Window] | None, count: int) -> Tensor:
    """Cut one window per sample out of a map ``(count, C, ...)`` or ``(1, C, ...)``; return others as is."""
    if windows is None or value.shape[0] not in (1, count):
        return value
    value = value.expand(count, *value.shape[1:])
    places: list[Any] = [(row, slice(None), *window) for row, window in enumerate(windows)]
    return torch.stack([value[place] for place in places])  # (N, C, H, W) -> (N, C, h, w)


def chunks(count: int, size: int) -> list[list[int]]:
    """Divide ``range(count)`` into lists of at most ``size``."""
    return [list(range(begin, min(begin + size, count))) for begin in range(0, count, size)]


def guidance_names(taps: Taps, first: str) -> tuple[str, str]:
    """Return the names of the maps that guidance keys and values are cut from; ``first``: the first feature."""
    return first if taps.key_tap == first else GUIDANCE_KEY, IMAGE if taps.gives_image else GUIDANCE_VALUE


class FeatureCache:
    """Values at the attach points, guidance maps and images of the backbone for ``count`` samples, memory-mapped."""

    def __init__(self, folder: Path, arrays: Iterable[str], count: int, shared: dict[str, Tensor]) -> None:
        self.folder, self.count, self._shared = folder, count, shared
        self._arrays = {name: _open(folder, name, count, "r") for name in arrays}

    def __len__(self) -> int:
        return self.count

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy maps the same files.
        return type(self), (self.folder.absolute(), list(self._arrays), self.count, self._shared)

    def read(
        self, name: str, indices: Sequence[int], device: torch.device | str = "cpu", crop: Crop | None = None
    ) -> Tensor:
        """Read a value by name for some samples, ``(len(indices), ...)``; only ``crop``'s windows are read."""
        if name in self._shared:
            value = self._shared[name].to(device, copy=True)  # branches may write into it
            return value if crop is None else cut_out(value, crop(tuple(value.shape[2:])), len(indices))
        array = self._arrays[name]
        windows = None if crop is None else crop(array.shape[2:])
        if windows is None:
            return _to_tensor(array[np.asarray(indices)]).to(device)
        places: list[Any] = [(row, slice(None), *part) for row, part in zip(indices, windows, strict=True)]
        return _to_tensor(np.stack([array[place] for place in places])).to(device)

    def is_per_sample(self, name: str) -> bool:
        """Tell whether a value has one row per sample, instead of being the same for all."""
        return name in self._arrays

    @classmethod
    def build(
        cls, model: EarlyExitGenerator, samples: Samples, folder: str | Path, *, batch: int = 8, progress: bool = True
    ) -> FeatureCache:
        """Run the backbone once over all samples and store what training needs.

        A cache of the same backbone, attach points and inputs in the folder is continued or reused; another one is a
        `CheckpointError`, a full disk a `StorageError`. Samples must have one size (`OptionError`).
        """
        folder = Path(folder)
        if not model.is_recorded:
            args, kwargs = samples.gather([0])
            model.record(*args, **kwargs)
        _check_rows(model)
        identity = _identity(model, samples, batch)
        state = _read_state(folder, identity)
        done, names = state["done"], state["arrays"]
        arrays = {name: _open(folder, name, len(samples), "r+") for name in names}
        sums = _check_sums(folder, arrays, state, batch)
        shared_names, shared = _shared_by_all(model), dict[str, Tensor]()
        if done and shared_names:  # they are not stored; the first batch computes them
            args, kwargs = samples.gather(range(min(batch, len(samples))))
            values = compute_features(model, args, kwargs, samples.seed)
            shared = {name: values[name].cpu() for name in shared_names}
        bar = progress_bar(total=len(samples), initial=done, desc="backbone features", show=progress)
        begins = range(done, len(samples), batch)
        computed = in_order(functools.partial(_batch_features, model, samples, batch), begins)
        for begin, features in zip(begins, computed, strict=True):
            indices = list(range(begin, min(begin + batch, len(samples))))
            for name, value in features.items():
                if name in shared_names:
                    _check_shared(name, shared.setdefault(name, value.cpu()), value.cpu())
                else:
                    _store(folder, name, arrays, indices, value, len(samples))
            for name, array in arrays.items():
                array.flush()  # type: ignore[attr-defined]
                sums.setdefault(name, []).append(_sum(array[indices[0] : indices[-1] + 1]))
            state = {"identity": identity, "done": indices[-1] + 1, "arrays": sorted(arrays), "sums": sums}
            write_json(folder / _STATE, state)
            bar.update(len(indices))
        bar.close()
        return cls(folder, sorted(arrays), len(samples), shared)


class LiveFeatures:
    """Runs the backbone on the samples that are read, where nothing may be stored.

    The last batch is kept for the other values of a step. Noise depends on the batch and the seed.
    """

    def __init__(self, model: EarlyExitGenerator, samples: Samples) -> None:
        _check_rows(model)
        self.model, self.samples = model, samples
        self._shared = _shared_by_all(model)
        self._last: tuple[tuple[int, ...], dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def read(
        self, name: str, indices: Sequence[int], device: torch.device | str = "cpu", crop: Crop | None = None
    ) -> Tensor:
        """Compute one value for some samples, as `FeatureCache.read` reads it."""
        rows = tuple(indices)
        if self._last is None or self._last[0] != rows or name not in self._last[1]:
            args, kwargs = self.samples.gather(rows)
            seed = int(np.random.SeedSequence([self.samples.seed, *rows]).generate_state(1)[0])
            with_guidance = name in (GUIDANCE_KEY, GUIDANCE_VALUE)
            self._last = rows, compute_features(self.model, args, kwargs, seed, with_guidance)
        value = self._last[1][name]
        windows = None if crop is None else crop(tuple(value.shape[2:]))
        return cut_out(value, windows, len(indices)).to(device, copy=True)  # branches may write into it

    def is_per_sample(self, name: str) -> bool:
        """Tell whether a value has one row per sample, instead of being the same for all."""
        return name not in self._shared


Features: TypeAlias = FeatureCache | LiveFeatures


def bytes_per_sample(model: EarlyExitGenerator, samples: Samples) -> int:
    """Return the size of one sample in a cache; the model is recorded, and the backbone runs once."""
    args, kwargs = samples.gather([0])
    values, shared = compute_features(model, args, kwargs, samples.seed), _shared_by_all(model)
    return sum(v[0].numel() * v.element_size() for name, v in values.items() if name not in shared)


def _batch_features(model: EarlyExitGenerator, samples: Samples, batch: int, begin: int) -> dict[str, Tensor]:
    """Do `compute_features` for the batch that begins at a sample."""
    args, kwargs = samples.gather(range(begin, min(begin + batch, len(samples))))
    return compute_features(model, args, kwargs, samples.seed + begin)


@torch.no_grad()
def compute_features(
    model: EarlyExitGenerator, args: Any, kwargs: Any, seed: int, with_guidance: bool = True
) -> dict[str, Tensor]:
    """Run the backbone once over a batch; return values by node, and image and guidance maps by our names."""
    split, features = model.split, dict[str, Tensor]()
    device = device_of(model.generator)
    args, kwargs = moved((args, kwargs), device)
    with drawing_from(seed, device):
        begun = split.begin(args, kwargs)
        values, key_feature = begun.values, begun.key_feature
        for index in range(len(split.cuts)):
            values = split.advance(values, index) if index else values
            features.update({node.name: values[node].clone() for node in split.cuts[index].crossing})
        features[IMAGE] = split.place_of(split.finish(values))
    taps = model.decomposition.taps
    if taps is None or not with_guidance:
        return features
    key, value = guidance_names(taps, split.cuts[0].feature.name)
    if key == GUIDANCE_KEY:
        features[GUIDANCE_KEY] = taps.query(key_feature, args, kwargs)
    if value == GUIDANCE_VALUE:
        # The same seed again, so that keys, values and image belong together.
        with drawing_from(seed, device):
            features[GUIDANCE_VALUE] = model.decomposition.guidance_values(args, kwargs)
    return features


def _shared_by_all(model: EarlyExitGenerator) -> set[str]:
    """Names of crossing values that do not depend on the sample."""
    split = model.split
    return {node.name for cut in split.cuts for node in cut.crossing if node not in split.batched}


def _check_rows(model: EarlyExitGenerator) -> None:
    """Refuse a generator whose values cannot be told apart by sample."""
    name = type(model.generator).__name__
    if not model.split.any_batch:
        raise TrainingError(f"{name} must take any batch size, but its forward holds for {model.split.batch} only")
    if {*model.split.batched.values(), *model.split.output_rows.values()} - {1, None}:
        raise TrainingError(
            f"{name} has values with several rows per sample, such as frames folded into the batch. Wrap the "
            "module that renders one frame, with frames as the batch."
        )


def _identity(model: EarlyExitGenerator, samples: Samples, batch: int) -> dict[str, Any]:
    taps = model.decomposition.taps
    return {
        "schema": _SCHEMA,
        "fingerprint": fingerprint(model.generator),
        "attach points": [[node.name for node in cut.crossing] for cut in model.split.cuts],
        "guidance key": None if taps is None else taps.key_tap,
        "guidance value": None if taps is None else taps.value_cut.feature.name,
        "inputs": samples.digest(),
        "count": len(samples),
        "seed": samples.seed,
        "batch": batch,
    }


def _store(
    folder: Path, name: str, arrays: dict[str, np.ndarray], indices: list[int], value: Tensor, count: int
) -> None:
    rows = _to_numpy(value)
    if name not in arrays:
        arrays[name] = new_array(folder / f"{name}.npy", rows.dtype, (count, *rows.shape[1:]))
    if arrays[name].shape[1:] != rows.shape[1:]:
        raise OptionError(
            f"inputs must be of one size, got shapes {arrays[name].shape[1:]} and {rows.shape[1:]} of {name}"
        )
    arrays[name][indices] = rows


def _to_numpy(value: Tensor) -> np.ndarray:
    """NumPy has no bfloat16: its bits are kept as uint16."""
    value = value.cpu()
    if value.dtype == torch.uint16:
        value = value.int()
    return value.view(torch.uint16).numpy() if value.dtype == torch.bfloat16 else value.numpy()


def _to_tensor(rows: np.ndarray) -> Tensor:
    """Undo `_to_numpy`."""
    value = torch.from_numpy(rows)
    return value.view(torch.bfloat16) if value.dtype == torch.uint16 else value


def _sum(rows: np.ndarray) -> int:
    begin = zlib.crc32(f"{rows.dtype}{rows.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(rows).tobytes(), begin)


def _check_sums(folder: Path, arrays: dict[str, np.ndarray], state: dict[str, Any], batch: int) -> dict[str, list[int]]:
    """Compare the stored batches with their checksums, and return these."""
    done = state["done"]
    for name, array in arrays.items():
        sums = [_sum(array[begin : min(begin + batch, done)]) for begin in range(0, done, batch)]
        if sums != state["sums"][name]:
            first = next(i for i, (a, b) in enumerate(zip(sums, state["sums"][name], strict=True)) if a != b)
            raise CheckpointError(f"{folder / name}.npy is damaged from sample {first * batch} on. Remove {folder}.")
    return dict(state["sums"])


def _check_shared(name: str, first: Tensor, now: Tensor) -> None:
    if first.shape != now.shape or not torch.allclose(first.double(), now.double(), rtol=1e-4, atol=1e-6):
        raise TrainingError(
            f"{name} has one value for all samples of a batch, and another one in the next batch. Draw noise "
            "per sample inside the generator, or attach the branch elsewhere."
        )


def _open(folder: Path, name: str, count: int, mode: Any) -> np.ndarray:
    path = folder / f"{name}.npy"
    array = read_npy(path, mode, f"Remove {folder}.")
    if array.shape[:1] != (count,):
        raise CheckpointError(f"{path} must have {count} rows, got {array.shape}. Remove {folder}.")
    return array


def _read_state(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    path = folder / _STATE
    if not path.exists():
        return {"identity": identity, "done": 0, "arrays": [], "sums": {}}
    with reading(path, f"Remove {folder}."):
        state = read_json(path, f"Remove {folder}.")
        other = [key for key in identity if state["identity"].get(key) != identity[key]]
        done, arrays, sums = int(state["done"]), list(map(str, state["arrays"])), dict(state["sums"])
        if not 0 <= done <= identity["count"] or {len(sums[n]) for n in arrays} - {-(-done // identity["batch"])}:
            raise ValueError(f"its checksums are not those of {done} samples")
    if other:
        raise CheckpointError(
            f"{folder} has features of another fit, with other {', '.join(other)}. Use another folder, or "
            "remove this one."
        )
    return {"identity": identity, "done": done, "arrays": arrays, "sums": sums}
