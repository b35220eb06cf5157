"""The command ``horsehuman data``: a table of counts and contact sheets with one row per group."""

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from rich.table import Table
from torch import Tensor

from horsehuman.data.datasets import decode
from horsehuman.data.image_sets import SPLITS, ImageQuery, ImageSet, find_image_set, read_run_config
from horsehuman.data.images import PictureError
from horsehuman.data.records import Record, evenly_spaced
from horsehuman.data.transforms import Augment, make_augment
from horsehuman.errors import HorseHumanError, check_number, printable
from horsehuman.run_dir import ReportOptions, is_run, print_json, read_json, unused_path, write_json
from horsehuman.runtime import configs_dir, console, table, track

log = logging.getLogger(__name__)

#: The file that holds the counts and the names of the sheets.
REPORT_FILE = "data.json"

#: Images per row, largest number of rows per sheet, and side of an image on a sheet in pixels.
COLUMNS, ROWS, SIDE = 8, 60, 96

#: Label of a row of a sheet, and its images, each uint8 ``(3, size, size)``.
Row = tuple[str, list[Tensor]]

#: Size of training images in pixels, and their augmentation.
Recipe = tuple[int, Augment]


def show_images(query: ImageQuery, options: ReportOptions, *, augmented: bool) -> bool:
    """Count the images of a set and write one contact sheet for each class and split.

    Args:
        query: The images; its ``split`` is not used.
        options: The folder of the sheets, by default ``outputs/data``, and what is written.
        augmented: Draw training images as augmented for training; see :func:`training_recipe`.

    Returns:
        Whether all images on the sheets could be read.

    Raises:
        HorseHumanError: If there are no images or there is no augmentation, or the folder cannot be
            used.
    """
    data = query.data or "box"
    image_set = find_image_set(data, query.group_pattern)
    recipe = training_recipe(data) if augmented else None
    folder = options.create_dir(Path("outputs/data"), [REPORT_FILE])
    parts = _by_split_and_class(image_set)
    counts, lines = _count(parts, image_set.grouped)
    if not options.json:
        console(stderr=False).print(lines)
    caption = "one row per group" if image_set.grouped else "ordered by name"
    if recipe:
        caption = "original, then augmented as in training"
    sheets: list[Path] = []
    errors: list[str] = []
    for (split, class_name), records in track(parts.items(), "drawing", len(parts)):
        if options.plot and not (recipe and split in ("validation", "test")):
            rows = _rows(records, image_set.grouped, recipe, errors)
            if rows:
                words = filter(None, (split, class_name, "augmented" if recipe else ""))
                name = re.sub(r"[^\w-]", "_", "-".join(words))
                sheets.append(unused_path(folder / f"{name}.png", sheets.__contains__))
                title = f"{len(records)} pictures: {class_name}" + (f", {split}" if split else "")
                _draw(sheets[-1], rows, f"{title}; {caption}")
    names = [path.name for path in sheets]
    for name in set(read_json(folder / REPORT_FILE).get("sheets", ())) - set(names):
        if name.endswith(".png") and name == Path(name).name:
            (folder / name).unlink(missing_ok=True)  # a sheet of an earlier report
    report = {"root": str(image_set.root), "counts": counts, "sheets": names}
    write_json(folder / REPORT_FILE, report)
    if options.json:
        print_json(report)
    else:
        print(f"sheets      {printable(folder)}")
    return not errors


def training_recipe(data: str) -> Recipe:
    """Return the recipe of a run, or that of ``model=cnn`` for other data.

    Args:
        data: See :func:`~horsehuman.data.image_sets.find_image_set`.

    Raises:
        HorseHumanError: If the run has no augmentation or an invalid image size.
    """
    folder = Path(data).expanduser()
    if is_run(folder):
        config = read_run_config(folder)
    else:
        config = yaml.safe_load((configs_dir() / "model" / "cnn.yaml").read_text(encoding="utf-8"))
    augment = make_augment(config["data"].get("augment"))
    if augment is None:
        raise HorseHumanError(f"--augmented: {printable(data)} was trained without augmentation")
    size: Any = dict(config.get("model") or {}).get("image_size")
    check_number(f"model.image_size of {printable(data)}", size, int, at_least=8, at_most=4096)
    return size, augment


def _by_split_and_class(image_set: ImageSet) -> dict[tuple[str, str], list[Record]]:
    """Return the records of each (split, class name), in the order of splits and classes.

    The records of each part are sorted by group and path.
    """
    order = [*SPLITS, ""]
    records = sorted(
        image_set.records, key=lambda r: (order.index(r.split), r.label, r.group, r.path)
    )
    parts = groupby(records, lambda r: (r.split, image_set.class_names[r.label]))
    return {key: list(part) for key, part in parts}


def _count(
    parts: Mapping[tuple[str, str], Sequence[Record]], grouped: bool
) -> tuple[list[dict[str, Any]], Table]:
    """Count the images and, if they are known, the groups of each split and class."""
    counts = []
    lines = table("split", "class", "pictures", "groups", left=2)
    for (split, class_name), records in parts.items():
        count, groups = len(records), len({record.group for record in records})
        row = {"split": split or None, "class": class_name, "pictures": count}
        counts.append({**row, "groups": groups if grouped else None})
        known = str(groups) if grouped else "unknown"
        lines.add_row(split or "none yet", printable(class_name), str(count), known)
    return counts, lines


def _rows(
    records: Sequence[Record], grouped: bool, recipe: Recipe | None, errors: list[str]
) -> list[Row]:
    """Decode the images of a sheet.

    Args:
        records: Records of one split and class.
        grouped: Whether each row shows one group; otherwise rows are filled in order.
        recipe: Makes each row show one image and augmented versions of it.
        errors: The errors of images that cannot be read are appended to it, and logged.
    """
    size, augment = recipe or (SIDE, None)
    groups: dict[str, list[Record]] = {}
    for index, record in enumerate(records):
        groups.setdefault(record.group if grouped else str(index // COLUMNS), []).append(record)
    rows: list[Row] = []
    for name in evenly_spaced(list(groups), ROWS):
        images: list[Tensor] = []
        for record in evenly_spaced(groups[name], 1 if augment else COLUMNS):
            try:
                images.append(decode(record.path, size))
            except PictureError as error:
                errors.append(str(error))
                log.warning("error: %s", error)
        if images and augment:
            with torch.random.fork_rng():
                torch.manual_seed(len(rows))
                images += augment(images[0].expand(COLUMNS - 1, -1, -1, -1))
        if images:
            label = f"{printable(name)[-24:]} ({len(groups[name])})" if grouped else ""
            rows.append((label, images))
    return rows


def _draw(path: Path, rows: Sequence[Row], title: str) -> None:
    from horsehuman import plots  # imports matplotlib, which is slow

    size = rows[0][1][0].shape[1]
    cells = np.full((len(rows), COLUMNS, size + 2, size + 2, 3), 255, np.uint8)
    for row, (_, images) in zip(cells, rows, strict=True):
        row[: len(images), :size, :size] = torch.stack(images).permute(0, 2, 3, 1).numpy()
    sheet = cells.swapaxes(1, 2).reshape(len(rows) * (size + 2), -1, 3)
    plots.save(plots.sheet(sheet, [label for label, _ in rows], title), path)
