"""The processes that train together; each takes its part of a batch, and gradients are averaged."""

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

_TIMEOUT = timedelta(days=2)  # the first process computes features and bank alone


@dataclass(frozen=True)
class Team:
    """The processes of a fit; a single one by default."""

    rank: int = 0  # number of this process, from 0
    size: int = 1  # number of processes
    device: torch.device | None = None  # device of this process; None: the generator's

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """Return this process's part of a batch of ``count`` samples; raises `OptionError` if it does not divide."""
        if count % self.size:
            raise OptionError(f"batch must be a multiple of {self.size} processes, got {count}")
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def broadcast(self, module: nn.Module) -> None:
        """Copy the first process's parameters and buffers to every process."""
        for tensor in (*module.parameters(), *module.buffers()) if self.size > 1 else ():
            dist.broadcast(tensor.detach(), 0)

    def from_first(self, value: Any) -> Any:
        """Return the first process's value in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


def average(tensors: Sequence[Tensor]) -> None:
    """Replace floating point tensors by their means over all processes, in place."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    for kind in sorted({(t.dtype, t.device) for t in tensors}, key=str):
        same = [t for t in tensors if (t.dtype, t.device) == kind]
        flat = torch.cat([t.detach().reshape(-1) for t in same])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for tensor, mean in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.detach().copy_(mean.view_as(tensor))


def join(devices: int | None = None, nodes: int | None = None, accelerator: str = "cpu") -> Team:
    """Join the processes that torchrun started, or start one per device of every machine by Lightning Fabric.

    Fabric starts the running script once more for every further device.
    """
    running = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", str(running)))
    devices = local if devices is None else devices
    nodes = max(1, running // local) if nodes is None else nodes
    if dist.is_available() and dist.is_initialized():
        if dist.get_world_size() != devices * nodes:
            raise OptionError(
                f"devices x nodes must be the {dist.get_world_size()} running processes, got {devices} x "
                f"{nodes}. Leave both out."
            )
        index = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cpu") if accelerator == "cpu" else torch.device(accelerator, index)
        return Team(dist.get_rank(), dist.get_world_size(), device)
    check_devices(devices, nodes)
    if devices * nodes == 1:
        return Team()
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    strategy = DDPStrategy(timeout=_TIMEOUT)
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=strategy)
    fabric.launch()
    return Team(fabric.global_rank, fabric.world_size, fabric.device)


def check_devices(devices: int | None, nodes: int | None, batch: int | None = None) -> None:
    """Check that processes could be started and could divide a batch; starts nothing."""
    devices, nodes = 1 if devices is None else devices, 1 if nodes is None else nodes
    if min(devices, nodes) < 1:
        raise OptionError(f"devices and nodes must be >= 1, got {devices} and {nodes}")
    if batch is not None:
        Team(size=devices * nodes).part(batch)
    if devices * nodes > 1:
        try:
            is_installed = importlib.util.find_spec("lightning_fabric") is not None
        except ValueError:  # sys.modules has None for it
            is_installed = False
        if not is_installed:
            raise MissingExtraError("several devices need lightning-fabric: pip install 'retroexit[train]'")


def kind_of_device(accelerator: str | None) -> str:
    """Return the kind of device of a name; ``None`` and ``"auto"`` mean CUDA if available, else the CPU."""
    if accelerator not in (None, "auto"):
        return str(accelerator)
    return "cuda" if torch.cuda.is_available() else "cpu"
