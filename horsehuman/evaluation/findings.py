"""Checks of an image set before training: files, copies, balance, backgrounds, groups, labels."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from horsehuman.data.image_sets import ImageSet
from horsehuman.data.records import Record
from horsehuman.evaluation.near_duplicates import (
    ImageStats,
    cluster_near_duplicates,
    cosine_rows,
    exclude_self,
    read_all_stats,
)
from horsehuman.models.calibration import cross_validated_probabilities

Severity = Literal["error", "warning", "note"]

#: Probability of an image's label below which the label is suspicious. With flipped labels in the
#: official training set, few of these are missed and few others are reported; see docs/audit.md.
LABEL_THRESHOLD = 0.1


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
    rows: list[list[Record]] = field(default_factory=list)


def audit(image_set: ImageSet) -> list[Finding]:
    """Run all checks on an image set and return the findings, the most severe first."""
    stats, features, pixels = read_all_stats(image_set.records)
    findings = check_files(stats)
    readable = [image for image in stats if not image.error]
    findings += check_duplicates(readable, image_set.class_names)
    findings += check_balance(readable, image_set.class_names)
    findings += check_formats(readable) + check_background(readable)
    if len(readable) > 1:
        clusters = cluster_near_duplicates(readable, features)
        findings += check_near_duplicates(readable, clusters)
        findings += check_groups(image_set, readable, clusters, features)
        groups = [image.record.group for image in readable] if image_set.grouped else clusters
        findings += check_random_split(readable, pixels, groups)
        findings += check_labels(readable, features, groups, image_set.class_names)
    order = ("error", "warning", "note")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def check_files(stats: Sequence[ImageStats]) -> list[Finding]:
    """Report files that cannot be read, and files whose suffix does not match their format.

    Args:
        stats: Statistics of all files, unreadable ones included.
    """
    findings = []
    if bad := [image for image in stats if image.error]:
        message = f"{len(bad)} files cannot be read ({bad[0].error})"
        rows = [[image.record for image in bad]]
        findings.append(Finding("error", message, "repair or remove them", rows))
    formats = Image.registered_extensions()
    mismatched = [
        image
        for image in stats
        if image.file_format
        and formats.get(image.record.path.suffix.lower(), image.file_format) != image.file_format
    ]
    if mismatched:
        first = mismatched[0]
        message = f"{len(mismatched)} files have a suffix that does not match their format "
        message += f"({first.record.path.name} is {first.file_format})"
        remedy = "rename them: other programs may refuse to read them"
        findings.append(Finding("warning", message, remedy, [[x.record for x in mismatched]]))
    return findings


def check_duplicates(stats: Sequence[ImageStats], class_names: Sequence[str]) -> list[Finding]:
    """Report byte-identical files.

    Args:
        stats: Statistics of the readable images.
        class_names: Names of class 0 and class 1.
    """
    by_digest: dict[bytes, list[Record]] = defaultdict(list)
    for image in stats:
        by_digest[image.digest].append(image.record)
    copies = [records for records in by_digest.values() if len(records) > 1]
    both_classes = [c for c in copies if len({record.label for record in c}) > 1]
    across = [c for c in copies if len({record.split for record in c}) > 1]
    within = [c for c in copies if c not in both_classes and c not in across]
    findings = []
    if both_classes:
        message = f"{len(both_classes)} pictures have copies in both classes, "
        message += f"{class_names[0]} and {class_names[1]}"
        remedy = "keep only the copies with the right label"
        findings.append(Finding("error", message, remedy, both_classes))
    if across:
        message = f"{len(across)} pictures have copies in more than one split"
        remedy = "keep each picture in one split: copies make test metrics too optimistic"
        findings.append(Finding("error", message, remedy, across))
    if within:
        message = f"{len(within)} pictures have copies in the same class and split"
        findings.append(Finding("warning", message, "remove the copies", within))
    return findings


def check_balance(stats: Sequence[ImageStats], class_names: Sequence[str]) -> list[Finding]:
    """Count the images of each class; warn if one class has more than 1.5 times the other's.

    Args:
        stats: Statistics of the readable images.
        class_names: Names of class 0 and class 1.
    """
    counts = [sum(image.record.label == label for image in stats) for label in (0, 1)]
    text = " and ".join(f"{n:,} {name}" for n, name in zip(counts, class_names, strict=True))
    if max(counts) > 1.5 * min(counts):
        remedy = "add pictures to the smaller class, and use balanced accuracy instead of accuracy"
        return [Finding("warning", f"the classes are not balanced: {text}", remedy)]
    return [Finding("note", text)]


def check_formats(stats: Sequence[ImageStats]) -> list[Finding]:
    """Summarize formats, pixel modes, sizes and brightness; warn about images below 64 pixels.

    Args:
        stats: Statistics of the readable images.
    """
    if not stats:
        return []
    counts = (Counter(image.file_format for image in stats), Counter(image.mode for image in stats))
    kinds = "; ".join(", ".join(f"{n:,} {name}" for name, n in c.most_common()) for c in counts)
    sides = [min(image.size) for image in stats]
    small = [image.record for image in stats if min(image.size) < 64]
    brightness = np.mean([image.brightness for image in stats])
    text = f"{kinds}; shorter side {min(sides)} to {max(sides)} pixels; "
    findings = [Finding("note", f"{text}mean brightness {brightness:.2f}")]
    if small:
        message = f"{len(small)} pictures have a side of less than 64 pixels"
        findings.append(Finding("warning", message, "replace them with larger ones", [small]))
    return findings


def check_background(stats: Sequence[ImageStats]) -> list[Finding]:
    """Warn if splits or classes differ by more than 0.25 in mean white edge or brightness.

    Args:
        stats: Statistics of the readable images.
    """
    findings = []
    for partition, part_of in (
        ("splits", lambda image: image.record.split),
        ("classes", lambda image: str(image.record.label)),
    ):
        parts: dict[str, list[ImageStats]] = defaultdict(list)
        for image in stats:
            parts[part_of(image)].append(image)
        for name, stat in (("white edges", "white_edge"), ("brightness", "brightness")):
            means = {k: float(np.mean([getattr(x, stat) for x in v])) for k, v in parts.items()}
            if len(means) > 1 and max(means.values()) - min(means.values()) > 0.25:
                text = ", ".join(f"{k or 'none'} {mean:.2f}" for k, mean in means.items())
                remedy = (
                    "augment with the background of the other split, and expect the test to be "
                    "harder than validation"
                    if partition == "splits"
                    else "a model can learn the background instead of the subject: mix backgrounds"
                )
                findings.append(Finding("warning", f"{partition} differ in {name}: {text}", remedy))
    return findings


def check_near_duplicates(stats: Sequence[ImageStats], clusters: Sequence[str]) -> list[Finding]:
    """Report clusters of near-duplicates that span several splits.

    Args:
        stats: Statistics of N readable images.
        clusters: Cluster of each image, N names.
    """
    across = [row for row in cluster_rows(stats, clusters) if len({r.split for r in row}) > 1]
    if not across:
        return []
    message = f"{sum(map(len, across))} pictures have near-duplicates in another split"
    remedy = "keep near-duplicates in one split, or split again with data.group_pattern"
    return [Finding("error", message, remedy, across)]


def check_groups(
    image_set: ImageSet, stats: Sequence[ImageStats], clusters: Sequence[str], features: Tensor
) -> list[Finding]:
    """Report missing groups: none are defined, but images are near-duplicates or share name stems.

    It is an error if a pattern of file names fits, or if 10 % of the images or more have
    near-duplicates; otherwise a note.

    Args:
        image_set: The set that is audited.
        stats: Statistics of its N readable images.
        clusters: Cluster of each image, N names.
        features: Features of the images, ``(N, F)``, each row of length 1.
    """
    sizes = Counter(clusters)
    count = sum(size for size in sizes.values() if size > 1)
    text = f"{count:,} of {len(stats):,} pictures have near-duplicates"
    pattern, share = (None, 0.0) if image_set.grouped else suggest_pattern(stats, features)
    if image_set.grouped or (pattern is None and count < 0.1 * len(stats)):
        return [Finding("note", text)]
    remedy = "define groups with data.group_pattern"
    if pattern:
        text += f", {share:.0%} have a nearest neighbour with the same name up to its number"
        remedy += f": --group-pattern '{pattern}' fits the file names"
    largest = cluster_rows(stats, clusters)[:8]
    return [Finding("error", f"{text}, and no groups are defined", remedy, largest)]


def cluster_rows(stats: Sequence[ImageStats], clusters: Sequence[str]) -> list[list[Record]]:
    """Return the records of each cluster, the largest cluster first.

    Args:
        stats: Statistics of N images.
        clusters: Cluster of each image, N names.
    """
    rows: dict[str, list[Record]] = defaultdict(list)
    for image, cluster in zip(stats, clusters, strict=True):
        rows[cluster].append(image.record)
    return sorted(rows.values(), key=len, reverse=True)


def suggest_pattern(stats: Sequence[ImageStats], features: Tensor) -> tuple[str | None, float]:
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
    nearest = torch.cat([exclude_self(*part).argmax(1) for part in cosine_rows(features)]).numpy()
    for pattern in (r"([^/]+)-[^-/]*$", r"([^/]+)_[^_/]*$", r"([^/]*?)[0-9]+\.[^.]*$"):
        matches = [re.search(pattern, image.record.path.name) for image in stats]
        if not all(matches):
            continue
        keys = [f"{x.record.label} {m[1]}" for x, m in zip(stats, matches, strict=True) if m]
        _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
        chance = float((counts / len(stats)) @ (counts / len(stats)))
        share = float((group[nearest] == group).mean())
        if share >= 0.5 and chance < 0.2:
            return pattern, share
    return None, 0.0


def check_random_split(
    stats: Sequence[ImageStats], pixels: Tensor, groups: Sequence[str]
) -> list[Finding]:
    """Estimate how much a random split overestimates accuracy compared with a split by group.

    The estimate compares two nearest-neighbour classifiers on pixels: one may use all other images,
    the other only images of other groups.

    Args:
        stats: Statistics of N readable images.
        pixels: Their pixels, ``(N, 3072)``, each row of length 1.
        groups: Group of each image, N names.
    """
    labels = torch.tensor([image.record.label for image in stats])
    group = torch.from_numpy(np.unique(groups, return_inverse=True)[1])
    if len(set(groups)) == len(stats):
        return []
    correct = torch.zeros(2)
    for start, cosines in cosine_rows(pixels):
        rows = torch.arange(start, start + len(cosines))
        cosines = exclude_self(start, cosines)
        correct[0] += (labels[cosines.argmax(1)] == labels[rows]).sum()
        cosines[group[rows, None] == group] = -1
        correct[1] += (labels[cosines.argmax(1)] == labels[rows]).sum()
    shares = (correct / len(stats)).tolist()
    message = (
        f"at 32 x 32 pixels, {shares[0]:.1%} of the nearest neighbours have the same class, and "
        f"{shares[1]:.1%} of those in other groups: the difference estimates how much a random "
        "split overestimates accuracy"
    )
    if shares[0] - shares[1] > 0.01:
        return [Finding("warning", message, "split by group, never at random")]
    return [Finding("note", message)]


def check_labels(
    stats: Sequence[ImageStats], features: Tensor, groups: Sequence[str], class_names: Sequence[str]
) -> list[Finding]:
    """Report labels that classifiers trained on other groups consider improbable.

    Args:
        stats: Statistics of N readable images.
        features: Their features, ``(N, F)``.
        groups: Group of each image, N names.
        class_names: Names of class 0 and class 1.
    """
    labels = np.array([image.record.label for image in stats])
    probabilities = cross_validated_probabilities(features, labels, groups)
    if probabilities is None:
        return []
    of_label = np.where(labels == 1, probabilities, 1 - probabilities)
    suspicious = [int(index) for index in np.argsort(of_label) if of_label[index] < LABEL_THRESHOLD]
    if not suspicious:
        return [Finding("note", "classifiers trained on other groups find no suspicious label")]
    records = [stats[index].record for index in suspicious]
    first = records[0]
    message = f"{len(suspicious)} labels are suspicious: "
    message += f"{first.path.name} as {class_names[first.label]}"
    return [Finding("warning", message, "check them: some may be wrong", [records])]
