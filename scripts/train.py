"""Train a classifier: python scripts/train.py model=inception (--help shows more)."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import re
import shlex
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HYDRA_FULL_ERROR"] = "1"  # before hydra: its errors are told by explain()

import hydra
from config_errors import CONFIGS, explain
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from horsehuman.errors import HorseHumanError, check_flag, check_number, one_line
from horsehuman.runtime import PeakMemory, keep_freed_memory, lacks_bf16
from horsehuman.terminal import Interrupted, raise_on_signals, show_notes

if TYPE_CHECKING:
    import lightning as L

    from horsehuman import HorseHumanDataModule

log = logging.getLogger("horsehuman.train")

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
        train(config, folder)
    except (HorseHumanError, OSError) as error:
        FAILED.append(folder)
        print(f"error: {one_line(error)}", file=sys.stderr)
        remove_if_empty(folder)
    except Interrupted:
        last = folder / "checkpoints" / "last.ckpt"
        kept = f"the last whole epoch is in {last}" if last.is_file() else "no epoch was finished"
        print(f"interrupted; {kept}", file=sys.stderr)
        remove_if_empty(folder)
        raise


def remove_if_empty(folder: Path) -> None:
    """Remove the folder that Hydra made for a run that never began, and its empty sweep's."""
    for made in (folder, folder.parent):
        if STARTED in made.name or STARTED in made.parent.name:
            with contextlib.suppress(OSError):
                made.rmdir()


def train(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Train into a run's folder, test its final checkpoint, and print what came out.

    Returns:
        What ``metrics.json`` holds.
    """
    started, memory = time.monotonic(), PeakMemory()
    check_options(config)
    for name in ("root", "archives_dir"):  # the run is come back to from other folders
        if config.data.get(name):
            config.data[name] = str(Path(str(config.data[name])).expanduser().absolute())
    import lightning as L

    from horsehuman import logs, runs
    from horsehuman.callbacks import print_summary
    from horsehuman.data.embedding import check_views

    quiet()
    L.seed_everything(config.seed, verbose=False)
    model = build("model", config)
    data = build("data", config, image_size=model.image_size, seed=config.seed)
    if model.hparams.get("cache_features"):
        check_views(model.hparams["views"], data.augment)
    data.prepare_data()
    data.setup()
    trainer: Any = build_trainer(config, folder, data)
    logger = trainer.logger
    settings: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    open_run(folder, config, data)
    sheet = runs.write_samples(folder, data.samples(model.hparams.get("views", 1)))
    logs.log_start(logger, OmegaConf.to_yaml(config, resolve=True), sheet)
    print_summary(model)
    fit(trainer, model, data)
    final = keep_checkpoints(folder / "checkpoints")
    metrics: dict[str, Any] = {
        "epochs": trainer.current_epoch,
        **{k: float(value) for k, value in trainer.callback_metrics.items() if "/" in k},
        "seed": config.seed,
        "seconds_training": round(time.monotonic() - started, 1),
        "peak_memory_gb": memory.gigabytes(),
    }
    logs.log_held_out(logger, model, data, trainer.global_step)
    kind = type(model)
    data.trainer = None
    del model, trainer  # their memory is the test's
    gc.collect()
    if config.test:
        tested = kind.load_from_checkpoint(final, map_location="cpu")
        metrics |= test(tested, data, config.trainer.accelerator)
    metrics["seconds"] = round(time.monotonic() - started, 1)
    logs.log_hyperparameters(logger, settings, metrics)
    runs.write_metrics(folder, metrics)
    runs.point_latest(folder)
    report(folder, metrics, data)
    return metrics


def open_run(folder: Path, config: DictConfig, data: HorseHumanDataModule) -> None:
    """Write what is known before training: the config, and who was on which side."""
    from horsehuman import runs

    assert data.root is not None
    runs.claim(folder)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    runs.write_splits(folder, data.root, data.records, data.class_names)
    if data.skipped:
        runs.write_skipped(folder, data.skipped)


def fit(trainer: L.Trainer, model: L.LightningModule, data: HorseHumanDataModule) -> None:
    """Train; what Lightning refuses is told in one line."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    precision = str(trainer.precision)
    if "bf16" in precision and trainer.strategy.root_device.type == "cpu" and lacks_bf16():
        log.warning(
            "trainer.precision=%s: this CPU has no bf16 instructions, training will be over 20 "
            "times slower than with 32-true",
            precision,
        )
    try:
        trainer.fit(model, datamodule=data)
    except MisconfigurationException as error:
        raise HorseHumanError(f"trainer does not take this: {first_line(error)}") from error


def check_options(config: DictConfig) -> None:
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
    if options.devices != 1:
        raise HorseHumanError(f"trainer.devices={options.devices} does not work: use 1")
    if not config.test and config.data.validation == "test":
        raise HorseHumanError("test=false does not go with data.validation=test: drop one of them")
    if config.early_stopping is not None:
        check_number("early_stopping", config.early_stopping, int, at_least=1)
    if config.ema is not None:
        check_number("ema", config.ema, float, above=0, below=1)


def build(part: str, config: DictConfig, **given: Any) -> Any:
    """Build what ``config[part]`` names; plain values only reach it."""
    arguments: dict[str, Any] = OmegaConf.to_container(config[part], resolve=True)  # type: ignore[assignment]
    try:
        kind = hydra.utils.get_class(arguments.pop("_target_"))
        return kind(**arguments, **given)
    except ImportError as error:
        raise HorseHumanError(f"{part}._target_: {first_line(error)}") from error
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None:
            raise HorseHumanError(f"{part} does not take this: {first_line(error)}") from error
        raise HorseHumanError(f"{part}.{found[1]} is not an option of {kind.__name__}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def build_trainer(config: DictConfig, folder: Path, data: HorseHumanDataModule) -> L.Trainer:
    """Lightning's trainer with the callbacks and the log of a run."""
    import lightning as L
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
    from lightning.pytorch.loggers import TensorBoardLogger

    from horsehuman.callbacks import AverageWeights, SeedEpochs, TerminalProgress
    from horsehuman.logs import Histograms

    common: dict[str, Any] = {"dirpath": folder / "checkpoints", "enable_version_counter": False}
    callbacks: list[L.Callback] = [
        SeedEpochs(config.seed),
        TerminalProgress(),
        ModelCheckpoint(filename="last", save_on_train_epoch_end=True, **common),
    ]
    held_out = bool(data.val_dataloader())
    if held_out:
        callbacks.append(ModelCheckpoint(filename="best", monitor="val/loss", **common))
    if config.early_stopping:
        if not held_out:
            raise HorseHumanError(
                f"early_stopping={config.early_stopping} needs held-out pictures: set "
                "data.val_fraction above 0, or drop it"
            )
        callbacks.append(EarlyStopping("val/loss", patience=config.early_stopping))
    if config.ema:
        callbacks.append(AverageWeights(config.ema))
    if config.histograms:
        callbacks.append(Histograms())
    options: dict[str, Any] = OmegaConf.to_container(config.trainer, resolve=True)  # type: ignore[assignment]
    try:
        return L.Trainer(
            **options,
            callbacks=callbacks,
            logger=TensorBoardLogger(folder, name="", version="", default_hp_metric=False),
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
    except Exception as error:  # Lightning's options fail in many ways
        raise HorseHumanError(f"trainer does not take this: {first_line(error)}") from error


def keep_checkpoints(folder: Path) -> Path:
    """Turn the last and the best full checkpoint into slim ones; returns the final one."""
    from horsehuman.runs import slim

    final, best = folder / "final.ckpt", folder / "best.ckpt"
    if not (folder / "last.ckpt").is_file():
        raise HorseHumanError(
            "no epoch was trained: look at trainer.limit_train_batches and what you added to it"
        )
    slim(folder / "last.ckpt", final)
    if best.is_file():
        slim(best, best)
    return final


def test(model: L.LightningModule, data: HorseHumanDataModule, accelerator: str) -> dict[str, Any]:
    """Test what was read back from a checkpoint, on real pictures from end to end."""
    import lightning as L

    from horsehuman.callbacks import TerminalProgress

    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
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


def report(folder: Path, metrics: dict[str, Any], data: HorseHumanDataModule) -> None:
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


def quiet() -> None:
    """Keep what Lightning says about itself off the terminal; what a user can act on stays."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("hydra").setLevel(logging.CRITICAL)  # explain() and build() tell it
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*deprecated.*")  # Lightning's own affair
    warnings.filterwarnings("ignore", message=".*across ranks is zero.*")  # nothing held out


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
