"""Build the model, the data and the trainer that a run's config describes."""

import inspect
import logging
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from horsehuman.data.datamodule import HorseHumanDataModule
from horsehuman.distributed import all_gather, env_local_rank
from horsehuman.errors import HorseHumanError, check_choice, closest, first_line
from horsehuman.models.checkpoint import NETWORKS
from horsehuman.training import callbacks
from horsehuman.training.module import CNNClassifier, InceptionClassifier

#: Options of every trainer: the progress bar and the table of layers are our own.
QUIET: Any = {"enable_progress_bar": False, "enable_model_summary": False}

#: If ``trainer.max_epochs`` is null: the least number of epochs, the number of steps for which
#: small sets get more epochs, and their largest number. Measured in docs/results.md.
EPOCHS, STEPS, MAX_EPOCHS = 25, 600, 200

#: The classes that a config may name. A config of unknown origin can build nothing else.
_CLASSES: dict[str, dict[str, Any]] = {
    "model": {f"horsehuman.{kind.__name__}": kind for kind in (CNNClassifier, InceptionClassifier)},
    "data": {"horsehuman.HorseHumanDataModule": HorseHumanDataModule},
}


# Arguments of a network that follow from what a run has fitted.
_FITTED = {"neither", "both_threshold"}


def build_model_and_data(config: DictConfig) -> tuple[Any, HorseHumanDataModule]:
    """Seed torch, build the model, then the data module with the model's image size, set up.

    Paths in ``config.data`` are made absolute, so that the run can be resumed from elsewhere.
    """
    for name in ("root", "archives_dir", "outliers"):
        if config.data.get(name):
            config.data[name] = str(Path(str(config.data[name])).expanduser().absolute())
    L.seed_everything(config.seed, verbose=False)
    model = build("model", config)
    model.network.precision = config.precision
    data = build("data", config, image_size=model.image_size, seed=config.seed)
    if data.outliers and not isinstance(model, InceptionClassifier):
        raise HorseHumanError("data.outliers needs model=inception: only it can say neither")
    if model.hparams.get("cache_features"):
        data.check_cacheable()
    for first in (True, False):  # one rank of each machine prepares, the others wait for it
        if first == (env_local_rank() == 0):
            data.prepare_data()
        all_gather(None)
    data.setup()
    if model.hparams.get("finetune") and "validation" not in {r.split for r in data.records}:
        raise HorseHumanError("model.finetune needs data.validation=held_out and val_fraction > 0")
    return model, data


def build(part: str, config: DictConfig, **given: Any) -> Any:
    """Build the object that ``config[part]`` names, with plain values as arguments.

    Args:
        part: ``model`` or ``data``.
        config: The run's config.
        given: Further arguments.

    Raises:
        HorseHumanError: The class is not one of ours, or does not take an argument.
    """
    arguments: dict[str, Any] = OmegaConf.to_container(config[part], resolve=True)  # type: ignore[assignment]
    target = str(arguments.pop("_target_", None))
    check_choice(f"{part}._target_", target, list(_CLASSES[part]))
    kind = _CLASSES[part][target]
    network = NETWORKS.get(kind.__name__, kind)
    signatures = inspect.signature(kind), inspect.signature(network)
    taken = [p for s in signatures for p in s.parameters.values() if p.kind != p.VAR_KEYWORD]
    options = {parameter.name for parameter in taken} - given.keys() - _FITTED
    for name in arguments.keys() - options:
        near = closest(str(name), options)
        raise HorseHumanError(f"{part}.{name} is not an option of {kind.__name__}{near}: drop it")
    return kind(**arguments, **given)


def build_trainer(
    config: DictConfig, run_dir: Path, data: HorseHumanDataModule, purge_step: int | None = None
) -> L.Trainer:
    """Build Lightning's trainer with the callbacks and the logger of a run.

    Args:
        config: The run's config.
        run_dir: The run folder.
        data: After ``setup``.
        purge_step: For a resumed run, the step from which on TensorBoard ignores earlier events.

    Raises:
        HorseHumanError: The trainer refuses an option, or early stopping has nothing to monitor.
    """
    options: dict[str, Any] = OmegaConf.to_container(config.trainer, resolve=True)  # type: ignore[assignment]
    if options.get("max_epochs") is None:
        cached = config.model.get("cache_features")  # only a head's epochs cost next to nothing
        options["max_epochs"] = epochs_for(data, STEPS, EPOCHS, MAX_EPOCHS) if cached else EPOCHS
    used = build_callbacks(config, run_dir, data)
    logger = TensorBoardLogger(run_dir, "", "", default_hp_metric=False, purge_step=purge_step)
    try:
        return L.Trainer(
            **options,
            callbacks=used,
            logger=logger,
            plugins=callbacks.AtomicCheckpointIO(),
            num_sanity_val_steps=0,
            **QUIET,
        )
    except (
        *(MisconfigurationException, AttributeError, ImportError),
        *(RuntimeError, TypeError, ValueError),
    ) as error:
        raise HorseHumanError(f"trainer does not take this: {first_line(error)}") from error


def epochs_for(data: HorseHumanDataModule, steps: int, least: int, most: int) -> int:
    """Return the number of epochs that makes some number of steps, within bounds.

    Args:
        data: After ``setup``.
        steps: Number of steps.
        least: Smallest number of epochs.
        most: Largest number of epochs.
    """
    return max(least, min(most, -(-steps // len(data.train_dataloader()))))


def build_callbacks(
    config: DictConfig, run_dir: Path, data: HorseHumanDataModule
) -> list[L.Callback]:
    """Build the callbacks of a run, in the order in which Lightning must call them."""
    common: dict[str, Any] = {"dirpath": run_dir / "checkpoints", "enable_version_counter": False}
    used: list[L.Callback] = [callbacks.EpochSeed(config.seed), callbacks.TerminalProgress()]
    used += [callbacks.CheckpointMetrics(), callbacks.TorchrunSignals()]
    held_out = bool(data.val_dataloader())
    if held_out:  # before "last", whose checkpoint then names the best one
        used.append(ModelCheckpoint(filename="best", monitor="val/loss", **common))
    used.append(ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common))
    if config.early_stopping:
        if not held_out:
            option = f"early_stopping={config.early_stopping}"
            raise HorseHumanError(f"{option} needs held-out pictures: raise data.val_fraction")
        used.append(EarlyStopping("val/loss", patience=config.early_stopping))
    if config.ema is not None:
        used.append(callbacks.AverageWeights(config.ema))
    used.append(callbacks.SyncBuffers())  # after the averaged weights have been swapped in
    return used


def silence_lightning() -> None:
    """Hide Lightning's notes about itself; warnings that a user can act on stay."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # scripts/train.py prints its errors
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*could not find the monitored key.*",  # with max_steps
        ".*is smaller than the logging interval.*",
        ".*LeafSpec.*deprecated.*",
        ".*across ranks is zero.*",  # nothing is held out
        ".*accumulate the metric across devices.*",  # torchmetrics objects are
    ):
        warnings.filterwarnings("ignore", message=message)
