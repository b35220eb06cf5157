"""Two or more classifiers on the same pictures: how they differ, and what each costs."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from horsehuman.checkpoint import weight_files
from horsehuman.errors import HorseHumanError, shown
from horsehuman.evaluate import Answers, answer, plain
from horsehuman.intervals import estimate_mean
from horsehuman.metrics import log_losses, mcnemar
from horsehuman.models.network import Network
from horsehuman.picture_set import PictureSet, choose_set, digest, run_of
from horsehuman.pictures import PictureError, read_picture
from horsehuman.runs import read_json

log = logging.getLogger(__name__)

#: Accuracy over the epochs, as a run's log names it.
CURVES = ("train/acc", "val/acc")


@dataclass(frozen=True)
class Contender:
    """One of the classifiers.

    Attributes:
        name: As the user named it.
        answers: What it said.
        curves: For each of :data:`CURVES` the values after each epoch; empty where no log is.
        cost: What ``compare.json`` says of time, memory and size; ``None`` where not recorded.
    """

    name: str
    answers: Answers
    curves: dict[str, list[float]]
    cost: dict[str, float | None]


def choose_same(
    models: Sequence[str], data: str | None, split: str | None, group_pattern: str | None
) -> PictureSet:
    """The pictures that all classifiers are asked about.

    Raises:
        HorseHumanError: There are none, or the runs have different ones.
    """
    if data is not None:
        return choose_set(models[0], data, split, group_pattern)[0]
    sets = [choose_set(model, None, split, group_pattern)[0] for model in models]
    contents = [
        {own.name(r): (digest(r.path), r.label, r.group) for r in own.records} for own in sets
    ]
    first = contents[0]
    for model, other in zip(models[1:], contents[1:], strict=True):
        names = first.keys() | other.keys()
        differ = sorted(name for name in names if first.get(name) != other.get(name))
        if differ:
            some = ", ".join(map(shown, differ[:3])) + (", ..." if len(differ) > 3 else "")
            raise HorseHumanError(
                f"{shown(models[0])} and {shown(model)} were tested on different pictures, labels "
                f"or groups: {len(differ)} differ ({some}); name the same for all with --data"
            )
    return sets[0]


def contend(model: str, classifier: Network, pictures: PictureSet) -> Contender:
    """Ask one classifier, and collect what is known of its training."""
    first = pictures.records[:1]
    with contextlib.suppress(PictureError):  # what the first answer takes is no picture's time
        classifier.answer([classifier.read(read_picture(record.path)) for record in first])
    started = time.perf_counter()
    answers = answer(classifier, pictures)
    seconds = time.perf_counter() - started
    run = run_of(model)
    parameters = list(classifier.parameters())
    recorded = read_json(run / "metrics.json") if run else {}
    cost: dict[str, float | None] = {
        "parameters": sum(p.numel() for p in parameters),
        "trained parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "weights, MB": sum(path.stat().st_size for path in weight_files(model)) / 1e6,
        "answer with reading, ms": 1000 * seconds / len(pictures.records),
        "epochs": recorded.get("epochs"),
        "training, s": recorded.get("seconds_training"),
        "training, peak memory, GB": recorded.get("peak_memory_gb"),
    }
    curves = read_curves(run, recorded.get("epochs")) if run else {}
    return Contender(model, answers, curves, cost)


def read_curves(run: Path, epochs: float | None = None) -> dict[str, list[float]]:
    """Accuracies after each epoch from a run's TensorBoard log, as far as it goes.

    A log that broke off counts up to there; of a step that stands in it twice the later counts.
    What is missing is said.

    Args:
        run: Its folder.
        epochs: That it had, where that is known.
    """
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of runs that went on
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    try:
        events.Reload()
        tags = set(events.Tags()["scalars"]) & set(CURVES)
        by_step = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags}
    except Exception as error:  # a damaged file may fail anywhere in the reader
        log.warning("the log of %s cannot be read (%s)", shown(run), type(error).__name__)
        return {}
    found = {
        tag: [by_step[tag][step] for step in sorted(by_step[tag])] for tag in CURVES if tag in tags
    }
    there = len(found.get(CURVES[0], ()))
    if not any(run.glob("events.out.tfevents.*")):
        log.warning("%s has no log: its epochs are not drawn", shown(run))
    elif epochs is not None and there < epochs:
        log.warning("the log of %s ends after %d of %d epochs", shown(run), there, epochs)
    return found


def common(contenders: Sequence[Contender]) -> list[Contender]:
    """The contenders with the pictures alone that all of them could read."""
    read = [{record.path for record in contender.answers.records} for contender in contenders]
    shared = set.intersection(*read)
    if not shared:
        raise HorseHumanError("no picture could be read by all of them")
    return [replace(each, answers=each.answers.only(shared)) for each in contenders]


def differences(first: Contender, second: Contender) -> dict[str, Any]:
    """How the second differs from the first, with paired intervals; plain values."""
    a, b = first.answers, second.answers
    names, groups = a.pictures.class_names, np.array(a.groups)
    right = b.right.astype(float) - a.right
    values = {
        "accuracy": right,
        f"accuracy on {names[0]}": np.where(a.labels == 0, right, np.nan),
        f"accuracy on {names[1]}": np.where(a.labels == 1, right, np.nan),
        "Brier score": (b.probabilities - b.labels) ** 2 - (a.probabilities - a.labels) ** 2,
        "log loss": log_losses(b.probabilities, b.labels) - log_losses(a.probabilities, a.labels),
    }
    found = {}
    for name, own in values.items():
        there = ~np.isnan(own)
        found[name] = plain(estimate_mean(own[there], a.labels[there], groups[there].tolist()))
    only_first, only_second, p = mcnemar(a.right, b.right)
    return {
        "first": first.name,
        "second": second.name,
        "second less first": found,
        "right in the first only": only_first,
        "right in the second only": only_second,
        "p of McNemar's exact test, frames taken for independent": p,
        "pictures with two answers": [
            a.pictures.name(a.records[index]) for index in disagreements(a, b)
        ],
    }


def disagreements(first: Answers, second: Answers) -> list[int]:
    """Indices of pictures with two answers, those with the most different probabilities first."""
    apart = np.abs(first.probabilities - second.probabilities)
    there = np.flatnonzero(first.said != second.said)
    return [int(index) for index in there[np.argsort(-apart[there], kind="stable")]]
