"""Every hook that a plug-in may implement: signatures and documentation, nothing else.

A plug-in is a module, or an object that is no class, whose functions carry `hookimpl`; a distribution
announces it under the entry-point group ``retroexit``. A hook may leave out arguments that it does not need,
and may not give defaults to the others. Wrappers are not supported: every result has one author, so that a
mistake can be reported under its name. A hook for another version of retroexit, which this one does not know,
is marked ``hookimpl(optionalhook=True)``. Hooks are asked when something of their kind is first looked up;
import heavy dependencies inside them, or later.

A name that we offer stays ours. One that two other plug-ins offer is an error when it is asked for.
`retroexit.testing.check_adapter.check_adapter` tests what an adapter says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import pluggy
from torch import nn

from retroexit.plugins.description import Description

if TYPE_CHECKING:
    from retroexit.branch.widths.plan import WidthFunction
    from retroexit.metrics import QualityMetric
    from retroexit.plugins.training_types import BatchTerm, Term
    from retroexit.retrieval import Retriever

__all__ = [
    "GROUP",
    "hookimpl",
    "hookspec",
    "retroexit_build_stage",
    "retroexit_commands",
    "retroexit_describe",
    "retroexit_losses",
    "retroexit_metrics",
    "retroexit_retrievers",
    "retroexit_width_rules",
]

GROUP: Final = "retroexit"
"""Name of the entry-point group, and of the project in the eyes of pluggy."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec(firstresult=True)
def retroexit_describe(generator: nn.Module) -> Description | None:
    """Recognise a generator and describe it; the first plug-in that does is believed.

    Args:
        generator: The user's trained model. It must be neither run nor changed here.

    Returns:
        The description (stages, example inputs, discriminator and its objective, taps of key and value, the
        predictor's input), or ``None`` for a generator that this plug-in does not know.
    """


@hookspec(firstresult=True)
def retroexit_build_stage(stage: nn.Module, in_channels: int, out_channels: int) -> nn.Module | None:
    """Make a thin stage through the stage's own constructor; the first plug-in that does is believed.

    The first stage of a branch is asked for with the feature's full width, and the guide's channels come on
    top wherever a stage is handed the guide (paper sections 3.1, 4.1, 4.2). The result must run where the
    full stage did, with the same further arguments, and take its map first.

    Args:
        stage: The generator's own stage, at full width; neither run nor change it.
        in_channels: Channels of the map that goes in.
        out_channels: Channels of the map that comes out.

    Returns:
        A new stage of the same kind, or ``None`` for a stage that this plug-in does not know or would rather
        have narrowed.
    """


@hookspec
def retroexit_retrievers() -> dict[str, type[Retriever]]:  # type: ignore[empty-body]
    """Offer nearest-neighbour back-ends for the guidance bank.

    Returns:
        Classes derived from `retroexit.retrieval.Retriever` by the name under which users ask for them,
        ``Guidance(retriever=name)``, which is the class's own ``name`` too.
    """


@hookspec
def retroexit_metrics() -> dict[str, Callable[..., QualityMetric]]:  # type: ignore[empty-body]
    """Offer measures of the distance between an exit's image and the backbone's.

    Returns:
        Factories by the name under which users ask for them: ``fit(..., metric=name)``. Calling one makes a
        `retroexit.metrics.QualityMetric` whose ``name`` is the same; where the user names a file
        of weights, it is handed over as ``weights``.
    """


@hookspec
def retroexit_losses() -> dict[str, Callable[..., Term | BatchTerm]]:  # type: ignore[empty-body]
    """Offer terms of the loss that branches are trained with.

    Returns:
        Factories by the name under which users ask for them: ``fit(..., losses={name: weight})``. Calling one
        makes the term, which takes an exit's image and the backbone's, both ``(N, C, H, W)`` in [-1, 1], and
        returns a scalar or one number per image. ``torch.nn.HuberLoss`` is such a factory. A term that needs
        the generator's inputs too has ``needs_inputs = True`` and the method ``of_batch(batch)``, which takes
        a `retroexit.plugins.training_types.TrainingBatch`. Where the user names a file of weights, it is
        handed to the factory as ``weights``.
    """


@hookspec
def retroexit_width_rules() -> dict[str, WidthFunction]:  # type: ignore[empty-body]
    """Offer rules by which a branch's channel counts follow from the backbone's.

    Returns:
        Functions by the name under which users ask for them: ``wrap(..., width_rule=name)``. One is called
        with the backbone's channel count, the scale in (0, 1] and ``min_channels``, and returns an integer
        from 1 to the backbone's count.
    """


@hookspec
def retroexit_commands() -> dict[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """Offer commands of the command line.

    Returns:
        Functions with typer's annotations, or apps of sub-commands, by the word that calls them: ``retroexit
        name``. The docstring becomes the help, its section ``Example:`` the end of it.
    """
