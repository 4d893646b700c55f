"""The module tree of a generator with its stages in place, everything else folded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from retroexit.stages.decoder import Decoder, input_names
from retroexit.stages.stage import Stage, live_spans

__all__ = ["Part", "decoder_facts", "module_tree"]


@dataclass(frozen=True)
class Part:
    """One line of the tree: a module, or a run of modules beside one another.

    Attributes:
        depth: How deep it lies; the generator itself is at 0.
        path: Dotted path in the generator; of a run the first one.
        name: What the path adds to the path of the part that it lies in; of a run ``first .. last``.
        kind: Class name; of a run how many modules it holds.
        parameters: Numbers in parameters, each counted where it occurs first; for a part that is opened in
            further lines what it holds itself.
        macs: Multiply-accumulates; for a part that is opened what its forward spends outside of modules.
        stage: The stage that it is.
        is_opened: Whether what it holds follows.
    """

    depth: int
    path: str
    name: str
    kind: str
    parameters: int
    macs: int
    stage: Stage | None = None
    is_opened: bool = False


def module_tree(decoder: Decoder) -> list[Part]:
    """List the modules of a generator that were called, down to the stages of its decoder.

    A module that holds stages is opened. What lies beside the stages is not; runs of it are one line, and
    what has neither weights nor MACs, such as an activation, is left out. What was never called comes last.

    Args:
        decoder: A generator that has been read.
    """
    return _Tree(decoder).parts()


class _Tree:
    def __init__(self, decoder: Decoder) -> None:
        self.calls = decoder.recording.calls
        self.stage_of = {stage.path: stage for stage in decoder.stages}
        self.generator = self.calls[0].module
        self.counted: set[int] = set()
        self.children: dict[int | None, list[int]] = {}
        for i, call in enumerate(self.calls):
            self.children.setdefault(call.parent, []).append(i)

    def parts(self) -> list[Part]:
        listed = self.below(0, 0, "")
        called = [call.path for call in self.calls if call.path]
        idle = [
            (path, module)
            for path, module in self.generator.named_modules()
            if path and not any(_is_within(path, other) or _is_within(other, path) for other in called)
        ]
        rest = sum(self.parameters(module) for _, module in idle)
        if rest:
            tops = [path for path, _ in idle if not any(_is_within(path, p) for p, _ in idle if p != path)]
            name = tops[0] if len(tops) == 1 else _from_to(tops[0], tops[-1])
            listed.append(Part(1, tops[0], name, "never called", rest, 0))
        return listed

    def below(self, i: int, depth: int, above: str) -> list[Part]:
        """Write down a call and what it holds."""
        call = self.calls[i]
        stage = self.stage_of.get(call.path)
        name = call.path.removeprefix(f"{above}.") if above else call.path
        kind = type(call.module).__name__
        if stage is not None or not self.holds_stages(i):
            return [Part(depth, call.path, name, kind, self.parameters(call.module), call.macs, stage)]
        own = self.parameters(call.module, recurse=False)
        inner = [self.below(j, depth + 1, call.path) for j in self.children.get(i, ())]
        if len(inner) == 1 and call.path and not own:  # a mere wrapper shares a line with what it wraps
            (first, *more), prefix = inner[0], f"{name}."
            return [replace(p, depth=p.depth - 1) for p in (replace(first, name=prefix + first.name), *more)]
        spent = call.macs - sum(self.calls[j].macs for j in self.children.get(i, ()))
        opened = Part(depth, call.path, name, kind, own, spent, is_opened=True)
        return [opened, *self.folded(inner)]

    def folded(self, groups: Sequence[Sequence[Part]]) -> list[Part]:
        """Join what lies beside stages to one line a run, and what closes a stage with the stage."""
        listed: list[Part] = []
        run: list[Part] = []
        open_stage = -1  # where in the list the stage is that the next modules may close
        for group in groups:
            first = group[0]
            if len(group) > 1 or first.stage is not None:
                listed += [*_joined(run), *group]
                run = []
                closes_later = first.stage is not None and first.stage.end not in ("", first.path)
                open_stage = len(listed) - 1 if closes_later else -1
                continue
            if open_stage < 0:
                run.append(first)
                continue
            stage = listed[open_stage].stage
            assert stage is not None
            more = listed[open_stage].parameters + first.parameters
            listed[open_stage] = replace(listed[open_stage], parameters=more)
            if first.path == stage.end:
                open_stage = -1
        return listed + _joined(run)

    def holds_stages(self, i: int) -> bool:
        """Tell whether a stage runs inside a call."""
        inner = self.children.get(i, ())
        return any(self.calls[j].path in self.stage_of or self.holds_stages(j) for j in inner)

    def parameters(self, module: nn.Module, recurse: bool = True) -> int:
        """Count the parameters of a module that no line before it has counted."""
        new = [p for p in module.parameters(recurse=recurse) if id(p) not in self.counted]
        self.counted.update(map(id, new))
        return sum(p.numel() for p in new)


def _joined(run: Iterable[Part]) -> list[Part]:
    run = [part for part in run if part.parameters or part.macs]
    if len(run) <= 1:
        return run
    first, last = run[0], run[-1]
    return [
        replace(
            first,
            name=_from_to(first.name, last.name),
            kind=f"{len(run)} modules",
            parameters=sum(part.parameters for part in run),
            macs=sum(part.macs for part in run),
        )
    ]


def _from_to(first: str, last: str) -> str:
    """Name a run; what the last path shares with the first is not repeated."""
    owner = first.rpartition(".")[0]
    return f"{first} .. {last.removeprefix(f'{owner}.') if owner else last}"


def _is_within(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def decoder_facts(decoder: Decoder) -> dict[str, Any]:
    """Write down what has been read from a generator.

    Returns:
        ``generator`` (class name), ``inputs`` (shapes by name), ``parameters``, ``macs``, ``replayed`` (why,
        or empty), ``suggested`` (stage numbers), ``stages``, ``live`` (from which stage to which a value is
        needed), ``tree`` (its lines; ``stage`` is a number or ``None``). MACs and shapes are those of the
        whole example batch.
    """
    tree = module_tree(decoder)
    stages = []
    for s in decoder.stages:
        live = [{"name": name, "shape": list(shape)} for name, shape in s.live]
        stages.append({**asdict(s), "shape": list(s.shape), "saves": s.saves, "live": live})
    return {
        "generator": tree[0].kind,
        "inputs": {name: list(node.meta["shape"]) for node, name in input_names(decoder.recording).items()},
        "parameters": sum(part.parameters for part in tree),
        "macs": decoder.recording.macs,
        "replayed": decoder.replayed,
        "suggested": [s.index for s in decoder.stages if s.is_suggested],
        "stages": stages,
        "live": [{**asdict(span), "shape": list(span.shape)} for span in live_spans(decoder.stages)],
        "tree": [
            {**asdict(part), "stage": part.stage.index if part.stage is not None else None} for part in tree
        ],
    }
