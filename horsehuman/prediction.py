"""Pictures to answers: a stream of any length, in order, a batch at a time; torch is not needed."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from horsehuman.errors import check_number, shown
from horsehuman.pictures import PictureError, as_rgb
from horsehuman.sources import open_picture

#: What can be asked about: a file or address, an opened picture, or pixels ``(H, W, 3)``, uint8.
Source = str | Path | Image.Image | NDArray[np.uint8]


class Answer(NamedTuple):
    """What a network says of a picture.

    Attributes:
        logit: Calibrated.
        probability: Of class 1: the logit's sigmoid.
        strangeness: How far it is from all training pictures, where the network can tell; from 1
            on it is neither class.
    """

    logit: float
    probability: float
    strangeness: float = 0.0


class Classifier(Protocol):
    """What answers: a :class:`~horsehuman.models.network.Network`, or an exported file."""

    @property
    def class_names(self) -> tuple[str, str]:
        """Names of class 0 and class 1."""

    @property
    def threshold(self) -> float:
        """Probability from which on a picture is of class 1."""

    @property
    def certain_from(self) -> float:
        """Probability of an answer, at least 0.5, below which it is unsure."""

    def read(self, picture: NDArray[np.uint8]) -> Any:
        """Make of a picture, ``(H, W, 3)``, what :meth:`answer` takes."""

    def answer(self, pictures: Sequence[Any]) -> list[Answer]:
        """Answer a batch."""


@dataclass(frozen=True)
class Prediction:
    """An answer, or why there is none.

    Attributes:
        source: The file or address, or which of several pictures.
        class_name: What the picture shows; empty for neither class, and where there is an error.
        probability: Of that class, 0 to 1; NaN where there is none.
        logit: Calibrated; its sigmoid is the probability of class 1. NaN where there is an error.
        status: ``ok``; ``unsure``, where the probability is too near to even; ``neither``, where
            the picture is too far from all that the classifier was trained on; or ``error``.
        error: Why the picture could not be read.
    """

    source: str
    class_name: str
    probability: float
    logit: float
    status: Literal["ok", "unsure", "neither", "error"]
    error: str = ""


def predict(
    classifier: Classifier,
    sources: Source | Iterable[Source],
    batch_size: int = 32,
    *,
    always_answer: bool = False,
) -> Iterator[Prediction]:
    """Classify pictures; one that cannot be read is an answer with its error.

    The next batch is read while the network looks at one; no more are in memory.

    Args:
        classifier: What :func:`~horsehuman.checkpoint.load_classifier` gives.
        sources: One picture or many.
        batch_size: Pictures that are looked at together.
        always_answer: Name one of the two classes for every picture.

    Raises:
        HorseHumanError: ``batch_size`` is below 1.
    """
    check_number("batch_size", batch_size, int, at_least=1)
    if isinstance(sources, str | Path | Image.Image) or (
        isinstance(sources, np.ndarray) and sources.ndim < 4
    ):
        sources = [sources]
    numbered = enumerate(sources)
    ahead: deque[list[tuple[str, Future[Any]]]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while True:
            while len(ahead) < 2 and (batch := list(islice(numbered, batch_size))):
                ahead.append([_begin(pool, classifier, *each) for each in batch])
            if not ahead:
                return
            yield from _answer_batch(classifier, ahead.popleft(), always_answer)


def _begin(
    pool: ThreadPoolExecutor, classifier: Classifier, index: int, source: Source
) -> tuple[str, Future[Any]]:
    """Start to read a picture; its name, and what it will be."""
    read: Callable[[], NDArray[np.uint8]]
    if isinstance(source, str | Path):
        name, read = str(source), lambda: open_picture(str(source))
    else:
        name, read = f"picture {index}", lambda: _pixels(source, name)
    return name, pool.submit(lambda: classifier.read(read()))


def _pixels(source: Image.Image | NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    if isinstance(source, Image.Image):
        return as_rgb(source)
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
        raise PictureError(
            f"{name}: pixels of shape {source.shape} and type {source.dtype} are not (H, W, 3) "
            "and uint8"
        )
    return source


def _answer_batch(
    classifier: Classifier, batch: Sequence[tuple[str, Future[Any]]], always_answer: bool
) -> list[Prediction]:
    pictures, errors = [], {}
    for index, (_, read) in enumerate(batch):
        try:
            pictures.append(read.result())
        except PictureError as error:
            errors[index] = str(error)
    answers = iter(classifier.answer(pictures) if pictures else [])
    nothing = float("nan")
    return [
        Prediction(source, "", nothing, nothing, "error", errors[index])
        if index in errors
        else prediction_of(classifier, source, next(answers), always_answer)
        for index, (source, _) in enumerate(batch)
    ]


def prediction_of(
    classifier: Classifier, source: str, answer: Answer, always_answer: bool = False
) -> Prediction:
    """What an answer means."""
    if answer.strangeness >= 1 and not always_answer:
        return Prediction(source, "", float("nan"), answer.logit, "neither")
    label = int(answer.probability >= classifier.threshold)
    share = answer.probability if label else 1 - answer.probability
    unsure = share < classifier.certain_from and not always_answer
    name = classifier.class_names[label]
    return Prediction(source, name, share, answer.logit, "unsure" if unsure else "ok")


def describe(prediction: Prediction) -> str:
    """What a prediction says, for a person: ``horses  99.10%``, ``unsure (horses 55.00%)``."""
    if prediction.status in ("neither", "error"):
        return prediction.status
    answer = f"{shown(prediction.class_name)}  {prediction.probability:7.2%}"
    return answer if prediction.status == "ok" else f"unsure ({' '.join(answer.split())})"
