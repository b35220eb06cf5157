"""Classify a stream of images in order, one batch at a time; torch is not imported.

:func:`predict` is the interface for Python, :func:`predict_and_report` the work of ``horsehuman
predict``.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from horsehuman.data.images import PictureError, as_rgb
from horsehuman.data.sources import expand_sources, is_url, read_source
from horsehuman.decision import Classifier, Prediction, decide
from horsehuman.errors import HorseHumanError, check_number, printable
from horsehuman.inference.output import copy_each, write_predictions
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
    read: Callable[[str], NDArray[np.uint8]] = read_source,
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
            prediction is ``unsure``, ``neither`` or ``both``.
        read: Reads an image by its name, as RGB ``(H, W, 3)``, uint8, in a thread; it raises
            :class:`~horsehuman.data.images.PictureError` if it cannot.

    Raises:
        HorseHumanError: If ``batch_size`` is not an integer of at least 1.

    Example:
        >>> import numpy as np
        >>> from horsehuman import load_classifier, predict
        >>> white = np.full((80, 100, 3), 255, np.uint8)
        >>> [prediction.status for prediction in predict(load_classifier("inception"), white)]
        ['neither']
    """
    check_number("batch_size", batch_size, int, at_least=1)
    is_image = isinstance(sources, str | Path | Image.Image) or getattr(sources, "ndim", 4) < 4
    numbered = enumerate(cast("Iterable[Source]", [sources] if is_image else sources))
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def start_reading(index: int, source: Source) -> tuple[str, Future[Any]]:
            name = str(source) if isinstance(source, str | Path) else f"picture {index}"
            return name, pool.submit(lambda: classifier.preprocess(_to_array(source, name, read)))

        batches = iter(lambda: [start_reading(*i) for i in islice(numbered, batch_size)], [])
        # Threads read the second batch of a pair while the network computes the first one.
        for batch, _ in pairwise(chain(batches, [[]])):
            readable = [i for _, i in batch if not isinstance(i.exception(), PictureError)]
            scores = iter(classifier.score([i.result() for i in readable]) if readable else [])
            for name, image in batch:
                if error := image.exception():
                    yield Prediction(name, error=str(error))
                else:
                    yield decide(classifier, name, next(scores), always_answer)


def _to_array(
    source: Source, name: str, read: Callable[[str], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """Return an image as an RGB array ``(H, W, 3)``, uint8; raise if it cannot be read as one."""
    if isinstance(source, str | Path):
        return read(name)
    if isinstance(source, Image.Image):
        return as_rgb(source, name)
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
        kind = f"{source.dtype} {source.shape}"
        raise PictureError(f"{name}: {kind} is not uint8 (H, W, 3) with values of 0 to 255")
    return np.require(source, requirements="W")  # torch warns of arrays that are read-only


def predict_and_report(
    sources: Sequence[str],
    model: str,
    output_format: str,
    out: Path | None,
    sort_into: Path | None,
    precision: str = "float32",
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
        precision: See :func:`load`.
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
    classifier = load(model, precision)
    if model == "cnn":
        log.info("cnn was trained on 67 rendered subjects: use --model inception for photographs")
    names = partial(expand_sources, sources, recursive=recursive)
    total = None if "-" in sources else sum(1 for _ in names())
    answers = track(predict(classifier, names(), always_answer=always_answer), "classifying", total)
    if sort_into:
        answers = copy_each(answers, sort_into)
    are_files = all(Path(source).is_file() for source in sources)  # Others are expanded only later.
    width = max(len(printable(source)) for source in sources) if are_files else MAX_WIDTH
    return write_predictions(answers, output_format, out, min(width, MAX_WIDTH))


def load(model: str, precision: str = "float32") -> Classifier:
    """Load a classifier for prediction.

    Args:
        model: An exported file whose name ends in ``.onnx``, which is loaded without torch, or a
            name, a run or a checkpoint.
        precision: See :func:`~horsehuman.models.checkpoint.load_classifier`.

    Raises:
        HorseHumanError: If there is no such model or precision; an exported file has float32 only.
    """
    if model.lower().endswith(".onnx"):
        if precision != "float32":
            reason = f"--precision {precision}: an exported file computes in float32"
            raise HorseHumanError(f"{reason}: drop the option, or name a run or a checkpoint")
        from horsehuman.inference.onnx import OnnxClassifier

        return OnnxClassifier(Path(model).expanduser())
    from horsehuman.models.checkpoint import load_classifier

    return load_classifier(model, precision)
