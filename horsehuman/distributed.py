"""Ranks of one run: the process group, collectives, and torchrun's environment variables.

All ranks must call a collective. Without a process group the rank is 0, the world size is 1, and a
collective returns what it is given.
"""

import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, distributed, nn

from horsehuman.errors import HorseHumanError, ResumableError, first_line

T = TypeVar("T")

# Option of prctl(2) on Linux: the signal that a process gets when its parent ends.
_PR_SET_PDEATHSIG = 1


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group that torchrun's environment variables describe.

    Gloo connects CPUs and NCCL connects GPUs. With a world size of 1 no group is created. If all
    ranks are on this machine, they listen on the loopback interface only, unless the user has
    chosen another one: they unpickle what they receive.

    Raises:
        HorseHumanError: If the process group cannot be created.
        ResumableError: If another rank has exited while this one still needs it.
    """
    if env_world_size() == 1:
        yield
        return
    with contextlib.suppress(AttributeError, OSError):  # Linux: end when torchrun is killed
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)
    try:
        distributed.init_process_group()
    except (RuntimeError, ValueError) as error:
        raise HorseHumanError(f"cannot create the process group: {first_line(error)}") from error
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error).lower():
            reason = f"another rank of this run has exited ({first_line(error)})"
            raise ResumableError(reason) from error
        raise
    distributed.destroy_process_group()


def rank() -> int:
    """Return the rank of this process, from 0."""
    return distributed.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks in the process group."""
    return distributed.get_world_size() if _is_initialized() else 1


def _is_initialized() -> bool:
    """Return whether this process belongs to a process group."""
    return distributed.is_available() and distributed.is_initialized()


def broadcast(value: T) -> T:
    """Return rank 0's value on all ranks; a collective."""
    values = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(values)
    return values[0]


def all_gather(value: T) -> list[T]:
    """Return the values of all ranks, in the order of the ranks; a collective."""
    values: list[T] = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(values, value)
    return values


def gather_sharded(shard: Tensor) -> Tensor:
    """Gather each rank's shard and restore the dataset's order; a collective.

    Args:
        shard: ``(n, ...)``, the values of every ``world_size``-th item, from item ``rank`` on.

    Returns:
        ``(N, ...)``, the values of all items, on the device and with the dtype of ``shard``.
    """
    if world_size() == 1:
        return shard
    shards = all_gather(shard)
    values = shard.new_empty(sum(map(len, shards)), *shard.shape[1:])
    for first, part in enumerate(shards):
        values[first :: world_size()] = part
    return values


def sync_buffers(module: nn.Module) -> None:
    """Broadcast rank 0's buffers, such as batch-norm statistics, to all ranks; a collective.

    Each rank has updated its own buffers with other batches.

    Args:
        module: Its buffers are overwritten in place on all ranks but 0.
    """
    if world_size() > 1:
        for buffer in module.buffers():
            distributed.broadcast(buffer, 0)


def env_world_size() -> int:
    """Return the world size in torchrun's environment variables, or 1 without them."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def env_local_rank() -> int:
    """Return this process's rank among those on this machine, or 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", 0)) if env_world_size() > 1 else 0
