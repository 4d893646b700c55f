"""When are found stages those that a person would pick? One rule for all generators.

A person's list says where the decoder's modules end. A found list is accepted if

1. nothing strange is in it: every found stage is one of the person's places, lies inside one, or holds
   some;
2. nothing is missing: every place of the person that is not optional is found, holds a found stage, or lies
   inside a found one;
3. the grain is alike: at least half and at most twice as many stages as the person has. So a finder may pair
   blocks up, or open each into two, but neither swallow the decoder whole nor list its layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from generators.entry import expand

__all__ = ["judge_stages"]


def judge_stages(found: Sequence[str], wanted: str) -> str:
    """Compare found stages with a person's; empty if a person would accept them, else what is wrong.

    Args:
        found: Paths that the finder returned.
        wanted: The person's list, in the notation of `Entry.stages`.

    Returns:
        The first objection, or an empty string.

    >>> judge_stages(["up.0", "up.1"], "?mid up.{0-1}")
    ''
    >>> judge_stages(["down.1", "up.0", "up.1"], "up.{0-1}")
    'down.1 is none of the stages'
    """
    places = [word.removeprefix("?").split("|") for word in expand(wanted)]
    needed = [place for place, word in zip(places, expand(wanted), strict=True) if not word.startswith("?")]
    for path in found:
        if not any(_related(path, name) for place in places for name in place):
            return f"{path} is none of the stages"
    for place in needed:
        if not any(_related(path, name) for path in found for name in place):
            return f"{place[0]} is missing"
    if not len(needed) <= 2 * len(found):
        return f"{len(found)} stages for {len(needed)}: too coarse"
    if not len(found) <= 2 * len(places):
        return f"{len(found)} stages for {len(places)}: too fine"
    return ""


def _related(a: str, b: str) -> bool:
    return f"{a}.".startswith(f"{b}.") or f"{b}.".startswith(f"{a}.")
