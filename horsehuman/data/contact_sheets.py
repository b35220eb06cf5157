"""A set of pictures as a person sees it: counts, and contact sheets with a row for each group."""

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

#: Pictures in a row, rows on a sheet, and the side of a picture there in pixels.
COLUMNS, ROWS, SIDE = 8, 60, 96

Row = tuple[str, list[Tensor]]


def show_images(
    data: str, group_pattern: str | None, out: Path | None, *, augmented: bool, force: bool
) -> bool:
    """What ``horsehuman data`` does; returns whether all pictures on the sheets could be read."""
    pictures = find_image_set(data, group_pattern)
    recipe = training_recipe(data) if augmented else None
    folder = create_report_dir(out, Path("outputs/data"), force=force, report=["*.png"])
    console(stderr=False).print(counts(pictures))
    parts = _parts(pictures)
    if recipe:
        parts = {key: own for key, own in parts.items() if key[0] not in ("validation", "test")}
    whole, drawn = True, set[Path]()
    for (split, class_name), records in track(parts.items(), "drawing", len(parts)):
        name = "-".join(filter(None, (split, class_name, "augmented" if recipe else "")))
        title = f"{len(records)} pictures: {class_name}" + (f", {split}" if split else "")
        rows, errors = _rows(records, pictures.grouped, recipe)
        for error in errors:
            log.warning("error: %s", error)
        whole = whole and not errors
        if rows:
            path = unused_path(folder / f"{_file_name(name)}.png", drawn.__contains__)
            drawn.add(path)
            _draw(path, rows, title, recipe is not None)
    print(f"sheets      {printable(folder)}")
    return whole


def counts(pictures: ImageSet) -> Table:
    """Pictures and groups of each class in each split."""
    lines = table("split", "class", "pictures", "groups", left=2)
    for (split, class_name), records in _parts(pictures).items():
        groups = str(len({record.group for record in records})) if pictures.grouped else "unknown"
        lines.add_row(split or "none yet", printable(class_name), str(len(records)), groups)
    return lines


def training_recipe(data: str) -> tuple[int, Augment]:
    """Picture size and augmentation of a run; for other pictures those of ``model=cnn``.

    Raises:
        HorseHumanError: The run augments nothing, or there is neither a run nor a clone.
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


def _parts(pictures: ImageSet) -> dict[tuple[str, str], list[Record]]:
    """The records of each split and class, in order."""
    found: dict[tuple[str, str], list[Record]] = {}
    order = [*SPLITS, ""]
    for record in sorted(
        pictures.records, key=lambda r: (order.index(r.split), r.label, r.group, r.path)
    ):
        found.setdefault((record.split, pictures.class_names[record.label]), []).append(record)
    return found


def _rows(
    records: Sequence[Record], grouped: bool, recipe: tuple[int, Augment] | None
) -> tuple[list[Row], list[str]]:
    """Rows of a sheet, and what could not be read."""
    groups: dict[str, list[Record]] = {}
    for index, record in enumerate(records):
        name = record.group if grouped else str(index // COLUMNS)
        groups.setdefault(name, []).append(record)
    rows: list[Row] = []
    errors: list[str] = []
    for name in evenly_spaced(list(groups), ROWS):
        own = groups[name]
        label = f"{printable(name)[-24:]} ({len(own)})" if grouped else ""
        chosen = evenly_spaced(own, 1 if recipe else COLUMNS)
        found = list(_decoded(chosen, recipe[0] if recipe else SIDE, errors))
        if found and recipe:
            with torch.random.fork_rng():
                torch.manual_seed(len(rows))
                views = recipe[1](found[0].expand(COLUMNS - 1, -1, -1, -1))
            found = [found[0], *views]
        if found:
            rows.append((label, found))
    return rows, errors


def _decoded(records: Sequence[Record], size: int, errors: list[str]) -> Iterator[Tensor]:
    for record in records:
        try:
            yield decode(record.path, size)
        except PictureError as error:
            errors.append(str(error))


def _draw(path: Path, rows: Sequence[Row], title: str, augmented: bool) -> None:
    from horsehuman import plots  # matplotlib, once there is something to draw

    size = rows[0][1][0].shape[1]
    sheet: NDArray[np.uint8] = np.full(
        (len(rows) * (size + 2), COLUMNS * (size + 2), 3), 255, np.uint8
    )
    for y, (_, found) in enumerate(rows):
        for x, picture in enumerate(found):
            top, left = y * (size + 2), x * (size + 2)
            sheet[top : top + size, left : left + size] = picture.permute(1, 2, 0).numpy()
    what = "the picture, and how training sees it" if augmented else "a row a group"
    plots.save(plots.sheet(sheet, [label for label, _ in rows], f"{title}; {what}"), path)


def _file_name(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)
