"""What a run records about itself, and how an interrupted run goes on."""

import hashlib
import importlib.metadata
import logging
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from horsehuman.data.archives import are_official
from horsehuman.data.datamodule import HorseHumanDataModule
from horsehuman.errors import HorseHumanError, printable
from horsehuman.run_dir import read_json
from horsehuman.runtime import cpu_name

log = logging.getLogger(__name__)

#: The file in a run folder that holds the record.
RECORD = "run.json"

_PACKAGES = ("horsehuman", "lightning", "numpy", "pillow", "timm", "torch", "torchvision")


def make_run_record(config: str, data: HorseHumanDataModule) -> dict[str, Any]:
    """Collect everything that a run's result depends on, as plain values.

    Args:
        config: The run's config as YAML; the record holds its digest.
        data: After ``setup``; the record holds one digest of all images, labels and splits.
    """
    digest = hashlib.blake2b(digest_size=16)
    assert data.root is not None
    for record in data.records:
        name = record.path.relative_to(data.root).as_posix()
        digest.update(f"{name}\0{record.label}\0{record.split}\0".encode(errors="replace"))
        digest.update(record.digest)
    return {
        "config": hashlib.blake2b(config.encode(), digest_size=16).hexdigest(),
        "data": digest.hexdigest(),
        "official": are_official(data.source, data.archives_dir),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
    }


def compare_run_record(run_dir: Path, record: Mapping[str, Any], *, allow_changes: bool) -> None:
    """Compare a record with the one that the run began with, and report the differences.

    Raises:
        HorseHumanError: The images, labels or splits differ, and ``allow_changes`` is not set.
    """
    before = read_json(run_dir / RECORD)
    if not before:
        log.warning("%s has no %s: what has changed is unknown", printable(run_dir), RECORD)
        return
    changed = {
        name: name if name in ("data", "config") else f"{name} ({before.get(name)}, now {value})"
        for name, value in record.items()
        if name in before and value != before[name]
    }
    if not changed:
        return
    message = f"{printable(run_dir)}: changed since this run began: {', '.join(changed.values())}"
    if "data" in changed and not allow_changes:
        fix = "restore the pictures and their splits, or add allow_changes=true"
        raise HorseHumanError(f"{message}; {fix}")
    log.warning("%s; the result will differ from an uninterrupted run", message)


def _commit() -> str | None:
    """Return the commit of the clone that holds the code, with ``+`` if it has local changes."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
