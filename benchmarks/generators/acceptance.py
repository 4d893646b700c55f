"""Decide whether detected stages are those that a person would pick, by one rule for all generators.

A person's list says where the decoder's modules end. Optional places are marked: the stem, an attention layer
of its own, a norm, and a single layer that resizes in front of blocks of the new resolution. Detected stages
are accepted if

1. none is foreign: each is one of the person's places, lies inside one, or holds at most two of those that
   are not optional;
2. none is missing: every place that is not optional is detected, lies inside a detected stage, or holds
   detected stages that do at least half of its work;
3. their number is similar: at least half the person's, and at most twice as many plus the optional ones. So
   blocks may be paired up, or split in two, but the decoder is neither one stage nor a list of its layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from generators.entry import expand


def judge_stages(stages: Sequence[str], expected: str, work: Mapping[str, int] | None = None) -> str:
    """Compare detected stages with a person's; empty if a person would accept them, else what is wrong.

    Args:
        stages: Paths of the detected stages.
        expected: The person's list, in the notation of `Entry.stages`.
        work: MACs by module path; without them, any detected stage inside a place stands for it.

    Returns:
        The first objection, or an empty string.

    >>> judge_stages(["up.0", "up.1"], "?mid up.{0-1}")
    ''
    >>> judge_stages(["down.1", "up.0", "up.1"], "up.{0-1}")
    'down.1 is none of the stages'
    >>> judge_stages(["up.0.norm", "up.1"], "up.{0-1}", {"up.0": 10, "up.0.norm": 1, "up.1": 10})
    'up.0 is missing'
    """
    words = expand(expected)
    places = [word.removeprefix("?").split("|") for word in words]
    needed = [place for place, word in zip(places, words, strict=True) if not word.startswith("?")]
    for path in stages:
        if not any(_related(path, name) for place in places for name in place):
            return f"{path} is none of the stages"
        held = sum(any(_inside(name, path) for name in place) for place in needed)
        if held > 2:
            return f"{path} holds {held} stages"
    for place in needed:
        if not any(_is_detected(name, stages, work or {}) for name in place):
            return f"{place[0]} is missing"
    if not len(needed) <= 2 * len(stages):
        return f"{len(stages)} stages for {len(needed)}: too coarse"
    if not len(stages) <= len(needed) + len(places):
        return f"{len(stages)} stages for {len(needed)}: too fine"
    return ""


def _is_detected(name: str, stages: Sequence[str], work: Mapping[str, int]) -> bool:
    if any(path == name or _inside(name, path) for path in stages):
        return True
    parts = [path for path in stages if _inside(path, name)]
    # A container that is never called has no work of its own to compare with.
    return bool(parts) and 2 * sum(work.get(path, 0) for path in parts) >= work.get(name, 0)


def _inside(a: str, b: str) -> bool:
    return a.startswith(f"{b}.")


def _related(a: str, b: str) -> bool:
    return a == b or _inside(a, b) or _inside(b, a)
