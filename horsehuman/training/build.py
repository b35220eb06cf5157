"""From a run's config to its model, data and trainer."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

import horsehuman
from horsehuman.data.datamodule import HorseHumanDataModule
from horsehuman.data.datasets import check_views
from horsehuman.distributed import all_gather, env_local_rank, env_world_size
from horsehuman.errors import (
    HorseHumanError,
    check_choice,
    check_flag,
    check_number,
    first_line,
)
from horsehuman.training.callbacks import (
    AtomicCheckpointIO,
    AverageWeights,
    CheckpointMetrics,
    EpochSeed,
    Histograms,
    SyncBuffers,
    TerminalProgress,
)

#: What may be built.
_KINDS = {
    "model": ("horsehuman.CNNClassifier", "horsehuman.InceptionClassifier"),
    "data": ("horsehuman.HorseHumanDataModule",),
}


def build_model_and_data(config: DictConfig) -> tuple[Any, HorseHumanDataModule]:
    """The seeded model, and the data, set up."""
    for name in ("root", "archives_dir"):  # the run is come back to from other folders
        if config.data.get(name):
            config.data[name] = str(Path(str(config.data[name])).expanduser().absolute())
    L.seed_everything(config.seed, verbose=False)
    model = build("model", config)
    data: HorseHumanDataModule
    data = build("data", config, image_size=model.image_size, seed=config.seed)
    if model.hparams.get("cache_features"):
        check_views(model.hparams["views"], data.augment)
    for turn in (True, False):  # the first process of each machine, then the others
        if turn == (env_local_rank() == 0):
            data.prepare_data()
        all_gather(None)
    data.setup()
    return model, data


def build(part: str, config: DictConfig, **given: Any) -> Any:
    """Build what ``config[part]`` names, which is one of ours; plain values only reach it."""
    arguments: dict[str, Any] = OmegaConf.to_container(config[part], resolve=True)  # type: ignore[assignment]
    target = str(arguments.pop("_target_", None))
    check_choice(f"{part}._target_", target, _KINDS[part])  # a run's config may be anybody's
    kind = getattr(horsehuman, target.rpartition(".")[2])
    try:
        return kind(**arguments, **given)
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None:
            raise HorseHumanError(f"{part} does not take this: {first_line(error)}") from error
        raise HorseHumanError(f"{part}.{found[1]} is not an option of {kind.__name__}") from error


def build_trainer(
    config: DictConfig, folder: Path, data: HorseHumanDataModule, purge: int | None = None
) -> L.Trainer:
    """Lightning's trainer with the callbacks and the log of a run.

    Args:
        config: What ``configs/`` describe.
        folder: Of the run.
        data: After ``setup``.
        purge: Step from which on what the log holds does not count, where a run goes on.
    """
    common: dict[str, Any] = {"dirpath": folder / "checkpoints", "enable_version_counter": False}
    callbacks: list[L.Callback] = [
        EpochSeed(config.seed),
        TerminalProgress(),
        CheckpointMetrics(),
    ]
    held_out = bool(data.val_dataloader())
    if held_out:  # before the last one, which knows then what the best one is
        callbacks.append(ModelCheckpoint(filename="best", monitor="val/loss", **common))
    callbacks.append(ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common))
    if config.early_stopping:
        if not held_out:
            raise HorseHumanError(
                f"early_stopping={config.early_stopping} needs held-out pictures: set "
                "data.val_fraction above 0, or drop it"
            )
        callbacks.append(EarlyStopping("val/loss", patience=config.early_stopping))
    if config.ema:
        callbacks.append(AverageWeights(config.ema))
    callbacks.append(SyncBuffers())  # after the averages have taken their place
    if config.histograms:
        callbacks.append(Histograms())
    options: dict[str, Any] = OmegaConf.to_container(config.trainer, resolve=True)  # type: ignore[assignment]
    try:
        return L.Trainer(
            **options,
            callbacks=callbacks,
            logger=TensorBoardLogger(
                folder, name="", version="", default_hp_metric=False, purge_step=purge
            ),
            plugins=[AtomicCheckpointIO(), *cluster_environment()],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    except Exception as error:  # Lightning's options fail in many ways
        raise HorseHumanError(f"trainer does not take this: {first_line(error)}") from error


def cluster_environment() -> list[Any]:
    """What tells Lightning which of several processes this is, whatever else there may be."""
    return [TorchElasticEnvironment()] if env_world_size() > 1 else []


def silence_lightning() -> None:
    """Keep what Lightning says about itself off the terminal; what a user can act on stays."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # explain() and build() tell it
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*could not find the monitored key.*")  # max_steps
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated.*")  # Lightning's own affair
    warnings.filterwarnings("ignore", message=".*across ranks is zero.*")  # nothing held out
    warnings.filterwarnings("ignore", message=".*accumulate the metric across devices.*")  # it has


def check_options(config: Any) -> None:
    """Check the options that neither the model nor the data checks."""
    check_number("seed", config.seed, int, at_least=0, below=2**32)
    check_flag("test", config.test)
    check_flag("histograms", config.histograms)
    options = config.trainer
    check_number("trainer.max_epochs", options.max_epochs, int, at_least=1)
    check_number(
        "trainer.accumulate_grad_batches", options.accumulate_grad_batches, int, at_least=1
    )
    check_number("trainer.limit_train_batches", options.limit_train_batches, float, above=0)
    check_number("trainer.log_every_n_steps", options.log_every_n_steps, int, at_least=1)
    check_processes(config)
    if not config.test and config.data.validation == "test":
        raise HorseHumanError("test=false does not go with data.validation=test: drop one of them")
    if config.early_stopping is not None:
        check_number("early_stopping", config.early_stopping, int, at_least=1)
    if config.ema is not None:
        check_number("ema", config.ema, float, above=0, below=1)


def requested_processes(options: Any) -> int:
    """How many processes a trainer's options ask for, on all machines together."""
    return int(options.get("devices", 1) * options.get("num_nodes", 1))


def check_processes(config: Any) -> None:
    """Check how many processes there are to be, and that a batch can be shared among them."""
    options = config.trainer
    for name in ("devices", "num_nodes"):
        value = options.get(name, 1)
        check_number(f"trainer.{name}", value, int, at_least=1, at_most=64)
        if value > 1 and options.get("strategy") != "ddp":
            raise HorseHumanError(
                f"trainer.{name}={value} goes with several processes: add trainer=ddp"
            )
    count = requested_processes(options)
    if env_world_size() > 1 and count != env_world_size():
        raise HorseHumanError(
            f"{env_world_size()} processes are running, and trainer.devices x trainer.num_nodes are "
            f"{count}: add trainer=ddp with as many"
        )
    size = config.data.batch_size
    if count > 1 and isinstance(size, int) and size % count:
        raise HorseHumanError(
            f"data.batch_size={size} cannot be shared among {count} processes: give a multiple "
            f"of {count}, such as {size + -size % count}"
        )
