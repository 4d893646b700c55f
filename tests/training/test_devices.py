"""Several processes train as one does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from retroexit.core.files import read_tensors
from retroexit.errors import DeviceError, MissingExtraError, OptionError
from retroexit.training.distributed import Team, join

SETTINGS = {"steps": 12, "batch": 4, "checkpoint_every": 5, "crop": 8, "equalise": 3}

SCRIPT = """
import importlib.util, json, sys, torch
from pathlib import Path
spec = importlib.util.spec_from_file_location("training_decoders", sys.argv[1])
decoders = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(decoders)
torch.set_num_threads(1)
model = decoders.wrap(decoders.make(decoders.Plain), guidance=True)
settings = json.loads(sys.argv[3])
decoders.fit(model, Path(sys.argv[2]), **settings)
size = torch.distributed.get_world_size()
print(f"process {torch.distributed.get_rank()} of {size}", flush=True)
"""


@pytest.fixture(scope="module")
def alone(decoders: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What one process gives."""
    folder = tmp_path_factory.mktemp("alone")
    decoders.fit(decoders.wrap(decoders.make(decoders.Plain), guidance=True), folder, **SETTINGS)
    return read_tensors(folder / "weights.safetensors")[0]


@pytest.mark.parametrize("starter", ["torchrun", "fabric"])
def test_two_processes_give_the_weights_of_one(
    decoders: ModuleType, tmp_path: Path, alone: dict[str, Tensor], starter: str
) -> None:
    pytest.importorskip("lightning_fabric")
    script, settings = tmp_path / "script.py", dict(SETTINGS)
    script.write_text(SCRIPT)
    words = [sys.executable]
    if starter == "torchrun":
        words += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    else:
        settings["devices"] = 2
    words += [str(script), str(decoders.__file__), str(tmp_path / "run"), json.dumps(settings)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    # Both write to one pipe, and a line may get into another.
    assert sorted(re.findall(r"process \d of \d", done.stdout)) == ["process 0 of 2", "process 1 of 2"]
    found = read_tensors(tmp_path / "run" / "weights.safetensors")[0]
    assert found.keys() == alone.keys()
    start = decoders.wrap(decoders.make(decoders.Plain), guidance=True).branches.state_dict()
    for name, value in found.items():
        assert torch.allclose(value, alone[name], rtol=1e-3, atol=1e-4), name
    moved = [
        k for k, v in start.items() if not torch.allclose(v, found[f"branches.{k}"], rtol=1e-2, atol=1e-3)
    ]
    assert len(moved) > 4  # the tolerance is small beside what was learnt


def test_one_device_needs_no_fabric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    assert join() == join(1, 1) == Team(0, 1, None)
    with pytest.raises(
        MissingExtraError, match=r"devices need lightning-fabric: pip install 'retroexit\[train\]'"
    ):
        join(2)


def test_torchrun_without_fabric_is_refused_rather_than_trained_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(MissingExtraError, match="several devices need lightning-fabric"):
        join()


@pytest.mark.parametrize("given", [(0, 1), (1, 0), (-2, None)])
def test_numbers_below_one_are_refused(given: tuple[int, int | None]) -> None:
    with pytest.raises(OptionError, match="devices and nodes must be >= 1, got"):
        join(*given)


def test_processes_divide_a_batch_between_them() -> None:
    parts = [list(range(12))[Team(rank, 3).part(12)] for rank in range(3)]
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(OptionError, match="batch must be a multiple of 3 processes, got 8"):
        Team(0, 3).part(8)


def test_a_generator_on_another_device_is_refused(
    decoders: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["retroexit.fit"], "join", lambda *_: Team(1, 2, torch.device("meta")))
    with pytest.raises(DeviceError, match="the generator must be on meta in this process of 2, got cpu"):
        decoders.fit(decoders.wrap(), tmp_path)
