"""What is known about a generator: told by the user, or asked of the plug-ins."""

from __future__ import annotations

from torch import nn

from retroexit.branch.adapter_stages import BuildStage
from retroexit.errors import OptionError
from retroexit.plugins.description import Description
from retroexit.plugins.host import host

__all__ = ["build_stage_of", "describe"]


def describe(generator: nn.Module, adapter: Description | str | bool | None) -> Description | None:
    """Say what is known about a generator.

    Args:
        generator: The user's trained model.
        adapter: What the user knows about it; the name of the plug-in to ask; ``False`` to ask none; ``None``
            to ask all.

    Returns:
        The description; one that says nothing where none is asked; ``None`` where all are asked and nobody
        knows the generator.

    Raises:
        OptionError: If the plug-in of that name does not recognise the generator.
        PluginError: If there is no plug-in of that name, or it is not in use.
    """
    if isinstance(adapter, Description):
        return adapter
    if adapter is False:
        return Description(name=type(generator).__name__)
    found = host().describe(generator, adapter if isinstance(adapter, str) else None)
    if isinstance(adapter, str) and found is None:
        raise OptionError(
            f"asked for adapter={adapter!r}; found that this plug-in does not recognise a "
            f"{type(generator).__name__}. Leave adapter out to ask all plug-ins, or pass a "
            "retroexit.Description.",
            adapter,
        )
    return found


def build_stage_of(known: Description | None, adapter: Description | str | bool | None) -> BuildStage | None:
    """Believe a description about its own generator; else ask the plug-ins that know a kind of stage."""
    if known is not None and known.build_stage is not None:
        return known.build_stage
    return None if adapter is False else host().build_stage
