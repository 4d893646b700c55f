"""The table of a decoder: at most 100 columns, correct numbers."""

import dataclasses
import itertools
import re

import pytest
import torch
from torch import nn

from retroexit.api import read_generator
from retroexit.core.modules import unit_of
from retroexit.report.stage_table import brief_count, decoder_table, ranges, shorten


class Block(nn.Module):
    def __init__(self, conv, i, o, up):
        super().__init__()
        self.a, self.b, self.up = conv(i, o, 3, padding=1), conv(o, o, 3, padding=1), up

    def forward(self, x):
        return self.b(torch.relu(self.a(nn.functional.interpolate(x, scale_factor=2) if self.up else x)))


class Decoder(nn.Module):
    """Blocks in 1, 2 or 3 dimensions; every one after which the width changes doubles the resolution."""

    def __init__(self, widths, dimensions=2):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        pairs = list(itertools.pairwise(widths))
        self.blocks_under_a_name_that_is_not_short = nn.ModuleList(Block(conv, i, o, i != o) for i, o in pairs)
        self.image = conv(widths[-1], 3, 1)

    def forward(self, x):
        for block in self.blocks_under_a_name_that_is_not_short:
            x = block(x)
        return self.image(x)


def table_of(generator, *args):
    lines = decoder_table(read_generator(generator.eval(), args)).splitlines()
    assert max(map(len, lines)) <= 100
    return lines


def stage_rows(lines):
    matches = (re.match(r" *(\d+)[* ] ", line) for line in lines)
    return {int(match[1]): match.string for match in matches if match}


@pytest.mark.parametrize(("dimensions", "sizes"), [(1, "8"), (2, "8x8"), (3, "8x8x8")])
def test_decoders_in_one_two_and_three_dimensions(dimensions, sizes):
    lines = table_of(Decoder([12, 8, 8, 6], dimensions), torch.rand(2, 12, *[4] * dimensions))
    assert re.search(rf"  Block +{sizes} +8 ", stage_rows(lines)[1])
    assert lines[0].endswith(f" for x 2x12{'x4' * dimensions}")


def test_sixty_stages_are_folded_where_they_are_alike():
    lines = table_of(Decoder([16] * 21 + [12] * 20 + [8] * 20), torch.rand(1, 16, 4, 4))
    rows = stage_rows(lines)
    assert {1, 20, 21, 40, 41, 60} <= set(rows)
    assert len(rows) < 40
    hidden = [int(match) for match in re.findall(r" (\d+) more alike", "\n".join(lines))]
    assert len(rows) + sum(hidden) == 60
    assert sum("*" in row for row in rows.values()) == 3  # what is suggested is never folded


def test_a_row_adds_up():
    decoder = read_generator(Decoder([12, 12, 8, 6]).eval(), (torch.rand(1, 12, 4, 4),))
    lines = decoder_table(decoder).splitlines()
    second = decoder.stages[1]
    assert second.macs == 8 * 8 * 9 * (12 * 8 + 8 * 8)
    first = 4 * 4 * 9 * 2 * 12 * 12
    total = first + second.macs + 16 * 16 * (9 * (8 * 6 + 6 * 6) + 6 * 3)
    parameters = 9 * (12 * 8 + 8 * 8) + 16
    done = (first + second.macs) / total
    (row,) = [line for line in lines if re.match(r" *2[* ] ", line)]
    shares = [f"{100 * second.macs / total:.1f}%", f"{100 * done:.1f}%", f"{int(100 * (1 - done))}%"]
    assert row.split()[3:] == ["8x8", "8", f"{parameters / 1e3:.2f}k", f"{second.macs / 1e6:.3f}", *shares]
    assert lines[0].startswith(f"Decoder, {sum(p.numel() for p in Decoder([12, 12, 8, 6]).parameters()):,} para")
    assert f", {total / 1e6:.3f} MMACs for x 1x12x4x4" in lines[0]


def test_live_values_are_numbered_in_the_rows_and_spelled_out_below(toys):
    toy = toys.TOYS["list_input_with_unet_skips"]()
    lines = decoder_table(read_generator(toy.generator, toy.args)).splitlines()
    rows = stage_rows(lines)
    assert [rows[i].split()[-1] for i in (1, 2)] == ["v1-v2", "v1"]
    assert not rows[3].rstrip().endswith("v1")
    below = "\n".join(lines[lines.index("live   what a branch there needs besides the feature:") :])
    assert re.search(r"^ +v1 .* 2x16x16x16 +8\.19k +after l_1\.\.l_2$", below, re.MULTILINE)
    assert re.search(r"^ +v2 .* 2x24x8x8 +3\.07k +after l_1$", below, re.MULTILINE)


def test_a_replayed_decoder_is_marked_with_the_reason():
    decoder = read_generator(Decoder([12, 12, 8]).eval(), (torch.rand(1, 12, 4, 4),))
    assert "Replayed" not in decoder_table(decoder)
    why = "blocks.1 hands its output on in a closure, which a recording cannot see"
    lines = decoder_table(dataclasses.replace(decoder, replayed=why)).splitlines()
    assert " ".join(lines[1:4]).startswith(f"Replayed, not cut: {why}.")
    assert max(map(len, lines)) <= 100


def test_names_are_shortened_in_the_middle():
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghij", 7) == "ab..hij"
    assert shorten("abcdefghijkl .. mnopqrstuvwx", 20) == "abc..jkl .. mno..vwx"
    assert [len(shorten("a" * 40, width)) for width in range(4, 40)] == list(range(4, 40))


def test_numbers_are_written_briefly():
    assert [ranges(n) for n in ([1, 2, 3, 7], [4], [], [1, 3, 5, 7])] == ["v1-v3 v7", "v4", "", "4 values"]
    counts = {0: "0", 999: "999", 1000: "1.00k", 9_996: "10.0k", 99_951: "100k", 999_600: "1.00M"}
    assert {n: brief_count(n) for n in counts} == counts and brief_count(2**31) == "2.15G"
    assert [unit_of(macs)[0] for macs in (5e3, 9e7, 2e8, 2e13)] == ["kMACs", "MMACs", "GMACs", "TMACs"]
