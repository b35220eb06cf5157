"""Options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

#: Which classifier a command uses.
Model = Annotated[
    str,
    typer.Option(
        metavar="NAME|RUN|FILE",
        help="inception or cnn (in the box), a run, a checkpoint; predict takes .onnx, too.",
    ),
]

#: Which pictures it is asked about.
Data = Annotated[
    str | None,
    typer.Option(metavar="box|RUN|FOLDER", help="Pictures [the model's own run, or the box]."),
]
Split = Annotated[
    str | None, typer.Option(help="train, validation, test or all [test, if there is one].")
]
GroupPattern = Annotated[
    str | None,
    typer.Option(help="Of a folder: regular expression with one (...) that names the group."),
]

#: Where a report goes, and whether over an earlier one.
ReportFolder = Annotated[
    Path | None, typer.Option(help="Folder for the report [below outputs; evaluate's in the run].")
]
Force = Annotated[bool, typer.Option("--force", help="Write over what --out holds.")]
Plot = Annotated[bool, typer.Option(help="Draw the pictures of the report.")]
