"""Pictures to answers: a stream of any length, in order, a batch at a time; torch is not needed."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from horsehuman.data.images import PictureError, as_rgb
from horsehuman.data.sources import expand_sources, is_url, read_source
from horsehuman.decision import Classifier, Prediction, decide
from horsehuman.errors import HorseHumanError, check_number, printable
from horsehuman.inference.output import Sorter, Writer
from horsehuman.run_dir import check_output_file
from horsehuman.runtime import track

#: What can be asked about: a file or address, an opened picture, or pixels ``(H, W, 3)``, uint8.
Source = str | Path | Image.Image | NDArray[np.uint8]

log = logging.getLogger(__name__)

#: Widest first column of a table.
WIDTH = 60


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
        name, read = str(source), lambda: read_source(str(source))
    else:
        name, read = f"picture {index}", lambda: _pixels(source, name)
    return name, pool.submit(lambda: classifier.preprocess(read()))


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
    answers = iter(classifier.score(pictures) if pictures else [])
    nothing = float("nan")
    return [
        Prediction(source, "", nothing, nothing, "error", errors[index])
        if index in errors
        else decide(classifier, source, next(answers), always_answer)
        for index, (source, _) in enumerate(batch)
    ]


def predict_and_report(
    sources: Sequence[str],
    model: str,
    form: str,
    out: Path | None,
    sort_into: Path | None,
    *,
    recursive: bool,
    always_answer: bool,
    force: bool,
) -> bool:
    """Answer all sources; returns whether all could be read.

    Raises:
        HorseHumanError: There is no such model, a source stands for nothing, or what is to be
            written cannot be.
    """
    if out:
        check_output_file(out, force=force)
    if sort_into and any(map(is_url, sources)):
        raise HorseHumanError("--sort-into copies files: drop it, or the addresses")
    classifier = load(model)
    if model == "cnn":
        log.info(
            "cnn learned from 67 rendered figures alone; for photographs use --model inception"
        )
    sorter = Sorter(sort_into) if sort_into else None
    errors = 0
    paths = expand_sources(sources, recursive=recursive)
    with Writer(form, out, _width(sources)) as writer:
        total = None if "-" in sources else _count(sources, recursive)
        found = predict(classifier, paths, always_answer=always_answer)
        for prediction in track(found, "answering", total):
            writer.write(prediction)
            if prediction.status == "error":
                errors += 1
                print(f"error: {prediction.error}", file=sys.stderr)
            if sorter:
                sorter.copy(prediction)
    return not errors


def load(model: str) -> Classifier:
    """A classifier from a name, a run or a checkpoint; or an exported file, without torch."""
    if model.lower().endswith(".onnx"):
        from horsehuman.inference.onnx import OnnxClassifier

        return OnnxClassifier(Path(model).expanduser())
    from horsehuman.models.checkpoint import load_classifier

    return load_classifier(model)


def _count(sources: Iterable[str], recursive: bool) -> int:
    return sum(1 for _ in expand_sources(sources, recursive=recursive))


def _width(sources: Sequence[str]) -> int:
    """Of names on the command line; of others the widest that a table takes."""
    names = [source for source in sources if Path(source).is_file()]
    return min(max(map(len, map(printable, names))), WIDTH) if len(names) == len(sources) else WIDTH
