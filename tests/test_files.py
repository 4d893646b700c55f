"""Files of a fit: who may read them, one fit per folder, a full disk, weights that are not what was recorded."""

import errno
import os
import re
import shutil
import signal
import stat
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import Distance

import retroexit
from retroexit.core import files
from retroexit.errors import BankError, CheckpointError, RetroExitError, StorageError

INPUTS = torch.randn(10, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def _unwritten(error):
    """Name of the file that an error says could not be written."""
    return Path(re.search(r"cannot write (.*?): ", str(error))[1]).name


def generator(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) for _ in range(3)]
        return nn.Sequential(*stages, nn.Conv2d(4, 3, 1), nn.Tanh()).eval()


def wrapped(seed=0):
    guidance = retroexit.Guidance(value_after=2, size=20, retriever="hnswlib")
    stages = ["0", "1", "2"]
    options = {"image_range": (-1, 1), "min_channels": 2, "self_test": False, "guidance": guidance}
    options |= {"stages": stages, "adapter": False, "example_inputs": (INPUTS[:1],)}
    return retroexit.wrap(generator(seed), [1], 0.5, **options)


def fit(folder, model=None, **changes):
    settings = {"metric": Distance(), "steps": 2, "predictor_steps": 2, "progress": False}
    return retroexit.fit(model or wrapped(), INPUTS, folder, **settings | changes)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_modes_follow_the_umask(mask, tmp_path):
    before = os.umask(mask)
    try:
        model = fit(tmp_path / "fit")
        retroexit.evaluate(model, INPUTS, tmp_path / "fit/report", metric=Distance(), progress=False)
    finally:
        os.umask(before)
    for path in (tmp_path / "fit", *(tmp_path / "fit").rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) & 0o777 in (expected, expected & ~0o022), path


def test_a_second_fit_in_a_folder_is_refused_until_the_first_is_killed(tmp_path):
    pid = os.fork() if sys.version_info < (3, 12) else pytest.skip("forks beside threads")
    if not pid:
        try:
            with files.locked(tmp_path):
                (tmp_path / "held").touch()
                time.sleep(60)
        finally:
            os._exit(0)
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        with pytest.raises(CheckpointError, match="one fit or save at a time, got a second one. Wait until"):
            fit(tmp_path, steps=3)
        assert {path.name for path in tmp_path.iterdir()} == {"held", "write.lock"}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    fit(tmp_path)
    model = wrapped()
    with files.locked(tmp_path):
        model.save(tmp_path)  # as a fit does
        with ThreadPoolExecutor(1) as pool, pytest.raises(CheckpointError, match="one fit or save at a time"):
            pool.submit(model.save, tmp_path).result()


@pytest.mark.long
def test_a_full_disk_is_an_error_at_every_phase(monkeypatch, tmp_path):
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("no posix_fallocate")
    reserve, calls = os.posix_fallocate, [0]
    limit = 10**9

    def full(file, offset, size):
        calls[0] += 1
        if calls[0] > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(file, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    fit(tmp_path / "whole")
    phases, written = set(), calls[0]
    for limit in range(written):
        calls[0] = 0
        message = r"No space left on device; /.* has [\d,.]+ MB free. Make room"
        with pytest.raises(StorageError, match=message) as caught:
            fit(tmp_path / f"{limit}")
        phases.add(_unwritten(caught.value))
        assert not list((tmp_path / f"{limit}").rglob("*.part"))
        shutil.rmtree(tmp_path / f"{limit}")
    assert phases >= {"cache.json", "backbone-image.npy", "fit.json", "values.npy", "exit1.safetensors"}
    assert phases >= {"losses.safetensors", "model.json"} and any(name.startswith("weights-") for name in phases)


@pytest.mark.parametrize("verb", ["evaluate", "save"])
def test_a_disk_that_refuses_to_write_is_an_error_at_every_file(verb, monkeypatch, tmp_path):
    resource = pytest.importorskip("resource")
    model = fit(tmp_path / "fit")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    plain_open, left = open, 0

    def open_until_full(path, mode="r", **options):
        nonlocal left
        left -= mode == "wb"
        if left < 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        return plain_open(path, mode, **options)

    monkeypatch.setattr(files, "open", open_until_full, raising=False)
    pick_strips, draw = retroexit.report.strips.pick_strips, retroexit.report.report._drawings
    drawings = []

    def draw_once(*args):
        drawings[:] = drawings or [draw(*args)]
        return drawings[0]

    monkeypatch.setattr(retroexit.report.report, "_drawings", draw_once)
    monkeypatch.setattr(sys.modules["retroexit.evaluate"], "pick_strips", lambda *args: pick_strips(*args)[:1])
    names = []
    while True:
        left, folder = len(names), tmp_path / "full"
        try:
            if verb == "save":
                model.save(folder)
            else:
                retroexit.evaluate(model, INPUTS, folder, metric=Distance(), progress=False, repeats=0)
            break
        except StorageError as error:
            assert re.search(r"cannot write /.*: File too large; /.* has [\d,.]+ MB free. Make room there", str(error))
            names.append(_unwritten(error))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list(folder.rglob("*.part"))
    expected = {"evaluate": {"evaluation.json", "report.json", "report.html"}, "save": {"values.npy", "model.json"}}
    assert expected[verb] <= set(names)


def test_a_folder_that_cannot_be_made_is_an_error_before_measuring(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write .*file/report: Not a directory; .*use another folder"):
        retroexit.evaluate(wrapped(), INPUTS, tmp_path / "file/report", metric="no such metric")


@pytest.mark.parametrize("write", [files.write_array, files.write_tensors, files.write_json])
def test_a_write_that_fails_leaves_the_old_file(write, monkeypatch, tmp_path):
    values = {files.write_array: torch.rand(9).numpy(), files.write_tensors: {"a": torch.rand(9)}}
    path, value = tmp_path / "file", values.get(write, {"a": 1})
    write(path, value)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="cannot write .*file: No space left on device"):
        write(path, value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_bank_of_other_weights_is_refused_before_anything_is_written(tmp_path):
    model = fit(tmp_path / "fit")
    model.bank.meta["fingerprint"] = "of another network"
    with pytest.raises(BankError, match="the backbone of the bank must be .*, got 'of another network'. Build"):
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    del model.bank.meta["fingerprint"]  # a bank made by hand fits by its shapes, and the folder can be read
    model.save(tmp_path / "saved")
    assert retroexit.load(tmp_path / "saved", generator()).bank is not None


def test_a_guided_model_in_another_precision_is_saved_with_a_bank_that_fits_it(tmp_path):
    fit(tmp_path / "fit")
    half = generator().to(torch.bfloat16)
    retroexit.load(tmp_path / "fit", half, (INPUTS[:1].bfloat16(),)).save(tmp_path / "half")
    assert retroexit.load(tmp_path / "half", half, (INPUTS[:1].bfloat16(),)).bank is not None


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(is_zip, value, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.tensor([1.0, value])}, path, _use_new_zipfile_serialization=is_zip)
    state = files.read_torch(path, "Copy it again.", CheckpointError)
    with pytest.raises(CheckpointError, match=r"must be finite, got NaN or infinity in a. Restore"):
        files.check_finite(state, path, CheckpointError)


def test_a_flipped_bit_in_weights_of_torch_is_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.arange(1000.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(1000.0).numpy().tobytes()) + 402] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"cannot read .*: ValueError: its part .* its checksum. Copy it again"):
        files.read_torch(path, "Copy it again.", CheckpointError)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_in_place_of_a_file_is_refused(make, tmp_path):
    path = tmp_path / "file"
    make(path)
    readers = [files.read_json, files.read_npy, files.read_tensors, files.sha256_of]
    for read in [*readers, lambda path: files.read_torch(path, "Copy it.", CheckpointError)]:
        with pytest.raises(RetroExitError, match="cannot read .*file: OSError: it is no regular file"):
            read(path)


def test_mutations_of_the_files_of_a_model_are_refused_or_repaired(damage, tmp_path):
    model, network = fit(tmp_path / "fit"), generator()
    model.save(tmp_path / "model")
    paths = sorted(path for path in (tmp_path / "model").rglob("*") if path.is_file() and path.stat().st_size)
    index = next(path for path in paths if path.name == "index.bin")

    def work(report):
        torch.set_num_threads(1)
        for done in damage.mutations(paths, 200):
            report([done, "began"])
            with damage.time_limit(10):
                try:
                    retroexit.load(tmp_path / "model", network, adapter=False)
                    report([done, "read"])
                except RetroExitError:
                    report([done, "refused"])

    reports, end = damage.in_child(work)
    assert end == "", f"{end} at {reports[-1]}"
    read = [done for done, outcome in reports if outcome == "read"]
    assert len(reports) == 400
    assert all(done.startswith(f"{index.name}:") or damage.RESEALED in done for done in read), read
