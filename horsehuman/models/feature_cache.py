"""Cache the features of a frozen backbone on disk, so that each image is embedded once."""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import zlib
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from horsehuman.errors import printable

log = logging.getLogger(__name__)

#: Function from uint8 images ``(N, 3, S, S)`` to features, float32 ``(N, F)``.
Embed = Callable[[Tensor], Tensor]

# Version of the file format; part of each file and of each cache key.
_VERSION = 2

# One statement, so that no other process can create the table between its two parts.
_STATE = """
SELECT (SELECT user_version FROM pragma_user_version), (SELECT count(*) FROM sqlite_master)
"""

# One transaction, so that other processes see both the table and its version, or neither.
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS features (picture BLOB PRIMARY KEY, feature BLOB) WITHOUT ROWID;
PRAGMA user_version = {_VERSION};
COMMIT;
"""


class FeatureCache:
    """Compute the features of images, and keep them in a SQLite file by digest of the pixels.

    Only images that are not in the file are embedded. Each batch is one transaction, so several
    processes can use a file at once, and an interrupted write leaves no trace. A file that is not
    a feature cache is deleted and created again. If the file cannot be written, features are
    computed without it. Either is logged in one line.

    Args:
        embed: Computes features, float32 ``(N, F)`` on the CPU, of uint8 images ``(N, 3, S, S)``.
        width: Number of features F.
        path: The file. Its name must identify everything but the image that the features depend
            on; see :func:`cache_key`.
    """

    def __init__(self, embed: Embed, width: int, path: Path) -> None:
        self.embed, self.width, self.path = embed, width, path
        self._disabled: set[str] = set()  # names of the methods that failed

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of a batch, and compute those that are not in the file.

        Args:
            images: uint8 of shape ``(N, 3, S, S)`` on the CPU.

        Returns:
            float32 of shape ``(N, F)``.
        """
        digests = [hashlib.blake2b(i.numpy().tobytes(), digest_size=20).digest() for i in images]
        cached = self._try(self._read, digests) or {}
        new = [index for index, digest in enumerate(digests) if digest not in cached]
        features = torch.empty(len(images), self.width)
        if new:
            features[new] = self.embed(images[new])
            rows = [(digests[index], _encode(digests[index], features[index])) for index in new]
            self._try(self._write, rows)
        for index, digest in enumerate(digests):
            if digest in cached:
                features[index] = cached[digest]
        return features

    def _try(
        self, action: Callable[..., dict[bytes, Tensor] | None], argument: Sequence[object]
    ) -> dict[bytes, Tensor] | None:
        """Call :meth:`_read` or :meth:`_write`, unless it failed before; log an error and go on."""
        if action.__name__ in self._disabled:
            return None
        try:
            return action(argument)
        except (OSError, sqlite3.OperationalError) as error:
            if not self._disabled:
                log.warning("features are not cached in %s: %s", printable(self.path), error)
            self._disabled.add(action.__name__)  # A full disk can still be read.
        except sqlite3.DatabaseError as error:
            log.warning("%s is not a feature cache (%s): recreated", printable(self.path), error)
            try:
                self.path.unlink(missing_ok=True)
            except OSError:  # The folder is read-only.
                self._disabled |= {"_read", "_write"}
        return None

    def _read(self, digests: Sequence[bytes]) -> dict[bytes, Tensor]:
        """Return the intact features ``(F,)`` in the file by digest."""
        marks = ",".join("?" * len(digests))
        query = f"SELECT picture, feature FROM features WHERE picture IN ({marks})"
        with closing(self._connect()) as connection:
            rows = connection.execute(query, digests).fetchall()
        features = {digest: _decode(digest, value, self.width) for digest, value in rows}
        return {digest: feature for digest, feature in features.items() if feature is not None}

    def _write(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Write digests and encoded features in one transaction."""
        with closing(self._connect()) as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", rows)

    def _connect(self) -> sqlite3.Connection:
        """Open the file, and create folder, file and table if necessary.

        Raises:
            OSError: If the folder cannot be created.
            sqlite3.Error: If the file cannot be opened, or is not a cache of this version.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=60)
        try:
            version, tables = connection.execute(_STATE).fetchone()
            if tables and version != _VERSION:
                raise sqlite3.DatabaseError(f"version {version}, expected {_VERSION}")
            if not tables:
                connection.executescript(_SCHEMA)
        except sqlite3.Error:
            connection.close()
            raise
        return connection


def _encode(digest: bytes, feature: Tensor) -> bytes:
    """Return a feature as bytes, after a CRC-32 of both the image's digest and the feature."""
    content = feature.numpy().tobytes()
    return zlib.crc32(digest + content).to_bytes(4, "big") + content


def _decode(digest: bytes, value: object, width: int) -> Tensor | None:
    """Return the feature ``(width,)`` of an encoded value; ``None`` if the value is damaged."""
    if not isinstance(value, bytes) or len(value) != 4 + 4 * width:
        return None
    if zlib.crc32(digest + value[4:]) != int.from_bytes(value[:4], "big"):
        return None
    return torch.from_numpy(np.frombuffer(value, np.float32, offset=4).copy())


def cache_key(backbone: torch.nn.Module, settings: object) -> str:
    """Compute a digest of everything but the image that features depend on, as 32 hex digits.

    Args:
        backbone: The frozen network. All its parameters and buffers are covered.
        settings: Cut, scales, preprocessing and pooling: any object with a ``repr`` that shows
            its whole value.
    """
    digest = hashlib.blake2b(repr((_VERSION, settings)).encode(), digest_size=16)
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
