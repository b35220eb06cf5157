"""Cache the features of a frozen backbone on disk, so that each image is embedded once."""

import hashlib
import logging
import sqlite3
import zlib
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from horsehuman.errors import printable

log = logging.getLogger(__name__)

# Version of the file format; part of each cache key.
_VERSION = 2

# Columns without a declared type have BLOB affinity: SQLite stores the bytes unchanged.
_SCHEMA = "CREATE TABLE IF NOT EXISTS features (picture PRIMARY KEY, feature) WITHOUT ROWID"
_READ = "SELECT picture, feature FROM features WHERE picture = ?"
_WRITE = "INSERT OR REPLACE INTO features VALUES (?, ?)"


class FeatureCache:
    """Compute the features of images, and keep them in a SQLite file by digest of the pixels.

    Only images that are not in the file are embedded. Each batch is one transaction, so several
    processes can use a file at once, and an interrupted write leaves no trace. A file that is not
    a database, or a damaged one, is deleted and created again. If the file cannot be written,
    features are computed without it. Either is logged in one line.

    Args:
        embed: Computes features, float32 ``(N, F)`` on the CPU, of uint8 images ``(N, 3, S, S)``.
        path: The file. Its name must identify everything but the image that the features depend
            on; see :func:`cache_key`.
    """

    def __init__(self, embed: Callable[[Tensor], Tensor], path: Path) -> None:
        self.embed, self.path = embed, path
        self._disabled: set[str] = set()  # the statements that failed

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of a batch, and compute those that are not in the file.

        Args:
            images: uint8 of shape ``(N, 3, S, S)`` on the CPU, at least one.

        Returns:
            float32 of shape ``(N, F)``.
        """
        digests = [hashlib.blake2b(i.numpy().tobytes(), digest_size=20).digest() for i in images]
        features = {
            digest: torch.frombuffer(bytearray(value), dtype=torch.float32, offset=4)
            for digest, value in self._execute(_READ, ((digest,) for digest in digests))
            if isinstance(value, bytes) and value == _with_crc(digest, value[4:])
        }
        new = {digest: index for index, digest in enumerate(digests) if digest not in features}
        if new:
            computed = dict(zip(new, self.embed(images[list(new.values())]), strict=True))
            rows = [(key, _with_crc(key, f.numpy().tobytes())) for key, f in computed.items()]
            self._execute(_WRITE, rows)
            features |= computed
        return torch.stack([features[digest] for digest in digests])

    def _execute(self, statement: str, rows: Iterable[tuple[bytes, ...]]) -> list[Any]:
        """Execute a statement for each row in one transaction; log an error and go on.

        Folder, file and table are created if necessary.

        Args:
            statement: :data:`_READ` or :data:`_WRITE`; it is not executed if it failed before.
            rows: Parameters of the statement.

        Returns:
            What the statement selects; empty after an error.
        """
        if statement in self._disabled:
            return []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=60)) as connection, connection:
                connection.execute(_SCHEMA)
                return [found for row in rows for found in connection.execute(statement, row)]
        except (OSError, sqlite3.OperationalError) as error:
            if not self._disabled:
                log.warning("features are not cached in %s: %s", printable(self.path), error)
            self._disabled.add(statement)  # Only this one: a full disk can still be read.
        except sqlite3.DatabaseError as error:
            log.warning("%s is not a feature cache (%s): recreated", printable(self.path), error)
            try:
                self.path.unlink(missing_ok=True)
            except OSError:  # The folder is read-only.
                self._disabled |= {_READ, _WRITE}
        return []


def _with_crc(digest: bytes, content: bytes) -> bytes:
    """Return the bytes of a feature after a CRC-32 of both the image's digest and the feature."""
    return zlib.crc32(digest + content).to_bytes(4, "big") + content


def cache_key(backbone: torch.nn.Module, settings: object) -> str:
    """Compute a digest of everything but the image that features depend on, as 32 hex digits.

    Args:
        backbone: The frozen network. All its parameters and buffers are covered.
        settings: Cut, scales, preprocessing and pooling, and where and in which precision they are
            computed: any object with a ``repr`` that shows its whole value.
    """
    digest = hashlib.blake2b(repr((_VERSION, settings)).encode(), digest_size=16)
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
