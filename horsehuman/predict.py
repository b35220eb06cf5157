"""Pictures from files to answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from horsehuman.models.network import Network
from horsehuman.pictures import PictureError, read_picture
from horsehuman.resize import resize


@dataclass(frozen=True)
class Prediction:
    """An answer, or why there is none.

    Attributes:
        source: The file.
        class_name: What the picture shows; empty where it could not be read.
        probability: Of that class, 0 to 1; NaN where the picture could not be read.
        error: Why the picture could not be read; empty where it could.
    """

    source: Path
    class_name: str
    probability: float
    error: str


def predict(
    classifier: Network, sources: Iterable[Path], batch_size: int = 16
) -> Iterator[Prediction]:
    """Classify pictures, in order and a batch at a time; a bad file is an answer with its error."""
    sources = iter(sources)
    while batch := list(islice(sources, batch_size)):
        yield from _predict_batch(classifier, batch)


def _predict_batch(classifier: Network, sources: list[Path]) -> list[Prediction]:
    pictures, errors = [], {}
    for index, source in enumerate(sources):
        try:
            picture = torch.from_numpy(read_picture(source)).permute(2, 0, 1)
            pictures.append(resize(picture, classifier.image_size))
        except PictureError as error:
            errors[index] = str(error)
    probabilities = iter(
        classifier.probabilities(torch.stack(pictures).to(classifier.device)).tolist()
        if pictures
        else []
    )
    return [
        Prediction(source, "", float("nan"), errors[index])
        if index in errors
        else _answer(classifier, source, next(probabilities))
        for index, source in enumerate(sources)
    ]


def _answer(classifier: Network, source: Path, probability: float) -> Prediction:
    label = int(probability >= classifier.threshold)
    share = probability if label else 1 - probability
    return Prediction(source, classifier.class_names[label], share, "")
