"""Is a saved or copied model the model? Features at every cut and images of every exit, bit for bit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import retroexit
from generators.entry import Entry, Made
from retroexit.core.nested import cloned
from retroexit.model import EarlyExitGenerator


def wrap_everywhere(entry: Entry, made: Made) -> EarlyExitGenerator:
    """Wrap with an exit after every stage but the last, where one is possible; a sole stage gets one before it."""
    stages = retroexit.find_stages(made.generator, made.args, made.kwargs, image=entry.image)
    settings: dict[str, Any] = {
        "min_channels": entry.floor,
        "example_inputs": cloned(made.args),
        "example_kwargs": cloned(made.kwargs),
        "adapter": False,
        "image": entry.image,
        "tap": "before" if len(stages) == 1 else "after",
    }
    places = list(range(1, max(2, len(stages))))
    try:
        return retroexit.wrap(made.generator, places, 1 / 4, **settings)
    except retroexit.errors.AttachPointError:
        places = [place for place in places if _is_possible(made, place, settings)]
        return retroexit.wrap(made.generator, places, 1 / 4, **settings)


def _is_possible(made: Made, place: int, settings: dict[str, Any]) -> bool:
    try:
        retroexit.wrap(made.generator, [place], 1 / 4, **settings)
    except retroexit.errors.AttachPointError:
        return False
    return True


def write(model: EarlyExitGenerator, made: Made, folder: Path) -> None:
    """Save a model, and what it renders."""
    model.save(folder / "model")
    torch.save(_renders(model, made), folder / "renders.pt")


def check(made: Made, folder: Path) -> str:
    """Load a model that `write` saved and compare what it renders; empty where all is equal."""
    model = retroexit.load(folder / "model", made.generator, cloned(made.args), cloned(made.kwargs), adapter=False)
    return _difference(torch.load(folder / "renders.pt"), _renders(model, made))


def check_copies(model: EarlyExitGenerator, made: Made) -> str:
    """Compare a deep copy and a pickled copy with the model; empty where all is equal.

    A kind of copy that the generator itself does not allow, as scripted modules do not, is left out.
    """
    expected = _renders(model, made)
    kinds = {"deep copy": copy.deepcopy, "pickle": lambda module: pickle.loads(pickle.dumps(module))}
    for kind, make_copy in kinds.items():
        try:
            make_copy(made.generator)
        except Exception:
            continue
        difference = _difference(expected, _renders(make_copy(model), made))
        if difference:
            return f"{kind}: {difference}"
    return ""


def _renders(model: EarlyExitGenerator, made: Made) -> dict[str, Tensor]:
    with torch.no_grad():
        torch.manual_seed(1)
        features = model.features(*cloned(made.args), **cloned(made.kwargs))
        torch.manual_seed(1)
        outputs = model.all_exits(*cloned(made.args), **cloned(made.kwargs))
    renders = {f"feature {i}": value for i, value in enumerate(features, 1)}
    return renders | {f"exit {i}": model.image(output) for i, output in enumerate(outputs, 1)}


def _difference(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> str:
    if expected.keys() != actual.keys():
        return f"{len(actual)} values instead of {len(expected)}"
    return ", ".join(name for name, value in expected.items() if not torch.equal(value, actual[name]))
