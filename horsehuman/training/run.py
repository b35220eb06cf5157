"""A run from its config to its results; ``scripts/train.py`` is the command."""

import gc
import logging
import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from horsehuman.data.datamodule import HorseHumanDataModule
from horsehuman.data.records import is_unbalanced, write_splits
from horsehuman.distributed import all_gather, broadcast, process_group, rank, sync_buffers
from horsehuman.errors import HorseHumanError, ResumableError, check_flag, first_line, printable
from horsehuman.models.checkpoint import read_checkpoint, strip_optimizer_state
from horsehuman.run_dir import (
    create_run_dir,
    link_latest,
    lock_run,
    remove_partial_files,
    write_bytes,
    write_csv,
    write_json,
)
from horsehuman.runtime import PeakMemory, lacks_bf16
from horsehuman.training import build, callbacks, resume, tensorboard
from horsehuman.training.advice import advise
from horsehuman.training.config import check_options, load_config
from horsehuman.training.neither import add_outputs

log = logging.getLogger(__name__)

#: Seconds to wait at the end of training for space or rights to save the last epoch.
SAVE_SECONDS = 120.0

#: Steps of fine-tuning, in 3 to 10 epochs of all images and their mirror images. See
#: docs/finetune.md.
FINETUNE_STEPS = 120


def resume_run(run_dir: Path, *, allow_changes: bool = False) -> dict[str, Any]:
    """Resume an interrupted run in its own folder with its own config; see :func:`train`."""
    check_flag("allow_changes", allow_changes)
    return train(load_config(run_dir), run_dir, resuming=True, allow_changes=allow_changes)


def train(
    config: DictConfig, run_dir: Path, *, resuming: bool = False, allow_changes: bool = False
) -> dict[str, Any]:
    """Train into a run folder, test the final checkpoint and print the results.

    Under torchrun every process calls this. All of them use the folder of rank 0, which alone
    writes and prints.

    Args:
        config: The composed config of ``configs/``.
        run_dir: The run folder.
        resuming: The folder holds an interrupted run: continue after its last saved epoch.
        allow_changes: Continue even if the images have changed.

    Returns:
        The content of ``metrics.json``.

    Raises:
        HorseHumanError: An option or the data do not work, or the run has ended already.
        ResumableError: Another process of the run has ended unexpectedly, or the last epoch could
            not be saved.
    """
    check_options(config)
    share_cores()
    with process_group():
        run_dir = Path(broadcast(str(run_dir)))
        started = time.monotonic()
        if resuming and (run_dir / "metrics.json").exists():
            raise HorseHumanError(f"resume={run_dir}: this run has ended: nothing to resume")
        build.silence_lightning()
        memory = PeakMemory()
        model, data = build.build_model_and_data(config)
        text = OmegaConf.to_yaml(config, resolve=True)
        trainer = build.build_trainer(config, run_dir, data, purge_step=completed_steps(run_dir))
        if rank() == 0:
            record = resume.make_run_record(text, data)
            if resuming:
                resume.compare_run_record(run_dir, record, allow_changes=allow_changes)
            else:
                write_run_dir(run_dir, text, record, data)
        with lock_run(run_dir) if rank() == 0 else nullcontext():
            fit(trainer, model, data, text, run_dir)
            advice = advise(model, data)
            rates = finetune(trainer, model, data, config, run_dir)
            rates |= add_outputs(model, data, run_dir)
        logger: Any = trainer.logger
        metrics, seconds_before = training_metrics(trainer, config.seed, memory, started)
        sync_buffers(model)
        tensorboard.log_validation_report(logger, model, data, trainer.global_step)
        steps, model_class = trainer.global_step, type(model)
        del model, trainer
        data.trainer = None
        gc.collect()  # frees the memory that the test needs
        if config.test:
            final = broadcast(str(run_dir / "checkpoints" / "final.ckpt"))  # after rank 0 wrote it
            tested = model_class.load_from_checkpoint(final, map_location="cpu")
            metrics |= test(tested, data, config)
        metrics |= rates | {"seconds": round(seconds_before + time.monotonic() - started, 1)}
        if rank() == 0:
            tensorboard.log_hyperparameters(logger, config, metrics, steps)
            write_json(run_dir / "metrics.json", metrics, sort_keys=True)
            link_latest(run_dir)
            print_results(run_dir, metrics, data, advice)
        return metrics


def share_cores() -> None:
    """Give each process of a machine its share of the cores, unless the user has chosen.

    ``torchrun`` sets ``OMP_NUM_THREADS`` to 1 unless it is set; another value is kept.
    """
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if local_world_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))


def write_run_dir(
    run_dir: Path, config: str, record: Mapping[str, Any], data: HorseHumanDataModule
) -> None:
    """Create the folder of a new run with the files that are known before training.

    Args:
        run_dir: The run folder.
        config: The run's config as YAML.
        record: Content of ``run.json``.
        data: After ``setup``.
    """
    assert data.root is not None
    create_run_dir(run_dir)
    write_splits(run_dir, data.root, data.records, data.class_names)
    write_json(run_dir / resume.RECORD, record)
    if data.skipped:
        write_csv(run_dir / "skipped.csv", ("picture", "reason"), data.skipped.items())
    write_bytes(run_dir / "config.yaml", config.encode())  # last: a folder with it is complete


def fit(
    trainer: L.Trainer, model: Any, data: HorseHumanDataModule, config: str, run_dir: Path
) -> None:
    """Train from the last checkpoint, if there is one, and write all checkpoints.

    Args:
        trainer: The trainer.
        model: The Lightning module.
        data: After ``setup``.
        config: The run's config as YAML, for TensorBoard.
        run_dir: The run folder, or a folder in it with checkpoints of its own.

    Raises:
        HorseHumanError: Lightning refuses the options, no epoch was trained, or other ranks have
            other options or do not see the folder.
    """
    precision = str(trainer.precision)
    if "bf16" in precision and trainer.strategy.root_device.type == "cpu" and lacks_bf16():
        reason = "this CPU has no bf16 instructions, 32-true is over 20 times faster"
        log.warning("trainer.precision=%s: %s", precision, reason)
    last = run_dir / "checkpoints" / "last.ckpt"
    if rank() == 0:
        remove_partial_files(last.parent)
    checkpoint = broadcast(str(last) if last.is_file() else None)
    if any(state != (config, True) for state in all_gather((config, run_dir.is_dir()))):
        raise HorseHumanError(f"{printable(run_dir)}: machines need the same options and folder")
    if rank() == 0 and checkpoint is None:
        sheet = tensorboard.write_samples(run_dir, data.samples())
        tensorboard.log_run_inputs(trainer.logger, config, sheet)  # type: ignore[arg-type]
    callbacks.print_summary(model)
    checkpoint_io: Any = trainer.strategy.checkpoint_io
    try:
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except MisconfigurationException as error:
        raise HorseHumanError(f"trainer does not take this: {first_line(error)}") from error
    except BaseException:
        with suppress(Exception):  # it must not replace the first error
            if failure := checkpoint_io.write_unsaved():
                log.warning("the last epochs are not saved (%s)", failure.strerror)
        raise
    if rank() == 0:
        write_unsaved_checkpoints(trainer, last)
        finalize_checkpoints(last.parent)


def finetune(
    probe: L.Trainer, model: Any, data: HorseHumanDataModule, config: DictConfig, run_dir: Path
) -> dict[str, float]:
    """Fine-tune the last blocks of the backbone from the trained head, and keep the better model.

    Training the head first keeps the features from being distorted (Kumar et al. 2022,
    arXiv:2202.10054). Logs and checkpoints are in the folder ``finetune`` of the run. If the loss
    on held-out images is lower than before, the run's checkpoints are replaced.

    Args:
        probe: The trainer of the head.
        model: The Lightning module; it ends with the weights that are kept.
        data: After ``setup``.
        config: The run's config.
        run_dir: The run folder, with the checkpoints of the head.

    Returns:
        The metrics of the kept model on held-out images, and losses and accuracies of both;
        nothing if the config asks for no fine-tuning.
    """
    if not model.hparams.get("finetune"):
        return {}
    folder, checkpoints = run_dir / "finetune", run_dir / "checkpoints"
    before = validation_metrics(probe)
    load_weights(model, checkpoints)
    model.freeze_blocks(False)
    folder.mkdir(exist_ok=True)
    epochs = build.epochs_for(data, FINETUNE_STEPS // 2, 3, 10)  # without the mirror images
    config = OmegaConf.merge(config, {"trainer": {"max_epochs": epochs}})  # type: ignore[assignment]
    trainer = build.build_trainer(config, folder, data, purge_step=completed_steps(folder))
    fit(trainer, model, data, OmegaConf.to_yaml(config, resolve=True), folder)
    after = validation_metrics(trainer)
    is_better = after["val/loss"] < before["val/loss"]
    for name in ("final.ckpt", "best.ckpt") if is_better and rank() == 0 else ():
        write_bytes(checkpoints / name, (folder / "checkpoints" / name).read_bytes())
    load_weights(model, checkpoints)
    model.freeze_blocks(True)
    data.discard_features()
    metrics = {**(after if is_better else before), "finetune/kept": float(is_better)}
    for name, values in (("before", before), ("after", after)):
        metrics |= {f"finetune/{name}_{key}": values[f"val/{key}"] for key in ("loss", "acc")}
    return metrics


def completed_steps(folder: Path) -> int:
    """Return the number of steps behind the last checkpoint of a run; 0 without one."""
    last = folder / "checkpoints" / "last.ckpt"
    return int(read_checkpoint(last)["global_step"]) if last.is_file() else 0


def load_weights(model: Any, checkpoints: Path) -> None:
    """Load the final checkpoint of a run, after rank 0 wrote it."""
    final = Path(broadcast(str(checkpoints / "final.ckpt")))
    model.load_state_dict(read_checkpoint(final)["state_dict"])


def validation_metrics(trainer: L.Trainer) -> dict[str, float]:
    """Return the last epoch's metrics; those of a run that had ended, from its checkpoint."""
    return callbacks.epoch_metrics(trainer) or saved_metrics(trainer).metrics


def saved_metrics(trainer: L.Trainer) -> callbacks.CheckpointMetrics:
    """Return the callback with what a resumed run had measured up to its checkpoint."""
    return next(c for c in trainer.callbacks if isinstance(c, callbacks.CheckpointMetrics))  # type: ignore[attr-defined]


def write_unsaved_checkpoints(trainer: L.Trainer, last: Path) -> None:
    """Write the checkpoints that could not be written before.

    Args:
        trainer: The trainer, after ``fit``.
        last: The file of the last checkpoint.

    Raises:
        ResumableError: They cannot be written within :data:`SAVE_SECONDS`.
    """
    checkpoint_io: Any = trainer.strategy.checkpoint_io
    if checkpoint_io.write_unsaved() is None:
        return
    log.warning("trying to save the last epoch for %.0f s: free some space", SAVE_SECONDS)
    if error := checkpoint_io.write_unsaved(SAVE_SECONDS):
        saved = read_checkpoint(last)["epoch"] + 1 if last.is_file() else 0
        names = " and ".join(printable(path) for path in checkpoint_io.unsaved)
        reason = f"cannot save {names} after epoch {trainer.current_epoch} ({error.strerror})"
        raise ResumableError(f"{reason}: epoch {saved} is on the disk" if saved else reason)


def finalize_checkpoints(folder: Path) -> None:
    """Write ``final.ckpt`` from the last checkpoint, and strip the best one in place.

    Raises:
        HorseHumanError: There is no checkpoint: no epoch was trained.
    """
    last, best = folder / "last.ckpt", folder / "best.ckpt"
    if not last.is_file():
        raise HorseHumanError("no epoch was trained: check the options of trainer")
    strip_optimizer_state(last, folder / "final.ckpt")
    if best.is_file():
        strip_optimizer_state(best, best)


def training_metrics(
    trainer: L.Trainer, seed: int, memory: PeakMemory, started: float
) -> tuple[dict[str, Any], float]:
    """Return the metrics of training, and the seconds before the run was resumed.

    A run that was killed after its last epoch takes the metrics from its checkpoint. Memory is the
    sum over all processes, in GB.
    """
    saved = saved_metrics(trainer)
    network: Any = trainer.lightning_module.network
    precision = str(network.compute_dtype(trainer.strategy.root_device)).removeprefix("torch.")
    peaks = [peak for peak in all_gather(memory.gigabytes()) if peak]
    return {
        "epochs": trainer.current_epoch,
        **validation_metrics(trainer),
        "seed": seed,
        "precision": precision,
        "seconds_training": round(saved.seconds_before + time.monotonic() - started, 1),
        "peak_memory_gb": round(sum(peaks), 3) or None,
    }, saved.seconds_before


def test(
    model: L.LightningModule, data: HorseHumanDataModule, config: DictConfig
) -> dict[str, Any]:
    """Test a model that was read back from its checkpoint.

    Args:
        model: The model.
        data: After ``setup``.
        config: The run's config, of which the precision and the devices are used.

    Raises:
        HorseHumanError: A metric is not finite.
    """
    network: Any = model.network
    network.precision = config.precision
    names = ("accelerator", "strategy", "devices", "num_nodes")
    trainer = L.Trainer(
        **{name: config.trainer[name] for name in names if name in config.trainer},
        callbacks=callbacks.TerminalProgress(),
        logger=False,
        enable_checkpointing=False,
        **build.QUIET,
    )
    metrics = dict(trainer.test(model, datamodule=data, verbose=False)[0])
    if not all(math.isfinite(value) for value in metrics.values()):
        raise HorseHumanError("the test metrics are not finite: lower model.optimizer.lr")
    count = len(data.test_dataloader().dataset)  # type: ignore[arg-type]
    return metrics | {"test/pictures": count, "test/right": round(metrics["test/acc"] * count)}


def format_accuracy(metrics: dict[str, Any], stage: str, data: HorseHumanDataModule) -> str:
    """Format the accuracy of a stage; for unbalanced classes, balanced accuracy and recalls."""
    if not is_unbalanced([record.label for record in data.records]):
        return f"{metrics[f'{stage}/acc']:.2%}"
    recalls = (f"{metrics[f'{stage}/recall_{k}']:.1%} of {data.class_names[k]}" for k in (0, 1))
    return printable(f"{metrics[f'{stage}/balanced_acc']:.2%} balanced: {' and '.join(recalls)}")


def print_results(
    run_dir: Path, metrics: dict[str, Any], data: HorseHumanDataModule, advice: Sequence[str]
) -> None:
    """Print the accuracies, the paths, the commands that go on from here, and the advice."""
    lines = []
    if "val/acc" in metrics:
        where = "test set, after every epoch" if data.validation == "test" else "held-out groups"
        lines.append(("validation", f"{format_accuracy(metrics, 'val', data)} ({where})"))
    if "test/acc" in metrics:
        count = f"{metrics['test/right']} of {metrics['test/pictures']} test pictures"
        accuracy = format_accuracy(metrics, "test", data)
        lines.append(("test", f"{accuracy} ({count} right, last epoch)"))
    if "finetune/kept" in metrics:
        after, before = metrics["finetune/after_loss"], metrics["finetune/before_loss"]
        verdict = "kept" if metrics["finetune/kept"] else "the model before it is kept"
        lines.append(("fine-tuning", f"loss {after:.4f}, before {before:.4f}: {verdict}"))
    if "neither/kept" in metrics:
        kept, refused = metrics["neither/kept"], metrics["neither/refused"]
        rates = f"{refused:.1%} of other pictures refused, {kept:.1%} of the classes kept"
        lines.append(("neither", f"{rates} (cross-validation)"))
    name = shlex.quote(str(run_dir))
    lines += [
        ("time", f"{metrics['seconds']:.0f} s"),
        ("checkpoint", f"{run_dir / 'checkpoints' / 'final.ckpt'}"),
        ("metrics", f"{run_dir / 'metrics.json'}"),
        ("log", f"{run_dir}"),
        ("pictures", f"{run_dir / 'samples.png'} (some, as the model gets them)"),
        ("predict", f"horsehuman predict PICTURE --model {name}"),
        ("evaluate", f"horsehuman evaluate --model {name} (intervals, errors)"),
        ("calibrate", f"horsehuman calibrate {name} (learn unsure)"),
        ("look at it", f"tensorboard --logdir {name}"),
        *(("advice", line) for line in advice),
    ]
    print("\n".join(f"{title:<12}{text}" for title, text in lines))
