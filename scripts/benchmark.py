"""Speed, memory and size beside the plain way, in one run: a table, and benchmark.json.

    python scripts/benchmark.py                       # all rows, about an hour on two cores
    python scripts/benchmark.py cnn_step trunk        # some rows
    python scripts/benchmark.py --short               # seconds a row: checks that it works, no more

Pieces of work are timed in several processes, of which the best counts; ours and the plain way
(scripts/benchmark_plain.py) take turns, so that a machine that slows down slows both. Whole
commands run once, and their peak memory is of that run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from horsehuman.data.archives import box_archives, unpack
from horsehuman.runtime import cpu_flags
from horsehuman.terminal import track

SCRIPTS = Path(__file__).resolve().parent

#: Extensions that decide how fast float32 and bf16 are.
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")

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
    small = ["trainer.max_epochs=1", "model.scales=[75]"] if bench.short else []
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
        Row("TensorBoard's share of a second run", f"{log['seconds_logging']:.2f} s",
            f"{log['seconds']:.0f} s", target="<= 5 %",
            note=f"{log['seconds_logging'] / log['seconds']:.1%}; plain: the whole run"),
        Row("model=inception, peak memory", f"{memory:.2f} GB", target="<= 1.5 GB"),
        Row("model=inception, slim checkpoint", f"{size:.1f} MB", target="<= 40 MB"),
    ]  # fmt: skip


def predict(bench: Bench) -> list[Row]:
    """One picture, cold."""
    picture = next((unpack(box_archives()) / "test" / "horses").glob("*.webp"))
    ours, bare = [], []
    for _ in range(bench.repeats + 1):
        ours.append(bench.command("-m", "horsehuman", "predict", str(picture))[0])
        bare.append(bench.command("-c", "import torch")[0])
    note = "plain: a bare 'import torch'"
    return [
        Row("horsehuman predict, one picture, cold", f"{min(ours):.2f} s", f"{min(bare):.2f} s",
            min(bare) / min(ours), ">= 0.286x (3.5 times the time)", note)
    ]  # fmt: skip


def growth(bench: Bench) -> list[Row]:
    """Time and memory over the number of pictures."""
    rows = []
    for count in (50, 100) if bench.short else (1000, 4000, 16_000):
        root = altered_pictures(bench.folder / f"set_{count}", count)
        data = ["data=folder", f"data.root={root}", "test=false", "trainer.max_epochs=1"]
        decoded = ["data.memory_limit=0", "data.num_workers=2"]
        for name, options in (("kept in memory", []), ("data.memory_limit=0", decoded)):
            seconds, memory = bench.train("model=cnn", *data, *options)
            rows.append(
                Row(
                    f"model=cnn, one epoch, {count:,} pictures, {name}",
                    f"{seconds:.1f} s, {memory:.2f} GB",
                    note=f"{1000 * seconds / count:.1f} ms a picture, start included",
                )
            )
        shutil.rmtree(root)
    return rows


def altered_pictures(root: Path, count: int) -> Path:
    """The pictures of the box over and over, each time with other pixels."""
    generator = np.random.default_rng(0)
    found = sorted(unpack(box_archives()).rglob("*.webp"))
    paths = [found[index] for index in generator.permutation(len(found))]
    for number in track(range(count), f"making {count:,} pictures", count):
        path = paths[number % len(paths)]
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(np.int16)
        pixels += generator.integers(-8, 9, (1, 1, 3), dtype=np.int16)
        folder = root / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(folder / f"{number}.jpg", quality=90)
    return root


def seconds_row(
    name: str, ours: dict[str, float], plain: dict[str, float], target: str, note: str = ""
) -> Row:
    """A row of two times."""
    first, second = ours["seconds"], plain["seconds"]
    mine, theirs = (f"{s * 1000:.2f} ms" if s < 1 else f"{s:.2f} s" for s in (first, second))
    return Row(name, mine, theirs, second / first, target, note)


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    part.__name__: part
    for part in (cnn_step, trunk, head_step, cnn_epoch, inception, predict, growth)
}


def machine() -> dict[str, object]:
    """The machine that the figures are of."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        names = [
            line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line
        ]
    except OSError:
        names = []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instruction sets": [flag for flag in _FLAGS if flag in cpu_flags()],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=" | ".join(ROWS))
    parser.add_argument("--short", action="store_true", help="only check that it works")
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"), metavar="FILE")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.rows if name not in ROWS]:
        parser.error(f"{', '.join(unknown)}: use {' | '.join(ROWS)}")
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given.short, Path(folder))
        for name in track(given.rows or list(ROWS), "measuring", len(given.rows or ROWS)):
            found += ROWS[name](bench)
            result = {"machine": machine(), "short": given.short, "rows": [*map(asdict, found)]}
            given.out.write_text(json.dumps(result, indent=2) + "\n")
    show(found)
    print(f"written to {given.out}")
    return 0


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("", "ours", "plain", "ratio", "target", "note"):
        table.add_column(title)
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
        table.add_row(row.name, row.ours, row.plain, ratio, row.target, row.note)
    Console(width=None if sys.stdout.isatty() else 180, soft_wrap=False).print(table)
    told = machine()
    print(f"{told['cpu']}, {told['cores']} cores, {' '.join(told['instruction sets'])}, "  # type: ignore[arg-type]
          f"torch {told['torch']}, {told['threads']} threads")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
