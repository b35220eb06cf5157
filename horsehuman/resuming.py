"""What lets a run that was killed go on as if nothing had happened."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from horsehuman.data.datamodule import HorseHumanDataModule
from horsehuman.errors import HorseHumanError, shown
from horsehuman.picture_set import digest
from horsehuman.runs import read_json, write_checkpoint, write_json
from horsehuman.runtime import cpu_name

log = logging.getLogger(__name__)

RECORD = "run.json"

_PACKAGES = ("horsehuman", "lightning", "numpy", "pillow", "timm", "torch", "torchvision")

_FIGURES, _SECONDS = "horsehuman_figures", "horsehuman_seconds"


class WholeFiles(TorchCheckpointIO):
    """Writes each checkpoint aside, syncs it to the disk and renames it.

    Whenever the process is killed, the one before is whole until the new one is. Where there is no
    room, that checkpoint is lost, and not the run.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write it, or say why not."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(Path(path), checkpoint)
        except OSError as error:
            log.warning(
                "%s is not saved (%s): the run goes on, with the one before, if any",
                shown(path),
                error.strerror,
            )


class KeepFigures(L.Callback):
    """Puts figures and time into each checkpoint, and the log on the disk before it.

    Attributes:
        figures: Of the epoch that the checkpoint ends with, by name.
        before: Seconds that a run which goes on had taken up to its checkpoint.
    """

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.before = 0.0
        self._started = time.monotonic()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the figures, and write what the log has waiting."""
        self.figures = figures_of(trainer)
        checkpoint[_FIGURES] = self.figures
        checkpoint[_SECONDS] = self.before + time.monotonic() - self._started
        logger: Any = trainer.logger
        logger.experiment.flush()

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take them back."""
        self.figures = dict(checkpoint.get(_FIGURES, {}))
        self.before = float(checkpoint.get(_SECONDS, 0))


def figures_of(trainer: L.Trainer) -> dict[str, float]:
    """The last epoch's figures by name; none where this process has trained no epoch."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}


def steps_done(last: Path) -> int:
    """Steps that a full checkpoint has behind it; 0 where there is none.

    Raises:
        HorseHumanError: It cannot be read.
    """
    from horsehuman.checkpoint import read_checkpoint

    return int(read_checkpoint(last)["global_step"]) if last.is_file() else 0


def make_record(config: str, data: HorseHumanDataModule) -> dict[str, Any]:
    """What a run's result depends on: config, data, versions, commit, CPU; plain values.

    Args:
        config: The run's, as YAML.
        data: After ``setup``.
    """
    pictures = hashlib.blake2b(digest_size=16)
    assert data.root is not None
    for record in data.records:
        name = record.path.relative_to(data.root).as_posix()
        pictures.update(f"{name}\0{record.label}\0{record.split}\0".encode(errors="replace"))
        pictures.update(digest(record.path))
    return {
        "config": hashlib.blake2b(config.encode(), digest_size=16).hexdigest(),
        "data": pictures.hexdigest(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write ``run.json``."""
    write_json(folder / RECORD, record)


def check_record(folder: Path, record: Mapping[str, Any], *, allow_changes: bool) -> None:
    """Compare with what a run began with, and say what is not the same.

    Raises:
        HorseHumanError: The data are others, and that is not allowed.
    """
    before = read_json(folder / RECORD)
    if not before:
        log.warning("%s has no whole %s: nobody knows what has changed", shown(folder), RECORD)
        return
    changed = [name for name in record if record[name] != before.get(name)]
    if "data" in changed and not allow_changes:
        raise HorseHumanError(
            f"{shown(folder)}: its pictures or their splits have changed: bring the old ones back, "
            "or go on with these with allow_changes=true"
        )
    for name in changed:
        values = "" if name in ("data", "config") else f" ({before.get(name)}, now {record[name]})"
        log.warning(
            "%s has changed since this run began%s: it will not end as it would have", name, values
        )


def _commit() -> str | None:
    """The commit of the clone that the code is in, with a plus where it has been changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
