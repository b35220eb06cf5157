"""File statistics, backbone features and near-duplicates of an image set, for the audit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import imagehash
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from horsehuman.data.image_sets import file_digest
from horsehuman.data.images import WHITE_LEVEL, PictureError, read_picture
from horsehuman.data.records import Record
from horsehuman.data.transforms import resize
from horsehuman.models.inception import Inception
from horsehuman.runtime import track

#: Two images are near-duplicates if their perceptual hashes differ in at most this many of 64 bits,
#: or if the cosine of their features is at least this large. Both were chosen on the subjects of
#: the training set; see docs/audit.md.
MAX_HASH_BITS, MIN_COSINE = 6, 0.94

#: Side in pixels of the square images that the backbone embeds.
IMAGE_SIZE = 150

# Images read at a time, and rows of cosines computed at a time. With 16,000 images, memory stays
# below 2 GB.
_BATCH, _CHUNK = 32, 256


@dataclass(frozen=True)
class ImageStats:
    """Statistics of one image file, independent of what the image shows.

    Attributes:
        record: The file with its label, group and split.
        digest: Digest of the file's bytes.
        file_format: Pillow's name of the file format; empty if the file cannot be read.
        mode: Pillow's name of the pixel mode, such as ``RGB``; empty if the file cannot be read.
        size: Width and height in pixels.
        brightness: Mean over pixels and channels, 0 (black) to 1 (white).
        white_edge: Share of the pixels on the image's edge that are white, 0 to 1.
        phash: Perceptual hash, bool ``(64,)``.
        error: Why the file cannot be read; empty if it can.
    """

    record: Record
    digest: bytes
    file_format: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    brightness: float = 0.0
    white_edge: float = 0.0
    phash: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(64, bool))
    error: str = ""


def read_all_stats(records: Sequence[Record]) -> tuple[list[ImageStats], Tensor, Tensor]:
    """Read all files and embed their images.

    Args:
        records: The files.

    Returns:
        The statistics of all files; the backbone features of the N readable ones, float32
        ``(N, F)``; and their pixels at 32 x 32, less each image's mean, float32 ``(N, 3072)``. The
        rows of both tensors have length 1.
    """
    network = Inception(image_size=IMAGE_SIZE, scales=[IMAGE_SIZE]).eval()
    cache = network.feature_cache()
    stats: list[ImageStats] = []
    features = torch.empty(len(records), network.width)
    pixels = torch.empty(len(records), 3 * 32 * 32)
    count = 0
    batches = range(0, len(records), _BATCH)
    with ThreadPoolExecutor(os.cpu_count()) as pool, torch.inference_mode():
        for start in track(batches, "reading images", len(batches)):
            results = list(pool.map(read_stats, records[start : start + _BATCH]))
            stats += [file_stats for file_stats, _ in results]
            if images := [image for _, image in results if image is not None]:
                batch = torch.stack(images)
                small = resize(batch, 32).flatten(1).float()
                small -= small.mean(1, keepdim=True)
                rows = slice(count, count + len(batch))
                features[rows] = functional.normalize(cache(batch), dim=1)
                pixels[rows] = functional.normalize(small, dim=1)
                count += len(batch)
    return stats, features[:count], pixels[:count]


def read_stats(record: Record) -> tuple[ImageStats, Tensor | None]:
    """Read one file.

    Args:
        record: The file.

    Returns:
        The file's statistics, and the image that the backbone embeds, uint8 ``(3, S, S)``;
        ``None`` if the file cannot be read.
    """
    digest = file_digest(record.path)
    try:
        pixels = read_picture(record.path)
        with Image.open(record.path) as image:
            file_format, mode, size = image.format or "", image.mode, image.size
            # MPO is a JPEG file with a second image, as phones write it.
            file_format = "JPEG" if file_format == "MPO" else file_format
    except (PictureError, OSError) as error:
        return ImageStats(record, digest, error=str(error)), None
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    stats = ImageStats(
        record,
        digest,
        file_format,
        mode,
        size,
        float(pixels.mean()) / 255,
        float((edge >= WHITE_LEVEL).all(1).mean()),
        imagehash.phash(Image.fromarray(pixels)).hash.ravel(),
    )
    return stats, resize(torch.from_numpy(pixels).permute(2, 0, 1), IMAGE_SIZE)


def cluster_near_duplicates(stats: Sequence[ImageStats], features: Tensor) -> list[str]:
    """Assign near-duplicates to the same cluster, directly or through a chain of others.

    Args:
        stats: Statistics of N readable images.
        features: Their features, ``(N, F)``, each row of length 1.

    Returns:
        The name of each image's cluster, N strings.
    """
    signs = torch.from_numpy(np.stack([image.phash for image in stats])).float() * 2 - 1
    parent = list(range(len(stats)))

    def find_root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for start, cosines in cosine_rows(features):
        distances = (64 - signs[start : start + len(cosines)] @ signs.T) / 2  # Hamming, in bits
        near = ((distances <= MAX_HASH_BITS) | (cosines >= MIN_COSINE)).nonzero()
        for row, column in near[near[:, 0] + start < near[:, 1]].tolist():
            parent[find_root(row + start)] = find_root(column)
    return [f"cluster {find_root(index)}" for index in range(len(stats))]


def cosine_rows(features: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the matrix of cosines between all images, some rows at a time.

    Args:
        features: ``(N, F)``, each row of length 1.

    Yields:
        The index of the first row, and the rows, ``(rows, N)``.
    """
    for start in range(0, len(features), _CHUNK):
        yield start, features[start : start + _CHUNK] @ features.T


def exclude_self(start: int, cosines: Tensor) -> Tensor:
    """Set the cosine of each image with itself to -1, in place.

    Args:
        start: Index of the first row, from :func:`cosine_rows`.
        cosines: The rows, ``(rows, N)``.

    Returns:
        ``cosines``.
    """
    rows = torch.arange(len(cosines))
    cosines[rows, rows + start] = -1
    return cosines
