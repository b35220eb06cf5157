"""The run folder: what is in it, and which is the newest."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

from horsehuman.data.folders import Record
from horsehuman.errors import HorseHumanError, shown
from horsehuman.seal import seal

log = logging.getLogger(__name__)

#: Seconds within which what a process that was killed has started notices that, and ends.
LETTING_GO = 15.0

#: What a slim checkpoint keeps of Lightning's: all that :func:`load_classifier` and
#: ``load_from_checkpoint`` need, and when it was.
_SLIM = (
    "pytorch-lightning_version",
    "epoch",
    "global_step",
    "state_dict",
    "hparams_name",
    "hyper_parameters",
    "horsehuman",
)


def claim(folder: Path) -> None:
    """Take a folder for a new run.

    Raises:
        HorseHumanError: It cannot be written, or holds a run already.
    """
    try:
        (folder / "checkpoints").mkdir(parents=True)
    except FileExistsError as error:
        raise HorseHumanError(
            f"{shown(folder)} holds a run already: start again, or name another folder with "
            "hydra.run.dir=DIR"
        ) from error
    except OSError as error:
        raise HorseHumanError(
            f"cannot write into {shown(folder)}: {error.strerror}; name another folder with "
            "hydra.run.dir=DIR"
        ) from error


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Let no other process train into a run's folder meanwhile; a process that dies lets go of it.

    Raises:
        HorseHumanError: Another one does.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=LETTING_GO)
    except Timeout as error:
        raise HorseHumanError(
            f"{shown(folder)} is being trained by another process: let it end, or end it"
        ) from error
    except NotImplementedError:
        log.warning("%s is on a disk without locks: let no other process train it", shown(folder))
    try:
        yield
    finally:
        lock.release()


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file aside, sync it to the disk and rename it: it is there whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # torch.save hides a full disk
            raise error.__context__ from None
        raise


def remove_unfinished(folder: Path) -> None:
    """Remove what :func:`write_whole` was writing when its process was killed."""
    for aside in folder.glob(".*.*.*"):
        aside.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file with this content, whole or not at all."""
    write_whole(path, lambda file: file.write(content))


def write_json(path: Path, value: Any, *, sort_keys: bool = False) -> None:
    """Write plain values as JSON, whole or not at all; there is no NaN in JSON."""
    text = json.dumps(value, indent=2, sort_keys=sort_keys, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """What a file of JSON says; nothing where it is not there, or not whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, whole or not at all; names that are no text stay what they are."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode(errors="surrogateescape"))


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint with its checksum, whole or not at all."""
    seal(checkpoint)
    write_whole(path, lambda file: torch.save(checkpoint, file))


def slim(source: Path, target: Path) -> None:
    """Keep of a full checkpoint what inference needs.

    Where weights are averaged, the full checkpoint's ``state_dict`` is the average already.

    Args:
        source: A checkpoint that Lightning wrote during training.
        target: Where the slim one goes; may be the same file.
    """
    full = torch.load(source, map_location="cpu", weights_only=True)
    kept = {key: full[key] for key in _SLIM if key in full}
    write_checkpoint(target, kept)


def write_splits(
    folder: Path, root: Path, records: Sequence[Record], class_names: Sequence[str]
) -> None:
    """Write ``splits.csv``: picture (below the data's root), label, group, split."""
    rows = (
        (os.path.relpath(r.path, root).replace(os.sep, "/"), class_names[r.label], r.group, r.split)
        for r in records
    )
    write_csv(folder / "splits.csv", ("picture", "label", "group", "split"), rows)


def write_samples(folder: Path, pictures: Tensor, columns: int = 8) -> Tensor:
    """Write ``samples.png``, training pictures as the model gets them; returns it, uint8 CHW."""
    from torchvision.utils import make_grid  # a second to import, for commands that train

    sheet: Tensor = make_grid(pictures, nrow=columns, padding=2, pad_value=127)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(folder / "samples.png")
    return sheet


def write_skipped(folder: Path, skipped: Mapping[str, str]) -> None:
    """Write ``skipped.csv``: files that were left out and why."""
    write_csv(folder / "skipped.csv", ("picture", "reason"), skipped.items())


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> Path:
    """Write ``metrics.json`` and return its path."""
    write_json(folder / "metrics.json", metrics, sort_keys=True)
    return folder / "metrics.json"


def point_latest(folder: Path) -> None:
    """Let ``latest``, beside the folder of a run or of its sweep, point to the run."""
    top = folder.parent.parent if folder.parent.name.startswith("sweep_") else folder.parent
    link, aside = top / "latest", top / f".latest-{os.getpid()}"
    try:
        aside.symlink_to(os.path.relpath(folder, top), target_is_directory=True)
        aside.replace(link)
    except OSError as error:  # Windows without the right to link; a folder of that name
        aside.unlink(missing_ok=True)
        log.info("%s is not updated: %s", shown(link), error.strerror)
