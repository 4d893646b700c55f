"""Show that memory does not grow with the number of inputs that a patch bank is streamed from.

A tenth of the paper's bank (section 4.1), 50 label maps x 100 noises x 128 patches = 640,000 pairs, in the
geometry of OASIS on Cityscapes: keys of 1,024 numbers, single locations of the 8x16 map behind l_1; values of
4x4x512, cut from the 32x64 map behind l_3. Weights are random, which changes no size; the last two stages,
which a bank never runs, are left out, so that recording the generator does not hide what is measured. A run
that was interrupted goes on where it stopped. Keys take 0.4 seconds of one processor per input: ``--narrow``
thins the blocks inside and the label maps, and leaves keys and values their sizes and numbers.

    python benchmarks/bank_memory.py --folder runs/bank-memory --json runs/bank-memory.json --narrow
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import torch
from retroexit_oasis import OASISGenerator, SPADEBlock
from torch import Tensor

import retroexit
from retroexit.core.samples import Samples
from retroexit.core.versions import versions
from retroexit.report.text_tables import table
from retroexit.retrieval import ExactRetriever
from retroexit.training.stream_bank import stream_bank

PAPER = 500 * 100 * 128  # pairs
NOISES = 100


class Memory:
    """Resident memory of this process, looked at ten times a second.

    Attributes:
        peak: Largest so far, in MB.
    """

    def __init__(self) -> None:
        self.peak = 0.0
        threading.Thread(target=self._look, daemon=True).start()

    @staticmethod
    def now() -> float:
        """Resident memory in MB, mapped files included."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def _look(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.1)


class Inputs:
    """Label maps of blocks, each with a hundred fixed noises; drawn as they are asked for.

    Args:
        maps: Number of label maps.
        block: Pixels along the side of a block; the map has 8x16 of them.
        memory: Noted as the inputs pass.
    """

    def __init__(self, maps: int, block: int, memory: Memory) -> None:
        self.maps, self.block, self.memory, self.begin = maps, block, memory, time.perf_counter()
        self.noises = torch.randn(NOISES, 64, generator=torch.Generator().manual_seed(0))
        self.marks = [int(PAPER / part / 128) for part in (1000, 300, 100, 30, 15)] + [len(self)]
        self.rows: list[dict[str, Any]] = []

    def __len__(self) -> int:
        return self.maps * NOISES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        while self.marks and index + 1 >= self.marks[0]:
            self.note(f"{index + 1} inputs", self.marks.pop(0) * 128)
        draw = torch.Generator().manual_seed(1 + index // NOISES)
        labels = torch.randint(35, (8, 16), generator=draw)
        labels = labels.repeat_interleave(self.block, 0).repeat_interleave(self.block, 1)
        label = torch.nn.functional.one_hot(labels, 35).movedim(-1, 0).float()
        return label, self.noises[index % NOISES]

    def note(self, what: str, pairs: int) -> None:
        """Write down the memory at this moment, and the peak until now."""
        seconds = time.perf_counter() - self.begin
        row = {"at": what, "pairs": pairs, "now": self.memory.now(), "peak": self.memory.peak, "s": seconds}
        self.rows.append(row)
        print(
            f"{what:>14} {pairs:9,} pairs {row['now']:7.0f} MB, peak {row['peak']:7.0f} MB {seconds:7.0f} s",
            flush=True,
        )


def front(narrow: bool) -> OASISGenerator:
    """Make the first four stages of OASIS on Cityscapes, which end at 64x128."""
    generator = OASISGenerator.for_dataset("cityscapes")
    del generator.body[4:]
    if narrow:
        generator.fc = torch.nn.Conv2d(99, 64, 3, padding=1)
        widths = [(64, 1024), (1024, 64), (64, 512), (512, 256)]
        for index, (c_in, c_out) in enumerate(widths):
            generator.body[index] = SPADEBlock(c_in, c_out, 99, 32)
    generator.conv_img = torch.nn.Conv2d(256, 3, 3, padding=1)
    with torch.no_grad():  # spectral norms and statistics of random weights settle, so that values stay small
        for _ in range(5):
            generator.train()(
                torch.nn.functional.one_hot(torch.randint(35, (2, 32, 64)), 35).movedim(-1, 1).float()
            )
    return generator.eval()


def main() -> None:
    """Build a bank and print the memory on the way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--maps", type=int, default=50, help="label maps; the paper has 500")
    parser.add_argument("--candidates", type=int, default=100_000, help="keys that wait to be thinned")
    parser.add_argument("--size", type=int, default=1024, help="pairs of the bank")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--narrow", action="store_true", help="thin blocks, small label maps")
    parser.add_argument("--folder", type=Path, required=True, help="for what is unfinished, and the bank")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    memory = Memory()
    torch.manual_seed(0)
    inputs = Inputs(arguments.maps, 4 if arguments.narrow else 32, memory)
    generator = front(arguments.narrow)
    inputs.note("generator", 0)
    guidance = retroexit.Guidance(key=False, value_after=3, size=arguments.size)
    example, _ = Samples([inputs[0]]).gather([0])
    model = retroexit.wrap(generator, [1], 1 / 15, guidance=guidance, example_inputs=example, self_test=False)
    inputs.note("wrapped", 0)
    scratch = arguments.folder / "unfinished"
    bank = stream_bank(
        model,
        Samples(inputs),
        ExactRetriever(),
        batch=arguments.batch,
        max_candidates=arguments.candidates,
        scratch=scratch,
    )
    inputs.note("bank built", len(inputs) * 128)
    bank.save(arguments.folder / "bank")
    inputs.note("bank saved", len(inputs) * 128)
    shutil.rmtree(scratch)
    report(inputs, bank, arguments)


def report(inputs: Inputs, bank: retroexit.GuidanceBank, arguments: argparse.Namespace) -> None:
    """Print what was noted as a table, and what would be held without thinning."""
    rows = [
        [
            r["at"],
            f"{r['pairs']:,}",
            f"{r['pairs'] / PAPER:.3f}",
            f"{r['now']:.0f}",
            f"{r['peak']:.0f}",
            f"{r['s']:.0f}",
        ]
        for r in inputs.rows
    ]
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, {versions()}")
    print(table(["at", "pairs", "of the paper's", "MB now", "MB peak", "s"], rows))
    shape = "x".join(map(str, bank.values.shape[1:]))
    pairs = len(inputs) * 128
    print(
        f"{arguments.candidates:,} candidates, bank of {len(bank):,} keys of {bank.retriever.width} numbers "
        f"with values {shape}; all {pairs:,} pairs would be {pairs * bank.retriever.width * 4 / 1e9:.1f} GB "
        f"of keys and {pairs * bank.values[0].size * 4 / 1e9:.0f} GB of values in float32"
    )
    print(f"thinning: {bank.meta['thinning']}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(
            json.dumps(
                {"versions": versions(), "rows": inputs.rows, "thinning": bank.meta["thinning"]}, indent=1
            )
        )


if __name__ == "__main__":
    main()
