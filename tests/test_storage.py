"""Saving and loading models; damaged or foreign files are refused."""

import copy
import json
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import Distance, decoder_12

import retroexit
from retroexit.core.files import read_tensors, self_digest, write_tensors
from retroexit.core.identity import fingerprint
from retroexit.errors import CheckpointError, NotRecordedError, OptionError


@pytest.fixture(scope="module")
def generator():
    return decoder_12()


INPUTS = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def fitted(generator, tmp_path_factory):
    """A narrow model with a bank and a predictor, and its folder."""
    folder = tmp_path_factory.mktemp("fitted")
    options = {"min_channels": 4, "guidance": True, "image_range": (-1, 1), "example_inputs": (INPUTS[:1],)}
    model = retroexit.wrap(generator, [1, 2], [0.5, 0.75], **options)
    settings = {"steps": 3, "batch": 2, "predictor_steps": 5, "progress": False}
    return retroexit.fit(model, INPUTS, folder, metric=Distance(), **settings), folder


@pytest.fixture
def folder(fitted, tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copytree(fitted[1], tmp_path / "copy"))


def _same(one, other):
    with torch.no_grad():
        predicted = one.predict(INPUTS)
        assert torch.equal(predicted, other.predict(INPUTS))
        for k in range(1, 4):
            assert torch.equal(one(INPUTS, exit=k), other(INPUTS, exit=k))
        for threshold in (0.0, float(predicted.median()), float(predicted.max())):
            assert torch.equal(one(INPUTS, threshold=threshold), other(INPUTS, threshold=threshold))
    assert one.exits == other.exits
    assert one.router.overhead() == other.router.overhead()


def test_a_loaded_model_gives_the_same_images_at_every_exit(fitted, generator, tmp_path):
    model, folder = fitted
    loaded = retroexit.load(folder, generator, (INPUTS[:2],))
    _same(model, loaded)
    assert loaded.about == json.loads(json.dumps(model.about))
    assert not loaded.predictor.training
    loaded.save(tmp_path / "again")
    _same(model, retroexit.load(tmp_path / "again", generator, (INPUTS[:1],)))


def test_without_example_inputs_the_first_call_records(fitted, generator):
    model, folder = fitted
    loaded = retroexit.load(folder, generator)
    assert not loaded.is_recorded
    assert len(loaded.branches) == 0
    with pytest.raises(NotRecordedError, match="Call the model once"):
        loaded.save(folder)
    with torch.no_grad():
        assert torch.equal(loaded(INPUTS, exit=1), model(INPUTS, exit=1))
    _same(model, loaded)


def test_settings_of_the_wrap_come_back(generator, tmp_path):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = generator

        def forward(self, z):
            return {"maps": (z, self.inner(z))}

    guidance = retroexit.Guidance(value_after=2, patch=(2, 2), size=9, thin="random", inject="every_stage")
    options = {"stages": ("inner.1", "inner.2", "inner.3"), "min_channels": 3, "image": ("maps", 1), "seed": 11}
    options |= {"image_range": (-1, 1), "guidance": guidance, "self_test": False, "example_inputs": (INPUTS[:1],)}
    model = retroexit.wrap(Pair().eval(), ["inner.2", "inner.1"], [0.75, 0.5], **options)
    model.save(tmp_path)
    loaded = retroexit.load(tmp_path, Pair().eval(), (INPUTS[:1],))
    for name in ("tap", "guidance", "init", "image", "image_range", "self_test", "seed"):
        assert getattr(loaded.options, name) == getattr(model.options, name), name
    assert loaded.exits == model.exits
    assert [exit.attach_at for exit in loaded.exits] == ["inner.1", "inner.2", ""]
    assert [rule.scale for rule in loaded.options.rules] == [0.5, 0.75]
    assert loaded.bank is None and loaded.predictor is None


def test_nothing_is_pickled_and_the_generator_is_not_saved(fitted):
    model, folder = fitted
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".npy", ".lock"}
    for path in files:
        head = path.read_bytes()[:8]
        assert not head.startswith((b"PK", *(bytes([0x80, protocol]) for protocol in range(2, 6)))), path
        if path.suffix == ".npy":
            assert head.startswith(b"\x93NUMPY") and b"'|O'" not in path.read_bytes()[:128]
    tensors, _ = read_tensors(next(folder.glob("weights-*.safetensors")))
    assert len(tensors) == len(model.branches.state_dict()) + len(model.predictor.state_dict())
    manifest = json.loads((folder / "model.json").read_text())
    assert manifest["fingerprint"] == fingerprint(model.generator)
    assert manifest["versions"]["torch"] == metadata.version("torch")
    assert manifest["versions"]["retroexit"] == retroexit.__version__
    assert manifest["about"]["metric"]["name"] == "distance"


def test_another_generator_is_refused(folder, generator):
    other = copy.deepcopy(generator)
    with torch.no_grad():
        other[0].bias[0] += 1e-6
    with pytest.raises(CheckpointError, match=r"weights differ in 1 of \d+ tensors: 0\.bias\. Load the weights"):
        retroexit.load(folder, other, (INPUTS[:1],))
    with pytest.raises(CheckpointError, match="this Linear: its class is Linear instead of Sequential"):
        retroexit.load(folder, nn.Linear(2, 2).eval())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weights-*", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "weights-.*has changed since it was written"),
        ("weights-*", None, "cannot read .*weights-.*safetensors: .*No such file"),
        ("bank-*/meta.json", lambda data: data.replace(b'"seed": 0', b'"seed": 1'), "bank-.*meta.json has changed"),
        ("bank-*/meta.json", None, "meta.json: .*No such file"),
    ],
)
def test_changed_or_missing_files_are_refused(folder, generator, name, change, message):
    (path,) = folder.glob(name)
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        retroexit.load(folder, generator)


def _without(key):
    return lambda manifest: manifest.pop(key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=99), "must be 4, got 99. Use the version that wrote it: 0."),
        (_without("schema"), "must be 4, got None. Use the version"),
        (_without("fingerprint"), "model.json: KeyError: 'fingerprint'"),
        (_without("about"), "model.json: KeyError: 'about'"),
        (_without("bank_sha256"), "model.json: KeyError: 'bank_sha256'"),
        (lambda m: m.update(weights_sha256=None), "cannot read .*weights-None.safetensors: .*No such file"),
        (lambda m: m.update(calibration_sha256=3), "model.json: TypeError"),
        (lambda m: m.update(options=None), "model.json: TypeError"),
        (lambda m: m["options"].update(tap="beside"), "model.json: tap must be 'after' or 'before', got 'beside'"),
        (lambda m: m["options"].update(colour="red"), "model.json: TypeError.*colour"),
        (lambda m: m["plans"][0]["sizes"].update(shapes=[]), "model.json: AttributeError"),
        (lambda m: m["predictor"].update(exits="two"), "model.json: TypeError"),
        (lambda m: m["predictor"].update(exits=3), "the predictor saved in .* does not fit: .*size mismatch"),
    ],
)
def test_a_changed_manifest_is_refused(folder, generator, change, message):
    manifest = json.loads((folder / "model.json").read_text())
    change(manifest)
    manifest["digest"] = self_digest(manifest)  # as if it had been written so
    (folder / "model.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=message):
        retroexit.load(folder, generator, (INPUTS[:1],))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", None])
def test_a_folder_without_a_readable_manifest_is_refused(folder, generator, text):
    if text is None:
        (folder / "model.json").unlink()
    else:
        (folder / "model.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot read .*model.json: .*Pass a folder that model.save wrote"):
        retroexit.load(folder, generator)


def test_a_predictor_that_reads_inputs_needs_its_adapter(generator, tmp_path):
    adapter = retroexit.Description(name="toy", predictor_inputs=lambda z: z[:, :2])
    options = {"init": "scratch", "adapter": adapter, "image_range": (-1, 1), "example_inputs": (INPUTS[:1],)}
    settings = {"steps": 1, "batch": 1, "predictor_steps": 1, "progress": False}
    retroexit.fit(retroexit.wrap(generator, [2], 1.0, **options), INPUTS, tmp_path, metric=Distance(), **settings)
    with pytest.raises(CheckpointError, match="no adapter recognises a Sequential. Install the plug-in"):
        retroexit.load(tmp_path, generator, (INPUTS[:1],))


def test_what_cannot_be_saved_is_refused_with_advice(generator, tmp_path):
    options = {"min_channels": 4, "example_inputs": (INPUTS[:1],)}
    model = retroexit.wrap(generator, [1, 2], [0.5, 0.75], **options)
    model.predictor = nn.Linear(2, 2)
    with pytest.raises(OptionError, match="only a retroexit Predictor can be saved, got a Linear. Save it yourself"):
        model.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_tensors_of_all_layouts_survive_writing(tmp_path):
    tied = torch.rand(3)
    tensors = {
        "channels_last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "one": tied,
        "other": tied,
        "view": torch.rand(4, 4)[::2, 1:],
        "half": torch.rand(2).bfloat16(),
        "trained": nn.Parameter(torch.rand(2)),
        "empty": torch.zeros(0, 3),
    }
    write_tensors(tmp_path / "deep/file.safetensors", tensors, {"step": 3, "name": "x"})
    read, about = read_tensors(tmp_path / "deep/file.safetensors")
    assert about == {"step": 3, "name": "x"}
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(read[name], value) and read[name].dtype == value.dtype
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["file.safetensors"]


@pytest.mark.parametrize("damage", [lambda raw: raw[:-3], lambda raw: raw[:4], lambda raw: b"", lambda raw: b"x" + raw])
def test_a_damaged_tensor_file_is_refused(tmp_path, damage):
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.rand(8)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"cannot read .*file.safetensors: .*\. Write it again"):
        read_tensors(path)


def test_fingerprints_depend_on_weights_names_types_and_classes_only():
    def linear(change=lambda m: None):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        change(module)
        return fingerprint(module)

    changes = (lambda m: m[1].running_mean.add_(1), lambda m: m.double(), lambda m: m.append(nn.Linear(1, 1)))
    assert len({linear(), *map(linear, changes)}) == 4
    assert linear() == linear(lambda m: m.eval()) == linear(lambda m: m.requires_grad_(False))
