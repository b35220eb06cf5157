"""What files are, and which pictures look alike: what an audit is made of."""

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

#: Bits of 64 by which perceptual hashes of near-duplicates differ at most, and how alike (cosine)
#: their features are at least. Chosen on the figures of the training set; see docs/audit.md.
MAX_HASH_BITS, MIN_COSINE = 6, 0.94

#: Pixels that the trunk sees pictures at.
SIDE = 150

# Pictures read at a time, and rows of cosines: memory stays below 2 GB with 16,000 pictures.
_BATCH, _CHUNK = 32, 256


@dataclass(frozen=True)
class ImageStats:
    """What a file is, before anybody asks what it shows.

    Attributes:
        record: The picture.
        digest: Of its bytes.
        kind: Pillow's name of its format; empty where it cannot be read.
        mode: Of its pixels.
        size: Width and height.
        brightness: Mean, 0 to 1.
        white_edge: Share of the edge that is white.
        bits: Perceptual hash, 64 of 0 or 1.
        error: Why it cannot be read.
    """

    record: Record
    digest: bytes
    kind: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    brightness: float = 0.0
    white_edge: float = 0.0
    bits: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(64, bool))
    error: str = ""


def read_stats(record: Record) -> tuple[ImageStats, Tensor | None]:
    """Read a file; what it is, and the picture as the trunk sees it, uint8 ``(3, S, S)``."""
    own = file_digest(record.path)
    try:
        pixels = read_picture(record.path)
        with Image.open(record.path) as image:
            kind, mode, size = image.format or "", image.mode, image.size
            kind = "JPEG" if kind == "MPO" else kind  # a JPEG that holds a second picture
    except (PictureError, OSError) as error:
        return ImageStats(record, own, error=str(error)), None
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    look = ImageStats(
        record,
        own,
        kind,
        mode,
        size,
        float(pixels.mean()) / 255,
        float((edge >= WHITE_LEVEL).all(1).mean()),
        imagehash.phash(Image.fromarray(pixels)).hash.ravel(),
    )
    return look, resize(torch.from_numpy(pixels).permute(2, 0, 1), SIDE)


def read_all_stats(records: Sequence[Record]) -> tuple[list[ImageStats], Tensor, Tensor]:
    """Look at all files.

    Returns:
        What they are; of those that can be read features ``(N, F)`` and pixels ``(N, 3072)``, of
        32 x 32 pictures less their mean, both of length 1.
    """
    network = Inception(image_size=SIDE, scales=[SIDE]).eval()
    cache = network.feature_cache()
    looks: list[ImageStats] = []
    features = torch.empty(len(records), network.width)
    pixels = torch.empty(len(records), 3 * 32 * 32)
    count = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool, torch.inference_mode():
        for start in track(range(0, len(records), _BATCH), "looking", -(-len(records) // _BATCH)):
            found = list(pool.map(read_stats, records[start : start + _BATCH]))
            looks += [look for look, _ in found]
            if pictures := [picture for _, picture in found if picture is not None]:
                batch = torch.stack(pictures)
                small = resize(batch, 32).flatten(1).float()
                small -= small.mean(1, keepdim=True)
                new = slice(count, count + len(batch))
                features[new] = functional.normalize(cache(batch), dim=1)
                pixels[new] = functional.normalize(small, dim=1)
                count += len(batch)
    return looks, features[:count], pixels[:count]


def cosine_rows(features: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Cosines of all pictures to all, some rows at a time: first row, ``(rows, N)``."""
    for start in range(0, len(features), _CHUNK):
        yield start, features[start : start + _CHUNK] @ features.T


def exclude_self(start: int, cosine: Tensor) -> Tensor:
    """Rows of cosines of :func:`cosine_rows`; a picture is not its own neighbour."""
    rows = torch.arange(len(cosine))
    cosine[rows, rows + start] = -1
    return cosine


def cluster_near_duplicates(looks: Sequence[ImageStats], features: Tensor) -> list[str]:
    """Which pictures are near-duplicates, of each other or by way of others: a name for each."""
    bits = torch.from_numpy(np.stack([look.bits for look in looks])).float() * 2 - 1
    parent = list(range(len(looks)))

    def top(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for start, cosine in cosine_rows(features):
        apart = (64 - bits[start : start + len(cosine)] @ bits.T) / 2
        near = ((apart <= MAX_HASH_BITS) | (cosine >= MIN_COSINE)).nonzero()
        for row, column in near[near[:, 0] + start < near[:, 1]].tolist():
            parent[top(row + start)] = top(column)
    return [f"cluster {top(index)}" for index in range(len(looks))]
