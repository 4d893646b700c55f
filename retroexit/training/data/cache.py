"""Backbone features and images, computed once and kept on disk.

A branch needs nothing but the values that cross its cut and the backbone's image. Training it from stored
ones costs the branch alone, which is what makes training on a CPU possible at all.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.core.files import is_intact, read_npy, self_digest
from retroexit.core.modules import device_of, fingerprint
from retroexit.core.samples import Samples, drawing_from, moved
from retroexit.errors import CheckpointError, OptionError, TrainingError
from retroexit.guidance.taps import Taps
from retroexit.model import EarlyExitGenerator
from retroexit.training.data.crops import Window, cut_out

__all__ = [
    "GUIDANCE_KEY",
    "GUIDANCE_VALUE",
    "IMAGE",
    "FeatureCache",
    "check_rows",
    "compute_features",
    "guidance_names",
    "shared_by_all",
]

# Crossing values go by the names of their nodes, which are identifiers; these are none, so that they cannot
# be taken.
IMAGE, GUIDANCE_KEY, GUIDANCE_VALUE = "backbone-image", "guidance-key", "guidance-value"

_SCHEMA = 2
_PARTS = {
    "schema": "the format",
    "fingerprint": "the backbone",
    "cuts": "the attach points",
    "key": "what guidance keys come from",
    "value": "the stage that guidance values come from",
    "inputs": "the inputs",
    "count": "the number of inputs",
    "seed": "the seed",
    "batch": "the batch size",
}


def guidance_names(taps: Taps, first: str) -> tuple[str, str]:
    """Name the cached maps that guidance keys and values are cut from.

    What is in the cache anyway is not stored twice.

    Args:
        taps: Where they come from.
        first: Name of the feature at the first attach point.
    """
    return first if taps.key_tap == first else GUIDANCE_KEY, IMAGE if taps.gives_image else GUIDANCE_VALUE


class FeatureCache:
    """What every training step reads: values crossing the cuts, guidance value maps, the backbone's images.

    Use `FeatureCache.build`. Arrays are memory-mapped; a build that was interrupted goes on where it stopped.

    Attributes:
        folder: Where the arrays are.
        count: Number of samples.
    """

    def __init__(self, folder: Path, arrays: Iterable[str], count: int, shared: dict[str, Tensor]) -> None:
        self.folder, self.count = folder, count
        self._shared = shared
        self._arrays = {name: _open(folder, name, count, "r") for name in arrays}

    def __len__(self) -> int:
        return self.count

    def read(
        self,
        name: str,
        indices: Sequence[int],
        device: torch.device | str = "cpu",
        crop: Callable[[tuple[int, ...]], list[Window] | None] | None = None,
    ) -> Tensor:
        """Read one kind of value for some samples, ``(len(indices), ...)``.

        Args:
            name: A crossing value, or one of the names of this module.
            indices: Samples, in the order wanted.
            device: Where to put it.
            crop: Given a map's size, says which window of it each sample needs, or ``None`` for all of it;
                nothing else is read from disk.
        """
        if name in self._shared:
            value = self._shared[name].to(device, copy=True)  # branches may write into what they are handed
            return value if crop is None else cut_out(value, crop(tuple(value.shape[2:])), len(indices))
        array = self._arrays[name]
        windows = None if crop is None else crop(array.shape[2:])
        if windows is None:
            return torch.from_numpy(array[np.asarray(indices)]).to(device)
        places: list[Any] = [(row, slice(None), *part) for row, part in zip(indices, windows, strict=True)]
        return torch.from_numpy(np.stack([array[place] for place in places])).to(device)

    def is_per_sample(self, name: str) -> bool:
        """Tell whether a value has a row per sample, rather than being the same for all."""
        return name in self._arrays

    @staticmethod
    def bytes_per_sample(model: EarlyExitGenerator, samples: Samples) -> int:
        """Say how much one sample takes on disk; the model is recorded, and the backbone run once."""
        args, kwargs = samples.gather([0])
        found, shared = compute_features(model, args, kwargs, samples.seed), shared_by_all(model)
        return sum(
            value[0].numel() * value.element_size() for name, value in found.items() if name not in shared
        )

    @classmethod
    def build(
        cls,
        model: EarlyExitGenerator,
        samples: Samples,
        folder: str | Path,
        *,
        batch: int = 8,
        progress: bool = True,
    ) -> FeatureCache:
        """Run the backbone once over all samples and store what training needs.

        Args:
            model: The wrapped generator.
            samples: Its inputs.
            folder: Where to store; made if missing. A finished cache of the same backbone, cuts and inputs is
                reused.
            batch: Samples per pass.
            progress: Whether to show a bar on a terminal.

        Returns:
            The cache.

        Raises:
            CheckpointError: If the folder holds a cache of something else, or a damaged one.
            OptionError: If samples differ in size.
            TrainingError: If the generator's forward fixes the batch size.
        """
        folder = Path(folder)
        if not model.is_recorded:
            args, kwargs = samples.gather([0])
            model.record(*args, **kwargs)
        check_rows(model)
        identity = _identity(model, samples, batch)
        state = _read_state(folder)
        done, names = _go_on(folder, state, identity) if state is not None else (0, [])
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: _open(folder, name, len(samples), "r+") for name in names}
        sums = _check_sums(folder, arrays, state, batch, done)
        shared_names, shared = shared_by_all(model), dict[str, Tensor]()
        if done and shared_names:  # they are not stored; the first batch gives them
            args, kwargs = samples.gather(range(min(batch, len(samples))))
            found = compute_features(model, args, kwargs, samples.seed)
            shared = {name: found[name].cpu() for name in shared_names}
        bar = tqdm(
            total=len(samples), initial=done, desc="backbone features", disable=None if progress else True
        )
        for indices, args, kwargs in samples.batches(batch, done):
            for name, value in compute_features(model, args, kwargs, samples.seed + indices[0]).items():
                if name in shared_names:
                    _check_shared(name, shared.setdefault(name, value.cpu()), value.cpu())
                else:
                    _store(folder, name, arrays, indices, value, len(samples))
            for name, array in arrays.items():
                array.flush()  # type: ignore[attr-defined]
                sums.setdefault(name, []).append(_sum(array[indices[0] : indices[-1] + 1]))
            state = {"identity": identity, "done": indices[-1] + 1, "arrays": sorted(arrays), "sums": sums}
            _write_state(folder, state)
            bar.update(len(indices))
        bar.close()
        return cls(folder, sorted(arrays), len(samples), shared)


def check_rows(model: EarlyExitGenerator) -> None:
    """Refuse a generator whose values cannot be told apart by samples.

    Raises:
        TrainingError: If its forward fixes the batch size, or folds several rows per sample into the batch.
    """
    asked = f"asked for features of {type(model.generator).__name__} by sample; found"
    if not model.split.any_batch:
        raise TrainingError(
            f"{asked} that its forward holds for batches of {model.split.batch} only, so that samples cannot "
            "be told apart. Let its forward take any batch size.",
            model.generator,
        )
    if {*model.split.batched.values(), *model.split.output_rows} - {1, None}:
        raise TrainingError(
            f"{asked} values with several rows per sample, such as frames folded into the batch, so that "
            "samples cannot be told apart. Wrap the module that renders one frame, and let its batch be the "
            "frames.",
            model.generator,
        )


def _identity(model: EarlyExitGenerator, samples: Samples, batch: int) -> dict[str, Any]:
    """What a cache belongs to."""
    taps, first = model.decomposition.taps, model.split.cuts[0].feature.name
    return {
        "schema": _SCHEMA,
        "fingerprint": fingerprint(model.generator),
        "cuts": [[node.name for node in cut.crossing] for cut in model.split.cuts],
        # Where keys come from the first attach point, no name is noted: older caches have none.
        "key": None if taps is None or taps.key_tap == first else taps.key_tap,
        "value": None if taps is None else taps.value_cut.feature.name,
        "inputs": samples.digest(),
        "count": len(samples),
        "seed": samples.seed,
        "batch": batch,
    }


def _go_on(folder: Path, state: dict[str, Any], identity: dict[str, Any]) -> tuple[int, list[str]]:
    """Number of samples already stored, and the arrays they are in, if the cache is the wanted one."""
    other = [what for key, what in _PARTS.items() if state["identity"].get(key) != identity[key]]
    if other:
        raise CheckpointError(
            f"asked to cache features in {folder}; found a cache of something else: {', '.join(other)} differ"
            f"{'s' if len(other) == 1 else ''}. Use another folder, or remove this one.",
            folder,
        )
    return state["done"], state["arrays"]


def _store(
    folder: Path, name: str, arrays: dict[str, np.ndarray], indices: list[int], value: Tensor, count: int
) -> None:
    rows = value.cpu().numpy()
    if name not in arrays:
        arrays[name] = np.lib.format.open_memmap(
            folder / f"{name}.npy", "w+", rows.dtype, (count, *rows.shape[1:])
        )
    if arrays[name].shape[1:] != rows.shape[1:]:
        raise OptionError(
            f"asked to cache {name}; found shape {rows.shape[1:]} after {arrays[name].shape[1:]}. Use inputs "
            "of one size.",
            value,
        )
    arrays[name][indices] = rows


def _sum(rows: np.ndarray) -> int:
    begin = zlib.crc32(f"{rows.dtype}{rows.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(rows).tobytes(), begin)


def _check_sums(
    folder: Path, arrays: dict[str, np.ndarray], state: dict[str, Any] | None, batch: int, done: int
) -> dict[str, list[int]]:
    """Compare what is stored, batch by batch, with the sums noted then; gives those to go on with."""
    begins = range(0, done, batch)
    found = {n: [_sum(a[begin : min(begin + batch, done)]) for begin in begins] for n, a in arrays.items()}
    noted = found if state is None else state.get("sums", found)  # caches of an earlier version note none
    for name, sums in found.items():
        if noted[name] != sums:
            begin = next(b for b, was, now in zip(begins, noted[name], sums, strict=True) if was != now)
            raise CheckpointError(
                f"asked to go on with cached features; found {folder / name}.npy damaged: samples from "
                f"{begin} on are not what was stored. Remove {folder}.",
                folder,
            )
    return found


def _check_shared(name: str, first: Tensor, now: Tensor) -> None:
    if first.shape != now.shape or not torch.allclose(first.double(), now.double(), rtol=1e-4, atol=1e-6):
        raise TrainingError(
            f"asked to cache {name}; found one value for all samples of a batch, and another one in the next "
            "batch, so that it belongs to no sample. Draw noise per sample inside the generator, or attach "
            "the branch elsewhere.",
            now,
        )


def _open(folder: Path, name: str, count: int, mode: Any) -> np.ndarray:
    path = folder / f"{name}.npy"
    try:
        array = read_npy(path, mode)
    except ValueError as error:
        raise CheckpointError(
            f"asked to read cached features; found {path} damaged ({error}). Remove {folder}.", path
        ) from error
    if array.shape[:1] != (count,):
        raise CheckpointError(
            f"asked to read cached features; found {path} with shape {array.shape}, not {count} samples. "
            f"Remove {folder}.",
            path,
        )
    return array


def shared_by_all(model: EarlyExitGenerator) -> set[str]:
    """Names of crossing values that do not depend on the sample."""
    split = model.split
    return {node.name for cut in split.cuts for node in cut.crossing if node not in split.batched}


@torch.no_grad()
def compute_features(
    model: EarlyExitGenerator, args: Any, kwargs: Any, seed: int, with_guidance: bool = True
) -> dict[str, Tensor]:
    """Run the backbone once over a batch.

    Args:
        model: The wrapped generator, recorded.
        args: Positional inputs.
        kwargs: Keyword inputs.
        seed: What it draws random numbers from.
        with_guidance: Whether keys and values of the guidance are wanted too.

    Returns:
        Values by the name of their node or of this module: those that cross the cuts, and the image.
    """
    split, found = model.split, dict[str, Tensor]()
    device = device_of(model.generator)
    args, kwargs = moved((args, kwargs), device)
    with drawing_from(seed, device):
        begun = split.begin(args, kwargs)
        values, key_feature = begun.values, begun.key_feature
        for index in range(len(split.cuts)):
            values = split.advance(values, index) if index else values
            found.update({node.name: values[node].clone() for node in split.cuts[index].crossing})
        found[IMAGE] = split.place_of(split.finish(values))
    taps = model.decomposition.taps
    if taps is None or not with_guidance:
        return found
    key, value = guidance_names(taps, split.cuts[0].feature.name)
    if key == GUIDANCE_KEY:
        found[GUIDANCE_KEY] = taps.query(key_feature, args, kwargs)
    if value == GUIDANCE_VALUE:
        # The same draw again, so that keys, values and image belong together.
        with drawing_from(seed, device):
            found[GUIDANCE_VALUE] = model.decomposition.guidance_values(args, kwargs)
    return found


def _read_state(folder: Path) -> dict[str, Any] | None:
    path = folder / "cache.json"
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        identity, done, arrays = state["identity"], state["done"], state["arrays"]
        if not (isinstance(identity, dict) and isinstance(done, int) and isinstance(arrays, list)):
            raise ValueError("its parts are not what they should be")
        if not is_intact(state):
            raise ValueError("it does not match its own digest")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"asked to go on with {path}; found it damaged ({error}). Remove {folder}.", path
        ) from error
    return state


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    temporary = folder / "cache.json.part"
    temporary.write_text(json.dumps({**state, "digest": self_digest(json.loads(json.dumps(state)))}))
    os.replace(temporary, folder / "cache.json")
