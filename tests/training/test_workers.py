"""What Ray's workers compute equals what one process computes: bank, features, labels, calibration, evaluation."""

import copy
import logging
import os
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from decoders import Distance, Noisy, fit, latents, make, trained, wrap

import retroexit
from retroexit.core import workers
from retroexit.core.samples import Samples
from retroexit.core.workers import in_order, ray_workers
from retroexit.errors import BankError, MissingExtraError, OptionError, WorkerError
from retroexit.retrieval import ExactRetriever
from retroexit.training.stream_bank import stream_bank


def everything(folder, with_references=False):
    """Run whatever has samples to go through, and return the tensors that come out."""
    guidance = retroexit.Guidance(order=1, size=60)
    model = wrap(make(Noisy), guidance=guidance)
    bank = stream_bank(model, Samples(latents(14), 3), ExactRetriever(), progress=False)
    fit(model, folder, latents(40), calibrate=0.7, alpha=0.3, confidence=0.7, predict_from="features+distance")
    images = 1 - 2 * torch.rand(11, 3, 16, 16, generator=torch.Generator().manual_seed(0)) if with_references else None
    evaluation = retroexit.evaluate(
        model, latents(51)[40:], references=images, metric=Distance(), progress=False, repeats=0
    )
    arrays = {name: getattr(evaluation, name) for name in ("loss", "predicted", "distance", "ood")}
    if with_references:
        arrays["fidelity"] = evaluation.fidelity
    arrays |= {"keys": bank.retriever.keys, "values": bank.values, "source": bank.source}
    calibration = model.calibration
    arrays |= {"calibration": calibration.losses, "calibration.predicted": calibration.predicted}
    as_tensor = {name: x if isinstance(x, torch.Tensor) else torch.tensor(x) for name, x in arrays.items()}
    return trained(model) | as_tensor


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return everything(tmp_path_factory.mktemp("alone"))


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.allclose(one[name], other[name], rtol=0, atol=0, equal_nan=True)]


class Rows:
    """The part of Ray Data that is used, in one process; blocks are done from the last to the first."""

    def __init__(self, items):
        self.items = items
        self.context = SimpleNamespace(execution_options=SimpleNamespace(preserve_order=False))

    def map_batches(self, function, *, fn_args, **options):
        assert self.context.execution_options.preserve_order
        assert options == {"batch_size": 1, "compute": 2, "num_cpus": 1, "max_retries": 3}
        done = {item: function({"item": [item]}, *fn_args) for item in reversed(self.items)}
        self.rows = [{name: column[0] for name, column in done[item].items()} for item in self.items]
        return self

    def iter_rows(self):
        return iter(self.rows)


@pytest.fixture
def no_ray(monkeypatch):
    """A stand-in for Ray, whose objects are copies."""
    ray, data = ModuleType("ray"), ModuleType("ray.data")
    calls = []
    ray.data, ray.put, ray.get = data, copy.deepcopy, lambda reference: reference
    ray.is_initialized = lambda: False
    ray.init = lambda **options: calls.append(options)
    ray.shutdown = lambda: calls.append("shutdown")
    data.from_items = lambda items, override_num_blocks: calls.append(override_num_blocks) or Rows(items)
    data.TaskPoolStrategy = lambda size: size
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", data)
    monkeypatch.setattr(workers._Worker, "last", None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


def test_copies_of_the_work_compute_what_one_process_does(no_ray, alone, tmp_path):
    with ray_workers(2):
        assert differing(everything(tmp_path), alone) == []
    # Keys, values, slopes, features, labels, calibration, evaluation.
    assert [call for call in no_ray if isinstance(call, int)] == [4, 2, 4, 3, 2, 7, 2] and no_ray[-1] == "shutdown"
    assert no_ray[0] == {
        "num_cpus": 2,
        "include_dashboard": False,
        "logging_level": logging.WARNING,
        "log_to_driver": False,
    }


@pytest.mark.parametrize("most", [3, 1000])
def test_spans_are_put_together_in_order_and_errors_reach_the_caller(no_ray, most, monkeypatch):
    monkeypatch.setattr(workers, "_SPANS", most)

    def work(item):
        if item == 17:
            raise BankError(f"item {item} is wrong")
        return {"square": torch.tensor(item**2)}

    with ray_workers(2):
        assert [r["square"].item() for r in in_order(work, range(5, 16))] == [i**2 for i in range(5, 16)]
        with pytest.raises(BankError, match="item 17 is wrong"):
            list(in_order(work, range(10, 20)))
    assert no_ray[1:3] == [min(3, 11) if most == 3 else 11, min(3, 10) if most == 3 else 10]
    assert list(in_order(str, [1, 2])) == ["1", "2"]  # outside, without Ray


def test_a_worker_that_cannot_load_the_model_says_why(no_ray):
    def get(_reference):
        raise RuntimeError("System error:\nModuleNotFoundError: No module named 'mymodels'")

    sys.modules["ray"].get = get
    with ray_workers(2), pytest.raises(WorkerError, match=r"No module named 'mymodels'\. Install .* all machines see"):
        list(in_order(str, [1, 2]))


def test_a_cluster_is_used_as_it_is_and_a_missing_ray_is_named(no_ray, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with ray_workers(2):
        assert "num_cpus" not in no_ray[0]
    sys.modules["ray"].is_initialized = lambda: True
    with ray_workers(2):
        pass
    assert no_ray[1:] == ["shutdown"]  # of the first
    with pytest.raises(OptionError, match="ray workers must be >= 1, got 0. Leave it out"), ray_workers(0):
        pass
    monkeypatch.setitem(sys.modules, "ray.data", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'retroexit\[ray\]'"), ray_workers(2):
        pass


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")
def test_two_workers_of_ray_compute_what_one_process_does(tmp_path):
    pytest.importorskip("ray.data")
    alone = everything(tmp_path / "alone", with_references=True)
    with ray_workers(2):
        assert differing(everything(tmp_path / "both", with_references=True), alone) == []
        assert len(set(in_order(lambda _: time.sleep(0.05) or os.getpid(), range(40)))) == 2
