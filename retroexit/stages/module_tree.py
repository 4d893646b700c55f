"""The module tree of a generator, opened down to its stages."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from retroexit.stages.decoder import Decoder, input_names
from retroexit.stages.stage import Stage, live_spans
from retroexit.tracing.recorder import Call


@dataclass(frozen=True)
class Part:
    """One line of the tree: a module, or a run of neighbouring modules."""

    depth: int  # how deep it lies; the generator itself is at 0
    path: str  # dotted path in the generator; of a run the first one
    name: str  # the path below the enclosing line; of a run first .. last
    kind: str  # class name; of a run how many modules it holds
    parameters: int  # elements of its parameters, without those counted in earlier or inner lines
    macs: int  # multiply-accumulates, without those of inner lines
    stage: Stage | None = None  # the stage that it is
    is_opened: bool = False  # whether lines for its content follow


def module_tree(decoder: Decoder) -> list[Part]:
    """List the modules of a generator that were called, down to the stages of its decoder.

    Modules beside the stages are joined to one line a run; those with neither weights nor MACs are left out.
    Modules that were never called come last.
    """
    return _Tree(decoder).parts()


class _Tree:
    def __init__(self, decoder: Decoder) -> None:
        self.calls = decoder.recording.calls
        self.stage_of = {stage.path: stage for stage in decoder.stages}
        self.counted: set[int] = set()

    def parts(self) -> list[Part]:
        listed = self.below(self.calls[0], 0, "")
        called = [call.path for call in self.calls if call.path]
        idle = [
            (path, module)
            for path, module in self.calls[0].module.named_modules()
            if path and not any(_is_within(path, other) or _is_within(other, path) for other in called)
        ]
        rest = sum(self.parameters(module) for _, module in idle)
        if rest:
            tops = [path for path, _ in idle if not any(_is_within(path, p) for p, _ in idle if p != path)]
            name = tops[0] if len(tops) == 1 else _from_to(tops[0], tops[-1])
            listed.append(Part(1, tops[0], name, "never called", rest, 0))
        return listed

    def below(self, call: Call, depth: int, above: str) -> list[Part]:
        """List a call and the calls inside."""
        stage = self.stage_of.get(call.path)
        name = call.path.removeprefix(f"{above}.") if above else call.path
        kind = type(call.module).__name__
        if stage is not None or not self.holds_stages(call):
            return [Part(depth, call.path, name, kind, self.parameters(call.module), call.macs, stage)]
        parameters = self.parameters(call.module, recurse=False)
        inner = [self.below(child, depth + 1, call.path) for child in call.children]
        if len(inner) == 1 and call.path and not parameters:  # a wrapper shares a line with its content
            (first, *more), prefix = inner[0], f"{name}."
            return [replace(p, depth=p.depth - 1) for p in (replace(first, name=prefix + first.name), *more)]
        macs = call.macs - sum(child.macs for child in call.children)
        opened = Part(depth, call.path, name, kind, parameters, macs, is_opened=True)
        return [opened, *self.folded(inner)]

    def folded(self, groups: Sequence[Sequence[Part]]) -> list[Part]:
        """Join neighbours beside the stages to one line, and what closes a stage with the stage."""
        listed: list[Part] = []
        run: list[Part] = []
        end = ""  # path of the module that closes the last stage, while it has not come yet
        for first, *more in groups:
            if more or first.stage is not None:
                listed += [*_joined(run), first, *more]
                run = []
                end = first.stage.end if first.stage is not None and first.stage.end != first.path else ""
            elif end:
                listed[-1] = replace(listed[-1], parameters=listed[-1].parameters + first.parameters)
                end = "" if first.path == end else end
            else:
                run.append(first)
        return listed + _joined(run)

    def holds_stages(self, call: Call) -> bool:
        """Return whether a stage runs inside a call."""
        return any(child.path in self.stage_of or self.holds_stages(child) for child in call.children)

    def parameters(self, module: nn.Module, recurse: bool = True) -> int:
        """Count the parameters of a module that were not counted before."""
        new = [p for p in module.parameters(recurse=recurse) if id(p) not in self.counted]
        self.counted.update(map(id, new))
        return sum(p.numel() for p in new)


def _joined(run: Iterable[Part]) -> list[Part]:
    run = [part for part in run if part.parameters or part.macs]
    if len(run) <= 1:
        return run
    name, kind = _from_to(run[0].name, run[-1].name), f"{len(run)} modules"
    parameters, macs = sum(part.parameters for part in run), sum(part.macs for part in run)
    return [replace(run[0], name=name, kind=kind, parameters=parameters, macs=macs)]


def _from_to(first: str, last: str) -> str:
    """Name a run, without repeating what the last path shares with the first."""
    owner = first.rpartition(".")[0]
    return f"{first} .. {last.removeprefix(f'{owner}.') if owner else last}"


def _is_within(path: str, other: str) -> bool:
    return path == other or path.startswith(f"{other}.")


def decoder_facts(decoder: Decoder) -> dict[str, Any]:
    """Describe a generator as JSON values; MACs and shapes are those of the whole example batch.

    Returns ``generator`` (class), ``inputs`` (shapes), ``parameters``, ``macs``, ``replayed`` (why, or
    empty), ``suggested`` (stage numbers), ``stages``, ``live`` (see `LiveSpan`), ``tree`` (see `Part`).
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
        "tree": [{**asdict(part), "stage": part.stage.index if part.stage else None} for part in tree],
    }
