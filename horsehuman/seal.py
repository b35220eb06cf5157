"""Checksums by which a file that was damaged is known, whatever was changed in it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

#: Where a checkpoint says what it holds, and under which name its checksum stands there.
ORIGIN, CHECKSUM = "horsehuman", "checksum"


def checksum(value: Any, crc: int = 0) -> int:
    """CRC-32 of tensors and plain values in dicts and lists, in their order."""
    if isinstance(value, Tensor):
        crc = zlib.crc32(f"{value.dtype} {tuple(value.shape)}".encode(), crc)
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return zlib.crc32(flat.numpy().data, crc)
    if isinstance(value, Mapping):
        for key, item in value.items():
            crc = checksum(item, zlib.crc32(repr(key).encode(errors="replace"), crc))
        return crc
    if isinstance(value, list | tuple):
        for item in value:
            crc = checksum(item, zlib.crc32(b",", crc))
        return crc
    return zlib.crc32(repr(value).encode(errors="replace"), crc)


def seal(checkpoint: dict[str, Any]) -> None:
    """Put its checksum into a checkpoint."""
    origin = {k: v for k, v in checkpoint.get(ORIGIN, {}).items() if k != CHECKSUM}
    checkpoint[ORIGIN] = {**origin, CHECKSUM: checksum({**checkpoint, ORIGIN: origin})}


def is_whole(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is as it was sealed; one that was not cannot be told."""
    origin = checkpoint.get(ORIGIN)
    if not isinstance(origin, Mapping) or CHECKSUM not in origin:
        return True
    bare = {k: v for k, v in origin.items() if k != CHECKSUM}
    return bool(checksum({**checkpoint, ORIGIN: bare}) == origin[CHECKSUM])
