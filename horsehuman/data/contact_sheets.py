"""The command ``horsehuman data``: a table of counts and contact sheets with one row per group."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from horsehuman.data.datasets import decode
from horsehuman.data.image_sets import SPLITS, ImageSet, find_image_set, read_run_config
from horsehuman.data.images import PictureError
from horsehuman.data.records import Record, evenly_spaced
from horsehuman.data.transforms import Augment, make_augment
from horsehuman.errors import HorseHumanError, check_number, printable
from horsehuman.run_dir import create_report_dir, is_run, unused_path
from horsehuman.runtime import console, table, track

log = logging.getLogger(__name__)

#: Images per row, largest number of rows per sheet, and side of an image on a sheet in pixels.
COLUMNS, ROWS, SIDE = 8, 60, 96

#: Label of a row of a sheet, and its images, each uint8 ``(3, size, size)``.
Row = tuple[str, list[Tensor]]


def show_images(
    data: str, group_pattern: str | None, out: Path | None, *, augmented: bool, force: bool
) -> bool:
    """Print counts of an image set and write one contact sheet for each class and split.

    Args:
        data: See :func:`~horsehuman.data.image_sets.find_image_set`.
        group_pattern: See :func:`~horsehuman.data.records.scan_folder`.
        out: Folder for the sheets; by default a new one under ``outputs/data``.
        augmented: Draw training images as augmented for training; see :func:`training_recipe`.
        force: Overwrite sheets in ``out``.

    Returns:
        Whether all images on the sheets could be read.

    Raises:
        HorseHumanError: If there are no images or there is no augmentation, or the folder cannot be
            used.
    """
    image_set = find_image_set(data, group_pattern)
    recipe = training_recipe(data) if augmented else None
    folder = create_report_dir(out, Path("outputs/data"), force=force, report=["*.png"])
    console(stderr=False).print(counts(image_set))
    parts = _by_split_and_class(image_set)
    if recipe:
        parts = {key: part for key, part in parts.items() if key[0] not in ("validation", "test")}
    complete, drawn = True, set[Path]()
    for (split, class_name), records in track(parts.items(), "drawing", len(parts)):
        name = "-".join(filter(None, (split, class_name, "augmented" if recipe else "")))
        title = f"{len(records)} pictures: {class_name}" + (f", {split}" if split else "")
        rows, errors = _rows(records, image_set.grouped, recipe)
        for error in errors:
            log.warning("error: %s", error)
        complete = complete and not errors
        if rows:
            path = unused_path(folder / f"{_file_name(name)}.png", drawn.__contains__)
            drawn.add(path)
            _draw(path, rows, title, recipe is not None)
    print(f"sheets      {printable(folder)}")
    return complete


def counts(image_set: ImageSet) -> Table:
    """Return a table with the number of images and groups of each class in each split."""
    lines = table("split", "class", "pictures", "groups", left=2)
    for (split, class_name), records in _by_split_and_class(image_set).items():
        groups = str(len({record.group for record in records})) if image_set.grouped else "unknown"
        lines.add_row(split or "none yet", printable(class_name), str(len(records)), groups)
    return lines


def training_recipe(data: str) -> tuple[int, Augment]:
    """Return image size in pixels and augmentation of a run, or of ``model=cnn`` for other data.

    Args:
        data: See :func:`~horsehuman.data.image_sets.find_image_set`.

    Raises:
        HorseHumanError: If the run has no augmentation or an invalid image size, or if ``data`` is
            not a run and this package is not in a clone of the repository, which holds the config.
    """
    path = Path(__file__).parents[2] / "configs" / "model" / "cnn.yaml"
    if is_run(Path(data).expanduser()):
        config: Mapping[str, Any] = read_run_config(Path(data).expanduser())
    elif path.is_file():
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    else:
        raise HorseHumanError(
            "--augmented needs a run, or a clone of the project: name a run with --data RUN"
        )
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
    parts: dict[tuple[str, str], list[Record]] = {}
    order = [*SPLITS, ""]
    for record in sorted(
        image_set.records, key=lambda r: (order.index(r.split), r.label, r.group, r.path)
    ):
        parts.setdefault((record.split, image_set.class_names[record.label]), []).append(record)
    return parts


def _rows(
    records: Sequence[Record], grouped: bool, recipe: tuple[int, Augment] | None
) -> tuple[list[Row], list[str]]:
    """Decode the images of a sheet.

    Args:
        records: Records of one split and class.
        grouped: Whether each row shows one group; otherwise rows are filled in order.
        recipe: Image size and augmentation. With it a row shows one image and augmented views of
            it.

    Returns:
        The rows, and the errors of images that cannot be read.
    """
    groups: dict[str, list[Record]] = {}
    for index, record in enumerate(records):
        name = record.group if grouped else str(index // COLUMNS)
        groups.setdefault(name, []).append(record)
    rows: list[Row] = []
    errors: list[str] = []
    for name in evenly_spaced(list(groups), ROWS):
        members = groups[name]
        label = f"{printable(name)[-24:]} ({len(members)})" if grouped else ""
        chosen = evenly_spaced(members, 1 if recipe else COLUMNS)
        images = list(_decode_readable(chosen, recipe[0] if recipe else SIDE, errors))
        if images and recipe:
            with torch.random.fork_rng():
                torch.manual_seed(len(rows))
                views = recipe[1](images[0].expand(COLUMNS - 1, -1, -1, -1))
            images = [images[0], *views]
        if images:
            rows.append((label, images))
    return rows, errors


def _decode_readable(records: Sequence[Record], size: int, errors: list[str]) -> Iterator[Tensor]:
    """Yield the canonical images of records; append the errors of unreadable ones to ``errors``."""
    for record in records:
        try:
            yield decode(record.path, size)
        except PictureError as error:
            errors.append(str(error))


def _draw(path: Path, rows: Sequence[Row], title: str, augmented: bool) -> None:
    from horsehuman import plots  # imports matplotlib, which is slow

    size = rows[0][1][0].shape[1]
    sheet: NDArray[np.uint8] = np.full(
        (len(rows) * (size + 2), COLUMNS * (size + 2), 3), 255, np.uint8
    )
    for y, (_, images) in enumerate(rows):
        for x, image in enumerate(images):
            top, left = y * (size + 2), x * (size + 2)
            sheet[top : top + size, left : left + size] = image.permute(1, 2, 0).numpy()
    caption = "original, then augmented as in training" if augmented else "one row per group"
    plots.save(plots.sheet(sheet, [label for label, _ in rows], f"{title}; {caption}"), path)


def _file_name(name: str) -> str:
    """Replace all characters but letters, digits, ``-`` and ``_`` by ``_``."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
