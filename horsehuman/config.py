"""The options of a run that neither its model nor its data check; nothing heavy is imported."""

from __future__ import annotations

from typing import Any

from horsehuman.errors import HorseHumanError, check_flag, check_number


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
    if options.devices != 1:
        raise HorseHumanError(f"trainer.devices={options.devices} does not work: use 1")
    if not config.test and config.data.validation == "test":
        raise HorseHumanError("test=false does not go with data.validation=test: drop one of them")
    if config.early_stopping is not None:
        check_number("early_stopping", config.early_stopping, int, at_least=1)
    if config.ema is not None:
        check_number("ema", config.ema, float, above=0, below=1)
