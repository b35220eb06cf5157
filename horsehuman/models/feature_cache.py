"""Cache the features of a frozen backbone on disk, so that each image is embedded once."""

import hashlib
import logging
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from horsehuman.errors import printable

log = logging.getLogger(__name__)

#: Features ``(F,)`` by digest of the image.
Features = dict[bytes, Tensor]

# Version of the file format; part of each cache key.
_VERSION = 2

# Columns without a declared type have BLOB affinity: SQLite stores the bytes unchanged.
_SCHEMA = "CREATE TABLE IF NOT EXISTS features (picture PRIMARY KEY, feature) WITHOUT ROWID"


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
        self._disabled: set[str] = set()  # names of the methods that failed

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of a batch, and compute those that are not in the file.

        Args:
            images: uint8 of shape ``(N, 3, S, S)`` on the CPU, at least one.

        Returns:
            float32 of shape ``(N, F)``.
        """
        digests = [hashlib.blake2b(i.numpy().tobytes(), digest_size=20).digest() for i in images]
        features = self._try(self._read, digests) or {}
        new = {digest: index for index, digest in enumerate(digests) if digest not in features}
        if new:
            computed = dict(zip(new, self.embed(images[list(new.values())]), strict=True))
            self._try(self._write, computed)
            features |= computed
        return torch.stack([features[digest] for digest in digests])

    def _try(self, action: Callable[..., Features | None], argument: object) -> Features | None:
        """Call :meth:`_read` or :meth:`_write`, unless it failed before; log an error and go on."""
        if action.__name__ in self._disabled:
            return None
        try:
            return action(argument)
        except (OSError, sqlite3.OperationalError) as error:
            if not self._disabled:
                log.warning("features are not cached in %s: %s", printable(self.path), error)
            self._disabled.add(action.__name__)  # Only this one: a full disk can still be read.
        except sqlite3.DatabaseError as error:
            log.warning("%s is not a feature cache (%s): recreated", printable(self.path), error)
            try:
                self.path.unlink(missing_ok=True)
            except OSError:  # The folder is read-only.
                self._disabled |= {"_read", "_write"}
        return None

    def _read(self, digests: Sequence[bytes]) -> Features:
        """Return the intact features in the file."""
        placeholders = ",".join("?" * len(digests))
        query = f"SELECT picture, feature FROM features WHERE picture IN ({placeholders})"
        with self._open() as connection:
            rows = connection.execute(query, digests).fetchall()
        return {
            digest: torch.frombuffer(bytearray(value), dtype=torch.float32, offset=4)
            for digest, value in rows
            if isinstance(value, bytes) and value == _with_crc(digest, value[4:])
        }

    def _write(self, features: Features) -> None:
        """Write features in one transaction."""
        rows = [(digest, _with_crc(digest, f.numpy().tobytes())) for digest, f in features.items()]
        with self._open() as connection:
            connection.executemany("INSERT OR REPLACE INTO features VALUES (?, ?)", rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Begin a transaction, and create folder, file and table if necessary.

        Raises:
            OSError: If the folder cannot be created.
            sqlite3.Error: If the file cannot be opened, or is not a database.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self.path, timeout=60)) as connection, connection:
            connection.execute(_SCHEMA)
            yield connection


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
