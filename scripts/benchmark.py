"""Measure speed, memory and size against a plain implementation: a table and benchmark.json.

    python scripts/benchmark.py                     # all rows: an hour and a half on two cores
    python scripts/benchmark.py cnn_step backbone   # some rows
    python scripts/benchmark.py --short             # check that each row works, in minutes

The plain implementation is what a tutorial shows: a loop with PyTorch, timm and torchvision and
their defaults, the images and batch size of ours, the notebook's augmentation, loss and optimizer,
and the notebook's CNN or the same frozen backbone at one scale with a linear head.

Each piece of work is measured in processes of its own, because the allocator's setting applies to a
whole process. Ours and plain take turns, so that a machine that slows down slows both, and the best
of three processes counts. Trainings and the audit run once. Nothing else should run meanwhile. The
rows of ONNX Runtime need ``pip install -e '.[export]'``.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import pstats
import re
import subprocess
import sys
import tempfile
import time
import timeit
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import safetensors.torch
import timm
import torch
from lightning.pytorch.callbacks import LambdaCallback
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, transforms

from horsehuman import InceptionClassifier, load_classifier
from horsehuman.data.archives import bundled_archives, unpack
from horsehuman.data.datasets import BatchDataset, EpochSampler, make_loader
from horsehuman.data.images import read_picture
from horsehuman.inference.predict import predict as predict_images
from horsehuman.models.inception import Inception, bundled_backbone
from horsehuman.runtime import cpu_flags, cpu_name, table, track, tune_process
from horsehuman.training.build import build, silence_lightning
from horsehuman.training.config import compose

#: CPU flags that decide how fast float32 and bf16 are.
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")

#: Images that train by default (the others are held out), images of the official validation set,
#: epochs of the notebook, and batch size.
TRAIN, OFFICIAL, EPOCHS, BATCH = 834, 256, 25, 32

#: Functions in files named ``tensorboard.py`` that write TensorBoard's log during a run.
LOGGING = ("log_metrics", "save", "log_run_inputs", "log_validation_report", "log_hyperparameters")

TRAIN_SCRIPT = str(Path(__file__).with_name("train.py"))

#: The options of each training in the row ``growth``.
GROWTH = {
    "CNN": "model=cnn trainer.max_epochs=3",
    "CNN, decoded anew": "model=cnn trainer.max_epochs=3 data.memory_limit=0 data.num_workers=2",
    "InceptionV3": "model=inception model.scales=[224]",
}

#: A program that predicts the official validation set, without metrics and a report.
BARE_EVALUATION = """
import torch
from horsehuman import load_classifier
from horsehuman.data.archives import bundled_archives, unpack
from horsehuman.data.datasets import decode
from horsehuman.runtime import tune_process
tune_process()
classifier = load_classifier("{model}")
paths = sorted((unpack(bundled_archives()) / "test").rglob("*.webp"))
for start in range(0, len(paths), 32):
    images = [decode(path, classifier.image_size) for path in paths[start : start + 32]]
    classifier.logits(torch.stack(images))
"""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: What was measured.
        ours: Our value, with its unit.
        plain: The value of the plain implementation; empty if there is none.
        ratio: How many times better ours is; ``None`` if there is no plain value.
        target: What the project requires.
        note: How the values were measured.
    """

    name: str
    ours: str
    plain: str = ""
    ratio: float | None = None
    target: str = ""
    note: str = ""


def compare(name: str, ours: float, plain: float, target: str, note: str, unit: str = "s") -> Row:
    """Return the row of two times; with the unit images/s, of the rates of two times per image."""
    a, b = (f"{s:.4g} s" if unit == "s" else f"{1 / s:.1f} {unit}" for s in (ours, plain))
    return Row(name, a, b, plain / ours, target, note)


class Bench:
    """Runs commands and pieces of work as processes.

    Args:
        short: Do as little as shows that it works.
        folder: Temporary folder for runs and caches.
    """

    def __init__(self, short: bool, folder: Path) -> None:
        self.short, self.folder = short, folder
        self.repeats, self.steps = (1, 1) if short else (3, 8)
        self.output, self.log = folder / "stdout.txt", folder / "stderr.txt"

    def run(self, *arguments: str, cache: str = "cache") -> tuple[float, float]:
        """Run Python with arguments; return wall-clock seconds and peak memory in GB.

        The memory is that of the largest process. Linux counts at least the memory of this script,
        0.9 GB.
        """
        command = [sys.executable, *arguments]
        env = {**os.environ, "HORSEHUMAN_CACHE": str(self.folder / cache)}
        start = time.perf_counter()
        with self.output.open("w") as out, self.log.open("w") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=out, stderr=log)
            _, process.returncode, usage = os.wait4(process.pid, 0)
        if process.returncode:
            sys.exit(f"error: {' '.join(command)} failed:\n{self.log.read_text()}")
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        return time.perf_counter() - start, usage.ru_maxrss * unit / 1e9

    def best(self, *commands: Sequence[str]) -> list[float]:
        """Repeat commands in turns; return the least seconds of each."""
        repeats = [[self.run(*command)[0] for command in commands] for _ in range(self.repeats)]
        return [min(seconds) for seconds in zip(*repeats, strict=True)]

    def work(self, name: str, *ways: str) -> list[dict[str, float]]:
        """Repeat one of :data:`WORKS`, its ways in turns; return each way's least values."""
        results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for _, way in itertools.product(range(self.repeats), ways):
            self.run(__file__, "--work", name, way, "--steps", str(self.steps))
            results[way].append(json.loads(self.output.read_text().splitlines()[-1]))
        return [{key: min(r[key] for r in runs) for key in runs[0]} for runs in results.values()]

    def epoch(self) -> float:
        """Return the seconds of the fastest epoch that the last training has printed."""
        return min(map(float, re.findall(r"([\d.]+) s$", self.log.read_text(), re.MULTILINE)))

    def checkpoint(self, model: str) -> str:
        """Return the size of the final checkpoint of the last run."""
        path = self.folder / "outputs" / model / "latest" / "checkpoints" / "final.ckpt"
        return f"{path.stat().st_size / 1e6:.2f} MB"


def cnn_step(bench: Bench) -> Iterator[Row]:
    """Measure a training step of the notebook's CNN."""
    ours, plain = bench.work("time_cnn_step", "ours", "plain")
    name = f"notebook CNN, training step, batch {BATCH}"
    yield compare(name, ours["seconds"], plain["seconds"], ">= 3x", share_of_peak(ours))


def backbone(bench: Bench) -> Iterator[Row]:
    """Measure the frozen backbone against timm's and against ONNX Runtime."""
    results = bench.work("time_backbone", "ours", "plain", "onnx")
    ours, plain, onnx = (result["seconds"] / BATCH for result in results)
    name, note = "frozen backbone, 299 px", share_of_peak(results[0])
    yield compare(name, ours, plain, ">= 2x", note, "images/s")
    yield compare(f"{name}; plain: ONNX Runtime", ours, onnx, ">= 0.8x", "", "images/s")


def share_of_peak(result: dict[str, float]) -> str:
    """Compare a time with that of the same operations at the machine's peak."""
    share = result["seconds_at_peak"] / result["seconds"]
    return f"{share:.0%} of what a large convolution or matrix product reaches here"


def head_step(bench: Bench) -> Iterator[Row]:
    """Measure a training step of the head on cached features."""
    ours, plain = bench.work("time_head_step", "ours", "plain")
    name, note = "head on cached features, step", "plain: a loop without logs, schedule and metrics"
    yield compare(name, ours["seconds"], plain["seconds"], "", note)


def cnn_epoch(bench: Bench) -> Iterator[Row]:
    """Measure an epoch of the default CNN without validation, its memory and checkpoint."""
    (plain,) = bench.work("time_plain_epoch", "plain_cnn")
    options = ["model=cnn", "trainer.max_epochs=3", "test=false"]
    _, memory = bench.run(TRAIN_SCRIPT, *options, "+trainer.limit_val_batches=0")
    name = "model=cnn, epoch; plain: the notebook's CNN"
    note = f"plain: {bench.steps} batches timed, the rest extrapolated"
    yield compare(name, bench.epoch(), plain["train"], ">= 15x", note)
    yield Row("model=cnn, peak memory", f"{memory:.2f} GB", target="<= 1.5 GB")
    yield Row("model=cnn, checkpoint", bench.checkpoint("cnn"), target="<= 2 MB")


def inception(bench: Bench) -> Iterator[Row]:
    """Measure the training of InceptionV3 against all epochs of the plain implementation."""
    (epoch,) = bench.work("time_plain_epoch", "plain_inception")
    start, _ = bench.run("-c", "import timm, torchvision")
    plain = start + EPOCHS * (epoch["train"] + epoch["test"])
    short = ["trainer.max_epochs=1", "model.scales=[75]", "test=false"] if bench.short else []
    command = [TRAIN_SCRIPT, "model=inception", "model.scales=[299]", *short]
    one_scale, _ = bench.run(*command, cache="one scale")
    note = f"plain: {bench.steps} batches timed, the rest of {EPOCHS} epochs extrapolated"
    yield compare("model=inception, command, one scale", one_scale, plain, ">= 30x", note)
    command = [TRAIN_SCRIPT, "model=inception", *short]
    first, memory = bench.run(*command)
    second, _ = bench.run(*command)
    yield compare("model=inception, command, first run", first, plain, ">= 20x", note)
    yield compare("the same, second run; plain: the first", second, first, ">= 3x", "")
    yield Row("model=inception, peak memory", f"{memory:.2f} GB", target="<= 1.5 GB")
    yield Row("model=inception, checkpoint", bench.checkpoint("inception"), target="<= 40 MB")
    bench.run("-m", "cProfile", "-o", "profile", *command)
    profile: Any = pstats.Stats(str(bench.folder / "profile"))
    times = {f"{Path(p).stem}.{name}": entry[3] for (p, _, name), entry in profile.stats.items()}
    spent = sum(times[f"tensorboard.{name}"] for name in LOGGING)
    name, share = "TensorBoard's share of a second run", f"{spent / profile.total_tt:.1%}"
    yield Row(name, share, target="<= 5 %", note="under a profiler, which adds to it")


def predict(bench: Bench) -> Iterator[Row]:
    """Measure predictions: of one image from a cold start, and of many."""
    image = next((unpack(bundled_archives()) / "test" / "horses").glob("*.webp"))
    model = "cnn" if bench.short else "inception"
    bench.run("-m", "horsehuman", "export", "--model", model, "--out", "model.onnx")
    command = ["-m", "horsehuman", "predict", str(image)]
    torch_import = ["-c", "import torch"]
    ours, bare, onnx = bench.best(command, torch_import, [*command, "--model", "model.onnx"])
    name, target = "horsehuman predict, one image, cold", ">= 0.286x (3.5 times the time)"
    yield compare(name, ours, bare, target, "plain: a bare 'import torch'")
    yield compare(f"{name}, model.onnx", onnx, ours, ">= 5x", "plain: the checkpoint")
    for model, target in (("cnn", ">= 2x"), ("inception", "")):
        (times,) = bench.work("time_predict", model)
        name, slower = f"predict, many images, {model}", max(times["decode"], times["network"])
        note = "plain: the slower of decoding and network alone"
        yield compare(name, times["predict"], slower, ">= 0.9x", note, "images/s")
        note = "plain: one image at a time"
        yield compare(name, times["predict"], times["loop"], target, note, "images/s")


def evaluate(bench: Bench) -> Iterator[Row]:
    """Measure the evaluation of the official validation set without plots."""
    for model in ("cnn",) if bench.short else ("cnn", "inception"):
        bare = ["-c", BARE_EVALUATION.format(model=model)]
        command = ["-m", "horsehuman", "evaluate", "--model", model, "--no-plot", "--out", model]
        ours, plain = bench.best([*command, "--force"], bare)
        note = "plain: start, load, decode and predict in a loop"
        name, target = f"horsehuman evaluate --model {model}", ">= 0.77x (1.3 times the time)"
        yield compare(name, ours, plain, target, note)


def growth(bench: Bench) -> Iterator[Row]:
    """Measure training on growing sets with empty caches, and an audit of the largest set."""
    sizes = (60,) if bench.short else (1_000, 4_000, 16_000)
    folders = {size: make_set(bench.folder / f"set{size}", size) for size in sizes}
    fixed = ["data=folder", 'data.group_pattern="(.+)-"', "data.val_fraction=0", "test=false"]
    for (name, options), size in itertools.product(GROWTH.items(), sizes):
        command = [TRAIN_SCRIPT, *options.split(), *fixed, f"data.root={folders[size]}"]
        seconds, memory = bench.run(*command, cache=f"{name} {size}")
        note = f"an epoch {bench.epoch()} s, {memory:.2f} GB"
        yield Row(f"train {name}, {size:,} images", f"{seconds:.1f} s", note=note)
    command = ["-m", "horsehuman", "audit", "--data", str(folders[size]), "--out", "audit"]
    seconds, memory = bench.run(*command, cache="audit")
    yield Row(f"audit, {size:,} images", f"{seconds:.1f} s", note=f"{memory:.2f} GB")


def make_set(folder: Path, size: int) -> Path:
    """Write training images, bundled ones rolled to the side, and a few of a test split."""
    paths = sorted((unpack(bundled_archives()) / "train").rglob("*.webp"))
    order = np.random.default_rng(0).permutation(len(paths))
    for number in range(size + 20):
        source, turn = paths[order[number % len(paths)]], number // len(paths)
        split = "train" if number < size else "test"
        target = folder / split / source.parent.name / f"{split}{turn}{source.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        rolled = np.roll(read_picture(source), 7 * turn, axis=1)
        Image.fromarray(rolled).save(target, quality=90, method=0)
    return folder


ROWS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    row.__name__: row
    for row in (cnn_step, backbone, head_step, cnn_epoch, inception, predict, evaluate, growth)
}


def time_cnn_step(way: str, steps: int) -> dict[str, float]:
    """Time a training step of the notebook's CNN on one batch; the ways are ours and plain."""
    images = torch.randint(0, 256, (BATCH, 3, 300, 300), dtype=torch.uint8)
    labels = torch.arange(BATCH).remainder(2)
    config = compose("experiment=notebook_cnn")
    network: nn.Module = plain_cnn() if way == "plain" else build("model", config).network
    inputs = images / 127.5 - 1 if way == "plain" else images
    optimizer = torch.optim.RMSprop(network.parameters(), lr=1e-4)
    return measure(lambda: train_step(network, optimizer, inputs, labels), steps)


def time_backbone(way: str, steps: int) -> dict[str, float]:
    """Time the frozen backbone on one batch of 299 px; the ways are ours, plain and onnx."""
    images = torch.rand(BATCH, 3, 299, 299)
    network: Any = plain_backbone() if way == "plain" else Inception(scales=[299]).backbone
    if way == "onnx":
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "backbone.onnx"
            torch.onnx.export(network.trunk.eval(), (images,), path, dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(path)
        inputs = {session.get_inputs()[0].name: images.numpy()}
        return {"seconds": fastest(lambda: session.run(None, inputs), steps)}
    if way == "ours":
        images = images.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        return measure(lambda: network(images), steps)


def time_head_step(way: str, steps: int) -> dict[str, float]:
    """Time a training step on cached features: in Lightning's loop (ours), or in a bare one."""
    features, labels = torch.rand(TRAIN, 768), torch.arange(TRAIN).remainder(2).float()
    batches = TRAIN // BATCH
    if way == "plain":
        head = nn.Linear(768, 1)
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.03)

        def epoch() -> None:
            for chosen in torch.split(torch.randperm(TRAIN)[: batches * BATCH], BATCH):
                train_step(head, optimizer, features[chosen], labels[chosen])

        return {"seconds": fastest(epoch, steps) / batches}
    silence_lightning()
    sampler = EpochSampler(TRAIN, BATCH, 0, lambda: 0)
    loader = make_loader(BatchDataset(features, labels, range(TRAIN)), sampler, BATCH, 0)
    ends: list[float] = []
    clock: Any = LambdaCallback(on_train_epoch_end=lambda *_: ends.append(time.perf_counter()))
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: Any = dict.fromkeys(quiet, False)
    trainer = L.Trainer(max_epochs=steps + 2, callbacks=clock, **options)
    trainer.fit(InceptionClassifier(scales=[96], weights="random", cache_features=False), loader)
    return {"seconds": float(np.diff(ends).min()) / batches}


def time_plain_epoch(way: str, steps: int) -> dict[str, float]:
    """Time some batches; extrapolate to :data:`TRAIN` and :data:`OFFICIAL` images.

    The ways are plain_cnn and plain_inception. The linear head of the latter is left out: beside
    the backbone it takes no time.
    """
    size, network = (300, plain_cnn()) if way == "plain_cnn" else (299, plain_backbone())
    optimizer = torch.optim.RMSprop(network.parameters(), lr=1e-4)
    result = {}
    for split, count in (("train", TRAIN), ("test", OFFICIAL)):
        ends = []
        for images, labels in itertools.islice(plain_loader(size, split), steps + 2):
            if way == "plain_cnn" and split == "train":
                train_step(network, optimizer, images, labels)
            else:
                with torch.no_grad():
                    network(images)
            ends.append(time.perf_counter())
        result[split] = float(np.median(np.diff(ends)[1:])) * count / BATCH
    return result


def time_predict(way: str, steps: int) -> dict[str, float]:
    """Time predictions and their parts, per image; the way is the name of a bundled classifier."""
    classifier = load_classifier(way)
    count = 8 if steps == 1 else steps * (64 if way == "cnn" else 32)
    paths = sorted((unpack(bundled_archives()) / "train").rglob("*.webp"))[:count]

    def decode(path: Path) -> Tensor:
        return classifier.preprocess(read_picture(path))

    pool = ThreadPoolExecutor(os.cpu_count())
    images = list(pool.map(decode, paths))
    calls: dict[str, Callable[[], object]] = {
        "predict": lambda: list(predict_images(classifier, paths)),
        "decode": lambda: list(pool.map(decode, paths)),
        "network": lambda: [classifier.score(images[i : i + 32]) for i in range(0, count, 32)],
        "loop": lambda: [classifier.score([decode(path)]) for path in paths],
    }
    return {name: fastest(call, 1) / count for name, call in calls.items()}


#: Pieces of work. Each takes a way and the number of repetitions, and returns seconds.
WORKS: dict[str, Callable[[str, int], dict[str, float]]] = {
    work.__name__: work
    for work in (time_cnn_step, time_backbone, time_head_step, time_plain_epoch, time_predict)
}


def train_step(network: nn.Module, optimizer: Any, inputs: Tensor, labels: Tensor) -> None:
    """Run a training step in plain PyTorch."""
    optimizer.zero_grad()
    loss = nn.functional.binary_cross_entropy_with_logits(network(inputs).view(-1), labels.float())
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def measure(call: Callable[[], object], times: int) -> dict[str, float]:
    """Return the seconds of a call, and those of its float operations at the machine's peak.

    The peak is the higher rate of two large operations, a matrix product and a convolution. Which
    of them is faster depends on the libraries behind them.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    a, b = torch.rand(2, 2048, 2048)
    maps = torch.rand(8, 256, 32, 32).contiguous(memory_format=torch.channels_last)
    kernels = torch.rand(256, 256, 3, 3).contiguous(memory_format=torch.channels_last)
    product = 2 * 2048**3 / fastest(lambda: torch.mm(a, b), 20)
    seconds = fastest(lambda: nn.functional.conv2d(maps, kernels, padding=1), 20)
    convolution = 2 * 9 * 256**2 * 8 * 32**2 / seconds
    at_peak = counter.get_total_flops() / max(product, convolution)
    return {"seconds": fastest(call, times), "seconds_at_peak": at_peak}


def fastest(call: Callable[[], object], times: int) -> float:
    """Return the seconds of the fastest of some calls, after one that warms up."""
    return min(timeit.repeat(call, number=1, repeat=times + 1)[1:])


def plain_cnn() -> nn.Module:
    """Build the notebook's CNN for normalised images ``(N, 3, 300, 300)``; logits ``(N, 1)``."""
    layers: list[nn.Module] = []
    for before, after in ((3, 64), (64, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(before, after, 3), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Dropout(0.2), nn.Linear(65_536, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 1))


def plain_backbone() -> nn.Module:
    """Build timm's Inception-v3 up to ``Mixed_6e`` with the bundled weights, frozen."""
    network: nn.Module = timm.create_model("inception_v3", features_only=True, out_indices=(3,))
    network.load_state_dict(safetensors.torch.load_file(bundled_backbone()))
    return network.eval().requires_grad_(False)


def plain_loader(size: int, split: str) -> torch.utils.data.DataLoader[Any]:
    """Return a loader that decodes in two workers and augments as the notebook does."""
    steps: list[Any] = [transforms.Resize((size, size))]
    if split == "train":
        affine = transforms.RandomAffine(40, translate=(0.2, 0.2), scale=(0.8, 1.2), shear=0.2)
        steps += [affine, transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    images = datasets.ImageFolder(unpack(bundled_archives()) / split, transforms.Compose(steps))
    shuffle = split == "train"
    return torch.utils.data.DataLoader(images, BATCH, shuffle=shuffle, num_workers=2)


def machine() -> dict[str, object]:
    """Describe the machine."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "instruction sets": [flag for flag in FLAGS if flag in cpu_flags()],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def show(rows: Sequence[Row]) -> None:
    """Print the table and the machine."""
    lines = table("", "ours", "plain", "ratio", "target", "note", left=6)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        lines.add_row(row.name, row.ours, row.plain, ratio, row.target, row.note)
    Console(width=None if sys.stdout.isatty() else 180).print(lines)
    print(", ".join(f"{name}: {value}" for name, value in machine().items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the JSON file."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=" | ".join(ROWS))
    parser.add_argument("--short", action="store_true", help="only check that it works")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"), metavar="FILE")
    parser.add_argument("--work", nargs=2, help=SUPPRESS)
    parser.add_argument("--steps", type=int, default=1, help=SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        name, way = options.work
        if not way.startswith("plain"):
            tune_process()
        print(json.dumps(WORKS[name](way, options.steps)))
        return 0
    names = options.rows or list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"{', '.join(unknown)}: use {' | '.join(ROWS)}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.short, Path(folder))
        for name in track(names, "measuring", len(names)):
            rows += ROWS[name](bench)
            result = {"machine": machine(), "short": options.short, "rows": [*map(asdict, rows)]}
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    show(rows)
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
