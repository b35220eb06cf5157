"""The options of a run that neither its model nor its data check; nothing heavy is imported."""

from __future__ import annotations

from typing import Any

from horsehuman.errors import HorseHumanError, check_flag, check_number
from horsehuman.launching import process_count


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


def processes_wanted(options: Any) -> int:
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
    count = processes_wanted(options)
    if process_count() > 1 and count != process_count():
        raise HorseHumanError(
            f"{process_count()} processes are running, and trainer.devices x trainer.num_nodes are "
            f"{count}: add trainer=ddp with as many"
        )
    size = config.data.batch_size
    if count > 1 and isinstance(size, int) and size % count:
        raise HorseHumanError(
            f"data.batch_size={size} cannot be shared among {count} processes: give a multiple "
            f"of {count}, such as {size + -size % count}"
        )
