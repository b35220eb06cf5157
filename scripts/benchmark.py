"""Speed, memory and size beside the plain way, in one run: a table, and benchmark.json.

    python scripts/benchmark.py                       # all rows, about 50 minutes on two cores
    python scripts/benchmark.py cnn_step trunk        # some rows
    python scripts/benchmark.py --short               # seconds a row: checks that it works, no more

Pieces of work are timed in several processes, of which the best counts; ours and the plain way
(scripts/benchmark_plain.py) take turns, so that a machine that slows down slows both. Whole
commands run once, and their peak memory is of that run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from benchmark_rows import ROWS, Bench, Row
from rich.console import Console
from rich.table import Table

from horsehuman.runtime import cpu_flags, cpu_name, track

#: Extensions that decide how fast float32 and bf16 are.
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def machine() -> dict[str, object]:
    """The machine that the figures are of."""
    return {
        "cpu": cpu_name(),
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
