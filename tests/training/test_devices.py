"""Several processes train as one does."""

import re
import sys

import pytest
import torch
from decoders import Plain, fit, make, start_script, wrap

from retroexit.core.files import read_tensors
from retroexit.errors import DeviceError, MissingExtraError, OptionError
from retroexit.training.distributed import Team, join

SETTINGS = {"steps": 8, "batch": 4, "checkpoint_every": 5, "crop": 8, "equalise": 3}

SCRIPT = """
model = decoders.wrap(decoders.make(decoders.Plain), guidance=True)
decoders.fit(model, Path(args[0]), **args[1])
size = torch.distributed.get_world_size()
print(f"process {torch.distributed.get_rank()} of {size}", flush=True)
"""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    fit(wrap(make(Plain), guidance=True), folder, **SETTINGS)
    return read_tensors(next(folder.glob("weights-*.safetensors")))[0]


@pytest.mark.parametrize("starter", ["torchrun", pytest.param("fabric", marks=pytest.mark.long)])
def test_two_processes_give_the_weights_of_one(tmp_path, alone, starter):
    pytest.importorskip("lightning_fabric")
    settings, launcher = dict(SETTINGS), []
    if starter == "torchrun":
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    else:
        settings["devices"] = 2
    done = start_script(SCRIPT, tmp_path / "run", settings, launcher=launcher)
    assert done.returncode == 0, done.stderr
    # Both write to one pipe, and a line may get into another.
    assert sorted(re.findall(r"process \d of \d", done.stdout)) == ["process 0 of 2", "process 1 of 2"]
    weights = read_tensors(next((tmp_path / "run").glob("weights-*.safetensors")))[0]
    assert weights.keys() == alone.keys()
    start = wrap(make(Plain), guidance=True).branches.state_dict()
    for name, value in weights.items():
        assert torch.allclose(value, alone[name], rtol=1e-3, atol=1e-4), name
    moved = [k for k, v in start.items() if not torch.allclose(v, weights[f"branches.{k}"], rtol=1e-2, atol=1e-3)]
    assert len(moved) > 4  # the tolerance is small beside what was learnt


def test_one_device_needs_no_fabric_and_more_are_refused_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    assert join() == join(1, 1) == Team(0, 1, None)
    with pytest.raises(MissingExtraError, match=r"devices need lightning-fabric: pip install 'retroexit\[train\]'"):
        join(2)
    monkeypatch.setenv("WORLD_SIZE", "4")  # of torchrun; the processes must not train apart
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(MissingExtraError, match="several devices need lightning-fabric"):
        join()


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (-2, None)])
def test_numbers_below_one_are_refused(numbers):
    with pytest.raises(OptionError, match="devices and nodes must be >= 1, got"):
        join(*numbers)


def test_processes_divide_a_batch_between_them():
    parts = [list(range(12))[Team(rank, 3).part(12)] for rank in range(3)]
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.raises(OptionError, match="batch must be a multiple of 3 processes, got 8"):
        Team(0, 3).part(8)


def test_a_generator_on_another_device_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["retroexit.fit"], "join", lambda *_: Team(1, 2, torch.device("meta")))
    with pytest.raises(DeviceError, match="the generator must be on meta in this process of 2, got cpu"):
        fit(wrap(), tmp_path)
