"""What the processes of one run tell each other; one process alone is a group of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from horsehuman.errors import HorseHumanError, PeerGoneError, first_line

T = TypeVar("T")


@contextmanager
def process_group() -> Iterator[None]:
    """Be one of the processes that the environment tells of, as torchrun sets it.

    Gloo connects the CPUs and NCCL the GPUs. Where the environment tells of one, nothing happens.

    Raises:
        HorseHumanError: They cannot be connected.
        PeerGoneError: Another process has ended before its time.
    """
    if env_world_size() == 1:
        yield
        return
    try:
        distributed.init_process_group()
    except (RuntimeError, ValueError) as error:
        raise HorseHumanError(f"the processes cannot be connected: {first_line(error)}") from error
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error).lower():
            reason = f"another process of this run is gone ({first_line(error)})"
            raise PeerGoneError(reason) from error
        raise
    distributed.destroy_process_group()


def rank() -> int:
    """This process's number, from 0 on."""
    return distributed.get_rank() if _is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _is_initialized() else 1


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def broadcast(value: T) -> T:
    """What the first process gave here; all of them must come here."""
    values = [value]
    if world_size() > 1:
        distributed.broadcast_object_list(values)
    return values[0]


def all_gather(value: T) -> list[T]:
    """What each process gave here, in their order; all of them must come here."""
    values: list[T] = [value] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(values, value)
    return values


def shard_indices(count: int) -> range:
    """Which of ``count`` items are this process's: each is one process's."""
    return range(rank(), count, world_size())


def gather_sharded(part: Tensor) -> Tensor:
    """From what each process found for its :func:`shard_indices`, ``(n, ...)``, all of it, in order."""
    if world_size() == 1:
        return part
    parts = all_gather(part)
    found = part.new_empty(sum(map(len, parts)), *part.shape[1:])
    for first, values in enumerate(parts):
        found[first :: world_size()] = values
    return found


def sync_buffers(module: nn.Module) -> None:
    """Give all processes the first one's buffers: each has seen other batches."""
    if world_size() > 1:
        with torch.no_grad():
            for buffer in module.buffers():
                distributed.broadcast(buffer, 0)


def env_world_size() -> int:
    """How many processes this run has, as torchrun's environment tells."""
    return _read_env("WORLD_SIZE", 1) if "RANK" in os.environ else 1


def env_rank() -> int:
    """Which of them this is, from 0 on."""
    return _read_env("RANK", 0) if env_world_size() > 1 else 0


def env_local_rank() -> int:
    """Which of those on this machine this is, from 0 on."""
    return _read_env("LOCAL_RANK", 0) if env_world_size() > 1 else 0


def _read_env(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else otherwise
