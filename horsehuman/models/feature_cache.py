"""Pictures as a frozen backbone sees them, computed once and kept on disk."""

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

Embed = Callable[[Tensor], Tensor]

_VERSION = 2

# One statement: another process cannot make the table in between.
_STATE = """
SELECT (SELECT user_version FROM pragma_user_version), (SELECT count(*) FROM sqlite_master)
"""

# One transaction: another process sees all of it or nothing.
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS features (picture BLOB PRIMARY KEY, feature BLOB) WITHOUT ROWID;
PRAGMA user_version = {_VERSION};
COMMIT;
"""


class FeatureCache:
    """Remembers the features of each picture in a file, under the digest of its pixels.

    A picture that changes is computed again, the others are not. Each batch is one transaction
    of SQLite: several processes may use the file at once, and what was cut off is not seen.
    A file that is no such cache is thrown away, one that cannot be written is done without;
    either is said in one line.

    Args:
        embed: Pictures, uint8 ``(N, 3, S, S)``, to features, float32 ``(N, F)``, on the CPU.
        width: F.
        path: The file. Its name must stand for all that the features depend on but the picture;
            see :func:`cache_key`.
    """

    def __init__(self, embed: Embed, width: int, path: Path) -> None:
        self.embed, self.width, self.path = embed, width, path
        self._given_up: set[str] = set()

    def __call__(self, pictures: Tensor) -> Tensor:
        """Features of a batch, float32 ``(N, F)``; computes those that are not known yet."""
        digests = [hashlib.blake2b(p.numpy().tobytes(), digest_size=20).digest() for p in pictures]
        known = self._try(self._read, digests) or {}
        new = [index for index, digest in enumerate(digests) if digest not in known]
        features = torch.empty(len(pictures), self.width)
        if new:
            features[new] = self.embed(pictures[new])
            rows = [(digests[index], _packed(digests[index], features[index])) for index in new]
            self._try(self._write, rows)
        for index, digest in enumerate(digests):
            if digest in known:
                features[index] = known[digest]
        return features

    def _read(self, digests: Sequence[bytes]) -> dict[bytes, Tensor]:
        marks = ",".join("?" * len(digests))
        query = f"SELECT picture, feature FROM features WHERE picture IN ({marks})"
        with closing(self._connect()) as connection:
            rows = connection.execute(query, digests).fetchall()
        found = {digest: _unpacked(digest, value, self.width) for digest, value in rows}
        return {digest: feature for digest, feature in found.items() if feature is not None}

    def _write(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        with closing(self._connect()) as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", rows)

    def _connect(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=60)
        try:
            version, tables = connection.execute(_STATE).fetchone()
            if tables and version != _VERSION:
                raise sqlite3.DatabaseError(f"it has version {version}, not {_VERSION}")
            if not tables:
                connection.executescript(_SCHEMA)
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _try(
        self, action: Callable[..., dict[bytes, Tensor] | None], rows: Sequence[object]
    ) -> dict[bytes, Tensor] | None:
        if action.__name__ in self._given_up:
            return None
        try:
            return action(rows)
        except (OSError, sqlite3.OperationalError) as error:
            if not self._given_up:
                log.warning("features are not kept in %s: %s", printable(self.path), error)
            self._given_up.add(action.__name__)  # what is there already may still be read
        except sqlite3.DatabaseError as error:
            log.warning("%s is no cache of features (%s): made anew", printable(self.path), error)
            try:
                self.path.unlink(missing_ok=True)
            except OSError:  # a folder that cannot be written: done without
                self._given_up |= {"_read", "_write"}
        return None


def _packed(digest: bytes, feature: Tensor) -> bytes:
    """A feature with a checksum that is of its picture, too."""
    content = feature.numpy().tobytes()
    return zlib.crc32(digest + content).to_bytes(4, "big") + content


def _unpacked(digest: bytes, value: object, width: int) -> Tensor | None:
    """The feature ``(F,)``; ``None`` where it was damaged."""
    if not isinstance(value, bytes) or len(value) != 4 + 4 * width:
        return None
    if zlib.crc32(digest + value[4:]) != int.from_bytes(value[:4], "big"):
        return None
    return torch.from_numpy(np.frombuffer(value, np.float32, offset=4).copy())


def cache_key(backbone: torch.nn.Module, settings: object) -> str:
    """A name for what features depend on: the weights and all settings, as 32 hex digits.

    Args:
        backbone: The frozen network.
        settings: Anything with a faithful ``repr``: cut, scales, preprocessing, pooling.
    """
    digest = hashlib.blake2b(repr((_VERSION, settings)).encode(), digest_size=16)
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
