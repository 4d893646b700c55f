"""Every hook: a plug-in that implements it, and its use by the library or command line."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from torch import nn
from toys import Block, Chain

import retroexit
from retroexit import cli
from retroexit.branch.branch import Branch
from retroexit.errors import OptionError, PluginError
from retroexit.metrics import QualityMetric
from retroexit.plugins import Description, PluginInfo, hookimpl, hookspecs
from retroexit.retrieval import Retriever

PAGE = Path(__file__).resolve().parents[2] / "docs/plugins.md"
SAMPLES = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
QUICK = {"steps": 2, "batch": 2, "predictor_steps": 2, "progress": False}


@pytest.fixture
def painter():
    return Chain([Block(16, 16) for _ in range(3)], first=16, last=16).eval()


def wrap(generator, **options):
    options = {"min_channels": 4, "example_inputs": (SAMPLES[:1],), **options}
    return retroexit.wrap(generator, [1], 1 / 2, **options)


# The hooks, one by one.


def test_hook_retroexit_describe(painter, installed):
    paths = ("blocks.0", "blocks.1", "blocks.2")

    class Knows:
        @hookimpl
        def retroexit_describe(self, generator):
            inputs = ((torch.zeros(1, 4, 8, 8),), {})
            options = {"stages": paths, "example_inputs": lambda generator: inputs, "image_range": (-1, 1)}
            return Description(name="painter", **options) if isinstance(generator, Chain) else None

    plugins = installed(mine=Knows())
    model = retroexit.wrap(painter, [1], 1 / 2, min_channels=4)
    assert model.is_recorded
    assert [stage.path for stage in model.split.decoder.stages] == list(paths)
    assert model.options.image_range == (-1, 1)
    assert plugins.describe(nn.ReLU()).stages is None
    recognised = plugins.recognise(painter)
    assert recognised[0] == PluginInfo("mine", hooks=("retroexit_describe",))
    assert recognised[1].name == "painter"


def test_hook_retroexit_build_stage(painter, installed):
    class Builds:
        @hookimpl
        def retroexit_build_stage(self, stage, in_channels, out_channels):
            return Block(in_channels, out_channels) if isinstance(stage, Block) else None

    plugins = installed(mine=Builds())
    built = plugins.build_stage(painter.get_submodule("blocks.1"), 16, 5)
    assert isinstance(built, Block)
    assert built(torch.zeros(1, 16, 8, 8)).shape == (1, 5, 8, 8)
    assert plugins.build_stage(nn.ReLU(), 16, 5) is None
    model = wrap(painter)
    assert model.branches[0].plan.built == {"blocks.1": (16, 8), "blocks.2": (8, 8)}
    assert wrap(painter, adapter=False).branches[0].plan.built == {}


class Backwards(Retriever):
    name = "backwards"

    def _build(self, keys):
        self._rows = keys

    def _search(self, queries, k):
        far = ((queries[:, None] - self._rows[None]) ** 2).sum(-1)
        return np.argsort(far, axis=1, kind="stable")[:, :k]


def test_hook_retroexit_retrievers(offering, painter, installed, tmp_path):
    plugins = installed(mine=offering(retrievers={"backwards": Backwards}))
    assert plugins.retriever("backwards") is Backwards
    assert plugins.names("retriever") == ("backwards", "exact", "faiss", "hnswlib")
    model = wrap(painter, guidance=retroexit.Guidance(retriever="backwards", size=16), image_range=(-1, 1))
    retroexit.fit(model, SAMPLES, tmp_path, metric=Gradient(), **QUICK)
    assert isinstance(model.bank.retriever, Backwards)
    again = retroexit.load(tmp_path, painter, (SAMPLES[:1],))
    assert isinstance(again.bank.retriever, Backwards)
    assert torch.equal(again(SAMPLES, exit=1), model(SAMPLES, exit=1))


class Gradient(QualityMetric):
    name = "gradient"

    def compare(self, a, b):
        return (a.diff(dim=-1) - b.diff(dim=-1)).abs().mean((1, 2, 3))


def test_hook_retroexit_metrics(offering, painter, installed, tmp_path):
    plugins = installed(mine=offering(metrics={"gradient": Gradient}))
    assert isinstance(plugins.metric("gradient"), Gradient)
    assert "gradient" in plugins.names("metric")
    model = wrap(painter, image_range=(-1, 1))
    retroexit.fit(model, SAMPLES, tmp_path, metric="gradient", **QUICK)
    report = retroexit.evaluate(model, SAMPLES, progress=False)
    with torch.no_grad():
        expected = Gradient()(model(SAMPLES, exit=1), painter(SAMPLES))
    assert report.loss[:, 0] == pytest.approx(expected.numpy(), rel=1e-4, abs=1e-6)


def test_hook_retroexit_losses(offering, painter, installed, tmp_path):
    seen = []

    class Recorded(nn.HuberLoss):
        def forward(self, image, target):
            seen.append(tuple(image.shape))
            return super().forward(image, target)

    plugins = installed(mine=offering(losses={"huber": Recorded}))
    assert isinstance(plugins.loss("huber"), nn.HuberLoss)
    assert {"huber", "l1", "vgg", "ms-ssim"} < set(plugins.names("loss"))
    model = wrap(painter, image_range=(-1, 1))
    with pytest.raises(PluginError, match="no loss 'hubber'; closest: 'huber'"):
        retroexit.fit(model, SAMPLES, tmp_path, metric=Gradient(), losses={"hubber": 1.0}, **QUICK)
    retroexit.fit(model, SAMPLES, tmp_path, metric=Gradient(), losses={"huber": 2.0}, **QUICK)
    assert (2, 3, 8, 8) in seen
    assert model.about["fit"]["losses"] == {"huber": 2.0}


def test_hook_retroexit_width_rules(offering, painter, installed):
    odd = lambda channels, scale, least: max(least, int(channels * scale)) | 1  # noqa: E731
    plugins = installed(mine=offering(width_rules={"odd": odd, "huge": lambda channels, scale, least: channels + 1}))
    assert plugins.width_rule("odd")(16, 0.5, 4) == 9
    assert wrap(painter, width_rule="odd").branches[0].tail.get_submodule("rgb").in_channels == 9
    assert wrap(painter).branches[0].tail.get_submodule("rgb").in_channels == 8
    with pytest.raises(PluginError, match="no width rule 'od'; closest: 'odd'"):
        wrap(painter, width_rule="od")
    message = "width rule 'huge' must return .* 1 to 16 for 16 channels at scale 0.5, got 17"
    with pytest.raises(OptionError, match=message):
        wrap(painter, width_rule="huge")


def test_hook_retroexit_branch_kinds(offering, painter, installed, tmp_path):
    class Plain(Branch):
        kind = "plain"

        def __init__(self, channels):
            super().__init__({"channels": channels})
            self.rgb = nn.Conv2d(channels, 3, 1)

        def forward(self, feature, *live, guide=None):
            return self.rgb(feature)

    def build(tail, cut, values, spec, plan=None):
        return Plain(values[0].shape[1] if plan is None else plan["channels"])

    installed(mine=offering(branch_kinds={"plain": build, "wrong": lambda *_: nn.Identity()}))
    model = wrap(painter, branch="plain")
    assert model.exits[0].kind == "plain"
    model.save(tmp_path)
    other = retroexit.load(tmp_path, painter, (SAMPLES[:1],))
    assert torch.equal(other(SAMPLES[:1], exit=1), model(SAMPLES[:1], exit=1))
    with pytest.raises(PluginError, match="no branch kind 'plane'; closest: 'plain'"):
        wrap(painter, branch="plane")
    with pytest.raises(PluginError, match="branch kind 'wrong' must build a Branch of this kind, got Identity"):
        wrap(painter, branch="wrong")


def test_hook_retroexit_commands(offering, installed, capsys):
    def greet(name="you"):
        """Greet somebody."""
        typer.echo(f"hello {name}")

    plugins = installed(mine=offering(commands={"greet": greet}))
    assert plugins.commands()["greet"] is greet
    shown = {}
    for words in (["--help"], ["greet", "--name", "me"], ["plugins"]):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert not end.value.code
        shown[words[0]] = capsys.readouterr().out
    assert re.search(r"^\s*greet\s+Greet somebody\.", shown["--help"], re.MULTILINE)
    assert shown["greet"] == "hello me\n"
    assert re.search(r"^retroexit_commands +mine +greet$", shown["plugins"], re.MULTILINE)


def test_every_hook_has_a_test_a_documented_signature_and_a_row_in_the_documentation():
    hooks = hookspecs.HOOKS
    page = PAGE.read_text()
    for hook in hooks:
        assert f"test_hook_{hook}" in globals()
        doc = getattr(hookspecs, hook).__doc__
        assert doc.splitlines()[0].endswith(".")
        assert "Returns:" in doc
        assert f"| `{hook}(" in page


# What more than one plug-in says.


def test_the_newest_plugin_that_describes_a_generator_is_used_unless_another_is_named(empty, offering):
    for name in ("first", "second"):
        empty.register(offering(describe=Description(name=name)), name)
    described = empty.describe(nn.ReLU()), empty.describe(nn.ReLU(), "first")
    assert [d.name for d in described] == ["second", "first"]
    with pytest.raises(PluginError, match="no plug-in 'third'; installed: 'first', 'second'"):
        empty.describe(nn.ReLU(), "third")


def test_an_adapter_may_be_named_and_has_to_recognise_the_generator(painter, installed):
    class Knows:
        @hookimpl
        def retroexit_describe(self, generator):
            return Description(name="a painter") if isinstance(generator, Chain) else None

    installed(mine=Knows())
    wrap(painter, adapter="mine")
    with pytest.raises(OptionError, match="must be a plug-in that recognises a ReLU, got 'mine'"):
        retroexit.wrap(nn.ReLU().eval(), [1], 1 / 2, adapter="mine")
    with pytest.raises(PluginError, match="no plug-in 'a painter'"):
        wrap(painter, adapter="a painter")
