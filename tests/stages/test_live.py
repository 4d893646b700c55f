"""Live values: their names, and the stages between which they are needed."""

import torch
from torch import nn

import retroexit
from retroexit.stages.decoder import read_decoder
from retroexit.stages.stage import LiveSpan, live_spans


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x, style, skip=None):
        h = self.b(torch.relu(self.a(x))) * style
        return h, h.mean(1, keepdim=True) + (0 if skip is None else skip)


class Styled(nn.Module):
    def __init__(self):
        super().__init__()
        self.mapping = nn.Linear(4, 12)
        self.stem = nn.Conv2d(3, 12, 1)
        self.blocks = nn.ModuleList([Block(), Block(), Block(), Block()])
        self.rgb = nn.Conv2d(12, 3, 1)

    def forward(self, maps, *, z, label):
        style = self.mapping(z)
        late = self.mapping(z + 1) + 2
        h = self.stem(maps[1])
        skip = None
        for i, block in enumerate(self.blocks):
            h, skip = block(h, style[:, :, None, None], skip)
            if i == 1:
                second = h
        return self.rgb(h + second * late[:, :, None, None]) + skip + label + maps[0]


def styled_stages():
    maps = [torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)]
    named = {"z": torch.rand(1, 4), "label": torch.rand(1, 1, 1, 1)}
    blocks = [f"blocks.{i}" for i in range(4)]
    return read_decoder(Styled().eval(), (maps,), named, stages=blocks).stages


def test_values_are_named_by_input_module_or_line_and_no_two_alike():
    stages = styled_stages()
    names = [name for name, _ in stages[2].live]
    assert {"maps[0]", "label", "mapping", "blocks.2[1]", "blocks.1[0]"} <= set(names)
    assert any(name.startswith("add (test_live.py:") for name in names)
    assert len(set(names)) == len(names)


def test_spans_state_where_a_value_is_made_and_last_used():
    stages = styled_stages()
    spans = {span.name: span for span in live_spans(stages)}
    assert spans["mapping"] == LiveSpan("mapping", (1, 12), made_by=0, first=1, last=3)
    assert spans["maps[0]"] == LiveSpan("maps[0]", (1, 3, 8, 8), made_by=0, first=1, last=4)
    assert spans["blocks.0[1]"] == LiveSpan("blocks.0[1]", (1, 1, 8, 8), made_by=1, first=1, last=1)
    assert spans["blocks.2[1]"] == LiveSpan("blocks.2[1]", (1, 1, 8, 8), made_by=3, first=3, last=3)
    # The feature of l_2 is needed again at the end.
    assert spans["blocks.1[0]"] == LiveSpan("blocks.1[0]", (1, 12, 8, 8), made_by=2, first=3, last=4)
    assert "maps[1]" not in spans


def test_skips_of_a_unet_are_nested(toys):
    toy = toys.TOYS["list_input_with_unet_skips"]()
    spans = live_spans(retroexit.find_stages(toy.generator, toy.args))
    assert [(s.first, s.last, s.shape[2]) for s in spans] == [(1, 2, 16), (1, 1, 8)]
