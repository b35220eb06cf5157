"""The decision: from scores to a class, ``unsure``, ``neither`` or ``both``; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from horsehuman.errors import printable

#: Number of bins of the calibration error, of equal width from probability 0 to 1.
CALIBRATION_BINS = 15

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Scores(NamedTuple):
    """The output of a network for one image.

    Attributes:
        logit: Calibrated logit: divided by the temperature.
        probability: Probability of class 1, 0 to 1: the sigmoid of ``logit``.
        neither_score: Logit of *neither*: from 0 on the image is of neither class. Always -1 for a
            network without this output.
        both_score: Logit of *both*: from 0 on the image shows both classes. Always -1 for a
            network without this output.
    """

    logit: float
    probability: float
    neither_score: float = -1.0
    both_score: float = -1.0


class Classifier(Protocol):
    """A classifier: a :class:`~horsehuman.models.base.Network`, or an exported file."""

    @property
    def class_names(self) -> tuple[str, str]:
        """Names of class 0 and class 1."""

    @property
    def threshold(self) -> float:
        """Smallest probability of class 1 at which an image is assigned to class 1."""

    @property
    def confidence_threshold(self) -> float:
        """Smallest probability of the predicted class, at least 0.5, that is not ``unsure``."""

    def preprocess(self, image: NDArray[np.uint8]) -> Any:
        """Convert an RGB image, uint8 ``(H, W, 3)``, to an input of :meth:`score`."""

    def score(self, images: Sequence[Any]) -> list[Scores]:
        """Return the scores of each image of a batch; see :meth:`preprocess`."""


@dataclass(frozen=True)
class Prediction:
    """The decision on one image, or the error that prevented one.

    Attributes:
        source: File, URL, or number of the image among several.
        class_name: Predicted class; empty if ``status`` is ``neither``, ``both`` or ``error``.
        probability: Probability of the class that the threshold gives, 0 to 1; NaN for ``neither``
            and ``error``.
        logit: Calibrated logit; its sigmoid is the probability of class 1. NaN for an error.
        status: ``ok``; ``unsure`` if the probability is below the confidence threshold;
            ``neither`` if the image shows neither class; ``both`` if it shows both; or ``error``.
        error: Why the image could not be read; otherwise empty.
    """

    source: str
    class_name: str = ""
    probability: float = float("nan")
    logit: float = float("nan")
    status: Literal["ok", "unsure", "neither", "both", "error"] = "error"
    error: str = ""


def decide(
    classifier: Classifier, source: str, scores: Scores, always_answer: bool = False
) -> Prediction:
    """Apply a classifier's thresholds to the scores of one image.

    Args:
        classifier: Its thresholds and class names are used.
        source: File, URL, or number of the image among several.
        scores: The classifier's scores of the image.
        always_answer: Whether to predict a class with status ``ok`` in every case, instead of
            ``unsure``, ``neither`` or ``both``.
    """
    if scores.neither_score >= 0 and not always_answer:
        return Prediction(source, logit=scores.logit, status="neither")
    label = int(scores.probability >= classifier.threshold)
    probability = scores.probability if label else 1 - scores.probability
    if scores.both_score >= 0 and not always_answer:
        return Prediction(source, "", probability, scores.logit, "both")
    unsure = probability < classifier.confidence_threshold and not always_answer
    name = classifier.class_names[label]
    return Prediction(source, name, probability, scores.logit, "unsure" if unsure else "ok")


def format_prediction(prediction: Prediction) -> str:
    """Format a prediction for people: ``horses  99.10%``, ``unsure (horses 55.00%)``."""
    if prediction.status in ("neither", "both", "error"):
        return prediction.status
    answer = f"{printable(prediction.class_name)}  {prediction.probability:7.2%}"
    return answer if prediction.status == "ok" else f"unsure ({' '.join(answer.split())})"


def calibration_bins(probabilities: Floats) -> Ints:
    """Return the bin of each probability, 0 to :data:`CALIBRATION_BINS` - 1.

    Args:
        probabilities: ``(N,)``, 0 to 1.
    """
    return np.minimum((probabilities * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
