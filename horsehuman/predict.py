"""Pictures from files to answers."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from horsehuman.data.loading import decode
from horsehuman.models.network import Network
from horsehuman.pictures import PictureError


@dataclass(frozen=True)
class Prediction:
    """An answer, or why there is none.

    Attributes:
        source: The file.
        class_name: What the picture shows; empty where it could not be read.
        probability: Of that class, 0 to 1; NaN where the picture could not be read.
        logit: Calibrated; its sigmoid is the probability of class 1. NaN likewise.
        error: Why the picture could not be read; empty where it could.
    """

    source: Path
    class_name: str
    probability: float
    logit: float
    error: str


def predict(
    classifier: Network, sources: Iterable[Path], batch_size: int = 32
) -> Iterator[Prediction]:
    """Classify pictures, in order and a batch at a time; a bad file is an answer with its error.

    The next batch is decoded while the network looks at one; no more are in memory.
    """
    sources = iter(sources)
    ahead: deque[list[tuple[Path, Future[Tensor]]]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while True:
            while len(ahead) < 2 and (batch := list(islice(sources, batch_size))):
                size = classifier.image_size
                ahead.append([(source, pool.submit(decode, source, size)) for source in batch])
            if not ahead:
                return
            yield from _answer_batch(classifier, ahead.popleft())


def _answer_batch(
    classifier: Network, batch: Sequence[tuple[Path, Future[Tensor]]]
) -> list[Prediction]:
    pictures, errors = [], {}
    for index, (_, decoded) in enumerate(batch):
        try:
            pictures.append(decoded.result())
        except PictureError as error:
            errors[index] = str(error)
    answers: Iterator[tuple[float, float]] = iter(())
    if pictures:
        logits = classifier.logits(torch.stack(pictures).to(classifier.device))
        answers = zip(logits.tolist(), logits.sigmoid().tolist(), strict=True)
    return [
        Prediction(source, "", float("nan"), float("nan"), errors[index])
        if index in errors
        else answer_of(classifier, source, *next(answers))
        for index, (source, _) in enumerate(batch)
    ]


def answer_of(classifier: Network, source: Path, logit: float, second: float) -> Prediction:
    """The answer that a calibrated logit, and the probability of class 1, mean."""
    label = int(second >= classifier.threshold)
    share = second if label else 1 - second
    return Prediction(source, classifier.class_names[label], share, logit, "")
