"""A run from its config to its report; ``scripts/train.py`` is the command."""

from __future__ import annotations

import gc
import logging
import math
import shlex
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from horsehuman.data.datamodule import HorseHumanDataModule
from horsehuman.data.records import write_splits
from horsehuman.distributed import (
    all_gather,
    broadcast,
    env_world_size,
    process_group,
    rank,
    sync_buffers,
)
from horsehuman.errors import HorseHumanError, first_line
from horsehuman.models.checkpoint import strip_optimizer_state
from horsehuman.run_dir import (
    create_run_dir,
    link_latest,
    lock_run,
    remove_partial_files,
    write_bytes,
    write_metrics,
    write_skipped,
)
from horsehuman.runtime import PeakMemory, lacks_bf16
from horsehuman.training.build import (
    build_model_and_data,
    build_trainer,
    check_options,
    cluster_environment,
    requested_processes,
    silence_lightning,
)
from horsehuman.training.callbacks import (
    CheckpointMetrics,
    TerminalProgress,
    epoch_metrics,
    print_summary,
)
from horsehuman.training.resume import (
    compare_run_record,
    completed_steps,
    load_config,
    make_run_record,
    write_record,
)
from horsehuman.training.tensorboard import (
    log_hyperparameters,
    log_run_inputs,
    log_validation_report,
    write_samples,
)

log = logging.getLogger(__name__)


def train(
    config: DictConfig, folder: Path, *, resume: bool = False, allow_changes: bool = False
) -> dict[str, Any]:
    """Train into a run's folder, test its final checkpoint, and print what came out.

    One of several processes does its share; the first one alone writes and prints.

    Args:
        config: What ``configs/`` describe.
        folder: Of the run.
        resume: The folder holds a run that was killed: go on after its last whole epoch.
        allow_changes: Go on although its pictures have changed.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        HorseHumanError: An option or the data do not work, or the run has ended already.
        PeerGoneError: Another process of the run has ended before its time.
    """
    with process_group():
        return _train(config, Path(broadcast(folder)), resume=resume, allow_changes=allow_changes)


def _train(
    config: DictConfig, folder: Path, *, resume: bool, allow_changes: bool
) -> dict[str, Any]:
    started = time.monotonic()
    if resume and (folder / "metrics.json").exists():
        raise HorseHumanError(
            f"resume={folder}: this run has ended; there is nothing to go on with"
        )
    check_options(config)
    check_started(config.trainer)
    silence_lightning()
    trained = fit_run(config, folder, started, resume=resume, allow_changes=allow_changes)
    gc.collect()  # the memory of the model and its trainer is the test's
    metrics, data = trained.metrics, trained.data
    if config.test:
        final = broadcast(folder / "checkpoints" / "final.ckpt")  # when it is there
        tested = trained.kind.load_from_checkpoint(final, map_location="cpu")
        metrics |= test(tested, data, config.trainer)
    metrics["seconds"] = round(trained.before + time.monotonic() - started, 1)
    if rank() > 0:
        return metrics
    options = OmegaConf.to_container(config, resolve=True)
    log_hyperparameters(trained.logger, options, metrics, trained.steps)
    write_metrics(folder, metrics)
    link_latest(folder)
    print_results(folder, metrics, data)
    return metrics


def check_started(options: Any) -> None:
    """Raise :class:`HorseHumanError` where several processes are to train, and this is alone."""
    if requested_processes(options) > 1 and env_world_size() == 1:
        raise HorseHumanError(
            f"trainer.devices={options.get('devices', 1)}: this is one process; start several with "
            "scripts/train.py, or with torchrun"
        )


class FitResult(NamedTuple):
    """What is left of a training when its model is on the disk.

    Attributes:
        metrics: What ``metrics.json`` says of it.
        data: What it was trained on, without its trainer.
        logger: Its log, open.
        steps: That it has trained.
        kind: Class of the model.
        before: Seconds of a run that went on, up to there.
    """

    metrics: dict[str, Any]
    data: HorseHumanDataModule
    logger: Any
    steps: int
    kind: Any
    before: float


def fit_run(
    config: DictConfig, folder: Path, started: float, *, resume: bool, allow_changes: bool
) -> FitResult:
    """Train, and keep the checkpoints; see :func:`train`."""
    memory = PeakMemory()
    model, data = build_model_and_data(config)
    last = folder / "checkpoints" / "last.ckpt"
    trainer: Any = build_trainer(
        config, folder, data, purge=completed_steps(last) if resume else None
    )
    if rank() == 0:
        write_run_files(config, folder, data, resume, allow_changes)
    with lock_run(folder) if rank() == 0 else nullcontext():
        if rank() == 0:
            remove_partial_files(folder / "checkpoints")
            if not last.is_file():
                log_inputs(trainer.logger, config, folder, model, data)
        print_summary(model)
        fit(trainer, model, data, broadcast(last if last.is_file() else None))
        if rank() == 0:
            finalize_checkpoints(folder / "checkpoints")
    kept = next(c for c in trainer.callbacks if isinstance(c, CheckpointMetrics))
    metrics: dict[str, Any] = {
        "epochs": trainer.current_epoch,
        # of a run that was killed after its last epoch, the kept ones
        **(epoch_metrics(trainer) or kept.figures),
        "seed": config.seed,
        "seconds_training": round(kept.before + time.monotonic() - started, 1),
        "peak_memory_gb": total_memory(memory),
    }
    sync_buffers(model)
    log_validation_report(trainer.logger, model, data, trainer.global_step)
    data.trainer = None
    return FitResult(metrics, data, trainer.logger, trainer.global_step, type(model), kept.before)


def total_memory(memory: PeakMemory) -> float | None:
    """Of all processes together, in GB; ``None`` where it is not told."""
    peaks = all_gather(memory.gigabytes())
    return round(sum(peak for peak in peaks if peak), 3) or None


def resume_run(folder: Path, *, allow_changes: bool = False) -> dict[str, Any]:
    """Go on with a run that was killed, with its own config, in its own folder.

    Raises:
        HorseHumanError: It is no run, has ended, or its pictures have changed.
    """
    return train(load_config(folder), folder, resume=True, allow_changes=allow_changes)


def write_run_files(
    config: DictConfig, folder: Path, data: HorseHumanDataModule, resume: bool, allow: bool
) -> None:
    """Write what is known before training; of a run that goes on, check that it is the same."""
    record = make_run_record(OmegaConf.to_yaml(config, resolve=True), data)
    if resume:
        compare_run_record(folder, record, allow_changes=allow)
        return
    assert data.root is not None
    create_run_dir(folder)
    write_splits(folder, data.root, data.records, data.class_names)
    write_record(folder, record)
    if data.skipped:
        write_skipped(folder, data.skipped)
    written = OmegaConf.to_yaml(config, resolve=True)
    write_bytes(folder / "config.yaml", written.encode())  # what is resumed has the others


def log_inputs(
    logger: Any, config: DictConfig, folder: Path, model: Any, data: HorseHumanDataModule
) -> None:
    """Show some pictures as the model gets them, and the config in the log."""
    sheet = write_samples(folder, data.samples(model.hparams.get("views", 1)))
    log_run_inputs(logger, OmegaConf.to_yaml(config, resolve=True), sheet)


def fit(
    trainer: L.Trainer, model: L.LightningModule, data: HorseHumanDataModule, last: Path | None
) -> None:
    """Train, after the checkpoint ``last`` if there is one; what Lightning refuses is one line."""
    precision = str(trainer.precision)
    if "bf16" in precision and trainer.strategy.root_device.type == "cpu" and lacks_bf16():
        log.warning(
            "trainer.precision=%s: this CPU has no bf16 instructions, training will be over 20 "
            "times slower than with 32-true",
            precision,
        )
    try:
        trainer.fit(model, datamodule=data, ckpt_path=last, weights_only=True)
    except MisconfigurationException as error:
        raise HorseHumanError(f"trainer does not take this: {first_line(error)}") from error


def finalize_checkpoints(folder: Path) -> None:
    """Turn the last and the best full checkpoint into slim ones."""
    final, best = folder / "final.ckpt", folder / "best.ckpt"
    if not (folder / "last.ckpt").is_file():
        raise HorseHumanError(
            "no epoch was trained: look at trainer.limit_train_batches and what you added to it"
        )
    strip_optimizer_state(folder / "last.ckpt", final)
    if best.is_file():
        strip_optimizer_state(best, best)


def test(model: L.LightningModule, data: HorseHumanDataModule, options: Any) -> dict[str, Any]:
    """Test what was read back from a checkpoint, on real pictures from end to end."""
    where = ("accelerator", "strategy", "devices", "num_nodes")
    trainer = L.Trainer(
        **{name: options[name] for name in where if name in options},
        plugins=cluster_environment(),
        callbacks=TerminalProgress(),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    found = trainer.test(model, datamodule=data, verbose=False)[0]
    if not all(math.isfinite(value) for value in found.values()):
        raise HorseHumanError("the test's figures are not finite: lower model.optimizer.lr")
    pictures = len(data.test_dataloader().dataset)  # type: ignore[arg-type]
    return {
        **found,
        "test/pictures": pictures,
        "test/right": round(found["test/acc"] * pictures),
    }


def print_results(folder: Path, metrics: dict[str, Any], data: HorseHumanDataModule) -> None:
    """Print the accuracy and what to do with the run."""
    lines = []
    if "val/acc" in metrics:
        what = "test set, after every epoch" if data.validation == "test" else "held-out groups"
        lines.append(("validation", f"{metrics['val/acc']:.2%} ({what})"))
    if "test/acc" in metrics:
        count = f"{metrics['test/right']} of {metrics['test/pictures']} test pictures"
        lines.append(("test", f"{metrics['test/acc']:.2%} ({count} right, last epoch)"))
    name = shlex.quote(str(folder))
    lines += [
        ("time", f"{metrics['seconds']:.0f} s"),
        ("checkpoint", f"{folder / 'checkpoints' / 'final.ckpt'}"),
        ("metrics", f"{folder / 'metrics.json'}"),
        ("log", f"{folder}"),
        ("pictures", f"{folder / 'samples.png'} (some, as the model gets them)"),
        ("predict", f"horsehuman predict PICTURE --model {name}"),
        ("look at it", f"tensorboard --logdir {name}"),
    ]
    print("\n".join(f"{title:<12}{text}" for title, text in lines))
