"""Options of ``retroexit fit`` that say what branches are trained on, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from retroexit.cli.load_target import load_network
from retroexit.errors import OptionError
from retroexit.training.losses.plan import PRESETS

__all__ = [
    "Adversarial",
    "Discriminator",
    "DiscriminatorLr",
    "Equalise",
    "EqualiseSteps",
    "Gaze",
    "Instead",
    "Loss",
    "LossWeights",
    "discriminator_source",
    "loss_arguments",
    "parse_losses",
]

Loss = Annotated[
    list[str] | None,
    typer.Option(
        help="Term of the training loss and its weight, name=weight; repeat it for several. Or a preset: "
        f"{', '.join(PRESETS)}. By default l1=1 and quality=1, the metric."
    ),
]
Equalise = Annotated[
    bool | None,
    typer.Option(
        "--equalise/--no-equalise",
        help="Multiply weights such that all terms pull equally; by default for presets alone.",
        show_default=False,
    ),
]
EqualiseSteps = Annotated[
    int | None, typer.Option(min=1, help="Steps during which that is measured, 50 by default.")
]
Instead = Annotated[
    list[str] | None,
    typer.Option(help="Term that takes the place of another one: vgg=features-alex; repeat it for several."),
]
LossWeights = Annotated[
    list[str] | None,
    typer.Option(help="File with the weights of a term's network: vgg=vgg19.pth; repeat it for several."),
]
Discriminator = Annotated[
    str,
    typer.Option(
        help="What every branch competes with a copy of: auto (the adapter's, untrained), none, a file with "
        "its trained weights, or package.module:factory."
    ),
]
Adversarial = Annotated[
    str | None,
    typer.Option(help="How they compete: hinge or non-saturating; by default as adapter or preset say."),
]
DiscriminatorLr = Annotated[float, typer.Option(min=0, help="Learning rate of the discriminators.")]
Gaze = Annotated[
    str | None, typer.Option(help="Gaze network of the term gaze: package.module:factory, or the module.")
]


def loss_arguments(
    loss: Sequence[str] | None,
    equalise: bool | None,
    equalise_steps: int | None,
    instead: Sequence[str] | None,
    loss_weights: Sequence[str] | None,
    discriminator: str,
    adversarial: str | None,
    discriminator_lr: float,
    gaze: str | None,
) -> dict[str, Any]:
    """Turn what was asked into arguments of `retroexit.fit`.

    Raises:
        OptionError: If a text is not of the form that its option has, or a network cannot be made.
    """
    if equalise_steps is not None and equalise is False:
        raise OptionError(
            f"asked for --no-equalise and --equalise-steps {equalise_steps}; found that they exclude one "
            "another. Leave one out.",
            equalise_steps,
        )
    found: dict[str, Any] = {
        "equalise": equalise if equalise_steps is None else equalise_steps,
        "instead": _pairs("--instead", instead or [], "vgg=features-alex"),
        "loss_weights": _pairs("--loss-weights", loss_weights or [], "vgg=vgg19.pth"),
        "discriminator": _opponent(discriminator),
        "adversarial": adversarial,
        "discriminator_lr": discriminator_lr,
        "gaze": None if gaze is None else load_network(gaze, "--gaze"),
    }
    losses = parse_losses(loss or [])
    return found if not losses else {**found, "losses": losses}


def parse_losses(texts: Sequence[str]) -> dict[str, float] | str:
    """Read ``name=weight``, once for each term of the loss, or the name of a preset, alone.

    Raises:
        OptionError: If one is not of this form, or a name occurs twice.
    """
    if len(texts) == 1 and texts[0] in PRESETS:
        return texts[0]
    losses: dict[str, float] = {}
    for name, weight in _pairs("--loss", texts, "l1=1", f", or one of {', '.join(PRESETS)} alone").items():
        try:
            losses[name] = float(weight)
        except ValueError:
            raise OptionError(
                f"asked for --loss {name}={weight}; found no weight behind a '='. Write l1=1.", weight
            ) from None
    return losses


def _pairs(option: str, texts: Sequence[str], example: str, or_else: str = "") -> dict[str, str]:
    """Read ``name=value`` texts."""
    found: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not value or not name or name in found:
            what = "no weight" if option == "--loss" else "nothing"
            cause = f"{what} behind a '='" if not value else "a name given twice" if name else "no name"
            raise OptionError(f"asked for {option} {text}; found {cause}. Write {example}{or_else}.", text)
        found[name] = value
    return found


def _opponent(text: str) -> nn.Module | str | Path | None:
    """Read where discriminators begin."""
    if text in ("auto", "none"):
        return None if text == "none" else text
    if ":" in text and not Path(text).exists():
        return load_network(text, "--discriminator")
    return Path(text)


def discriminator_source(text: str) -> str:
    """Say where the weights of discriminators come from."""
    return {"auto": "none: as the adapter makes it, untrained", "none": ""}.get(text, text)
