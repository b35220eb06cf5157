"""The rows of the benchmark: what is measured, and against what."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from horsehuman.data.archives import bundled_archives, unpack

SCRIPTS = Path(__file__).resolve().parent

_PEAK = "what a large convolution or matrix product reaches here"


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: What was measured.
        ours: Our figure, with its unit.
        plain: The plain way's; empty where there is none.
        ratio: How many times better ours is; ``None`` where there is none.
        target: What the project asks of itself.
        note: How the figures came about.
    """

    name: str
    ours: str
    plain: str = ""
    ratio: float | None = None
    target: str = ""
    note: str = ""


class Bench:
    """Runs the pieces of work as processes.

    Args:
        short: Do as little as shows that it works.
        folder: For runs and caches, which are thrown away.
    """

    def __init__(self, short: bool, folder: Path) -> None:
        self.short, self.folder = short, folder
        self.repeats, self.steps = (1, 1) if short else (3, 8)

    def pair(self, work: str, better: Callable[..., float] = min) -> tuple[dict[str, float], ...]:
        """Measure a piece of work both ways, in turns; the best value of each figure."""
        found: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
        for _ in range(self.repeats):
            for way, results in found.items():
                results.append(self.work(work, way))
        return tuple(
            {key: better(result[key] for result in results) for key in results[0]}
            for results in found.values()
        )

    def work(self, name: str, way: str) -> dict[str, float]:
        """One process of ``benchmark_work.py``."""
        command = [sys.executable, str(SCRIPTS / "benchmark_work.py"), name, way]
        done = subprocess.run(
            [*command, "--steps", str(self.steps)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "HORSEHUMAN_CACHE": str(self.folder / "cache")},
        )
        result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return result

    def command(self, *arguments: str, cache: str = "cache") -> tuple[float, float]:
        """Run a whole command; seconds of wall-clock time, and peak memory in GB."""
        environment = {**os.environ, "HORSEHUMAN_CACHE": str(self.folder / cache)}
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, list(arguments))
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        return time.perf_counter() - start, usage.ru_maxrss * unit / 1e9

    def train(self, *overrides: str, cache: str = "cache") -> tuple[float, float]:
        """Run ``scripts/train.py``; see :meth:`command`."""
        return self.command(str(SCRIPTS / "train.py"), *overrides, cache=cache)

    def run_size(self, model: str) -> float:
        """Size in MB of the final checkpoint of the newest run."""
        final = self.folder / "outputs" / model / "latest" / "checkpoints" / "final.ckpt"
        return final.stat().st_size / 1e6


def cnn_step(bench: Bench) -> list[Row]:
    """The notebook's network, one training step."""
    ours, plain = bench.pair("cnn_step")
    note = f"{ours['seconds_at_peak'] / ours['seconds']:.0%} of {_PEAK}"
    return [seconds_row("notebook CNN, training step, batch 32", ours, plain, ">= 3x", note)]


def trunk(bench: Bench) -> list[Row]:
    """Pictures through the frozen trunk."""
    ours, plain = bench.pair("trunk", max)
    speed = ours["images_per_second"]
    rows = [
        Row(
            "frozen trunk, 299 px",
            f"{speed:.1f} images/s",
            f"{plain['images_per_second']:.1f} images/s",
            speed / plain["images_per_second"],
            ">= 2x",
            f"{speed / ours['images_per_second_at_peak']:.0%} of {_PEAK}",
        )
    ]
    if not all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript")):
        return rows
    other = max(bench.work("onnx", "ours")["images_per_second"] for _ in range(bench.repeats))
    note = "ours against ONNX Runtime on the same trunk"
    row = Row("frozen trunk in ONNX Runtime", f"{speed:.1f} images/s", f"{other:.1f} images/s",
              speed / other, ">= 0.8x", note)  # fmt: skip
    return [*rows, row]


def head_step(bench: Bench) -> list[Row]:
    """A step of the head on cached features."""
    ours, plain = bench.pair("head_step")
    note = "plain: a bare PyTorch loop without logs, schedule and metrics"
    return [seconds_row("head on cached features, step", ours, plain, "", note)]


def cnn_epoch(bench: Bench) -> list[Row]:
    """An epoch of the default CNN, and the memory of its whole command."""
    ours, plain = bench.pair("cnn_epoch")
    note = f"plain: {bench.steps} batches timed, the rest extrapolated"
    _, memory = bench.train("model=cnn", "trainer.max_epochs=2", "test=false")
    return [
        seconds_row("model=cnn, epoch; plain: the notebook's CNN", ours, plain, ">= 15x", note),
        Row("model=cnn, peak memory", f"{memory:.2f} GB", target="<= 1.5 GB"),
        Row("model=cnn, slim checkpoint", f"{bench.run_size('cnn'):.2f} MB", target="<= 2 MB"),
    ]


def inception(bench: Bench) -> list[Row]:
    """The whole command, first and second run, against 25 epochs of the plain way."""
    small = ["trainer.max_epochs=1", "model.scales=[75]", "test=false"] if bench.short else []
    plain = bench.work("inception_run", "plain")["seconds_25_epochs"]
    start, _ = bench.command("-c", "import lightning, timm, torchvision")
    plain += start
    first, memory = bench.train("model=inception", *small)
    second, _ = bench.train("model=inception", *small)
    size = bench.run_size("inception")
    log = bench.work("logging", "ours")
    single, _ = bench.train("model=inception", "model.scales=[299]", *small, cache="other")
    note = f"plain: {bench.steps} batches timed, the rest of 25 epochs extrapolated"
    return [
        Row("model=inception, whole command, first run", f"{first:.0f} s", f"{plain:.0f} s",
            plain / first, ">= 20x", note),
        Row("the same at one scale", f"{single:.0f} s", f"{plain:.0f} s", plain / single, ">= 30x",
            note),
        Row("the same, second run; plain: the first", f"{second:.0f} s", f"{first:.0f} s",
            first / second, ">= 3x"),
        Row("TensorBoard's share of a second run", f"{log['seconds_logging'] / log['seconds']:.1%}",
            target="<= 5 %", note=f"{log['seconds_logging']:.2f} s"),
        Row("model=inception, peak memory", f"{memory:.2f} GB", target="<= 1.5 GB"),
        Row("model=inception, slim checkpoint", f"{size:.1f} MB", target="<= 40 MB"),
    ]  # fmt: skip


def predict(bench: Bench) -> list[Row]:
    """One picture, cold, from a checkpoint and from an ONNX file; and many."""
    picture = str(next((unpack(bundled_archives()) / "test" / "horses").glob("*.webp")))
    ours, bare, other = [], [], []
    model = "cnn" if bench.short else "inception"
    bench.command("-m", "horsehuman", "export", "--model", model, "--out", "box.onnx")
    for _ in range(bench.repeats):
        ours.append(bench.command("-m", "horsehuman", "predict", picture)[0])
        bare.append(bench.command("-c", "import torch")[0])
        other.append(
            bench.command("-m", "horsehuman", "predict", picture, "--model", "box.onnx")[0]
        )
    rows = [
        Row("horsehuman predict, one picture, cold", f"{min(ours):.2f} s", f"{min(bare):.2f} s",
            min(bare) / min(ours), ">= 0.286x (3.5 times the time)",
            "plain: a bare 'import torch'"),
        Row("the same with --model box.onnx", f"{min(other):.2f} s", f"{min(ours):.2f} s",
            min(ours) / min(other), ">= 5x", "plain: the checkpoint"),
    ]  # fmt: skip
    for model in ("cnn", "inception"):
        rate = bench.work(f"throughput_{model}", "ours")
        slower = min(rate["decode"], rate["network"])
        rows.append(
            Row(f"predict, many pictures, {model}", f"{rate['predict']:.0f} images/s",
                f"{slower:.0f} images/s", rate["predict"] / slower, ">= 0.9x",
                "plain: the slower of decoding and network alone")
        )  # fmt: skip
        rows.append(
            Row(f"predict, many pictures, {model}", f"{rate['predict']:.0f} images/s",
                f"{rate['loop']:.0f} images/s", rate["predict"] / rate["loop"],
                ">= 2x" if model == "cnn" else "", "plain: one picture at a time")
        )  # fmt: skip
    return rows


#: Answers to the official set, and nothing else: no figures, no heat, no report.
_BARE = """
import torch
from horsehuman import load_classifier
from horsehuman.data.archives import box_archives, unpack
from horsehuman.data.loading import decode
from horsehuman.runtime import keep_freed_memory
keep_freed_memory()
classifier = load_classifier("{model}")
paths = sorted((unpack(box_archives()) / "test").rglob("*.webp"))
for start in range(0, len(paths), 32):
    pictures = [decode(path, classifier.image_size) for path in paths[start : start + 32]]
    classifier.logits(torch.stack(pictures))
"""


def evaluate(bench: Bench) -> list[Row]:
    """The official set, evaluated without drawing."""
    rows = []
    for model in ("cnn",) if bench.short else ("cnn", "inception"):
        ours, bare = [], []
        for number in range(bench.repeats):
            command = ["-m", "horsehuman", "evaluate", "--model", model, "--no-plot"]
            ours.append(bench.command(*command, "--out", f"evaluate-{model}-{number}")[0])
            bare.append(bench.command("-c", _BARE.format(model=model))[0])
        note = "plain: start, load, decode and answer in a loop"
        rows.append(
            Row(f"horsehuman evaluate --model {model}", f"{min(ours):.1f} s", f"{min(bare):.1f} s",
                min(bare) / min(ours), ">= 0.77x (1.3 times the time)", note)
        )  # fmt: skip
    return rows


def seconds_row(
    name: str, ours: dict[str, float], plain: dict[str, float], target: str, note: str = ""
) -> Row:
    """A row of two times."""
    first, second = ours["seconds"], plain["seconds"]
    mine, theirs = (f"{s * 1000:.2f} ms" if s < 1 else f"{s:.2f} s" for s in (first, second))
    return Row(name, mine, theirs, second / first, target, note)


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    part.__name__: part
    for part in (cnn_step, trunk, head_step, cnn_epoch, inception, predict, evaluate)
}
