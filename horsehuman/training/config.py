"""The config of a run: composed from ``configs/``, read back from a run folder, checked."""

import shlex
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from horsehuman.data.image_sets import read_config
from horsehuman.distributed import env_world_size
from horsehuman.errors import HorseHumanError, check_choice, check_flag, check_number, printable
from horsehuman.models.base import PRECISIONS
from horsehuman.runtime import configs_dir

_REQUIRED_SECTIONS = {"data", "early_stopping", "ema", "model", "seed", "test", "trainer"}


def compose(*overrides: str) -> DictConfig:
    """Compose the config that ``scripts/train.py`` makes of overrides such as ``model=cnn``."""
    with hydra.initialize_config_dir(str(configs_dir()), version_base="1.3"):
        return hydra.compose("train", list(overrides))


def load_config(run_dir: Path) -> DictConfig:
    """Read the config that a run began with. Interpolations (``${...}``) are refused.

    Raises:
        HorseHumanError: If there is none, or it is damaged or has an interpolation.
    """
    values = read_config(run_dir / "config.yaml")
    dicts = {name for name, value in values.items() if isinstance(value, dict)}
    complete = dicts >= {"model", "trainer"} and values.keys() >= _REQUIRED_SECTIONS
    if not complete or "${" in str(values):
        path = printable(run_dir / "config.yaml")
        raise HorseHumanError(f"{path} is not the config of a run: it cannot be resumed")
    values.setdefault("precision", "float32")  # older runs have no such option
    return DictConfig(values)


def check_options(config: DictConfig) -> None:
    """Check the options of a run that neither the model nor the data module checks.

    Raises:
        HorseHumanError: If a value is out of range, or two options contradict each other.
    """
    options = config.trainer
    check_number("seed", config.seed, int, at_least=0, below=2**32)
    check_flag("test", config.test)
    check_choice("precision", config.precision, PRECISIONS)
    for name in ("max_epochs", "accumulate_grad_batches", "log_every_n_steps"):
        if options[name] is not None or name != "max_epochs":  # null: build.default_epochs
            check_number(f"trainer.{name}", options[name], int, at_least=1)
    check_number("trainer.limit_train_batches", options.limit_train_batches, float, above=0)
    if config.early_stopping is not None:
        check_number("early_stopping", config.early_stopping, int, at_least=1)
    if config.ema is not None:
        check_number("ema", config.ema, float, above=0, below=1)
    if not config.test and config.data.validation == "test":
        raise HorseHumanError("test=false does not go with data.validation=test: drop one of them")
    _check_processes(options, config.data.batch_size)


def _check_processes(options: DictConfig, size: Any) -> None:
    """Check that as many processes run as the config asks for, and that they can share a batch.

    Args:
        options: The section ``trainer``.
        size: The option ``data.batch_size``.
    """
    devices, nodes = options.get("devices", 1), options.get("num_nodes", 1)
    for name, value in (("devices", devices), ("num_nodes", nodes)):
        check_number(f"trainer.{name}", value, int, at_least=1, at_most=64)
        if value > 1 and options.get("strategy") != "ddp":
            raise HorseHumanError(f"trainer.{name}={value}: add trainer=ddp for several processes")
    expected, running = devices * nodes, env_world_size()
    if expected > 1 and running == 1:
        several = f"--nnodes {nodes} --node-rank N --master-addr HOST"
        where = several if nodes > 1 else "--standalone"
        command = f"torchrun {where} --nproc-per-node {devices} {shlex.join(sys.argv)}"
        raise HorseHumanError(f"the config needs {expected} processes: start them with {command}")
    if running not in (1, expected):
        raise HorseHumanError(
            f"{running} processes run, {expected} are configured: add trainer=ddp"
        )
    if isinstance(size, int) and size % expected:
        fix = f"give a multiple of {expected}, such as {size + -size % expected}"
        raise HorseHumanError(f"data.batch_size={size} does not fit {expected} processes: {fix}")
