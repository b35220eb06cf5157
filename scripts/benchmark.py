"""Measure speed and memory beside plain Lightning and the notebook in Keras.

    python scripts/benchmark.py                          # all rows: about an hour on two cores
    python scripts/benchmark.py training predict         # some rows
    python scripts/benchmark.py training --keras tf/bin/python
    python scripts/benchmark.py --short                  # check that each row works, in minutes

Prints a table, and writes it with a plot to benchmark.json and benchmark.png. Each command is a
process of its own. Whole trainings and the audit run once; of shorter commands, which take turns,
the fastest of three counts. Nothing else should run meanwhile.

*Plain* is what a tutorial shows: Lightning, timm and torchvision with their defaults, two workers,
the notebook's augmentation, loss and optimizer, and the notebook's CNN, or the frozen backbone at
one scale. *Keras* is the notebook's own code; ``--keras`` takes the Python of an environment with
``pip install tensorflow-cpu scipy pillow``. Some batches of both are timed, and the rest of the
notebook's 25 epochs is extrapolated.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import timeit
from argparse import SUPPRESS, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib as mpl
import numpy as np
import safetensors.torch
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torchvision import datasets, transforms

from horsehuman import load_classifier
from horsehuman.data.archives import bundled_archives, unpack
from horsehuman.data.images import read_picture
from horsehuman.inference.predict import predict as predict_images
from horsehuman.models.inception import bundled_backbone
from horsehuman.plots import COLOURS, STYLE, save
from horsehuman.runtime import cpu_flags, cpu_name, table, track, tune_process
from horsehuman.training.build import silence_lightning

#: CPU flags that decide how fast float32 and bf16 are.
FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")

#: Images of the official training and validation sets, epochs of the notebook, and batch size.
TRAIN, OFFICIAL, EPOCHS, BATCH = 1027, 256, 25, 32

TRAIN_SCRIPT = str(Path(__file__).with_name("train.py"))

#: Options that shorten a training.
SHORT = {
    "inception": ["trainer.max_epochs=1", "model.scales=[75]", "test=false"],
    "cnn": ["trainer.max_epochs=1", "test=false"],
}

#: The options of each training in the row ``growth``.
GROWTH = {
    "CNN": "model=cnn trainer.max_epochs=3",
    "CNN, decoded anew": "model=cnn trainer.max_epochs=3 data.memory_limit=0 data.num_workers=2",
    "InceptionV3": "model=inception model.scales=[224]",
}

#: A program that predicts the official validation set, without metrics and a report.
BARE_EVALUATION = """
from horsehuman.runtime import tune_process
tune_process()
import torch
from horsehuman import load_classifier
from horsehuman.data.archives import bundled_archives, unpack
from horsehuman.data.datasets import decode
classifier = load_classifier("{model}")
paths = sorted((unpack(bundled_archives()) / "test").rglob("*.webp"))
for start in range(0, len(paths), 32):
    images = [decode(path, classifier.image_size) for path in paths[start : start + 32]]
    classifier.logits(torch.stack(images))
"""

#: A program for Keras: the notebook's networks, augmentation and batches. It prints the seconds of
#: an epoch of training (8 steps) and of validation (8 batches).
KERAS = """
import json, statistics, sys, time
import keras
from keras import layers
from keras.src.legacy.preprocessing.image import ImageDataGenerator
kind, folder, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
augment = dict(rotation_range=40, width_shift_range=0.2, height_shift_range=0.2, shear_range=0.2,
               zoom_range=0.2, horizontal_flip=True, fill_mode="nearest")
def flow(split, batch_size, **options):
    generator = ImageDataGenerator(rescale=1 / 255, **options)
    return generator.flow_from_directory(
        f"{folder}/{split}", (300, 300), batch_size=batch_size, class_mode="binary")
inputs = x = keras.Input((300, 300, 3))
if kind == "cnn":
    for width in (64, 64, 128, 256):
        x = layers.MaxPooling2D()(layers.Conv2D(width, 3, activation="relu")(x))
    x = layers.Dropout(0.2)(layers.Flatten()(x))
    x = layers.Dense(512, activation="relu")(layers.Dense(128, activation="relu")(x))
else:
    trunk = keras.applications.InceptionV3(weights=None, include_top=False, input_tensor=inputs)
    trunk.trainable = False
    x = layers.Flatten()(trunk.get_layer("mixed7").output)
    x = layers.Dropout(0.2)(layers.Dense(1024, activation="relu")(x))
model = keras.Model(inputs, layers.Dense(1, activation="sigmoid")(x))
rate = 1e-4 if kind == "cnn" else 1.5e-4
model.compile(keras.optimizers.RMSprop(rate), "binary_crossentropy", metrics=["accuracy"])
ends = {"train": [], "test": []}
clock = keras.callbacks.LambdaCallback(
    on_train_batch_end=lambda *_, **__: ends["train"].append(time.perf_counter()))
clock.on_test_batch_end = lambda *_, **__: ends["test"].append(time.perf_counter())
model.fit(flow("train", 128, **augment), steps_per_epoch=steps, epochs=1, verbose=0,
          validation_data=flow("test", 32), validation_steps=steps, callbacks=[clock])
medians = {k: statistics.median(b - a for a, b in zip(v, v[1:])) for k, v in ends.items()}
print(json.dumps({split: 8 * seconds for split, seconds in medians.items()}))
"""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: What was measured.
        ours: Our value.
        plain: The value of the plain implementation, if there is one.
        keras: The value of the notebook in Keras, if it was measured.
        unit: ``s``, ``images/s`` or ``GB``; of images/s more are better.
        note: What *plain* is, if it is not the plain implementation.
    """

    name: str
    ours: float
    plain: float | None = None
    keras: float | None = None
    unit: str = "s"
    note: str = ""

    def cells(self) -> list[str]:
        """Return the row as text, with how many times better ours is than each of the others."""
        texts = [self.name, f"{self.ours:.3g} {self.unit}"]
        for other in (self.plain, self.keras):
            if other is None:
                texts.append("")
            else:
                times = self.ours / other if self.unit == "images/s" else other / self.ours
                texts.append(f"{other:.4g} {self.unit} ({times:.2f}x)")
        return [*texts, self.note]


class Bench:
    """Runs commands and pieces of work as processes.

    Args:
        short: Do as little as shows that it works.
        folder: Temporary folder for runs and caches.
        keras: Python of an environment with Keras, or ``None``.
    """

    def __init__(self, short: bool, folder: Path, keras: str | None = None) -> None:
        self.short, self.folder, self.keras = short, folder, keras
        self.repeats, self.steps = (1, 2) if short else (3, 8)
        self.output, self.log = folder / "stdout.txt", folder / "stderr.txt"

    def run(
        self, *arguments: str, cache: str = "cache", python: str = sys.executable
    ) -> tuple[float, float]:
        """Run Python with arguments; return wall-clock seconds and peak memory in GB.

        The memory is that of the largest process. Linux counts at least the memory of this script,
        0.9 GB.
        """
        command = [python, *arguments]
        env = {**os.environ, "HORSEHUMAN_CACHE": str(self.folder / cache)}
        start = time.perf_counter()
        with self.output.open("w") as out, self.log.open("w") as log:
            process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=out, stderr=log)
            _, process.returncode, usage = os.wait4(process.pid, 0)
        if process.returncode:
            sys.exit(f"error: {' '.join(command)[:200]} failed:\n{self.log.read_text()}")
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        return time.perf_counter() - start, usage.ru_maxrss * unit / 1e9

    def best(self, *commands: Sequence[str]) -> list[float]:
        """Repeat commands in turns; return the least seconds of each."""
        repeats = [[self.run(*command)[0] for command in commands] for _ in range(self.repeats)]
        return [min(seconds) for seconds in zip(*repeats, strict=True)]

    def printed(self) -> dict[str, float]:
        """Return the JSON object in the last line that the last command has printed."""
        result: dict[str, float] = json.loads(self.output.read_text().splitlines()[-1])
        return result

    def work(self, name: str, kind: str) -> dict[str, float]:
        """Run one of :data:`WORKS` in a process, and return its seconds."""
        self.run(__file__, "--work", name, kind, "--steps", str(self.steps))
        return self.printed()

    def epoch(self) -> float:
        """Return the seconds of the fastest epoch that the last training has printed."""
        return min(map(float, re.findall(r"([\d.]+) s$", self.log.read_text(), re.MULTILINE)))


def training(bench: Bench) -> Iterator[Row]:
    """Measure both trainings up to the test result, and their memory."""
    for kind in ("inception", "cnn"):
        command = [TRAIN_SCRIPT, f"model={kind}", *(SHORT[kind] if bench.short else [])]
        ours, memory = bench.run(*command)
        plain, keras = bench.work("time_plain_epoch", kind), None
        if bench.keras:
            keras = sum(time_keras_epoch(bench, kind).values()) * EPOCHS
        seconds = plain["start"] + (plain["train"] + plain["test"]) * EPOCHS
        yield Row(f"model={kind}, whole command", ours, seconds, keras)
        if kind == "inception":
            yield Row("the same, second run", bench.run(*command)[0], seconds, keras)
        yield Row(f"model={kind}, peak memory", memory, unit="GB")


def time_keras_epoch(bench: Bench, kind: str) -> dict[str, float]:
    """Return the seconds of an epoch of the notebook in Keras, ``train`` and ``test``."""
    folder = bench.folder / "png"
    for path in unpack(bundled_archives()).rglob("*.webp"):  # Keras reads no WebP files
        target = folder / path.parent.parent.name / path.parent.name / f"{path.stem}.png"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).save(target)
    bench.run("-c", KERAS, kind, str(folder), str(bench.steps), python=str(bench.keras))
    return bench.printed()


def predict(bench: Bench) -> Iterator[Row]:
    """Measure predictions: of one image from a cold start, and of many."""
    image = next((unpack(bundled_archives()) / "test" / "horses").glob("*.webp"))
    model = "cnn" if bench.short else "inception"
    bench.run("-m", "horsehuman", "export", "--model", model, "--out", "model.onnx")
    models = ("cnn", "inception", "model.onnx")
    commands = [["-m", "horsehuman", "predict", str(image), "--model", name] for name in models]
    *ours, bare = bench.best(*commands, ["-c", "import torch"])
    for name, seconds in zip(models, ours, strict=True):
        yield Row(f"predict, one image, {name}", seconds, bare, note="plain: import torch alone")
    for name in models[:1] if bench.short else models[:2]:
        rates = {way: 1 / seconds for way, seconds in bench.work("time_predict", name).items()}
        name, note = f"predict, many images, {name}", "plain: one image at a time"
        yield Row(name, rates["predict"], rates["loop"], unit="images/s", note=note)


def evaluate(bench: Bench) -> Iterator[Row]:
    """Measure the evaluation of the official validation set without plots."""
    for model in ("cnn",) if bench.short else ("cnn", "inception"):
        bare = ["-c", BARE_EVALUATION.format(model=model)]
        command = ["-m", "horsehuman", "evaluate", "--model", model, "--no-plot", "--out", model]
        ours, plain = bench.best([*command, "--force"], bare)
        yield Row(f"evaluate --model {model}", ours, plain, note="plain: predictions only")


def growth(bench: Bench) -> Iterator[Row]:
    """Measure training on growing sets with empty caches, and an audit of the largest set."""
    sizes = (60,) if bench.short else (1_000, 4_000, 16_000)
    folders = {size: make_set(bench.folder / f"set{size}", size) for size in sizes}
    fixed = ["data=folder", 'data.group_pattern="(.+)-"', "data.val_fraction=0", "test=false"]
    for (name, options), size in itertools.product(GROWTH.items(), sizes):
        command = [TRAIN_SCRIPT, *options.split(), *fixed, f"data.root={folders[size]}"]
        seconds, memory = bench.run(*command, cache=f"{name} {size}")
        note = f"an epoch {bench.epoch()} s, {memory:.2f} GB"
        yield Row(f"train {name}, {size:,} images", seconds, note=note)
    command = ["-m", "horsehuman", "audit", "--data", str(folders[size]), "--out", "audit"]
    seconds, memory = bench.run(*command, cache="audit")
    yield Row(f"audit, {size:,} images", seconds, note=f"{memory:.2f} GB")


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
    row.__name__: row for row in (training, predict, evaluate, growth)
}


class PlainModule(L.LightningModule):
    """Train a network as in a tutorial, and record when each batch ends.

    Args:
        network: Maps images ``(N, 3, H, W)`` to logits ``(N, 1)``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.ends: dict[str, list[float]] = {"train": [], "test": []}

    def training_step(self, batch: Any, index: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        logits = self.network(images).view(-1)
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.float())

    def validation_step(self, batch: Any, index: int) -> None:
        """Predict a batch."""
        self.network(batch[0])

    def on_train_batch_end(self, *unused: Any) -> None:
        """Take the time."""
        self.ends["train"].append(time.perf_counter())

    def on_validation_batch_end(self, *unused: Any) -> None:
        """Take the time."""
        self.ends["test"].append(time.perf_counter())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the notebook's optimizer."""
        return torch.optim.RMSprop(self.parameters(), lr=1e-4)


def time_plain_epoch(kind: str, steps: int) -> dict[str, float]:
    """Time some batches of plain Lightning; extrapolate to an epoch.

    Args:
        kind: ``cnn`` or ``inception``.
        steps: Batches to time.

    Returns:
        Seconds of the imports and of an epoch of training and of validation.
    """
    silence_lightning()
    start = timeit.timeit(
        lambda: subprocess.run([sys.executable, "-c", "import lightning, timm"], check=True),
        number=1,
    )
    size, network = (300, plain_cnn()) if kind == "cnn" else (299, plain_inception())
    module = PlainModule(network)
    quiet: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    limits: Any = {"limit_train_batches": steps + 2, "limit_val_batches": steps + 2}
    trainer = L.Trainer(max_epochs=1, num_sanity_val_steps=0, **quiet, **limits)
    trainer.fit(module, plain_loader(size, "train"), plain_loader(size, "test"))
    batch = {split: float(np.median(np.diff(ends)[1:])) for split, ends in module.ends.items()}
    counts = {"train": TRAIN / BATCH, "test": OFFICIAL / BATCH}
    return {"start": start, **{split: batch[split] * counts[split] for split in counts}}


def plain_cnn() -> nn.Module:
    """Build the notebook's CNN for normalised images ``(N, 3, 300, 300)``; logits ``(N, 1)``."""
    layers: list[nn.Module] = []
    for before, after in ((3, 64), (64, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(before, after, 3), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Flatten(), nn.Dropout(0.2), nn.Linear(65_536, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 1))


def plain_inception() -> nn.Module:
    """Build timm's Inception-v3 up to ``Mixed_6e``, frozen, and a linear head."""
    backbone = timm.create_model("inception_v3", features_only=True, out_indices=(3,))
    backbone.load_state_dict(safetensors.torch.load_file(bundled_backbone()))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone: Any = backbone.eval().requires_grad_(False)
            self.head = nn.Linear(768, 1)

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.head(self.backbone(images)[-1].mean((2, 3)))
            return logits

    return Network()


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


def time_predict(kind: str, steps: int) -> dict[str, float]:
    """Return the seconds per image of ``predict`` and of a loop over images, for a classifier."""
    classifier = load_classifier(kind)
    count = 8 if steps == 2 else steps * (64 if kind == "cnn" else 32)
    paths = sorted((unpack(bundled_archives()) / "train").rglob("*.webp"))[:count]

    def loop() -> None:
        for path in paths:
            classifier.score([classifier.preprocess(read_picture(path))])

    calls = {"predict": lambda: list(predict_images(classifier, paths)), "loop": loop}
    return {name: min(timeit.repeat(c, number=1, repeat=2)) / count for name, c in calls.items()}


#: Pieces of work, each for ``cnn`` or ``inception`` and a number of batches; they return seconds.
WORKS: dict[str, Callable[[str, int], dict[str, float]]] = {
    work.__name__: work for work in (time_plain_epoch, time_predict)
}


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
    lines = table("", "ours", "plain", "Keras", "note", left=5)
    for row in rows:
        lines.add_row(*row.cells())
    Console(width=None if sys.stdout.isatty() else 180).print(lines)
    print(", ".join(f"{name}: {value}" for name, value in machine().items()))


@mpl.rc_context(STYLE)
def draw(rows: Sequence[Row]) -> Figure:
    """Draw the seconds of the trainings as bars on a logarithmic axis."""
    shown = [row for row in rows if row.plain is not None and not row.note]  # the trainings
    figure = Figure(figsize=(7, 0.8 + 0.9 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for index, row in enumerate(shown):
        values = {"Keras": row.keras, "plain Lightning": row.plain, "horsehuman": row.ours}
        for place, (name, value) in enumerate(values.items()):
            if value is not None:
                y = index + 0.27 * (place - 1)
                label = name if index == 0 else None
                axes.barh(y, value, 0.25, color=COLOURS[place], label=label)
                axes.text(value, y, f" {value:,.0f} s", va="center")
    axes.set_yticks(range(len(shown)), [row.name for row in shown])
    axes.set(xscale="log", xlabel="seconds to a tested classifier (log)", xmargin=0.12)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the JSON file and the plot."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=" | ".join(ROWS))
    parser.add_argument("--short", action="store_true", help="only check that it works")
    parser.add_argument("--keras", metavar="PYTHON", help="interpreter that can import Keras")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"), metavar="FILE")
    parser.add_argument("--work", nargs=2, help=SUPPRESS)
    parser.add_argument("--steps", type=int, default=2, help=SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        name, kind = options.work
        if name != "time_plain_epoch":
            tune_process()
        print(json.dumps(WORKS[name](kind, options.steps)))
        return 0
    names = options.rows or list(ROWS)
    if unknown := [name for name in names if name not in ROWS]:
        parser.error(f"{', '.join(unknown)}: use {' | '.join(ROWS)}")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.short, Path(folder), options.keras)
        for name in track(names, "measuring", len(names)):
            rows += ROWS[name](bench)
            result = {"machine": machine(), "short": options.short, "rows": [*map(asdict, rows)]}
            options.out.write_text(json.dumps(result, indent=2) + "\n")
    show(rows)
    if "training" in names:
        save(draw(rows), options.out.with_suffix(".png"))
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
