"""Draw which floor of the package imports which: docs/floors.png.

    python scripts/floors.py [--out FILE]

The graph is read from the source, imports inside functions included. Root modules are the ground
floor, except the command line; each folder is a floor. tests/test_architecture.py holds the rules.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PACKAGE = Path(__file__).resolve().parents[1] / "horsehuman"

#: From the bottom up. A module imports from its own floor and from those below it.
FLOORS = ("ground", "data", "models", "inference", "evaluation", "training", "cli")


def modules() -> dict[str, Path]:
    """Map dotted module names below the package to files; ``__init__`` and ``__main__`` are out."""
    paths = (path for path in PACKAGE.rglob("*.py") if not path.name.startswith("__"))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in paths}


def floor_of(module: str) -> str:
    """Return the floor of a module name as given by :func:`modules`."""
    folder, dot, _ = module.partition(".")
    return folder if dot or folder == "cli" else "ground"


def imported_names(path: Path) -> set[str]:
    """Return the dotted names below ``horsehuman`` that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "horsehuman":
            parent = str(node.module).removeprefix("horsehuman").lstrip(".")
            found |= {f"{parent}.{alias.name}".lstrip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            names = (alias.name for alias in node.names)
            found |= {name.removeprefix("horsehuman").lstrip(".") for name in names
                      if name.split(".")[0] == "horsehuman"}  # fmt: skip
    return found


def imports() -> dict[str, set[str]]:
    """Map each module to the modules of the package that it imports."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        names = imported_names(path)
        graph[module] = {name for name in names if name in known}
        graph[module] |= {p for name in names if (p := name.rpartition(".")[0]) in known}
    return graph


def draw() -> Figure:
    """Draw the floors with their modules, and the number of imports from each floor below."""
    graph = imports()
    figure = Figure(figsize=(13, 6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 13), ylim=(-0.2, len(FLOORS) + 0.4))
    axes.axis("off")
    axes.text(7.6, len(FLOORS) + 0.1, "imports from:", fontsize=10, ha="right")
    for level, floor in enumerate(FLOORS):
        modules_here = sorted(module for module in graph if floor_of(module) == floor)
        axes.add_patch(Rectangle((0, level), 7.7, 0.8, facecolor="#EAF2F8", edgecolor="#0072B2"))
        axes.text(0.15, level + 0.4, floor, va="center", fontsize=12, fontweight="bold")
        names = [module.rpartition(".")[2] for module in modules_here]
        rows = [names[:5], names[5:]]
        text = "\n".join("   ".join(row) for row in rows if row)
        axes.text(1.6, level + 0.4, text, va="center", fontsize=10, linespacing=1.6)
        axes.text(8.2 + 0.8 * level, len(FLOORS) + 0.1, floor, fontsize=10, ha="center")
        counts = Counter(floor_of(name) for module in modules_here for name in graph[module])
        for other, count in counts.items():
            position = 8.2 + 0.8 * FLOORS.index(other)
            axes.text(position, level + 0.4, str(count), va="center", ha="center", fontsize=11)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = PACKAGE.parent / "docs" / "floors.png"
    parser.add_argument("--out", type=Path, default=default, metavar="FILE")
    out = parser.parse_args(arguments).out
    draw().savefig(out, dpi=100)
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
