"""What a discriminator says about images: scores, and the features on the way to them.

Discriminators differ in what they return. A tensor is the score. A list is the features of one discriminator
in order, its score last; a list of lists is several of them, as those of pix2pixHD at several scales. Where
features are not returned, they are listened to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from retroexit.core.nested import tensors
from retroexit.errors import OptionError, TrainingError, closest

__all__ = ["DiscriminatorOutput", "capture_features", "captured_layers"]

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class DiscriminatorOutput:
    """What a discriminator says about a batch of images.

    Attributes:
        output: What it returned.
        scores: Its scores, one tensor of any shape per discriminator in it.
        features: Its features, one list per discriminator in it; empty lists where it has none.
    """

    output: Any
    scores: list[Tensor]
    features: list[list[Tensor]]


def captured_layers(module: nn.Module) -> list[str]:
    """Name the modules whose outputs count as features, where a discriminator returns the score alone.

    They are its children with parameters; lists and sequences are opened, and so is an only child.
    """
    found = list(_children(module, ""))
    while len(found) == 1 and any(True for _ in module.get_submodule(found[0]).children()):
        found = list(_children(module.get_submodule(found[0]), found[0] + "."))
    return found


def capture_features(
    module: nn.Module, call: Callable[[], Any], layers: Sequence[str] | None = None
) -> DiscriminatorOutput:
    """Call a discriminator and read what it says.

    Args:
        module: The discriminator; hooks are put on it for the time of the call.
        call: Calls it.
        layers: Paths of modules whose outputs count as features, the first tensor of each;
            `captured_layers` if ``None``.

    Raises:
        OptionError: If there is no module at one of the paths.
        TrainingError: If it returns something else than described above.
    """
    parts = dict(module.named_modules())
    paths = captured_layers(module) if layers is None else list(layers)
    unknown = [path for path in paths if path not in parts]
    if unknown:
        raise OptionError(
            f"asked for the features of {unknown[0]!r}; found no such module in {type(module).__name__}. "
            f"Closest: {closest(unknown[0], [path for path in parts if path])}.",
            layers,
        )
    heard: list[Any] = []
    hooks = [parts[path].register_forward_hook(lambda _m, _i, out: heard.append(out)) for path in paths]
    try:
        output = call()
    finally:
        for hook in hooks:
            hook.remove()
    scales = _scales(output)
    if scales is None:
        raise TrainingError(
            f"asked {type(module).__name__} to judge images; found that it returned a "
            f"{type(output).__name__}. A discriminator returns a tensor of scores, a list whose last part is "
            "the score, or a list of such lists.",
            module,
        )
    scores = [scale[-1] for scale in scales]
    features = [scale[:-1] for scale in scales]
    if layers is not None or not any(features):
        maps = [next((x for x in tensors(out) if x.is_floating_point()), None) for out in heard]
        features = [[x for x in maps if x is not None and not any(x is score for score in scores)]]
    return DiscriminatorOutput(output, scores, features)


def _scales(output: Any) -> list[list[Tensor]] | None:
    """Read an output as one list per discriminator, the score last in each."""
    if isinstance(output, Tensor):
        return [[output]]
    if not isinstance(output, (list, tuple)) or not output:
        return None
    if all(isinstance(part, Tensor) for part in output):
        return [list(output)]
    lists = [list(part) if isinstance(part, (list, tuple)) else [part] for part in output]
    if all(part and all(isinstance(x, Tensor) for x in part) for part in lists):
        return lists
    return None


def _children(module: nn.Module, start: str) -> Iterator[str]:
    for name, child in module.named_children():
        if isinstance(child, _CONTAINERS):
            yield from _children(child, f"{start}{name}.")
        elif next(child.parameters(), None) is not None:
            yield start + name
