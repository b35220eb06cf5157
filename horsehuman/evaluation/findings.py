"""What is wrong with a set of pictures, before anyone trains on it."""

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

#: Probability of its own label below which a picture's label is doubted: with turned-over labels of
#: the official training set few are missed, and few others doubted (docs/audit.md).
LABEL_THRESHOLD = 0.1


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or worth knowing.

    Attributes:
        severity: An error makes figures wrong, a warning may; a note is for the reader.
        message: In one line.
        remedy: What to do; empty for a note.
        pictures: Which ones, in rows of those that belong together.
    """

    severity: Severity
    message: str
    remedy: str = ""
    pictures: list[list[Record]] = field(default_factory=list)


def audit(pictures: ImageSet) -> list[Finding]:
    """All findings about a set, the gravest first."""
    looks, features, pixels = read_all_stats(pictures.records)
    found = check_files(looks)
    good = [look for look in looks if not look.error]
    found += check_duplicates(good, pictures.class_names)
    found += check_balance(good, pictures.class_names)
    found += check_formats(good) + check_background(good)
    if len(good) > 1:
        cluster = cluster_near_duplicates(good, features)
        found += check_near_duplicates(good, cluster)
        found += check_groups(pictures, good, cluster, features)
        groups = [look.record.group for look in good] if pictures.grouped else cluster
        found += check_random_split(good, pixels, groups)
        found += check_labels(good, features, groups, pictures.class_names)
    order = ("error", "warning", "note")
    return sorted(found, key=lambda finding: order.index(finding.severity))


def check_files(looks: Sequence[ImageStats]) -> list[Finding]:
    """Files that cannot be read, or are something else than their names say."""
    found = []
    if bad := [look for look in looks if look.error]:
        what = f"{len(bad)} files cannot be read ({bad[0].error})"
        found.append(Finding("error", what, "mend or remove them", [[b.record for b in bad]]))
    endings = Image.registered_extensions()
    odd = [
        look
        for look in looks
        if look.kind and endings.get(look.record.path.suffix.lower(), look.kind) != look.kind
    ]
    if odd:
        first = odd[0]
        what = f"{len(odd)} files are not what their names say ({first.record.path.name} is "
        what += f"{first.kind})"
        remedy = "rename them: other programs may refuse them"
        found.append(Finding("warning", what, remedy, [[look.record for look in odd]]))
    return found


def check_duplicates(looks: Sequence[ImageStats], class_names: Sequence[str]) -> list[Finding]:
    """Files that are the same to the byte."""
    same: dict[bytes, list[Record]] = defaultdict(list)
    for look in looks:
        same[look.digest].append(look.record)
    copies = [records for records in same.values() if len(records) > 1]
    torn = [c for c in copies if len({record.label for record in c}) > 1]
    across = [c for c in copies if len({record.split for record in c}) > 1]
    within = [c for c in copies if c not in torn and c not in across]
    found = []
    if torn:
        what = f"{len(torn)} pictures are {class_names[0]} and {class_names[1]} at once, as copies"
        found.append(Finding("error", what, "keep the one that is right", torn))
    if across:
        what = f"{len(across)} pictures stand in two splits, as copies"
        found.append(Finding("error", what, "remove them from one: they flatter the test", across))
    if within:
        what = f"{len(within)} pictures are there more than once"
        found.append(Finding("warning", what, "remove the copies", within))
    return found


def check_balance(looks: Sequence[ImageStats], class_names: Sequence[str]) -> list[Finding]:
    """How many there are of each class."""
    counts = [sum(look.record.label == label for look in looks) for label in (0, 1)]
    text = " and ".join(f"{n:,} {name}" for n, name in zip(counts, class_names, strict=True))
    if max(counts) > 1.5 * min(counts):
        remedy = "add some, and read balanced accuracy instead of accuracy"
        return [Finding("warning", f"the classes are not balanced: {text}", remedy)]
    return [Finding("note", text)]


def check_formats(looks: Sequence[ImageStats]) -> list[Finding]:
    """Formats, modes, sizes and brightness."""
    if not looks:
        return []
    formats = ", ".join(f"{n:,} {kind}" for kind, n in Counter(x.kind for x in looks).most_common())
    modes = ", ".join(f"{n:,} {mode}" for mode, n in Counter(x.mode for x in looks).most_common())
    sides = [min(look.size) for look in looks]
    small = [look.record for look in looks if min(look.size) < 64]
    found = [
        Finding(
            "note",
            f"{formats}; {modes}; shorter side {min(sides)} to {max(sides)} pixels; brightness "
            f"{np.mean([look.brightness for look in looks]):.2f} on average",
        )
    ]
    if small:
        what = f"{len(small)} pictures are smaller than 64 pixels on a side"
        found.append(Finding("warning", what, "find larger ones", [small]))
    return found


def check_background(looks: Sequence[ImageStats]) -> list[Finding]:
    """Whether splits, or classes, differ in what stands around the figures."""
    found = []
    for what, key in (
        ("splits", lambda look: look.record.split),
        ("classes", lambda look: str(look.record.label)),
    ):
        parts: dict[str, list[ImageStats]] = defaultdict(list)
        for look in looks:
            parts[key(look)].append(look)
        for name, of in (("white edges", "white_edge"), ("brightness", "brightness")):
            means = {k: float(np.mean([getattr(look, of) for look in v])) for k, v in parts.items()}
            if len(means) > 1 and max(means.values()) - min(means.values()) > 0.25:
                text = ", ".join(f"{k or 'none'} {mean:.2f}" for k, mean in means.items())
                remedy = (
                    "augment with the background of the other split, and expect the test to be "
                    "harder than validation"
                    if what == "splits"
                    else "a network can tell the classes without the figure: mix backgrounds"
                )
                found.append(Finding("warning", f"{what} differ in {name}: {text}", remedy))
    return found


def cluster_rows(looks: Sequence[ImageStats], cluster: Sequence[str]) -> list[list[Record]]:
    """The records of each cluster, the largest first."""
    rows: dict[str, list[Record]] = defaultdict(list)
    for look, name in zip(looks, cluster, strict=True):
        rows[name].append(look.record)
    return sorted(rows.values(), key=len, reverse=True)


def check_near_duplicates(looks: Sequence[ImageStats], cluster: Sequence[str]) -> list[Finding]:
    """Near-duplicates on two sides of a split that is there already."""
    torn = [row for row in cluster_rows(looks, cluster) if len({r.split for r in row}) > 1]
    if not torn:
        return []
    count = sum(map(len, torn))
    what = f"{count} pictures have near-duplicates on the other side of a split"
    remedy = "put what shows the same thing on one side, or split anew with data.group_pattern"
    return [Finding("error", what, remedy, torn)]


def check_groups(
    pictures: ImageSet, looks: Sequence[ImageStats], cluster: Sequence[str], features: Tensor
) -> list[Finding]:
    """Whether groups are missing: what looks alike, and nobody says that it belongs together."""
    sizes = Counter(cluster)
    alike = sum(count for count in sizes.values() if count > 1)
    text = f"{alike:,} of {len(looks):,} pictures have near-duplicates"
    pattern, share = (None, 0.0) if pictures.grouped else suggest_pattern(looks, features)
    if pictures.grouped or (pattern is None and alike < 0.1 * len(looks)):
        return [Finding("note", text)]
    remedy = "name what belongs together with data.group_pattern"
    if pattern:
        text += f", the nearest other picture of {share:.0%} has the same name up to its number"
        remedy += f": --group-pattern '{pattern}' fits the file names"
    largest = cluster_rows(looks, cluster)[:8]
    return [Finding("error", f"{text}, and no groups are named", remedy, largest)]


def suggest_pattern(looks: Sequence[ImageStats], features: Tensor) -> tuple[str | None, float]:
    """A pattern of file names by which neighbours are of one group far more than by chance.

    Returns:
        The pattern, if there is one, and the share of pictures whose nearest other one is of the
        same group.
    """
    nearest = torch.cat([exclude_self(*part).argmax(1) for part in cosine_rows(features)]).numpy()
    for pattern in (r"([^/]+)-[^-/]*$", r"([^/]+)_[^_/]*$", r"([^/]*?)[0-9]+\.[^.]*$"):
        names = [re.search(pattern, look.record.path.name) for look in looks]
        if not all(names):
            continue
        keys = [f"{x.record.label} {m[1]}" for x, m in zip(looks, names, strict=True) if m]
        _, group, counts = np.unique(keys, return_inverse=True, return_counts=True)
        chance = float((counts / len(looks)) @ (counts / len(looks)))
        share = float((group[nearest] == group).mean())
        if share >= 0.5 and chance < 0.2:
            return pattern, share
    return None, 0.0


def check_random_split(
    looks: Sequence[ImageStats], pixels: Tensor, groups: Sequence[str]
) -> list[Finding]:
    """How much better a random split looks than one by group: nearest neighbours among pixels."""
    labels = torch.tensor([look.record.label for look in looks])
    group = torch.from_numpy(np.unique(groups, return_inverse=True)[1])
    if len(set(groups)) == len(looks):
        return []
    right = torch.zeros(2)
    for start, cosine in cosine_rows(pixels):
        rows = torch.arange(start, start + len(cosine))
        cosine = exclude_self(start, cosine)
        right[0] += (labels[cosine.argmax(1)] == labels[rows]).sum()
        cosine[group[rows, None] == group] = -1
        right[1] += (labels[cosine.argmax(1)] == labels[rows]).sum()
    shares = (right / len(looks)).tolist()
    what = (
        f"among 32 x 32 pixels the nearest other picture is of the same class for {shares[0]:.1%}, "
        f"the nearest of another group for {shares[1]:.1%}: so much a random split flatters"
    )
    if shares[0] - shares[1] > 0.01:
        return [Finding("warning", what, "split by group, never at random")]
    return [Finding("note", what)]


def check_labels(
    looks: Sequence[ImageStats], features: Tensor, groups: Sequence[str], class_names: Sequence[str]
) -> list[Finding]:
    """Labels that a classifier of other groups does not believe."""
    own = np.array([look.record.label for look in looks])
    probability = cross_validated_probabilities(features, own, groups)
    if probability is None:
        return []
    mine = np.where(own == 1, probability, 1 - probability)
    doubted = [int(index) for index in np.argsort(mine) if mine[index] < LABEL_THRESHOLD]
    if not doubted:
        return [Finding("note", "no label is doubted by classifiers of other groups")]
    records = [looks[index].record for index in doubted]
    first = records[0]
    what = f"{len(doubted)} labels are doubted: {first.path.name} as {class_names[first.label]}"
    return [Finding("warning", what, "look at them; some may be wrong", [records])]
