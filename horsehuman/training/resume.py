"""What lets a run that was killed go on as if nothing had happened."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from horsehuman.data.datamodule import HorseHumanDataModule
from horsehuman.data.image_sets import file_digest, read_run_config
from horsehuman.errors import HorseHumanError, printable
from horsehuman.run_dir import read_json, write_json
from horsehuman.runtime import cpu_name

#: Parts of a run's config.
_PARTS = {"data", "early_stopping", "ema", "model", "seed", "test", "trainer"}

log = logging.getLogger(__name__)

RECORD = "run.json"

_PACKAGES = ("horsehuman", "lightning", "numpy", "pillow", "timm", "torch", "torchvision")


def completed_steps(last: Path) -> int:
    """Steps that a full checkpoint has behind it; 0 where there is none.

    Raises:
        HorseHumanError: It cannot be read.
    """
    from horsehuman.models.checkpoint import read_checkpoint

    return int(read_checkpoint(last)["global_step"]) if last.is_file() else 0


def make_run_record(config: str, data: HorseHumanDataModule) -> dict[str, Any]:
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
        pictures.update(file_digest(record.path))
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


def compare_run_record(folder: Path, record: Mapping[str, Any], *, allow_changes: bool) -> None:
    """Compare with what a run began with, and say what is not the same.

    Raises:
        HorseHumanError: The data are others, and that is not allowed.
    """
    before = read_json(folder / RECORD)
    if not before:
        log.warning("%s has no whole %s: nobody knows what has changed", printable(folder), RECORD)
        return
    changed = [name for name in record if record[name] != before.get(name)]
    if "data" in changed and not allow_changes:
        raise HorseHumanError(
            f"{printable(folder)}: its pictures or their splits have changed: bring the old ones back, "
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


def load_config(folder: Path) -> DictConfig:
    """The config that a run began with, as it stands there: nothing in it is looked up elsewhere.

    Raises:
        HorseHumanError: There is none, or it is damaged.
    """
    found = read_run_config(folder)
    whole = found.keys() >= _PARTS and all(isinstance(found[p], dict) for p in ("model", "trainer"))
    if not whole or "${" in str(found):
        raise HorseHumanError(
            f"{printable(folder / 'config.yaml')} is not as a run has written it: there is no going on"
        )
    found.setdefault("histograms", False)  # runs of before there was such
    config = OmegaConf.create(found)
    assert isinstance(config, DictConfig)
    return config
