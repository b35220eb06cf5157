"""From a logit to an answer: the types and the rule that all classifiers share; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from horsehuman.errors import printable

#: Bins of the calibration error, of equal width.
CALIBRATION_BINS = 15

Floats = NDArray[np.float64]


class Scores(NamedTuple):
    """What a network says of a picture.

    Attributes:
        logit: Calibrated.
        probability: Of class 1: the logit's sigmoid.
        neither_score: How far it is from all training pictures, where the network can tell; from 1
            on it is neither class.
    """

    logit: float
    probability: float
    neither_score: float = 0.0


class Classifier(Protocol):
    """What answers: a :class:`~horsehuman.models.network.Network`, or an exported file."""

    @property
    def class_names(self) -> tuple[str, str]:
        """Names of class 0 and class 1."""

    @property
    def threshold(self) -> float:
        """Probability from which on a picture is of class 1."""

    @property
    def confidence_threshold(self) -> float:
        """Probability of an answer, at least 0.5, below which it is unsure."""

    def preprocess(self, picture: NDArray[np.uint8]) -> Any:
        """Make of a picture, ``(H, W, 3)``, what :meth:`score` takes."""

    def score(self, pictures: Sequence[Any]) -> list[Scores]:
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


def decide(
    classifier: Classifier, source: str, answer: Scores, always_answer: bool = False
) -> Prediction:
    """What an answer means."""
    if answer.neither_score >= 1 and not always_answer:
        return Prediction(source, "", float("nan"), answer.logit, "neither")
    label = int(answer.probability >= classifier.threshold)
    share = answer.probability if label else 1 - answer.probability
    unsure = share < classifier.confidence_threshold and not always_answer
    name = classifier.class_names[label]
    return Prediction(source, name, share, answer.logit, "unsure" if unsure else "ok")


def format_prediction(prediction: Prediction) -> str:
    """What a prediction says, for a person: ``horses  99.10%``, ``unsure (horses 55.00%)``."""
    if prediction.status in ("neither", "error"):
        return prediction.status
    answer = f"{printable(prediction.class_name)}  {prediction.probability:7.2%}"
    return answer if prediction.status == "ok" else f"unsure ({' '.join(answer.split())})"


def calibration_bins(probabilities: Floats) -> NDArray[np.int64]:
    """Which of :data:`CALIBRATION_BINS` bins of equal width each probability falls into."""
    return np.minimum((probabilities * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
