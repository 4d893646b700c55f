"""The module tree: every stage, parameter and MAC occurs once."""

import torch
from torch import nn
from toys import Block

from retroexit.api import read_generator
from retroexit.stages.module_tree import module_tree


class Coder(nn.Module):
    """An encoder, a wrapper around the decoder, a parameter of its own, and a module that never runs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 4, 4), nn.BatchNorm2d(12)
        self.gain = nn.Parameter(torch.ones(12, 1, 1))
        blocks = nn.Sequential(Block(12, 12, True), Block(12, 12, True), Block(12, 12))
        self.wrapper = nn.ModuleDict({"inner": nn.Sequential(blocks)})
        self.head = nn.Conv2d(12, 3, 1)
        self.teacher = nn.Linear(5, 5)

    def forward(self, x):
        h = torch.relu(self.second(self.first(x))) * self.gain
        return self.head(self.wrapper["inner"](h))


def lines(generator, *args, **kwargs):
    decoder = read_generator(generator.eval(), args, kwargs)
    parts = module_tree(decoder)
    assert sum(part.parameters for part in parts) == sum(p.numel() for p in generator.parameters())
    assert sum(part.macs for part in parts) == decoder.recording.macs
    assert [p.stage for p in parts if p.stage is not None] == list(decoder.stages)
    return parts


def test_parameters_and_macs_of_every_toy_are_counted_once(every_toy):
    lines(every_toy.generator, *every_toy.args, **every_toy.kwargs)


def test_what_holds_stages_is_opened_and_the_rest_is_folded():
    parts = lines(Coder(), torch.rand(1, 3, 16, 16))
    assert [(p.depth, p.name, p.kind) for p in parts] == [
        (0, "", "Coder"),
        (1, "first .. second", "2 modules"),
        (1, "wrapper.inner.0", "Sequential"),  # what merely wraps shares a line with what it wraps
        (2, "0", "Block"),
        (2, "1", "Block"),
        (2, "2", "Block"),
        (1, "head", "Conv2d"),
        (1, "teacher", "never called"),
    ]
    assert parts[0].parameters == 12  # the gain
    assert parts[1].parameters == 3 * 12 * 16 + 12 + 24
    assert parts[1].macs == 4 * 4 * 12 * 3 * 16
    assert [p.path for p in parts if p.stage] == [f"wrapper.inner.0.{i}" for i in range(3)]


def test_a_norm_that_closes_a_stage_belongs_to_it():
    def level(i, o):
        return [nn.ConvTranspose2d(i, o, 4, 2, 1), nn.BatchNorm2d(o), nn.ReLU()]

    levels = [*level(8, 16), *level(16, 12), *level(12, 8)]
    parts = lines(nn.Sequential(*levels, nn.Conv2d(8, 3, 3, padding=1)), torch.rand(1, 8, 4, 4))
    assert [(p.name, p.stage is not None) for p in parts[1:]] == [("0", True), ("3", True), ("6", True), ("9", False)]
    assert parts[1].parameters == 8 * 16 * 16 + 16 + 32


def test_a_shared_weight_is_counted_where_it_occurs_first():
    coder = Coder()
    coder.head.weight = nn.Parameter(torch.rand(3, 12, 1, 1))
    blocks = coder.wrapper["inner"][0]
    blocks[1].a.weight = blocks[0].a.weight
    parts = lines(coder, torch.rand(1, 3, 16, 16))
    first, second = (part.parameters for part in parts[3:5])
    assert first - second == 12 * 12 * 9


def test_what_a_forward_computes_itself_stands_at_the_module():
    class Mixing(Coder):
        def forward(self, x):
            return nn.functional.conv2d(super().forward(x), torch.ones(3, 3, 1, 1))

    parts = lines(Mixing(), torch.rand(1, 3, 16, 16))
    assert parts[0].macs == 3 * 3 * 16 * 16
