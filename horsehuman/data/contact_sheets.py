"""The command ``horsehuman data``: a table of counts and contact sheets with one row per group."""

import logging
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from horsehuman.data.datasets import decode
from horsehuman.data.image_sets import SPLITS, ImageQuery, find_image_set, read_config
from horsehuman.data.images import PictureError
from horsehuman.data.records import Record, evenly_spaced
from horsehuman.data.transforms import Augment, make_augment
from horsehuman.errors import HorseHumanError, check_number, printable
from horsehuman.run_dir import ReportOptions, is_run, read_json, unused_path, write_json
from horsehuman.runtime import configs_dir, table, track

log = logging.getLogger(__name__)

#: The file that holds the counts and the names of the sheets.
REPORT_FILE = "data.json"

COLUMNS = 8  #: Images per row.
ROWS = 60  #: Largest number of rows per sheet.
SIDE = 96  #: Side of an image on a sheet in pixels, without augmentation.
MAX_CELL = 128  #: Largest side of an augmented image on a sheet; larger training images are shrunk.

#: Label of a row of a sheet, and its images, uint8 ``(N, size, size, 3)``.
Row = tuple[str, NDArray[np.uint8]]


def report_images(query: ImageQuery, options: ReportOptions, *, augmented: bool) -> bool:
    """Count the images of a set and write one contact sheet for each class and split.

    Args:
        query: The images; its ``split`` is not used.
        options: The folder of the sheets, by default ``outputs/data``, and what is written.
        augmented: Show each training image with augmented versions of it, see
            :func:`training_augmentation`, and no validation and test images.

    Returns:
        Whether all images on the sheets could be read.

    Raises:
        HorseHumanError: If there are no images or there is no augmentation, or the folder cannot be
            used.
    """
    data = query.data or "box"
    image_set = find_image_set(data, query.group_pattern)
    size, augment = training_augmentation(data) if augmented else (SIDE, None)
    records = sorted(image_set.records, key=lambda r: (r.label, r.group, r.path))
    records.sort(key=lambda r: [*SPLITS, ""].index(r.split))
    by_part = groupby(records, lambda r: (r.split, image_set.class_names[r.label]))
    parts = {key: list(part) for key, part in by_part}
    names = _sheet_names(parts, augmented) if options.plot else {}
    folder = options.create_dir(Path("outputs/data"), [REPORT_FILE, *names.values()])
    counts = []
    summary = table("split", "class", "pictures", "groups", left=2)
    for (split, name), records in parts.items():
        n = len(records)
        groups = len({record.group for record in records}) if image_set.grouped else None
        counts.append({"split": split or None, "class": name, "pictures": n, "groups": groups})
        summary.add_row(split or "none yet", printable(name), f"{n}", f"{groups or 'unknown'}")
    caption = "one row per group" if image_set.grouped else "ordered by name"
    if augmented:
        caption = "original, then augmented as in training"
    sheets: list[str] = []
    unreadable = 0
    for (split, name), file in track(names.items(), "drawing", len(names)):
        from horsehuman import plots  # imports matplotlib, which is slow

        records = parts[split, name]
        rows, count = _rows(records, image_set.grouped, size, augment)
        unreadable += count
        if rows:
            title = f"{len(records)} pictures: {name}" + (f", {split}" if split else "")
            plots.save(plots.sheet(rows, COLUMNS, f"{title}; {caption}"), folder / file)
            sheets.append(file)
    earlier = read_json(folder / REPORT_FILE).get("sheets") or []
    for path in folder.glob("*.png"):
        if path.name in earlier and path.name not in sheets:
            path.unlink()
    report = {"root": str(image_set.root), "counts": counts, "sheets": sheets}
    write_json(folder / REPORT_FILE, report)
    options.print(report, [summary], "sheets", folder)
    return not unreadable


def _sheet_names(parts: Iterable[tuple[str, str]], augmented: bool) -> dict[tuple[str, str], str]:
    """Return the file name of the sheet of each (split, class name); only training is augmented."""
    names: dict[tuple[str, str], str] = {}
    for split, class_name in parts:
        if not (augmented and split in ("validation", "test")):
            words = filter(None, (split, class_name, "augmented" if augmented else ""))
            path = Path(re.sub(r"[^\w-]", "_", "-".join(words)) + ".png")
            names[split, class_name] = unused_path(path, lambda p: p.name in names.values()).name
    return names


def training_augmentation(data: str) -> tuple[int, Augment]:
    """Return the image size in pixels and the augmentation of a run, or of ``model=cnn``.

    Args:
        data: See :func:`~horsehuman.data.image_sets.find_image_set`.

    Raises:
        HorseHumanError: If the run has no augmentation or an invalid image size.
    """
    folder = Path(data).expanduser()
    of_cnn = configs_dir() / "model" / "cnn.yaml"
    config = read_config(folder / "config.yaml" if is_run(folder) else of_cnn)
    augment = make_augment(config["data"].get("augment"))
    if augment is None:
        raise HorseHumanError(f"--augmented: {printable(data)} was trained without augmentation")
    size = config.get("model", {}).get("image_size")
    check_number(f"model.image_size of {printable(data)}", size, int, at_least=8, at_most=4096)
    return size, augment


def _rows(
    records: Sequence[Record], grouped: bool, size: int, augment: Augment | None
) -> tuple[list[Row], int]:
    """Decode the images of a sheet.

    Args:
        records: Records of one split and class.
        grouped: Whether each row shows one group; otherwise rows are filled in order.
        size: Side of the images in pixels, before they are limited to :data:`MAX_CELL`.
        augment: Makes each row show one image and augmented versions of it.

    Returns:
        The rows with images, and the number of unreadable images; errors are logged.
    """
    unreadable = 0
    groups: dict[str, list[Record]] = {}
    for index, record in enumerate(records):
        groups.setdefault(record.group if grouped else str(index // COLUMNS), []).append(record)
    rows: list[Row] = []
    for name in evenly_spaced(list(groups), ROWS):
        images: list[Tensor] = []
        for record in evenly_spaced(groups[name], 1 if augment else COLUMNS):
            try:
                images.append(decode(record.path, min(size, MAX_CELL)))
            except PictureError as error:
                unreadable += 1
                log.warning("error: %s", error)
        if images and augment:
            with torch.random.fork_rng():
                torch.manual_seed(len(rows))  # the same augmentation on every call
                images += augment(images[0].expand(COLUMNS - 1, -1, -1, -1))
        if images:
            label = f"{printable(name)[-24:]} ({len(groups[name])})" if grouped else ""
            rows.append((label, torch.stack(images).permute(0, 2, 3, 1).numpy()))
    return rows, unreadable
