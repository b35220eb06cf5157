"""Trained classifiers from files: safe, offline, with errors that say what the file is."""

from __future__ import annotations

import importlib
import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from horsehuman.errors import HorseHumanError, shown
from horsehuman.models.classifier import BinaryClassifier, check_origin
from horsehuman.runs import newest_run

log = logging.getLogger(__name__)

_HOMES = {
    "CNNClassifier": "horsehuman.models.cnn",
    "InceptionClassifier": "horsehuman.models.inception",
}


def load_classifier(source: str | Path | None = None) -> BinaryClassifier:
    """Load a trained classifier with all that belongs to it, from one file.

    No network is asked, no pretrained weights are read, and no code in the file is executed.

    Args:
        source: A run's folder (its ``final.ckpt`` is meant), a checkpoint file, or ``None`` for
            the newest run below ``outputs/``.

    Returns:
        The classifier on the CPU, in eval mode.

    Raises:
        HorseHumanError: There is no such run or file, or it is not a classifier of ours.
    """
    path = find_checkpoint(source)
    checkpoint = read_checkpoint(path)
    try:
        name = check_origin(checkpoint)
        kind: type[BinaryClassifier] = getattr(importlib.import_module(_HOMES[name]), name)
        given = dict(checkpoint["hyper_parameters"])
        if "weights" in given:
            given["weights"] = "checkpoint"  # whatever the file says, nothing else is read
        classifier = kind(**given)
        classifier.load_state_dict(checkpoint["state_dict"])
    except HorseHumanError as error:
        raise HorseHumanError(f"{shown(path)}: {error}") from error
    except Exception as error:  # a damaged or foreign file may hold anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HorseHumanError(
            f"{shown(path)} does not hold what its classifier needs ({reason}): train it again"
        ) from error
    return classifier.eval()


def find_checkpoint(source: str | Path | None) -> Path:
    """The file that a run, a file name or nothing stands for.

    Raises:
        HorseHumanError: There is none.
    """
    if source is None:
        source = newest_run()
        log.info("using the newest run: %s", shown(source))
    path = Path(source).expanduser()
    if not path.is_dir():
        if not path.is_file():
            raise HorseHumanError(f"--model {shown(path)}: there is no such run or file")
        return path
    final = path / "checkpoints" / "final.ckpt"
    if final.is_file():
        return final
    last = final.with_name("last.ckpt")
    if last.is_file():
        raise HorseHumanError(f"{shown(path)} has not finished: name its {shown(last)} instead")
    raise HorseHumanError(f"{shown(path)} is no run: it has no checkpoints/final.ckpt")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file that ``torch.save`` wrote, executing nothing.

    Raises:
        HorseHumanError: It is something else, is cut off, or holds code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise HorseHumanError(f"cannot read {shown(path)}: {error.strerror or error}") from error
    if not start.startswith(b"PK"):
        raise HorseHumanError(f"{shown(path)} is no checkpoint: {_kind(start)}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise HorseHumanError(
            f"{shown(path)} holds more than weights and plain values; nothing in it was executed"
        ) from error
    except Exception as error:  # so may a damaged archive or pickle
        raise HorseHumanError(
            f"{shown(path)} is cut off or damaged: copy or train it again"
        ) from error
    if not isinstance(checkpoint, dict):
        raise HorseHumanError(f"{shown(path)}: this checkpoint was not written by horsehuman")
    return checkpoint


def _kind(start: bytes) -> str:
    text = start.lstrip().lower()
    if not start:
        return "it is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page; the download went wrong"
    if start.startswith(b"\x80"):
        return "it is a bare pickle, which is not executed"
    return "it is another kind of file"
