"""Find the labelled images of ``--data`` and ``--split``, and count those a classifier has seen."""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from horsehuman.data.archives import image_root
from horsehuman.data.records import SUBJECT_PATTERN, Record, file_digest, scan_folder
from horsehuman.errors import HorseHumanError, check_choice, os_errors, printable
from horsehuman.run_dir import find_run, is_run
from horsehuman.runtime import BUNDLED

#: Splits of an image set.
SPLITS = ("train", "validation", "test")

#: Values of ``--split``.
SPLIT_CHOICES = (*SPLITS, "all")


@dataclass(frozen=True)
class ImageQuery:
    """The options that name the images of a command.

    Attributes:
        data: ``box`` (the bundled set), the folder of a run, or a folder of images. ``None`` stands
            for the images of the classifier's run, or for the bundled set if there is no run.
        split: One of :data:`SPLIT_CHOICES`. ``None`` stands for ``test``, or for ``all`` if no
            image is in the test split.
        group_pattern: See :func:`~horsehuman.data.records.scan_folder`; for a folder of images.
    """

    data: str | None
    split: str | None = None
    group_pattern: str | None = None


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of two classes.

    Attributes:
        root: The folder that holds them.
        class_names: Names of class 0 and class 1.
        records: One record per image.
        grouped: Whether groups are known; otherwise each image is a group by itself.
    """

    root: Path
    class_names: tuple[str, str]
    records: list[Record]
    grouped: bool

    def name(self, record: Record) -> str:
        """Return the path of an image relative to ``root``, with forward slashes."""
        return record.path.relative_to(self.root).as_posix()

    def split(self, name: str) -> "ImageSet":
        """Return the images of one split.

        Args:
            name: One of :data:`SPLIT_CHOICES`; ``all`` includes images without a split.

        Raises:
            HorseHumanError: If the split is unknown or empty.
        """
        check_choice("--split", name, SPLIT_CHOICES)
        records = [r for r in self.records if name in ("all", r.split)]
        if not records:
            splits = ", ".join(sorted({record.split or "no split" for record in self.records}))
            raise HorseHumanError(f"--split {name}: {printable(self.root)} has only {splits}")
        return replace(self, records=records)


def find_image_set(data: str, group_pattern: str | None = None) -> ImageSet:
    """Return the image set that ``--data`` names.

    Args:
        data: ``box`` (the bundled set), the folder of a run, or a folder of images.
        group_pattern: See :func:`~horsehuman.data.records.scan_folder`; for a folder of images
            only, since the other sets define their groups.

    Raises:
        HorseHumanError: If there are no images, or ``group_pattern`` cannot be used.
    """
    folder = Path(data).expanduser()
    if group_pattern is not None and (data == "box" or is_run(folder)):
        raise HorseHumanError(f"{printable(data)} has groups of its own: drop --group-pattern")
    if data == "box":
        folder, group_pattern = image_root("box"), SUBJECT_PATTERN
    elif is_run(folder):
        return read_run_images(folder)
    class_names, records = scan_folder(folder, group_pattern, require_train=False)
    return ImageSet(folder, class_names, records, group_pattern is not None)


def select_images(model: str, query: ImageQuery) -> tuple[ImageSet, str]:
    """Return the images on which a command evaluates a classifier.

    Args:
        model: Name, run or file of the classifier; see
            :func:`horsehuman.models.checkpoint.load_classifier`.
        query: The images to look for.

    Returns:
        The images of the split, and the name of the split.

    Raises:
        HorseHumanError: If there are no such images.
    """
    run = find_run(model)
    image_set = find_image_set(query.data or (str(run) if run else "box"), query.group_pattern)
    default = "test" if any(record.split == "test" for record in image_set.records) else "all"
    split = default if query.split is None else query.split
    return image_set.split(split), split


def count_images_seen_in_training(model: str, records: Iterable[Record]) -> int | None:
    """Return how many images have the same bytes as an image the classifier was trained on.

    Args:
        model: Name, run or file of the classifier.
        records: The images to look up.

    Returns:
        The count; ``None`` if the training images are unknown, would have to be downloaded, or are
        all gone.
    """
    run = find_run(model)
    if run is None and model not in BUNDLED:
        return None
    try:
        data = read_config(run / "config.yaml")["data"] if run else {}
        if data.get("source") == "archives" and not data.get("archives_dir"):
            return None  # do not download archives for a count
        image_set = read_run_images(run) if run else find_image_set("box")
    except HorseHumanError:
        return None
    trained = [record.path for record in image_set.records if record.split == "train"]
    if not any(path.is_file() for path in trained):
        return None
    digests = {file_digest(path) for path in trained}
    return sum(file_digest(record.path) in digests for record in records)


def read_run_images(run: Path) -> ImageSet:
    """Return all images of a run, as listed in its ``splits.csv``.

    Args:
        run: Folder of the run.

    Raises:
        HorseHumanError: If ``config.yaml`` or ``splits.csv`` is missing or damaged.
    """
    data = read_config(run / "config.yaml")["data"]
    root = image_root(data.get("source", "folder"), data.get("root"), data.get("archives_dir"))
    path = run / "splits.csv"
    try:
        with os_errors("read", path):
            text = path.read_bytes().decode(errors="surrogateescape")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
        paths = [Path(row["picture"]) for row in rows]
        first, second = sorted({row["label"] for row in rows})
        outside = any(path.is_absolute() or ".." in path.parts for path in paths)
        if outside or not {row["split"] for row in rows} <= set(SPLITS):
            raise ValueError
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        message = f"{printable(path)} is damaged: choose the images with --data"
        raise HorseHumanError(message) from error
    records = [
        Record(root / row["picture"], int(row["label"] == second), row["group"], row["split"])
        for row in rows
    ]
    grouped = any(row["group"] != row["picture"] for row in rows)
    return ImageSet(root, (first, second), records, grouped)


def read_config(path: Path) -> dict[str, Any]:
    """Return the contents of a config, such as a run's; its ``data`` section is a dict.

    Args:
        path: The YAML file.

    Raises:
        HorseHumanError: If the file is missing, damaged or has no such section.
    """
    try:
        with os_errors("read", path):
            config = yaml.load(path.read_text(encoding="utf-8"), _NoAliasLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        config = None
    if isinstance(config, dict) and isinstance(config.get("data"), dict):
        return config
    raise HorseHumanError(f"{printable(path)} is not a run's config: choose the images with --data")


class _NoAliasLoader(yaml.SafeLoader):  # type: ignore[misc]
    """A YAML loader that refuses aliases, a few of which can expand to more than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)
