"""Making branches: memory, printed code, compilation and export, projections."""

import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

import retroexit
from retroexit.core.nested import tensors
from retroexit.tracing.record import record


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of real tensors that are alive and were made while it is on."""

    def __init__(self, known):
        super().__init__()
        self.known = {self._key(tensor): 0 for tensor in known.state_dict().values()}
        self.alive = self.peak = 0

    @staticmethod
    def _key(tensor):
        return int(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            if isinstance(tensor, FakeTensor) or tensor.is_meta or self._key(tensor) in self.known:
                continue
            storage = tensor.untyped_storage()
            self.known[self._key(tensor)] = storage.nbytes()
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, self._key(tensor))
        return out

    def _forget(self, key):
        self.alive -= self.known.pop(key)


class WideDecoder(nn.Module):
    """Residual blocks with far more weights than activations, as latent decoders have."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(WideBlock(192) for _ in range(4))
        self.rgb = nn.Conv2d(192, 3, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.rgb(x)


class WideBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.layers = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        y = self.norm(x)
        for layer in self.layers:
            y = layer(y.relu())
        return x + y


def test_wrapping_needs_less_memory_than_the_weights_once_more():
    generator = WideDecoder().eval()
    weights = sum(p.numel() * p.element_size() for p in generator.parameters())
    x = torch.randn(1, 192, 4, 4)
    with StorageCounter(generator) as counter:
        model = retroexit.wrap(generator, [1, 2, 3], 1 / 4, min_channels=32, example_inputs=(x,))
    branches = sum(p.numel() * p.element_size() for p in model.branches.parameters())
    assert branches < counter.alive
    assert counter.peak < weights / 2


def test_a_recording_keeps_no_activation_alive(toys):
    toy = toys.TOYS["group_norm"]()
    image = sum(t.numel() * t.element_size() for t in tensors(toy.generator(*toy.args, **toy.kwargs)))
    with StorageCounter(toy.generator) as counter:
        recording = record(toy.generator, toy.args, toy.kwargs)
    assert recording.nodes
    assert image <= counter.alive <= image + 1024
    assert counter.peak > counter.alive


class Flat(nn.Module):
    """Layers in a row; what reads the first one's feature is 1x1 or not, and there may be two of it."""

    def __init__(self, kernel, readers=1):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 64, 3, padding=1), nn.ReLU())
        self.heads = nn.ModuleList(nn.Conv2d(64, 64, kernel, padding=kernel // 2) for _ in range(readers))
        self.body = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU())
        self.rgb = nn.Conv2d(64, 3, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        y = sum(head(x) for head in self.heads)
        return self.rgb(self.body(y))


def flat(kernel, readers=1):
    generator, x = Flat(kernel, readers).eval(), torch.randn(1, 8, 6, 6)
    return generator, x, retroexit.wrap(generator, ["stem"], 1 / 4, min_channels=8, example_inputs=(x,))


def test_a_narrow_1x1_layer_reads_the_whole_feature(tmp_path):
    generator, x, model = flat(1)
    (branch,) = model.branches
    assert branch.entry is None
    weight = branch.tail.get_parameter("heads.0.weight")
    assert weight.shape == (16, 64, 1, 1)
    assert any(torch.equal(weight[0], row) for row in generator.heads[0].weight)
    model.save(tmp_path)
    with torch.no_grad():
        assert torch.equal(retroexit.load(tmp_path, generator)(x, exit=1), model(x, exit=1))


@pytest.mark.parametrize(("kernel", "readers"), [(3, 1), (1, 2)])
def test_a_projection_stays_where_it_saves_work(kernel, readers):
    (branch,) = flat(kernel, readers)[2].branches
    assert branch.entry.project.weight.shape == (16, 64, 1, 1)
    assert branch.tail.get_parameter("heads.0.weight").shape == (16, 16, kernel, kernel)
    # 64 to 16 channels for the projection, 16 to 16 behind it; without, 64 to 16 everywhere.
    taps = readers * kernel**2
    assert 64 * 16 + taps * 16 * 16 < taps * 64 * 16


def test_a_branch_is_printed_as_code():
    (branch,) = flat(3)[2].branches
    assert branch.code.startswith("def forward(self, ")
    assert "self.heads" in branch.code and "self.rgb(" in branch.code


@pytest.mark.parametrize("inject", [None, "input", "every_stage"])
def test_a_branch_is_compiled_and_exported(inject):
    generator, x = WideDecoder().eval(), torch.randn(2, 192, 16, 16)
    guidance = inject and retroexit.Guidance(size=20, inject=inject)
    model = retroexit.wrap(generator, [1], 1 / 4, example_inputs=(x,), guidance=guidance)
    (branch,) = model.branches
    guide = {"guide": torch.randn(2, 192, 16, 16)} if inject else {}
    with torch.no_grad():
        values = tuple(model.split.crossing(model.split.begin((x,), {}).values, 0))
        expected = branch(*values, **guide)
        assert torch.equal(torch.compile(branch, backend="eager")(*values, **guide), expected)
        assert torch.equal(torch.export.export(branch, values, guide).module()(*values, **guide), expected)
