"""The labelled pictures that a command is asked about: the box, a folder, or a run's own."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from horsehuman.data.archives import image_root
from horsehuman.data.records import SUBJECT_PATTERN, Record, scan_folder
from horsehuman.errors import HorseHumanError, check_choice, printable
from horsehuman.run_dir import find_run, is_run
from horsehuman.runtime import BUNDLED

#: What ``--split`` takes.
SPLITS = ("train", "validation", "test", "all")


@dataclass(frozen=True)
class ImageSet:
    """Labelled pictures.

    Attributes:
        root: The folder that they are in.
        class_names: Names of class 0 and class 1.
        records: Pictures with label, group and split.
        grouped: Whether groups were named; otherwise each picture is one.
    """

    root: Path
    class_names: tuple[str, str]
    records: list[Record]
    grouped: bool

    def name(self, record: Record) -> str:
        """A picture's name below the folder of the set."""
        return record.path.relative_to(self.root).as_posix()

    def split(self, name: str) -> ImageSet:
        """The pictures of one split; of ``all``, all of them.

        Raises:
            HorseHumanError: There are none.
        """
        check_choice("--split", name, SPLITS)
        records = [r for r in self.records if name in ("all", r.split)]
        if not records:
            there = sorted({record.split or "no split" for record in self.records})
            raise HorseHumanError(
                f"--split {name}: {printable(self.root)} has no such pictures, but {', '.join(there)}"
            )
        return ImageSet(self.root, self.class_names, records, self.grouped)


def find_image_set(data: str, group_pattern: str | None = None) -> ImageSet:
    """The pictures that ``--data`` names: ``box``, a run's folder, or a folder of pictures.

    Raises:
        HorseHumanError: There are none.
    """
    in_folder = data != "box" and not is_run(Path(data).expanduser())
    if group_pattern is not None and not in_folder:
        raise HorseHumanError(
            f"--group-pattern={group_pattern!r} goes with a folder of pictures, and {printable(data)} "
            "has groups of its own: drop it"
        )
    if data == "box":
        root = image_root("box")
        classes, records = scan_folder(root, SUBJECT_PATTERN)
        return ImageSet(root, (classes[0], classes[1]), records, True)
    folder = Path(data).expanduser()
    if not in_folder:
        return read_run_images(folder)
    classes, records = scan_folder(folder, group_pattern, to_train=False)
    return ImageSet(folder, (classes[0], classes[1]), records, group_pattern is not None)


def select_images(
    model: str, data: str | None, split: str | None, group_pattern: str | None
) -> tuple[ImageSet, str]:
    """The pictures that a classifier is asked about.

    Args:
        model: The classifier.
        data: See :func:`find_image_set`; otherwise what it was trained and tested on: its run's, or the
            box.
        split: One of :data:`SPLITS`; otherwise ``test``, or ``all`` where there is no such split.
        group_pattern: See :func:`find_image_set`.

    Returns:
        The pictures, and the split.

    Raises:
        HorseHumanError: There are none.
    """
    run = find_run(model)
    pictures = find_image_set(data or (str(run) if run else "box"), group_pattern)
    if split is None:
        split = "test" if any(record.split == "test" for record in pictures.records) else "all"
    return pictures.split(split), split


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain values, each written out: a few aliases can stand for more than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)


def read_run_config(run: Path) -> dict[str, Any]:
    """What a run's ``config.yaml`` says; raises :class:`HorseHumanError` where it is not whole."""
    path = run / "config.yaml"
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
        if isinstance(config, dict) and isinstance(config.get("data"), dict):
            return config
    except OSError as error:
        raise HorseHumanError(f"cannot read {printable(path)}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise HorseHumanError(f"{printable(path)} is damaged: name pictures with --data") from error
    raise HorseHumanError(f"{printable(path)} is no run's config: name pictures with --data")


def read_run_images(run: Path) -> ImageSet:
    """All pictures of a run, as its ``splits.csv`` lists them.

    Raises:
        HorseHumanError: A file of the run cannot be read.
    """
    data = read_run_config(run)["data"]
    root = image_root(data.get("source", "folder"), data.get("root"), data.get("archives_dir"))
    path = run / "splits.csv"
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        if not all(_is_sound(row) for row in rows):
            raise KeyError("picture")
        names = sorted({row["label"] for row in rows})
        records = [
            Record(root / row["picture"], names.index(row["label"]), row["group"], row["split"])
            for row in rows
        ]
    except OSError as error:
        raise HorseHumanError(f"cannot read {printable(path)}: {error.strerror}") from error
    except (KeyError, TypeError, csv.Error) as error:
        raise HorseHumanError(f"{printable(path)} is damaged: name pictures with --data") from error
    if len(names) != 2:
        raise HorseHumanError(
            f"{printable(path)} names {len(names)} classes: name pictures with --data"
        )
    grouped = bool(data.get("group_pattern")) or data.get("source") != "folder"
    return ImageSet(root, (names[0], names[1]), records, grouped)


def _is_sound(row: dict[str, Any]) -> bool:
    """Whether a line is whole, and names a picture inside the set."""
    picture = Path(row["picture"] or "/")
    inside = not picture.is_absolute() and ".." not in picture.parts
    return inside and None not in row.values() and row["split"] in SPLITS[:3]


def count_training_images(model: str, records: Iterable[Record]) -> int | None:
    """How many pictures a classifier was trained on, byte for byte; ``None`` if it is not known."""
    run = find_run(model)
    try:
        if run:
            data = read_run_config(run)["data"]
            if data.get("source") == "archives" and not data.get("archives_dir"):
                return None  # nothing is downloaded to find out
        elif model not in BUNDLED:
            return None
        known = read_run_images(run) if run else find_image_set("box")
    except HorseHumanError:
        return None
    if not any(r.path.is_file() for r in known.records if r.split == "train"):
        return None
    asked = [(_size(record.path), record.path) for record in records]
    sizes = {size for size, _ in asked}
    trained = {
        file_digest(record.path)
        for record in known.records
        if record.split == "train" and _size(record.path) in sizes
    }
    return sum(file_digest(path) in trained for _, path in asked)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def file_digest(path: Path) -> bytes:
    """What tells one file's content from another's; a file that cannot be read equals none."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError:
        return str(path).encode(errors="surrogateescape")  # equal to no digest
