"""Backbone features and images, computed once and kept on disk.

A branch needs nothing but the values that cross its cut and the backbone's image. Training it from stored ones costs the
branch alone, which is what makes training on a CPU possible at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from retroexit.errors import CheckpointError, OptionError
from retroexit.fingerprint import fingerprint
from retroexit.model import EarlyExitGenerator
from retroexit.training.inputs import Samples

__all__ = ["FeatureCache"]

_SCHEMA = 1


class FeatureCache:
    """What every training step reads: crossing values of every cut, the guidance value map, the backbone's image.

    Use `FeatureCache.build`. Arrays are memory-mapped; a build that was interrupted goes on where it stopped.

    Attributes:
        folder: Where the arrays are.
        count: Number of samples.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], shared: dict[str, Tensor]) -> None:
        self.folder, self.count = folder, int(manifest["count"])
        self._shared = shared
        self._arrays = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in manifest["arrays"]
        }

    def __len__(self) -> int:
        return self.count

    def read(self, name: str, indices: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Read one kind of value for some samples, ``(len(indices), ...)``."""
        if name in self._shared:
            return self._shared[name].to(device)
        return torch.from_numpy(np.ascontiguousarray(self._arrays[name][np.asarray(indices)])).to(device)

    def is_per_sample(self, name: str) -> bool:
        """Tell whether a value has a row per sample, rather than being the same for all."""
        return name in self._arrays

    @classmethod
    def build(
        cls, model: EarlyExitGenerator, samples: Samples, folder: str | Path, *, batch: int = 8, progress: bool = True
    ) -> FeatureCache:
        """Run the backbone once over all samples and store what training needs.

        Args:
            model: The wrapped generator.
            samples: Its inputs.
            folder: Where to store; made if missing. A finished cache of the same backbone, cuts and inputs is reused.
            batch: Samples per pass.
            progress: Whether to show a bar on a terminal.

        Returns:
            The cache.

        Raises:
            CheckpointError: If the folder holds a cache of something else.
            OptionError: If samples differ in size.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not model.is_recorded:
            args, kwargs = samples.gather([0])
            model.record(*args, **kwargs)
        identity = {
            "schema": _SCHEMA,
            "fingerprint": fingerprint(model.generator),
            "cuts": [[node.name for node in cut.crossing] for cut in model.split.cuts],
            "value": None if model.anatomy.value_cut is None else model.anatomy.value_cut.feature.name,
            "inputs": samples.digest(),
            "seed": samples.seed,
            "batch": batch,
            "count": len(samples),
        }
        state = _read_state(folder)
        if state is not None and state["identity"] != identity:
            raise CheckpointError(
                f"asked to cache features in {folder}; found a cache of another backbone, other attach points or other inputs. "
                "Use another folder, or remove this one.",
                folder,
            )
        arrays: dict[str, np.ndarray] = {}
        done = 0 if state is None else int(state["done"])
        names = [] if state is None else list(state["arrays"])
        shared: dict[str, Tensor] = {}
        for name in names:
            arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r+", allow_pickle=False)
        bar = tqdm(total=len(samples), initial=done, desc="backbone features", disable=None if progress else True)
        first_pass = done >= len(samples)  # values that all samples share are recomputed from one batch
        start = 0 if first_pass else done
        for indices, args, kwargs in samples.batches(batch, start):
            values = _compute(model, args, kwargs, samples.seed + indices[0])
            for name, value in values.items():
                if name in model_shared(model):
                    shared[name] = value.cpu()
                    continue
                if name not in arrays:
                    arrays[name] = np.lib.format.open_memmap(
                        folder / f"{name}.npy", "w+", value.cpu().numpy().dtype, (len(samples), *value.shape[1:])
                    )
                if arrays[name].shape[1:] != tuple(value.shape[1:]):
                    raise OptionError(
                        f"asked to cache {name}; found shape {tuple(value.shape[1:])} after {arrays[name].shape[1:]}. Use "
                        "inputs of one size.",
                        value,
                    )
                if not first_pass:
                    arrays[name][indices] = value.cpu().numpy()
            if first_pass:
                break
            done = indices[-1] + 1
            for array in arrays.values():
                array.flush()  # type: ignore[attr-defined]
            _write_state(folder, {"identity": identity, "done": done, "arrays": sorted(arrays)})
            bar.update(len(indices))
        bar.close()
        return cls(folder, {"count": len(samples), "arrays": sorted(arrays)}, shared)


def model_shared(model: EarlyExitGenerator) -> set[str]:
    """Names of crossing values that do not depend on the sample."""
    split = model.split
    return {node.name for cut in split.cuts for node in cut.crossing if node not in split.batched}


@torch.no_grad()
def _compute(model: EarlyExitGenerator, args: Any, kwargs: Any, seed: int) -> dict[str, Tensor]:
    split, found = model.split, {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        values = split.start(args, kwargs)
        for index in range(len(split.cuts)):
            values = split.advance(values, index)
            found.update({node.name: values[node].clone() for node in split.cuts[index].crossing})
        found["image"] = split.place_of(split.finish(values))
        if model.anatomy.value_cut is not None:
            torch.manual_seed(seed)
            found["guidance_value"] = model.anatomy.guidance_values(args, kwargs)
    return found


def _read_state(folder: Path) -> dict[str, Any] | None:
    path = folder / "cache.json"
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = json.loads(path.read_text())
        state["identity"], state["done"], state["arrays"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"asked to go on with {path}; found it damaged ({error}). Remove {folder}.", path) from error
    return state


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    temporary = folder / "cache.json.part"
    temporary.write_text(json.dumps(state))
    os.replace(temporary, folder / "cache.json")
