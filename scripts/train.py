"""Train a classifier: python scripts/train.py model=inception (--help shows more)."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["HYDRA_FULL_ERROR"] = "1"  # before hydra: its errors are told by explain()

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra_config import CONFIGS, explain
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from horsehuman.distributed import env_rank, env_world_size
from horsehuman.errors import HorseHumanError, PeerGoneError, check_flag, first_line, one_line
from horsehuman.runtime import (
    Interrupted,
    keep_freed_memory,
    log_to_stderr,
    raise_on_signals,
    silence,
)
from horsehuman.training.build import check_options, requested_processes
from horsehuman.training.launch import GRACE, PEER_GONE, end_with_parent, launch

# One time for all runs of a sweep, and all processes; Hydra's own ${now:} moves on.
LAUNCHED = os.environ.get("HORSEHUMAN_STARTED")
STARTED = LAUNCHED or time.strftime("%Y-%m-%d_%H-%M-%S")
OmegaConf.register_new_resolver("started", lambda: STARTED)

#: Exit codes of runs that failed: of one run, or of several of a sweep.
FAILED: list[int] = []

#: Why threads beside the training have ended, such as the log's.
BESIDE: list[str] = []


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="train")
def main(config: DictConfig) -> None:
    """Train, test and report one run; a failure is told here, and a sweep goes on."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    with contextlib.suppress(ValueError):  # on another drive
        folder = min(Path(os.path.relpath(folder)), folder, key=lambda path: len(str(path)))
    if HydraConfig.get().mode == RunMode.MULTIRUN and config.trainer.get("strategy") == "ddp":
        remove_if_empty(folder)
        print("error: -m does not go with trainer=ddp: start one after another", file=sys.stderr)
        sys.exit(2)  # the other runs do not begin
    if env_rank() > 0 and not LAUNCHED:
        remove_if_empty(folder)  # the first process knows where to write
    try:
        if config.resume is None:
            begin(config, folder)
        else:
            made, folder = folder, Path(str(config.resume)).expanduser()
            remove(made)
            try:
                go_on(config, folder)
            finally:
                remove(made)  # launched processes have made it again
    except (HorseHumanError, OSError) as error:
        tell(error, folder)
        remove_if_empty(folder)
    except Interrupted:
        if env_rank() == 0:
            print(f"interrupted; {kept(folder)}", file=sys.stderr)
        remove_if_empty(folder)
        raise


def remove(folder: Path) -> None:
    """Remove the folder that Hydra made for a new run, where none begins."""
    if not LAUNCHED:
        with contextlib.suppress(OSError):
            os.removedirs(folder)


def begin(config: DictConfig, folder: Path) -> None:
    """Train a new run, in several processes where it says so."""
    check_options(config)  # before what takes seconds to import
    if is_to_launch(config.trainer):
        launch_all(config.trainer.devices, folder)
        return
    from horsehuman.training.run import train

    train(config, folder)


def is_to_launch(options: Any) -> bool:
    """Whether several processes are asked for, and this is none of them."""
    if requested_processes(options) == 1 or env_world_size() > 1:
        return False
    if (machines := options.get("num_nodes", 1)) > 1:
        raise HorseHumanError(
            f"trainer.num_nodes={machines}: start it on each machine with torchrun; docs/use.md "
            "shows how"
        )
    return True


def launch_all(count: int, folder: Path) -> None:
    """Run this command in several processes, and end as they do."""
    code, why = launch([sys.executable, *sys.argv], count, {"HORSEHUMAN_STARTED": STARTED})
    if why:
        raise HorseHumanError(f"{why}; {kept(folder)}")
    if code:
        remove_if_empty(folder)
        FAILED.append(code)


def tell(error: Exception, folder: Path) -> None:
    """Print an error; the first process says at once, and ends, what all of them find."""
    lost = isinstance(error, PeerGoneError)
    FAILED.append(PEER_GONE if lost else 1)
    if lost or env_rank() > 0:  # what caused it, or found it first, says so and ends the run
        time.sleep(GRACE / 3)
    known = f"; {kept(folder)}" if lost and env_rank() == 0 else ""
    print(f"error: {one_line(error)}{known}", file=sys.stderr)


def kept(folder: Path) -> str:
    """What is left of a run that did not end, and how to go on with it."""
    last = folder / "checkpoints" / "last.ckpt"
    command = f"python scripts/train.py resume={shlex.quote(str(folder))}"
    if not last.is_file():
        begun = (folder / "config.yaml").is_file()
        return "no epoch was finished" + (f"; begin again with {command}" if begun else "")
    return f"the last whole epoch is in {last}; go on with {command}"


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
    from horsehuman.training.resume import load_config

    begun = load_config(folder)
    check_options(begun)
    if is_to_launch(begun.trainer):
        launch_all(begun.trainer.devices, folder)
        return
    from horsehuman.training.run import resume_run

    resume_run(folder, allow_changes=config.allow_changes)


def remove_if_empty(folder: Path) -> None:
    """Remove the folder that Hydra made for a run that never began, and its empty sweep's."""
    for made in (folder, folder.parent):
        if STARTED in made.name or STARTED in made.parent.name:
            with contextlib.suppress(OSError):
                made.rmdir()


def note_of_thread(failed: threading.ExceptHookArgs) -> None:
    """Keep why a thread has ended; most often the training ends of it, and says so."""
    if isinstance(failed.exc_value, Exception):
        BESIDE.append(one_line(failed.exc_value))


def run() -> int:
    """Run the script; every failure that a user can cause is one line and an exit code."""
    log_to_stderr()
    if env_rank() > 0:
        silence()
    keep_freed_memory()
    raise_on_signals()
    threading.excepthook = note_of_thread
    if LAUNCHED:
        end_with_parent()
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
    if BESIDE and not FAILED:
        print(f"error: {BESIDE[0]}", file=sys.stderr)
        return 1
    return max(FAILED, default=0)


if __name__ == "__main__":
    sys.exit(run())
