"""The hooks that a plug-in may implement: signatures and documentation.

A plug-in is a module or object whose functions are marked with `hookimpl`, announced under the entry-point group
``retroexit``. An implementation may leave out arguments. Hook wrappers are not supported. A hook of another version of
retroexit needs ``hookimpl(optionalhook=True)``. Names of the library cannot be replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pluggy
from torch import nn

from retroexit.branch.branch import Branch
from retroexit.branch.widths.plan import WidthFunction
from retroexit.metrics import QualityMetric
from retroexit.plugins.description import Description
from retroexit.plugins.training_types import RESERVED_LOSSES
from retroexit.retrieval import Retriever

GROUP: Final = "retroexit"
"""The entry-point group, and the project's name in pluggy."""

RESERVED: Final = {
    "retroexit_metrics": {"auto": "the best metric that is available", "lpips": "'lpips-alex'"},
    "retroexit_losses": RESERVED_LOSSES,
    "retroexit_branch_kinds": {"auto": "a choice between 'copy', 'subpixel' and 'stitch'"},
}
"""Names that no plug-in can offer, with their meaning, by hook."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec(firstresult=True)
def retroexit_describe(generator: nn.Module) -> Description | None:
    """Describe a generator, without running or changing it; the first description is used, newest plug-in first.

    Returns:
        The description, or ``None`` for a generator that this plug-in does not know.
    """


@hookspec(firstresult=True)
def retroexit_build_stage(stage: nn.Module, in_channels: int, out_channels: int) -> nn.Module | None:
    """Make a thin stage through the stage's own constructor; the first result is used, newest plug-in first.

    Args:
        stage: The generator's stage at full width. It must be neither run nor changed here.
        in_channels: Channels of the input map: the feature's full width at the first stage of a branch, and those of
            the guide where a stage receives it.
        out_channels: Channels of the output map.

    Returns:
        A new stage of the same kind, which takes the map first and then the same arguments as the full stage, or
            ``None`` to have the stage narrowed by retroexit.
    """


@hookspec
def retroexit_retrievers() -> dict[str, type[Retriever]]:  # type: ignore[empty-body]
    """Offer nearest-neighbour back-ends for the guidance bank.

    Returns:
        Subclasses of `retroexit.retrieval.Retriever` by ``name``, for ``Guidance(retriever=name)``.
    """


@hookspec
def retroexit_metrics() -> dict[str, Callable[..., QualityMetric]]:  # type: ignore[empty-body]
    """Offer losses between an exit's image and the backbone's.

    Returns:
        Factories of `retroexit.metrics.QualityMetric` by the ``name`` of what they make, for ``fit(..., metric=name)``.
            A file of weights named by the user is passed as ``weights``.
    """


@hookspec
def retroexit_losses() -> dict[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """Offer terms of the loss that branches are trained with.

    Returns:
        Factories by the name that users pass as ``fit(..., losses={name: weight})``. A factory makes a callable that
            takes an exit's image and the backbone's, both ``(N, C, H, W)`` in [-1, 1], and returns a scalar or one
            number per image. A term that also needs the generator's inputs has ``needs_inputs = True`` and a method
            ``of_batch(batch)``, which takes a `retroexit.plugins.training_types.TrainingBatch`. A file of weights named
            by the user is passed as ``weights``.
    """


@hookspec
def retroexit_width_rules() -> dict[str, WidthFunction]:  # type: ignore[empty-body]
    """Offer rules for the channel counts of a branch.

    Returns:
        Functions by the name in ``wrap(..., width_rule=name)``, which take the backbone's count, the scale in (0, 1]
            and ``min_channels``, and return an integer from 1 to the backbone's count.
    """


@hookspec
def retroexit_branch_kinds() -> dict[str, Callable[..., Branch]]:  # type: ignore[empty-body]
    """Offer kinds of branches.

    Returns:
        Builders by the name in ``wrap(..., branch=name)``. A builder takes ``(tail, cut, values, spec, plan)``, see
            `retroexit.branch.builder.build_branch`, and returns a `retroexit.branch.branch.Branch` whose ``kind`` is
            the name. Its ``plan`` has JSON types; a saved model passes it back, otherwise ``plan`` is ``None``.
    """


@hookspec
def retroexit_commands() -> dict[str, Callable[..., Any]]:  # type: ignore[empty-body]
    """Offer commands of the command line.

    Returns:
        Functions with typer's annotations, or typer apps, by name: ``retroexit name``. The docstring becomes the help
            text, its section ``Example:`` the end of it.
    """


HOOKS: Final = tuple(name for name in globals() if name.startswith(f"{GROUP}_"))
