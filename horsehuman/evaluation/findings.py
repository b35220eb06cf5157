"""Checks of an image set before training: files, copies, balance, backgrounds, groups, labels."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

import imagehash
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.nn import functional

from horsehuman.data.image_sets import ImageSet
from horsehuman.data.images import WHITE_LEVEL, PictureError, read_picture
from horsehuman.data.records import Record, file_digest, is_unbalanced
from horsehuman.data.transforms import resize
from horsehuman.models.calibration import cross_validated_probabilities
from horsehuman.models.inception import Inception
from horsehuman.runtime import track

R = TypeVar("R", bound=Record)

Severity = Literal["error", "warning", "note"]

#: The severities, the most severe first.
SEVERITIES = get_args(Severity)

#: Probability of an image's label below which the label is suspicious. With flipped labels in the
#: official training set, few of these are missed and few others are reported; see docs/audit.md.
LABEL_THRESHOLD = 0.1

#: What to do about another background in another split or class.
BACKGROUND_REMEDIES = {
    "splits": "augment with the other split's background; the test will be harder than validation",
    "classes": "a model can learn the background instead of the subject: mix backgrounds",
}


#: Two images are near-duplicates if their perceptual hashes differ in at most this many of 64 bits,
#: or if the cosine of their features is at least this large. Both were chosen on the subjects of
#: the training set; see docs/audit.md.
MAX_HASH_BITS, MIN_COSINE = 6, 0.94

#: Side in pixels of the square images that the backbone embeds.
IMAGE_SIZE = 150

# Images read at a time, and rows of cosines computed at a time. With 16,000 images, memory stays
# below 2 GB.
_BATCH, _CHUNK = 32, 256


@dataclass(frozen=True, eq=False)
class ImageStats(Record):
    """A record with statistics of its image file, which are empty if it cannot be read.

    Attributes:
        digest: Digest of the file's bytes.
        file_format: Pillow's name of the file format.
        mode: Pillow's name of the pixel mode, such as ``RGB``.
        size: Width and height in pixels.
        brightness: Mean over pixels and channels, 0 (black) to 1 (white).
        white_edge: Share of the pixels on the image's edge that are white, 0 to 1.
        phash: Perceptual hash, bool ``(64,)``.
        error: Why the file cannot be read; empty if it can.
    """

    digest: bytes
    file_format: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    brightness: float = 0.0
    white_edge: float = 0.0
    phash: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(64, bool))
    error: str = ""


@dataclass(frozen=True)
class Finding:
    """One problem of an image set, or one fact worth knowing.

    Attributes:
        severity: ``error`` if it makes metrics wrong, ``warning`` if it may, ``note`` if it only
            informs.
        message: One line that describes it.
        remedy: One line that describes what to do; empty for a note.
        rows: The images concerned; each row contains images that belong together.
    """

    severity: Severity
    message: str
    remedy: str = ""
    rows: Sequence[Sequence[Record]] = field(default_factory=list)


def audit(image_set: ImageSet) -> list[Finding]:
    """Run all checks on an image set and return the findings, the most severe first."""
    names = image_set.class_names
    stats, features, pixels = read_all_stats(image_set.records)
    findings = list(check_files(stats))
    if readable := [image for image in stats if not image.error]:
        hashes = torch.from_numpy(np.stack([image.phash for image in readable]))
        clusters = cluster_near_duplicates(features, hashes)
        groups = [image.group for image in readable] if image_set.grouped else clusters
        rows = sorted(rows_by(readable, clusters), key=len, reverse=True)
        findings += [*check_duplicates(readable, names), *check_balance(readable, names)]
        findings += [*check_formats(readable), *check_background(readable, names)]
        findings += check_near_duplicates(readable, rows, features, grouped=image_set.grouped)
        findings += check_random_split(readable, pixels, groups)
        findings += check_labels(readable, features, groups, names)
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


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
    features, pixels = [torch.empty(0, network.width)], [torch.empty(0, 3 * 32 * 32)]
    batches = range(0, len(records), _BATCH)
    with ThreadPoolExecutor(os.cpu_count()) as pool, torch.inference_mode():
        for start in track(batches, "reading images", len(batches)):
            results = list(pool.map(read_stats, records[start : start + _BATCH]))
            stats += [file_stats for file_stats, _ in results]
            if images := [image for _, image in results if image is not None]:
                batch = torch.stack(images)
                small = resize(batch, 32).flatten(1).float()
                small -= small.mean(1, keepdim=True)
                features.append(functional.normalize(cache(batch), dim=1))
                pixels.append(functional.normalize(small, dim=1))
    return stats, torch.cat(features), torch.cat(pixels)


def read_stats(record: Record) -> tuple[ImageStats, Tensor | None]:
    """Read one file.

    Args:
        record: The file.

    Returns:
        The file's statistics, and the image that the backbone embeds, uint8 ``(3, S, S)``;
        ``None`` if the file cannot be read.
    """
    identity = (record.path, record.label, record.group, record.split, file_digest(record.path))
    try:
        pixels = read_picture(record.path)
        with Image.open(record.path) as image:
            # MPO is a JPEG file with a second image, as phones write it.
            properties = (image.format or "").replace("MPO", "JPEG"), image.mode, image.size
    except (PictureError, OSError) as error:
        return ImageStats(*identity, error=str(error)), None
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    white = float((edge >= WHITE_LEVEL).all(1).mean())
    brightness = float(pixels.mean()) / 255
    phash = imagehash.phash(Image.fromarray(pixels)).hash.ravel()
    stats = ImageStats(*identity, *properties, brightness, white, phash)
    return stats, resize(torch.from_numpy(pixels).permute(2, 0, 1), IMAGE_SIZE)


def check_files(stats: Sequence[ImageStats]) -> Iterator[Finding]:
    """Report files that cannot be read, and files whose suffix does not match their format.

    Args:
        stats: Statistics of all files, unreadable ones included.
    """
    if bad := [image for image in stats if image.error]:
        message = f"{len(bad)} files cannot be read ({bad[0].error})"
        yield Finding("error", message, "repair or remove them", [bad])
    formats = Image.registered_extensions()
    named = [(image, formats.get(image.path.suffix.lower())) for image in stats]
    if bad := [image for image, name in named if name and image.file_format not in ("", name)]:
        example = f"{bad[0].path.name} is {bad[0].file_format}"
        message = f"{len(bad)} files have a suffix that does not match their format ({example})"
        remedy = "rename them: other programs may refuse to read them"
        yield Finding("warning", message, remedy, [bad])


def check_duplicates(stats: Sequence[ImageStats], class_names: Sequence[str]) -> Iterator[Finding]:
    """Report byte-identical files.

    Args:
        stats: Statistics of the readable images.
        class_names: Names of class 0 and class 1.
    """
    copies = [row for row in rows_by(stats, [image.digest for image in stats]) if len(row) > 1]
    both_classes = [row for row in copies if len({image.label for image in row}) > 1]
    across = [row for row in copies if len({image.split for image in row}) > 1]
    within = [row for row in copies if row not in both_classes and row not in across]
    if rows := both_classes:
        message = f"{len(rows)} pictures have copies in both classes, {' and '.join(class_names)}"
        yield Finding("error", message, "keep only the copies with the right label", rows)
    if rows := across:
        message = f"{len(rows)} pictures have copies in more than one split"
        remedy = "keep each picture in one split: copies make test metrics too optimistic"
        yield Finding("error", message, remedy, rows)
    if rows := within:
        message = f"{len(rows)} pictures have copies in the same class and split"
        yield Finding("warning", message, "remove the copies", rows)


def check_balance(stats: Sequence[ImageStats], class_names: Sequence[str]) -> Iterator[Finding]:
    """Count the images of each class; warn if the classes are unbalanced.

    Args:
        stats: Statistics of the readable images.
        class_names: Names of class 0 and class 1.
    """
    counts = [sum(image.label == label for image in stats) for label in (0, 1)]
    text = " and ".join(f"{n:,} {name}" for n, name in zip(counts, class_names, strict=True))
    if is_unbalanced([image.label for image in stats]):
        remedy = "add pictures to the smaller class; data.prior=0.5 finds more of it; "
        remedy += "use balanced accuracy instead of accuracy"
        yield Finding("warning", f"the classes are not balanced: {text}", remedy)
    else:
        yield Finding("note", text)


def check_formats(stats: Sequence[ImageStats]) -> Iterator[Finding]:
    """Summarize formats, pixel modes, sizes and brightness; warn about images below 64 pixels.

    Args:
        stats: Statistics of the readable images.
    """
    counts = (Counter(image.file_format for image in stats), Counter(image.mode for image in stats))
    kinds = "; ".join(", ".join(f"{n:,} {name}" for name, n in c.most_common()) for c in counts)
    sides = [min(image.size) for image in stats]
    brightness = np.mean([image.brightness for image in stats])
    text = f"{kinds}; shorter side {min(sides)} to {max(sides)} pixels; "
    yield Finding("note", f"{text}mean brightness {brightness:.2f}")
    if small := [image for image in stats if min(image.size) < 64]:
        message = f"{len(small)} pictures have a side of less than 64 pixels"
        yield Finding("warning", message, "replace them with larger ones", [small])


def check_background(stats: Sequence[ImageStats], class_names: Sequence[str]) -> Iterator[Finding]:
    """Warn if splits or classes differ by more than 0.25 in mean white edge or brightness.

    Args:
        stats: Statistics of the readable images.
        class_names: Names of class 0 and class 1.
    """
    splits = np.array([image.split or "none" for image in stats])
    classes = np.array([class_names[image.label] for image in stats])
    edges = np.array([image.white_edge for image in stats])
    brightness = np.array([image.brightness for image in stats])
    for kind, parts in (("splits", splits), ("classes", classes)):
        for name, values in (("white edges", edges), ("brightness", brightness)):
            means = {part: float(values[parts == part].mean()) for part in dict.fromkeys(parts)}
            if max(means.values()) - min(means.values()) > 0.25:
                text = ", ".join(f"{part} {mean:.2f}" for part, mean in means.items())
                message = f"{kind} differ in {name}: {text}"
                yield Finding("warning", message, BACKGROUND_REMEDIES[kind])


def cluster_near_duplicates(features: Tensor, hashes: Tensor | None = None) -> list[str]:
    """Assign near-duplicates to the same cluster, directly or through a chain of others.

    Args:
        features: Features of N images, ``(N, F)``, each row of length 1.
        hashes: Their perceptual hashes, bool ``(N, 64)``; ``None`` compares features only.

    Returns:
        The name of each image's cluster, N strings.
    """
    count = len(features)
    signs = None if hashes is None else hashes.float() * 2 - 1
    clusters = np.arange(count)
    for index, cosines in cosine_rows(features):
        near = cosines >= MIN_COSINE
        if signs is not None:
            near |= (64 - signs[index] @ signs.T) / 2 <= MAX_HASH_BITS  # Hamming distance
        rows, columns = near.numpy().nonzero()
        # Join the clusters of the rows before, so that not all pairs are in memory at a time.
        pairs = clusters[index.numpy()[rows]], clusters[columns]
        graph = coo_array((np.ones(len(rows), bool), pairs), (count, count))
        clusters = connected_components(graph, directed=False)[1][clusters]
    return [f"cluster {cluster}" for cluster in clusters]


def cosine_rows(features: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the cosines between each image and all others, some images at a time.

    Args:
        features: ``(N, F)``, each row of length 1.

    Yields:
        The indices of R images, ``(R,)``, and their cosines, ``(R, N)``, which may be changed; that
        of an image with itself is -1.
    """
    for start in range(0, len(features), _CHUNK):
        cosines = features[start : start + _CHUNK] @ features.T
        index = torch.arange(start, start + len(cosines))
        cosines[index - start, index] = -1
        yield index, cosines


def check_near_duplicates(
    stats: Sequence[Record], rows: Sequence[Sequence[Record]], features: Tensor, *, grouped: bool
) -> Iterator[Finding]:
    """Report clusters of near-duplicates that span several splits, and missing groups.

    Groups are missing if none are defined, and a pattern of file names fits or 10 % of the images
    or more have near-duplicates. Otherwise the number of near-duplicates is a note.

    Args:
        stats: Statistics of N readable images.
        rows: The images of each cluster, the largest cluster first.
        features: Features of the images, ``(N, F)``, each row of length 1.
        grouped: Whether groups are defined.
    """
    if across := [row for row in rows if len({image.split for image in row}) > 1]:
        message = f"{sum(map(len, across))} pictures have near-duplicates in another split"
        remedy = "keep near-duplicates in one split, or split again with data.group_pattern"
        yield Finding("error", message, remedy, across)
    count = sum(len(row) for row in rows if len(row) > 1)
    text = f"{count:,} of {len(stats):,} pictures have near-duplicates"
    pattern, share = (None, 0.0) if grouped else suggest_pattern(stats, features)
    if grouped or (pattern is None and count < 0.1 * len(stats)):
        yield Finding("note", text if grouped else f"{text}: no groups are needed")
        return
    remedy = "name groups with data.group_pattern"
    if pattern:
        text += f", {share:.0%} have a nearest neighbour with the same name up to its number"
        remedy = f"""'data.group_pattern="{pattern}"' fits the file names"""
    yield Finding("error", f"{text}, and no groups are defined", remedy, rows[:8])


def rows_by(stats: Sequence[R], keys: Sequence[Hashable]) -> list[list[R]]:
    """Return the images in rows, one for each key.

    Args:
        stats: N images.
        keys: The key of each image, N.
    """
    rows: dict[Hashable, list[R]] = defaultdict(list)
    for image, key in zip(stats, keys, strict=True):
        rows[key].append(image)
    return list(rows.values())


def suggest_pattern(stats: Sequence[Record], features: Tensor) -> tuple[str | None, float]:
    """Search for a file name pattern whose groups contain nearest neighbours more than by chance.

    A pattern fits if at least half of the images have their nearest neighbour in the same group,
    and two images drawn at random are in the same group with a probability below 0.2.

    Args:
        stats: Statistics of N readable images.
        features: Their features, ``(N, F)``, each row of length 1.

    Returns:
        The first pattern that fits, and the share of images whose nearest neighbour is in the same
        group; ``None`` and 0 if no pattern fits.
    """
    nearest = torch.cat([cosines.argmax(1) for _, cosines in cosine_rows(features)]).numpy()
    for pattern in (r"([^/]+)-[^-/]*$", r"([^/]+)_[^_/]*$", r"([^/]*?)[0-9]+\.[^.]*$"):
        matches = [re.search(pattern, image.path.name) for image in stats]
        keys = [f"{x.label} {m[1]}" for x, m in zip(stats, matches, strict=True) if m]
        if len(keys) < len(stats):
            continue
        _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
        chance = float((counts / len(stats)) @ (counts / len(stats)))
        share = float((group[nearest] == group).mean())
        if share >= 0.5 and chance < 0.2:
            return pattern, share
    return None, 0.0


def check_random_split(
    stats: Sequence[ImageStats], pixels: Tensor, groups: Sequence[str]
) -> Iterator[Finding]:
    """Estimate how much a random split overestimates accuracy compared with a split by group.

    The estimate compares two nearest-neighbour classifiers on pixels: one may use all other images,
    the other only images of other groups.

    Args:
        stats: Statistics of N readable images.
        pixels: Their pixels, ``(N, 3072)``, each row of length 1.
        groups: Group of each image, N names.
    """
    if len(set(groups)) == len(stats):
        return
    labels = torch.tensor([image.label for image in stats])
    group = torch.from_numpy(np.unique(groups, return_inverse=True)[1])
    correct = torch.zeros(2)
    for index, cosines in cosine_rows(pixels):
        correct[0] += (labels[cosines.argmax(1)] == labels[index]).sum()
        cosines[group[index, None] == group] = -1
        correct[1] += (labels[cosines.argmax(1)] == labels[index]).sum()
    any_group, other_groups = (correct / len(stats)).tolist()
    message = f"at 32 x 32 pixels, {any_group:.1%} of the nearest neighbours have the same class, "
    message += f"and {other_groups:.1%} of those in other groups: the difference estimates how "
    message += "much a random split overestimates accuracy"
    if any_group - other_groups > 0.01:
        yield Finding("warning", message, "split by group, never at random")
    else:
        yield Finding("note", message)


def check_labels(
    stats: Sequence[Record], features: Tensor, groups: Sequence[str], class_names: Sequence[str]
) -> Iterator[Finding]:
    """Report labels that classifiers trained on other groups consider improbable.

    Args:
        stats: Statistics of N readable images.
        features: Their features, ``(N, F)``.
        groups: Group of each image, N names.
        class_names: Names of class 0 and class 1.
    """
    labels = np.array([image.label for image in stats])
    probabilities = cross_validated_probabilities(features, labels, groups)
    if probabilities is None:
        return
    of_label = np.where(labels == 1, probabilities, 1 - probabilities)
    order = np.argsort(of_label)
    suspicious = [stats[index] for index in order if of_label[index] < LABEL_THRESHOLD]
    if not suspicious:
        yield Finding("note", "classifiers trained on other groups find no suspicious label")
        return
    first = f"{suspicious[0].path.name} as {class_names[suspicious[0].label]}"
    message = f"{len(suspicious)} labels are suspicious: {first}"
    yield Finding("warning", message, "check them: some may be wrong", [suspicious])
