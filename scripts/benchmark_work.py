"""What the benchmark times, each piece twice: our way and the plain way.

    python scripts/benchmark_work.py WORK {ours,plain} [--steps N]

Each call is a process of its own, since the allocator's setting holds for a whole process; it
prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from benchmark_plain import BATCH, PlainModule, plain_cnn, plain_loader, plain_trunk
from benchmark_use import logging, throughput_cnn, throughput_inception
from torch import nn
from torch.nn import functional
from torch.nn.functional import binary_cross_entropy_with_logits as loss_of
from torch.utils.flop_counter import FlopCounterMode

from horsehuman import InceptionClassifier
from horsehuman.data.datasets import EpochSampler, InMemoryDataset, make_loader
from horsehuman.models.cnn import CNN
from horsehuman.models.inception import Inception
from horsehuman.runtime import keep_freed_memory
from horsehuman.training.build import build, silence_lightning
from horsehuman.training.callbacks import AverageWeights
from horsehuman.training.config import compose

TRAIN, OFFICIAL, EPOCHS = 834, 256, 25

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def cnn_step(way: str, steps: int) -> dict[str, float]:
    """Seconds of a training step of the notebook's network, batch 32."""
    images = torch.randint(0, 256, (BATCH, 3, 300, 300), dtype=torch.uint8)
    labels = torch.arange(BATCH).remainder(2).float()
    if way == "ours":
        network: Any = notebook_cnn()
        inputs: Any = images
    else:
        network, inputs = plain_cnn(), images / 127.5 - 1
    optimizer = torch.optim.RMSprop(network.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(network(inputs).view(-1), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    found = {"seconds": fastest(step, steps)}
    return found | ({"seconds_at_peak": operations(step) / peak()} if way == "ours" else {})


def notebook_cnn() -> CNN:
    """The notebook's network as we build it."""
    config = compose("experiment=notebook_cnn")
    network: CNN = build("model", config).network
    return network


def trunk(way: str, steps: int) -> dict[str, float]:
    """Pictures a second through the frozen trunk at 299 px."""
    images = torch.rand(BATCH, 3, 299, 299)
    if way == "ours":
        network: Any = Inception(scales=[299]).backbone
        images = images.contiguous(memory_format=torch.channels_last)
    else:
        network = plain_trunk()

    def look() -> None:
        with torch.no_grad():
            network(images)

    found = {"images_per_second": BATCH / fastest(look, steps)}
    bound = {"images_per_second_at_peak": BATCH * peak() / operations(look)}
    return found | (bound if way == "ours" else {})


def operations(call: Callable[[], object]) -> float:
    """Float operations of a call's convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def peak() -> float:
    """The most float operations a second that simple work reaches here.

    That work is a product of two matrices and a convolution, both large: which of the two is
    faster depends on the libraries behind them.
    """
    a, b = torch.rand(2, 2048, 2048).unbind()
    maps = torch.rand(8, 256, 32, 32).contiguous(memory_format=torch.channels_last)
    kernels = torch.rand(256, 256, 3, 3).contiguous(memory_format=torch.channels_last)
    product = 2 * 2048**3 / fastest(lambda: torch.mm(a, b), 20)
    convolved = 2 * 9 * 256**2 * 8 * 32**2
    with torch.no_grad():
        convolution = convolved / fastest(lambda: functional.conv2d(maps, kernels, padding=1), 20)
    return max(product, convolution)


def onnx(way: str, steps: int) -> dict[str, float]:
    """Pictures a second through the same trunk in ONNX Runtime (``ours`` alone)."""
    import onnxruntime

    images = torch.rand(8, 3, 299, 299)
    network = Inception(scales=[299]).backbone.trunk.eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trunk.onnx"
        torch.onnx.export(network, (images,), path, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(path)
    given = {session.get_inputs()[0].name: images.numpy()}
    return {"images_per_second": 8 / fastest(lambda: session.run(None, given), steps)}


def head_step(way: str, steps: int) -> dict[str, float]:
    """Seconds of a step on cached features: Lightning's loop against a bare one."""
    features, labels = torch.rand(TRAIN, 768), torch.arange(TRAIN).remainder(2).float()
    if way == "plain":
        head = nn.Linear(768, 1)
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.03)

        def epoch() -> None:
            for chosen in torch.split(torch.randperm(TRAIN)[: TRAIN - TRAIN % BATCH], BATCH):
                optimizer.zero_grad()
                loss = loss_of(head(features[chosen]).squeeze(1), labels[chosen])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()

        return {"seconds": fastest(epoch, steps) / (TRAIN // BATCH)}

    silence_lightning()
    order = EpochSampler(TRAIN, BATCH, 0, lambda: 0)
    loader = make_loader(InMemoryDataset(features, labels, range(TRAIN)), order, BATCH, 0)
    clock = EpochClock()
    trainer = L.Trainer(
        max_epochs=steps + 2,
        callbacks=clock,
        **QUIET,
    )
    trainer.fit(InceptionClassifier(scales=[96], weights="random", cache_features=False), loader)
    return {"seconds": min(clock.seconds[1:]) / (TRAIN // BATCH)}


def cnn_epoch(way: str, steps: int) -> dict[str, float]:
    """Seconds of an epoch of training on 834 pictures: our CNN against the notebook's."""
    if way == "plain":
        return epoch_of_plain("cnn", steps)

    config = compose("model=cnn")
    silence_lightning()
    model = build("model", config)
    data = build("data", config, image_size=model.image_size, seed=0)
    data.prepare_data()
    clock = EpochClock()
    trainer = L.Trainer(
        max_epochs=max(steps // 4, 1) + 1,
        limit_val_batches=0,
        callbacks=[clock, AverageWeights(config.ema)],
        **QUIET,
    )
    trainer.fit(model, datamodule=data)
    return {"seconds": min(clock.seconds[1:])}


def inception_run(way: str, steps: int) -> dict[str, float]:
    """Seconds of 25 epochs of training and validation, extrapolated (``plain`` alone)."""
    return epoch_of_plain("inception", steps)


def epoch_of_plain(model: str, steps: int) -> dict[str, float]:
    """Time some batches of Lightning's own loop and extrapolate to an epoch, and to 25."""
    silence_lightning()
    clock = BatchClock()
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=steps + 2,
        limit_val_batches=steps + 1 if model == "inception" else 0,
        callbacks=clock,
        **QUIET,
    )
    trainer.fit(PlainModule(model), plain_loader(model, "train"), plain_loader(model, "test"))
    epoch = statistics.median(clock.train[2:]) * TRAIN / BATCH
    validation = statistics.median(clock.val[1:]) * OFFICIAL / BATCH if clock.val else 0.0
    return {"seconds": epoch, "seconds_25_epochs": EPOCHS * (epoch + validation)}


def fastest(call: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of so many calls, after one to warm up."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


class EpochClock(L.Callback):
    """Seconds of each training epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_train_epoch_start(self, *unused: Any) -> None:
        """Start the clock."""
        self._start = time.perf_counter()

    def on_train_epoch_end(self, *unused: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._start)


class BatchClock(L.Callback):
    """Seconds from batch to batch, loading included."""

    def __init__(self) -> None:
        self.train: list[float] = []
        self.val: list[float] = []
        self._last = time.perf_counter()

    def on_train_batch_end(self, *unused: Any) -> None:
        """Note the time since the batch before."""
        self._tick(self.train)

    def on_validation_batch_end(self, *unused: Any) -> None:
        """Note the time since the batch before."""
        self._tick(self.val)

    def _tick(self, into: list[float]) -> None:
        now = time.perf_counter()
        into.append(now - self._last)
        self._last = now


WORKS = {
    work.__name__: work
    for work in (
        *(cnn_step, trunk, onnx, head_step, cnn_epoch, inception_run),
        *(logging, throughput_cnn, throughput_inception),
    )
}


def main() -> None:
    """Do one piece of work and print what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", choices=list(WORKS))
    parser.add_argument("way", choices=["ours", "plain"])
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    if given.way == "ours":
        keep_freed_memory()
    print(json.dumps(WORKS[given.work](given.way, given.steps)))


if __name__ == "__main__":
    main()
