"""Optimizer and learning-rate schedule from plain values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from horsehuman.errors import HorseHumanError, check_choice, check_number

SCHEDULES = ("constant", "cosine", "one_cycle")

_UNFIT = {"Optimizer", "SparseAdam", "LBFGS", "Muon"}  # sparse; closures; matrices only


def optimizer_class(given: Mapping[str, Any]) -> type[torch.optim.Optimizer]:
    """Look up ``given["name"]`` in :mod:`torch.optim`.

    Raises:
        HorseHumanError: There is no such optimizer, or its rate or weight decay does not work.
    """
    found = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    if not isinstance(given, Mapping):
        raise HorseHumanError(f"model.optimizer={given!r} does not work: give name, lr, ...")
    name = given.get("name")
    check_choice("model.optimizer.name", name, sorted(set(found) - _UNFIT))
    decay = given.get("weight_decay", 0.0)
    check_number("model.optimizer.weight_decay", decay, float, at_least=0)
    check_number("model.optimizer.lr", given.get("lr"), float, above=0)
    return found[str(name)]


def make_optimizer(
    given: Mapping[str, Any], parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Build an optimizer over what is trained.

    Args:
        given: ``name`` of a class in :mod:`torch.optim` and its arguments. Weight decay spares
            what has one dimension (biases, batch norm).
        parameters: Those without ``requires_grad`` are left aside.

    Raises:
        HorseHumanError: The optimizer does not take an argument.
    """
    kind, arguments = optimizer_class(given), dict(given)
    name, decay = arguments.pop("name"), arguments.pop("weight_decay", 0.0)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    try:
        return kind(groups, **arguments)
    except (TypeError, ValueError) as error:
        raise HorseHumanError(f"model.optimizer: {name} does not take this: {error}") from error


def make_schedule(
    schedule: str, optimizer: torch.optim.Optimizer, steps: float
) -> lr_scheduler.LRScheduler:
    """Build the schedule of the learning rate.

    Args:
        schedule: ``constant``, ``cosine`` (to zero) or ``one_cycle`` (Smith 2018, with torch's
            proportions).
        optimizer: What it changes.
        steps: All steps of training; infinite where training has no end.

    Raises:
        HorseHumanError: The schedule needs an end and there is none.
    """
    if schedule == "constant":
        return lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if steps == float("inf"):
        raise HorseHumanError(
            f"model.schedule={schedule} needs an end: set trainer.max_epochs, or use constant"
        )
    if schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(steps))
    return lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[float(group["lr"]) for group in optimizer.param_groups],
        total_steps=max(int(steps), 4),
        cycle_momentum="betas" in optimizer.defaults,
    )
