"""Train a classifier: python scripts/train.py model=inception (--help shows more)."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from pathlib import Path

os.environ["HYDRA_FULL_ERROR"] = "1"  # before hydra: its errors are told by explain()

import hydra
from config_errors import CONFIGS, explain
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from horsehuman.config import check_options
from horsehuman.errors import HorseHumanError, check_flag, first_line, one_line
from horsehuman.runtime import keep_freed_memory
from horsehuman.terminal import Interrupted, raise_on_signals, show_notes

# One time for all runs of a sweep; Hydra's own ${now:} moves on.
STARTED = time.strftime("%Y-%m-%d_%H-%M-%S")
OmegaConf.register_new_resolver("started", lambda: STARTED)

#: Folders of runs that failed: of one run, or of several of a sweep.
FAILED: list[Path] = []


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(config: DictConfig) -> None:
    """Train, test and report one run; a failure is told here, and a sweep goes on."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with contextlib.suppress(ValueError):  # on another drive
        folder = min(Path(os.path.relpath(folder)), folder, key=lambda path: len(str(path)))
    try:
        if config.resume is None:
            check_options(config)  # before what takes seconds to import
            from horsehuman.training import train

            train(config, folder)
        else:
            with contextlib.suppress(OSError):  # Hydra made a folder for a new run
                os.removedirs(folder)
            folder = Path(str(config.resume)).expanduser()
            go_on(config, folder)
    except (HorseHumanError, OSError) as error:
        FAILED.append(folder)
        print(f"error: {one_line(error)}", file=sys.stderr)
        remove_if_empty(folder)
    except Interrupted:
        last = folder / "checkpoints" / "last.ckpt"
        kept = f"the last whole epoch is in {last}" if last.is_file() else "no epoch was finished"
        on = f"; go on with python scripts/train.py resume={folder}" if last.is_file() else ""
        print(f"interrupted; {kept}{on}", file=sys.stderr)
        remove_if_empty(folder)
        raise


def go_on(config: DictConfig, folder: Path) -> None:
    """Resume a run, with its own options alone."""
    here = HydraConfig.get()
    given = [o for o in here.overrides.task if o.split("=")[0] not in ("resume", "allow_changes")]
    if given or here.mode == RunMode.MULTIRUN:
        what = ", ".join(given) or "-m"
        raise HorseHumanError(
            f"resume={config.resume} goes on with the options that the run began with: drop {what}"
        )
    check_flag("allow_changes", config.allow_changes)
    from horsehuman.training import resume_run

    resume_run(folder, allow_changes=config.allow_changes)


def remove_if_empty(folder: Path) -> None:
    """Remove the folder that Hydra made for a run that never began, and its empty sweep's."""
    for made in (folder, folder.parent):
        if STARTED in made.name or STARTED in made.parent.name:
            with contextlib.suppress(OSError):
                made.rmdir()


def run() -> int:
    """Run the script; every failure that a user can cause is one line and an exit code."""
    show_notes()
    keep_freed_memory()
    raise_on_signals()
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    except ValueError as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not {"hydra", "omegaconf"} & set(Path(raised_in).parts):
            raise
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        return interrupted.exit_code
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(run())
