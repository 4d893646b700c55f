"""The processes that train together: who is first, who takes which part of a batch, means over all.

Lightning Fabric starts them, on one machine or, under torchrun, on several, and gives each its device. Every
process holds all branches, takes its part of each batch, and steps with the mean of all gradients, so that
several processes train as one does on the whole batch.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from retroexit.errors import MissingExtraError, OptionError

__all__ = ["Team", "join", "kind_of_device", "rehearse"]

_PATIENCE = timedelta(days=2)
"""How long processes wait for one another: the first one computes features and banks alone."""


@dataclass(frozen=True)
class Team:
    """The processes of a fit; a single one by default.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Where this process computes; ``None`` where the generator is.
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    @property
    def is_first(self) -> bool:
        """Tell whether this process writes files and shows progress."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Say which samples of a batch are this process's own.

        Raises:
            OptionError: If the batch does not divide.
        """
        if count % self.size:
            raise OptionError(
                f"asked for batch={count} on {self.size} processes; found that it does not divide. Use a "
                "multiple of it.",
                count,
            )
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of floating point by their means over all processes, in place."""
        kinds = {(t.dtype, t.device) for t in tensors}
        for kind in sorted(kinds, key=str) if self.size > 1 else ():
            same = [t for t in tensors if (t.dtype, t.device) == kind]
            flat = torch.cat([t.detach().reshape(-1) for t in same])
            dist.all_reduce(flat)
            flat /= self.size
            for tensor, mean in zip(same, flat.split([t.numel() for t in same]), strict=True):
                tensor.detach().copy_(mean.view_as(tensor))

    def average_gradients(self, module: nn.Module) -> None:
        """Let every backward pass end with gradients that are means over all processes."""
        if self.size > 1:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._average_gradient)

    def _average_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self.average([parameter.grad])

    def spread(self, module: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        for tensor in (*module.parameters(), *module.buffers()) if self.size > 1 else ():
            dist.broadcast(tensor.detach(), 0)

    def from_first(self, value: Any) -> Any:
        """Give every process what the first one holds; the others' values are dropped."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


def join(devices: int | None = None, nodes: int | None = None, accelerator: str = "cpu") -> Team:
    """Start the processes of a fit, or join those that run already.

    Under torchrun the numbers are known, and the processes run. Otherwise the script that is running is
    started once more for every further device, as Lightning Fabric does it. A single device needs nothing
    else.

    Args:
        devices: Devices, and so processes, on each machine; by default what torchrun says, or 1.
        nodes: Machines; likewise.
        accelerator: ``"cpu"``, ``"cuda"``, or another of Fabric's names.

    Returns:
        The processes, seen from this one.

    Raises:
        MissingExtraError: If there are several devices and no lightning-fabric.
        OptionError: If a number is below 1, or another one than torchrun's.
    """
    running = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(running)))
    wanted = (
        local if devices is None else devices,
        max(1, running // local) if nodes is None else nodes,
    )
    if min(wanted) < 1:
        raise OptionError(f"asked for devices={devices}, nodes={nodes}; found no integers >= 1.", wanted)
    if dist.is_available() and dist.is_initialized():
        return _checked(Team(dist.get_rank(), dist.get_world_size(), _own_device(accelerator)), wanted)
    if wanted == (1, 1):
        return Team()
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy
    except ImportError as error:
        raise _without_fabric(wanted[0] * wanted[1]) from error
    strategy = DDPStrategy(timeout=_PATIENCE)
    fabric = Fabric(accelerator=accelerator, devices=wanted[0], num_nodes=wanted[1], strategy=strategy)
    fabric.launch()
    return Team(fabric.global_rank, fabric.world_size, fabric.device)


def rehearse(devices: int | None, nodes: int | None, batch: int) -> None:
    """Refuse what a fit on such processes would be refused for; nothing is started.

    Raises:
        OptionError: If the batch does not divide.
        MissingExtraError: If there are several devices and no lightning-fabric.
    """
    size = (devices or 1) * (nodes or 1)
    Team(size=size).part(batch)
    if size > 1 and importlib.util.find_spec("lightning_fabric") is None:
        raise _without_fabric(size)


def _without_fabric(size: int) -> MissingExtraError:
    return MissingExtraError(
        f"asked for {size} devices; found no lightning-fabric, which starts their processes. Run: pip "
        "install 'retroexit[train]'"
    )


def kind_of_device(accelerator: str | None) -> str:
    """Say which kind of device a name means; ``None`` and ``"auto"`` take CUDA where there is some."""
    if accelerator not in (None, "auto"):
        return str(accelerator)
    return "cuda" if torch.cuda.is_available() else "cpu"


def _checked(team: Team, wanted: tuple[int, int]) -> Team:
    if team.size != wanted[0] * wanted[1]:
        raise OptionError(
            f"asked for {wanted[0]} devices on {wanted[1]} machines; found {team.size} processes. Leave "
            "devices and nodes out: they join what runs.",
            wanted,
        )
    return team


def _own_device(accelerator: str) -> torch.device:
    if accelerator == "cpu":
        return torch.device("cpu")
    return torch.device(accelerator, int(os.environ.get("LOCAL_RANK", "0")))
