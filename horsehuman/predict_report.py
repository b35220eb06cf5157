"""What ``horsehuman predict`` does."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from horsehuman.errors import HorseHumanError, shown
from horsehuman.output import Sorter, Writer
from horsehuman.places import check_free
from horsehuman.prediction import Classifier, predict
from horsehuman.sources import expand, is_url
from horsehuman.terminal import track

log = logging.getLogger(__name__)

#: Widest first column of a table.
WIDTH = 60


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
        check_free(out, force=force)
    if sort_into and any(map(is_url, sources)):
        raise HorseHumanError("--sort-into copies files: drop it, or the addresses")
    classifier = load(model)
    if model == "cnn":
        log.info(
            "cnn learned from 67 rendered figures alone; for photographs use --model inception"
        )
    sorter = Sorter(sort_into) if sort_into else None
    errors = 0
    paths = expand(sources, recursive=recursive)
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
        from horsehuman.onnx_model import OnnxClassifier

        return OnnxClassifier(Path(model).expanduser())
    from horsehuman.checkpoint import load_classifier

    return load_classifier(model)


def _count(sources: Iterable[str], recursive: bool) -> int:
    return sum(1 for _ in expand(sources, recursive=recursive))


def _width(sources: Sequence[str]) -> int:
    """Of names on the command line; of others the widest that a table takes."""
    names = [source for source in sources if Path(source).is_file()]
    return min(max(map(len, map(shown, names))), WIDTH) if len(names) == len(sources) else WIDTH
