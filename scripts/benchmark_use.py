"""Of the pieces of work that the benchmark times, those about using a classifier."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from horsehuman import load_classifier
from horsehuman.data.archives import bundled_archives, unpack
from horsehuman.data.images import read_picture
from horsehuman.inference.predict import predict
from horsehuman.training import tensorboard
from horsehuman.training.config import compose
from horsehuman.training.run import train


def logging(way: str, steps: int) -> dict[str, float]:
    """Seconds that a run of ``model=inception`` takes, and those of its log (``ours`` alone)."""
    spent = 0.0

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            start = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent += time.perf_counter() - start

        return wrapper

    for name in ("log_run_inputs", "log_validation_report", "log_hyperparameters"):
        setattr(tensorboard, name, timed(getattr(tensorboard, name)))
    TensorBoardLogger.log_metrics = timed(TensorBoardLogger.log_metrics)  # type: ignore[method-assign]
    TensorBoardLogger.save = timed(TensorBoardLogger.save)  # type: ignore[method-assign]
    small = ["trainer.max_epochs=1", "model.scales=[75]", "test=false"] if steps == 1 else []
    config = compose("model=inception", *small)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train(config, Path(folder) / "run")
    return {"seconds": time.perf_counter() - start, "seconds_logging": spent}


def throughput_cnn(way: str, steps: int) -> dict[str, float]:
    """Pictures a second; see :func:`throughput`."""
    return throughput("cnn", 64 * steps, steps)


def throughput_inception(way: str, steps: int) -> dict[str, float]:
    """Pictures a second; see :func:`throughput`."""
    return throughput("inception", 8 if steps == 1 else 32 * steps, steps)


def throughput(model: str, count: int, steps: int) -> dict[str, float]:
    """Pictures a second: predicted, decoded alone, seen by the network alone, and in a plain loop.

    Args:
        model: Of the box.
        count: Pictures; training pictures of the box.
        steps: With one alone each piece runs once, otherwise three times.
    """
    classifier = load_classifier(model)
    paths = sorted((unpack(bundled_archives()) / "train").rglob("*.webp"))[:count]
    pictures: list[Any] = []

    def decode() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            pictures[:] = pool.map(lambda path: classifier.preprocess(read_picture(path)), paths)

    def look() -> None:
        for start in range(0, len(pictures), 32):
            classifier.score(pictures[start : start + 32])

    def loop() -> None:
        for path in paths:
            classifier.score([classifier.preprocess(read_picture(path))])

    calls: dict[str, Callable[[], object]] = {
        "decode": decode,
        "network": look,
        "predict": lambda: list(predict(classifier, paths)),
        "loop": loop,
    }
    found: dict[str, float] = {}
    for name, call in calls.items():
        seconds = []
        for _ in range(1 if steps == 1 else 3):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        found[name] = len(paths) / min(seconds)
    return found
