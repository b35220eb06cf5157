"""Measure how the cost of training grows with the number of pictures, and of processes.

    python scripts/growth.py [--sizes 1000 4000 16000] [--work DIR]

Makes sets out of the training pictures in the box, repeated and rolled to the side, and runs
scripts/train.py on them without a test: the CNN for three epochs, with pictures that are kept in
memory and with such that are decoded in every epoch, and InceptionV3 at one scale of 224 px, with
an empty cache. Prints a Markdown table, and the cost of an audit of the largest set. Nothing else
should run meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from benchmark_rows import Bench
from PIL import Image

from horsehuman.data.archives import image_root
from horsehuman.runtime import track

SCRIPT = Path(__file__).with_name("train.py")

_CNN = ["model=cnn", "trainer.max_epochs=3"]
_INCEPTION = ["model=inception", "model.scales=[224]"]

#: Name, processes, options.
CASES = [
    ("CNN", 1, _CNN),
    ("CNN", 2, _CNN),
    ("CNN, decoded anew", 1, [*_CNN, "data.memory_limit=0", "data.num_workers=2"]),
    ("InceptionV3", 1, _INCEPTION),
    ("InceptionV3", 2, _INCEPTION),
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the sets, train on them, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000, 16000])
    parser.add_argument("--work", type=Path, help="folder for sets and runs, to be kept")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as aside:
        work = (given.work or Path(aside)).absolute()
        print("| model | pictures | processes | command, s | an epoch, s | memory, GB |")
        print("|---|---|---|---|---|---|", flush=True)
        for (name, processes, options), size in itertools.product(CASES, given.sizes):
            row = train(options, make_set(work / f"set{size}", size), processes, work)
            print(f"| {name} | {size:,} | {processes} | {row} |", flush=True)
        print(audit(work / f"set{max(given.sizes)}", work))
    return 0


def make_set(folder: Path, size: int) -> Path:
    """A folder of ``size`` training pictures and a few for a test that is never made."""
    sources = sorted((image_root("box") / "train").rglob("*.webp"))
    random.Random(0).shuffle(sources)

    def write(number: int) -> None:
        source, turn = sources[number % len(sources)], number // len(sources)
        split, figure = ("train", turn) if number < size else ("test", "x")
        target = aside / split / source.parent.name / f"{figure}{source.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(source) as picture:
            rolled = np.roll(np.asarray(picture), 7 * turn, axis=1)
        Image.fromarray(rolled).save(target, quality=90, method=0)

    aside = folder.with_name(f".{folder.name}")
    if not folder.exists():
        numbers = [*range(size), *range(size, size + len(sources), 100)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for _ in track(pool.map(write, numbers), f"making {size}", len(numbers)):
                pass
        aside.rename(folder)
    return folder


def train(options: Sequence[str], pictures: Path, processes: int, work: Path) -> str:
    """Seconds of a whole run, of its last epoch, and GB, as the end of a row."""
    run = work / f"run-{time.time():.0f}"
    command = [sys.executable, str(SCRIPT), *options, "test=false", "data=folder"]
    command += [f"data.root={pictures}", 'data.group_pattern="(.+)-"', "data.val_fraction=0"]
    command += [f"trainer={'ddp' if processes > 1 else 'default'}", f"hydra.run.dir={run}"]
    with tempfile.TemporaryDirectory() as cache:
        began = time.monotonic()
        done = subprocess.run(
            command,
            env={**os.environ, "HORSEHUMAN_CACHE": cache},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(done.stderr)
        seconds = time.monotonic() - began
    epoch = re.findall(r"([\d.]+) s$", done.stderr, re.MULTILINE)[-1]
    memory = json.loads((run / "metrics.json").read_text())["peak_memory_gb"]
    return f"{seconds:.0f} | {epoch} | {memory:.2f}"


def audit(pictures: Path, work: Path) -> str:
    """Seconds and GB of an audit of a set, in a sentence."""
    options = ("--data", str(pictures.absolute()), "--out", "audit", "--force")
    seconds, gigabytes = Bench(False, work).command("-m", "horsehuman", "audit", *options)
    return f"\naudit of {pictures.name}: {seconds:.0f} s, {gigabytes:.2f} GB"


if __name__ == "__main__":
    sys.exit(main())
