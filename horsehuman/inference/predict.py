"""Classify a stream of images in order, one batch at a time; torch is not imported.

:func:`predict` is the interface for Python, :func:`predict_and_report` the work of ``horsehuman
predict``.
"""

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

#: An image to classify: a file or address, an opened PIL image, or an RGB array ``(H, W, 3)``,
#: uint8.
Source = str | Path | Image.Image | NDArray[np.uint8]

#: Largest width in characters of the source column of a table.
MAX_WIDTH = 60

log = logging.getLogger(__name__)


def predict(
    classifier: Classifier,
    sources: Source | Iterable[Source],
    batch_size: int = 32,
    *,
    always_answer: bool = False,
) -> Iterator[Prediction]:
    """Classify images and yield one prediction per image, in order.

    While the network computes one batch, threads read the next one; no other images are in memory.
    An image that cannot be read yields a prediction with status ``error``.

    Args:
        classifier: A network of :func:`~horsehuman.models.checkpoint.load_classifier`, or an
            :class:`~horsehuman.inference.onnx.OnnxClassifier`.
        sources: One image, or an iterable of images; an array ``(N, H, W, 3)`` is N images.
        batch_size: Number of images per batch, at least 1.
        always_answer: Whether to choose one of the two classes for every image, so that no
            prediction is ``unsure`` or ``neither``.

    Raises:
        HorseHumanError: If ``batch_size`` is not an integer of at least 1.
    """
    check_number("batch_size", batch_size, int, at_least=1)
    if isinstance(sources, str | Path | Image.Image) or (
        isinstance(sources, np.ndarray) and sources.ndim < 4
    ):
        sources = [sources]
    numbered = enumerate(sources)
    pending: deque[list[tuple[str, Future[Any]]]] = deque()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while True:
            while len(pending) < 2 and (batch := list(islice(numbered, batch_size))):
                pending.append([_start_reading(pool, classifier, *item) for item in batch])
            if not pending:
                return
            yield from _predict_batch(classifier, pending.popleft(), always_answer)


def _start_reading(
    pool: ThreadPoolExecutor, classifier: Classifier, index: int, source: Source
) -> tuple[str, Future[Any]]:
    """Submit the reading and preprocessing of an image; return its name and the future."""
    read: Callable[[], NDArray[np.uint8]]
    if isinstance(source, str | Path):
        name, read = str(source), lambda: read_source(str(source))
    else:
        name, read = f"picture {index}", lambda: _to_array(source, name)
    return name, pool.submit(lambda: classifier.preprocess(read()))


def _to_array(source: Image.Image | NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """Return an image in memory as an RGB array ``(H, W, 3)``, uint8; raise if it is another."""
    if isinstance(source, Image.Image):
        return as_rgb(source)
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
        raise PictureError(
            f"{name}: an array of shape {source.shape} and dtype {source.dtype} is not an image: "
            "give (H, W, 3) and uint8"
        )
    return source


def _predict_batch(
    classifier: Classifier, batch: Sequence[tuple[str, Future[Any]]], always_answer: bool
) -> list[Prediction]:
    """Wait for the images of a batch and classify those that could be read."""
    images, errors = [], {}
    for index, (_, image) in enumerate(batch):
        try:
            images.append(image.result())
        except PictureError as error:
            errors[index] = str(error)
    scores = iter(classifier.score(images) if images else [])
    nan = float("nan")
    return [
        Prediction(source, "", nan, nan, "error", errors[index])
        if index in errors
        else decide(classifier, source, next(scores), always_answer)
        for index, (source, _) in enumerate(batch)
    ]


def predict_and_report(
    sources: Sequence[str],
    model: str,
    output_format: str,
    out: Path | None,
    sort_into: Path | None,
    *,
    recursive: bool,
    always_answer: bool,
    force: bool,
) -> bool:
    """Classify images and write the predictions: the work of ``horsehuman predict``.

    Args:
        sources: Files, folders, patterns, addresses, or ``-`` for such names on stdin.
        model: Name, run, checkpoint or exported file, see :func:`load`.
        output_format: One of :data:`horsehuman.inference.output.FORMATS`.
        out: File to write; ``None`` for stdout.
        sort_into: Folder to copy the images into, by answer; ``None`` to copy nothing.
        recursive: Whether to read the folders inside folders.
        always_answer: See :func:`predict`.
        force: Whether to replace ``out`` if it exists.

    Returns:
        Whether all images could be read.

    Raises:
        HorseHumanError: If there is no such model, the output cannot be written, a file cannot be
            copied, or ``sort_into`` is used with addresses.
    """
    if out:
        check_output_file(out, force=force)
    if sort_into and any(map(is_url, sources)):
        raise HorseHumanError("--sort-into copies files only: drop it, or drop the addresses")
    classifier = load(model)
    if model == "cnn":
        log.info(
            "cnn was trained on 67 rendered subjects only: use --model inception for photographs"
        )
    sorter = Sorter(sort_into) if sort_into else None
    errors = 0
    paths = expand_sources(sources, recursive=recursive)
    with Writer(output_format, out, _source_width(sources)) as writer:
        total = None if "-" in sources else _count(sources, recursive)
        predictions = predict(classifier, paths, always_answer=always_answer)
        for prediction in track(predictions, "classifying", total):
            writer.write(prediction)
            if prediction.status == "error":
                errors += 1
                print(f"error: {prediction.error}", file=sys.stderr)
            if sorter:
                sorter.copy(prediction)
    return not errors


def load(model: str) -> Classifier:
    """Load a classifier for prediction.

    Args:
        model: An exported file whose name ends in ``.onnx``, which is loaded without torch, or a
            name, a run or a checkpoint.
    """
    if model.lower().endswith(".onnx"):
        from horsehuman.inference.onnx import OnnxClassifier

        return OnnxClassifier(Path(model).expanduser())
    from horsehuman.models.checkpoint import load_classifier

    return load_classifier(model)


def _count(sources: Iterable[str], recursive: bool) -> int:
    """Count the images that the sources stand for, as the total of the progress bar."""
    return sum(1 for _ in expand_sources(sources, recursive=recursive))


def _source_width(sources: Sequence[str]) -> int:
    """Return the width of the source column.

    It is that of the longest source if all are files, at most :data:`MAX_WIDTH`; otherwise it is
    :data:`MAX_WIDTH`, because folders and patterns are expanded only later.
    """
    if not all(Path(source).is_file() for source in sources):
        return MAX_WIDTH
    return min(max(len(printable(source)) for source in sources), MAX_WIDTH)
