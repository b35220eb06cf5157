"""An audit as a person sees it: a table, JSON, and a page with the pictures."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.table import Table

from horsehuman.data.image_sets import ImageSet, find_image_set
from horsehuman.data.images import PictureError, read_picture
from horsehuman.data.records import Record
from horsehuman.errors import check_choice, printable
from horsehuman.evaluation.findings import Finding, audit
from horsehuman.run_dir import create_report_dir, write_bytes, write_json
from horsehuman.runtime import console, table

#: What ``--fail-on`` takes, and the severities that it means.
FAIL_ON = {"never": (), "error": ("error",), "warning": ("error", "warning")}

#: The files of an audit.
REPORT = ("audit.json", "audit.html")

#: Rows of pictures of a finding on the page, pictures in a row, and their side in pixels.
ROWS, COLUMNS, SIDE = 12, 9, 96

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Audit</title>
<meta name="viewport" content="width=device-width">
<style>body{{font:16px system-ui,sans-serif;margin:2rem;max-width:70rem}}
section{{border-left:.4rem solid;padding:.2rem 1rem;margin:1rem 0}}
.error{{border-color:#D55E00}}.warning{{border-color:#E69F00}}.note{{border-color:#999}}
img{{width:96px;height:96px}}figure{{display:inline-block;margin:.2rem;width:96px;font-size:.7rem;
overflow-wrap:anywhere}}</style>
<h1>{title}</h1>{sections}</html>
"""


def audit_and_report(
    data: str, group_pattern: str | None, out: Path | None, fail_on: str, *, force: bool
) -> bool:
    """What ``horsehuman audit`` does; returns whether nothing was found that is to fail it."""
    check_choice("--fail-on", fail_on, list(FAIL_ON))
    pictures = find_image_set(data, group_pattern)
    folder = create_report_dir(out, Path("outputs/audit"), force=force, report=REPORT)
    found = audit(pictures)
    title = f"{printable(pictures.root)}: {len(pictures.records):,} pictures"
    content = [
        {
            "severity": each.severity,
            "what": each.message,
            "remedy": each.remedy,
            "pictures": [[pictures.name(record) for record in row] for row in each.pictures],
        }
        for each in found
    ]
    write_json(folder / "audit.json", {"data": str(pictures.root), "findings": content})
    drawn = page(title, found, pictures)
    write_bytes(folder / "audit.html", drawn.encode(errors="replace"))
    out_console = console(stderr=False)
    out_console.print(lines_of(found))
    out_console.print(f"page        {printable(folder / 'audit.html')}")
    return not any(each.severity in FAIL_ON[fail_on] for each in found)


def lines_of(found: Sequence[Finding]) -> Table:
    """A line for each finding."""
    lines = table("", "finding", "remedy", left=3)
    for each in found:
        lines.add_row(each.severity, printable(each.message), printable(each.remedy))
    return lines


def page(title: str, found: Sequence[Finding], pictures: ImageSet) -> str:
    """The page, with all pictures in it."""
    sections = []
    for each in found:
        remedy = f"<p>{html.escape(printable(each.remedy))}</p>" if each.remedy else ""
        sections.append(
            f'<section class="{each.severity}"><h2>{each.severity}: '
            f"{html.escape(printable(each.message))}</h2>{remedy}{_rows(each, pictures)}</section>"
        )
    return _PAGE.format(title=html.escape(title), sections="".join(sections))


def _rows(finding: Finding, pictures: ImageSet) -> str:
    rows = [
        "<div>" + "".join(_figure(record, pictures) for record in row[:COLUMNS]) + "</div>"
        for row in finding.pictures[:ROWS]
    ]
    left = len(finding.pictures) - ROWS
    return "".join(rows) + (f"<p>and {left} more rows, in audit.json</p>" if left > 0 else "")


def _figure(record: Record, pictures: ImageSet) -> str:
    name = html.escape(printable(pictures.name(record)))
    try:
        image = Image.fromarray(read_picture(record.path)).resize((SIDE, SIDE))
    except PictureError:
        return f"<figure>{name}</figure>"
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    data = base64.b64encode(content.getvalue()).decode()
    source = f"data:image/jpeg;base64,{data}"
    return f'<figure><img alt="{name}" src="{source}"><figcaption>{name}</figcaption></figure>'
