"""Say why a stage is no stage, or why none were found, and what to write instead."""

from __future__ import annotations

from collections import Counter

from torch import fx

from retroexit.errors import AttachPointError, RepeatedStageError
from retroexit.stages.image import is_map
from retroexit.tracing.record import Recording

__all__ = ["nothing_found", "runs_often"]

_MOST_LISTED = 4


def nothing_found(recording: Recording, image: fx.Node) -> AttachPointError:
    """Explain that a generator has no stages.

    Args:
        recording: One execution, with every layer as a node.
        image: Node of the image.
    """
    times = Counter(call.path for call in recording.calls if call.path and call.macs)
    often = [(path, n) for path, n in times.items() if n > 1]
    once = _run_once(recording, image, times)
    asked = "asked for the decoder's stages; found "
    if often:
        # The outermost of what runs again is what the user wrote a loop around.
        path, n = next((p, n) for p, n in often if not any(p.startswith(f"{q}.") for q, _ in often))
        what = f"that {path!r} runs {n} times, so that there is no single place behind it, and "
        what += "little work in modules that run once. " + _turns(path, n)
    else:
        what = "no module with weights that passes a feature map on to the image. "
        what += (
            "Put the layers of each resolution into a module of their own, or wrap the module that renders "
        )
        what += "the image."
    if once:
        what += f" Or name what runs once: stages={once}."
    elif not often:
        what += " Then name them: stages=['blocks.0', 'blocks.1']."
    return AttachPointError(asked + what, recording)


def runs_often(path: str, times: int) -> RepeatedStageError:
    """Explain that a module that was asked for runs more than once."""
    return RepeatedStageError(
        f"asked for a branch at {path!r}; found that it runs {times} times in one forward pass, so that "
        "there is no single place behind it. Attach at a module that runs once, or "
        f"{_lower(_turns(path, times))}",
        path,
    )


def _turns(path: str, times: int) -> str:
    name = path.rpartition(".")[2]
    name = name if name.isidentifier() else f"get_submodule({path!r})"
    return (
        f"Give every turn a module of its own: self.turns = nn.ModuleList(nn.Sequential(self.{name}) for _ "
        f"in range({times})), call self.turns[i] in the loop, and write stages=['turns.0', 'turns.1']; the "
        "weights stay shared."
    )


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]


def _run_once(recording: Recording, image: fx.Node, times: Counter[str]) -> list[str]:
    """Paths of modules with weights that run once and return a map which is not yet the image."""
    found = [
        call.path
        for call in recording.calls
        if times[call.path] == 1
        and image not in call.outputs
        and any(is_map(node, image) for node in call.outputs)
        and any(True for _ in call.module.parameters())
    ]
    outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    return outer[:_MOST_LISTED]
