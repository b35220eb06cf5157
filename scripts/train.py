"""Train a classifier: python scripts/train.py model=inception (--help shows more)."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import threading
import time
from pathlib import Path

os.environ["HYDRA_FULL_ERROR"] = "1"  # before the import; run() explains Hydra's errors

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra_config import HYDRA_ERRORS, explain
from omegaconf import DictConfig, OmegaConf

from horsehuman import runtime
from horsehuman.errors import HorseHumanError, ResumableError, one_line

log = logging.getLogger("horsehuman.train")  # silent on ranks above 0

# torchrun sets both
RANK = int(os.environ.get("RANK", 0)) if os.environ.get("WORLD_SIZE", "1") != "1" else 0

COMMAND = sys.argv

# The runs of a sweep share one start time; Hydra's ${now:} differs.
STARTED = time.strftime("%Y-%m-%d_%H-%M-%S")
OmegaConf.register_new_resolver("started", lambda: STARTED)

#: Exit codes of the runs that failed; a sweep has several.
exit_codes: list[int] = []

#: Errors of background threads, such as the log's writer.
thread_errors: list[str] = []


@hydra.main(version_base="1.3", config_path=str(runtime.configs_dir()), config_name="train")
def main(config: DictConfig) -> None:
    """Train, test and report one run. A failed run of a sweep does not end the sweep."""
    sys.argv = COMMAND  # error messages quote it
    folder = HydraConfig.get().runtime.output_dir if config.resume is None else config.resume
    run_dir = Path(str(folder)).expanduser()
    if run_dir.is_relative_to(Path.cwd()):
        run_dir = run_dir.relative_to(Path.cwd())
    try:
        check_command(config)
        from horsehuman.training.run import resume_run, train  # imports Lightning: takes seconds

        if config.resume is None:
            train(config, run_dir)
        else:
            resume_run(run_dir, allow_changes=config.allow_changes)
    except (HorseHumanError, OSError) as error:
        exit_codes.append(1)
        has_begun = (run_dir / "config.yaml").is_file()
        can_resume = isinstance(error, ResumableError) or (has_begun and isinstance(error, OSError))
        hint = resume_hint(run_dir) if can_resume and RANK == 0 else ""  # others know no folder
        if RANK > 0:
            time.sleep(5)  # torchrun ends all ranks meanwhile if rank 0 prints the same error
        # One write with the newline: print makes two, and torchrun's lines may come between them.
        sys.stderr.write(f"error: {one_line(error)}{hint}\n")
    except runtime.Interrupted:
        log.error("interrupted%s", resume_hint(run_dir))
        raise
    finally:
        if STARTED in str(run_dir):
            with contextlib.suppress(OSError):  # unless it is empty: the run has not begun
                os.removedirs(run_dir)


def check_command(config: DictConfig) -> None:
    """Refuse invalid options and combinations of ``-m``, ``resume`` and ``trainer=ddp``."""
    from horsehuman.training.config import check_options  # train() would import Lightning first

    sweep = "MULTIRUN" in str(HydraConfig.get().mode)
    if sweep and config.trainer.get("strategy") == "ddp":
        log.error("error: -m does not go with trainer=ddp: start one run after another")
        sys.exit(2)
    overrides = HydraConfig.get().overrides.task
    others = ", ".join(o for o in overrides if o.split("=")[0] not in ("resume", "allow_changes"))
    if config.resume is None:
        check_options(config)
    elif others or sweep:
        raise HorseHumanError(f"resume={config.resume} uses its own options: drop {others or '-m'}")


def resume_hint(run_dir: Path) -> str:
    """Return what is left of a run that has begun, and the command that resumes it."""
    if not (run_dir / "config.yaml").is_file():
        return "; no epoch was finished"
    last = run_dir / "checkpoints" / "last.ckpt"
    done = f"the last saved epoch is in {last}" if last.is_file() else "no epoch is on the disk"
    count = os.environ.get("LOCAL_WORLD_SIZE")
    python = f"torchrun --standalone --nproc-per-node {count}" if count else "python"
    if count != os.environ.get("WORLD_SIZE"):
        python = "the same torchrun on each machine and"
    return f"; {done}; go on with {python} scripts/train.py resume={shlex.quote(str(run_dir))}"


def run() -> int:
    """Run the script; every error that a user can cause is one line and an exit code."""
    runtime.log_to_stderr()
    if RANK > 0:
        runtime.silence()
    if RANK > 0 or any(argument.startswith("resume=") for argument in sys.argv):
        sys.argv = [*sys.argv, "hydra.run.dir=."]  # Hydra must not make a folder
    runtime.tune_process()
    runtime.raise_on_signals()
    runtime.report_uncaught_errors()
    threading.excepthook = lambda failure: thread_errors.append(str(failure.exc_value))
    try:
        main()
    except (*HYDRA_ERRORS, OSError) as error:
        log.error("error: %s", explain(error))
        return 2 if isinstance(error, HYDRA_ERRORS) else 1
    if thread_errors and not exit_codes:  # otherwise the run has failed with the same cause
        log.error("error: %s", thread_errors[0])
    return 1 if exit_codes or thread_errors else 0


if __name__ == "__main__":
    sys.exit(run())
