"""Cut a recording between two nodes, and list what crosses the cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from retroexit.errors import AttachPointError
from retroexit.tracing.record import Recording

__all__ = ["Cut", "cut_at"]


@dataclass(frozen=True)
class Cut:
    """A place between two nodes of a recording.

    Attributes:
        position: Number of nodes before the cut.
        feature: Node of the stage's feature map, the branch's main input.
        live: Nodes of tensors that the rest needs besides the feature.
        rest: Nodes after the cut that the output depends on, in order. Sizes and attributes from before the
            cut that the rest reads are repeated here, so that only tensors cross.
    """

    position: int
    feature: fx.Node
    live: tuple[fx.Node, ...]
    rest: tuple[fx.Node, ...]

    @property
    def crossing(self) -> tuple[fx.Node, ...]:
        """All nodes whose values cross the cut, the feature first."""
        return (self.feature, *self.live)


def cut_at(recording: Recording, position: int, features: Sequence[fx.Node], where: str) -> Cut:
    """Cut a recording between two nodes.

    Args:
        recording: One execution of a generator.
        position: Number of nodes before the cut.
        features: Nodes that may be the stage's feature map, the likeliest first.
        where: Name of this place in errors.

    Raises:
        AttachPointError: If the output depends on none of them after this place.
    """
    nodes = recording.nodes
    index = {node: i for i, node in enumerate(nodes)}
    needed: set[fx.Node] = set(nodes[-1].all_input_nodes)
    rest: list[fx.Node] = [nodes[-1]]
    for node in reversed(nodes[position:-1]):
        if node in needed or node.meta.get("mutates"):
            needed.update(node.all_input_nodes)
            rest.append(node)
    # Sizes and attributes are read again, so that a part of a batch sees its own sizes.
    for node in reversed(nodes[:position]):
        if node in needed and (node.meta.get("size") or node.op == "get_attr"):
            needed.update(node.all_input_nodes)
            rest.append(node)
    live = [n for n in nodes[:position] if n in needed and not n.meta.get("size") and n.op != "get_attr"]
    feature = next((node for node in features if node in live), None)
    if feature is None:
        raise AttachPointError(
            f"no branch is possible {where}: the image does not depend on that feature map afterwards. "
            "Attach at one of the stages that 'retroexit inspect' lists.",
            where,
        )
    live.remove(feature)
    return Cut(position, feature, tuple(live), tuple(sorted(rest, key=index.__getitem__)))
