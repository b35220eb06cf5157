"""``horsehuman audit``: print the findings about an image set, and write JSON and a page."""

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

#: For each value of ``--fail-on``, the severities that make the command fail.
FAIL_ON = {"never": (), "error": ("error",), "warning": ("error", "warning")}

#: Names of the files that an audit writes.
REPORT_FILES = ("audit.json", "audit.html")

#: Rows of images that the page shows for a finding, images in a row, and their side in pixels.
MAX_ROWS, MAX_COLUMNS, THUMBNAIL_SIZE = 12, 9, 96

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
    """Audit an image set, print the findings and write the report.

    Args:
        data: Value of ``--data``: ``box``, a run's folder, or a folder of images.
        group_pattern: Regular expression that extracts the group from a file name, for a folder of
            images only; ``None`` if no groups are defined.
        out: Folder of the report; ``outputs/audit`` if ``None``.
        fail_on: Value of ``--fail-on``, a key of :data:`FAIL_ON`.
        force: Overwrite a report that the folder already contains.

    Returns:
        Whether the set passes: no finding has a severity that ``fail_on`` selects.

    Raises:
        HorseHumanError: If an option is invalid, the set does not exist or has no images, or the
            report cannot be written.
    """
    check_choice("--fail-on", fail_on, list(FAIL_ON))
    image_set = find_image_set(data, group_pattern)
    folder = create_report_dir(out, Path("outputs/audit"), force=force, report=REPORT_FILES)
    findings = audit(image_set)
    title = f"{printable(image_set.root)}: {len(image_set.records):,} pictures"
    content = [
        {
            "severity": finding.severity,
            "what": finding.message,
            "remedy": finding.remedy,
            "pictures": [[image_set.name(record) for record in row] for row in finding.rows],
        }
        for finding in findings
    ]
    write_json(folder / "audit.json", {"data": str(image_set.root), "findings": content})
    page = render_page(title, findings, image_set)
    write_bytes(folder / "audit.html", page.encode(errors="replace"))
    out_console = console(stderr=False)
    out_console.print(findings_table(findings))
    out_console.print(f"page        {printable(folder / 'audit.html')}")
    return not any(finding.severity in FAIL_ON[fail_on] for finding in findings)


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return a table with severity, message and remedy of each finding."""
    lines = table("", "finding", "remedy", left=3)
    for finding in findings:
        lines.add_row(finding.severity, printable(finding.message), printable(finding.remedy))
    return lines


def render_page(title: str, findings: Sequence[Finding], image_set: ImageSet) -> str:
    """Return an HTML page of the findings with their images embedded.

    Args:
        title: Heading of the page, plain text.
        findings: The findings, in the order of the page.
        image_set: The set that was audited.
    """
    sections = []
    for finding in findings:
        remedy = f"<p>{html.escape(printable(finding.remedy))}</p>" if finding.remedy else ""
        message = html.escape(printable(finding.message))
        sections.append(
            f'<section class="{finding.severity}"><h2>{finding.severity}: {message}</h2>'
            f"{remedy}{_render_rows(finding, image_set)}</section>"
        )
    return _PAGE.format(title=html.escape(title), sections="".join(sections))


def _render_rows(finding: Finding, image_set: ImageSet) -> str:
    """Return the HTML of a finding's first :data:`MAX_ROWS` rows of images."""
    rows = [
        "<div>" + "".join(_render_image(r, image_set) for r in row[:MAX_COLUMNS]) + "</div>"
        for row in finding.rows[:MAX_ROWS]
    ]
    left = len(finding.rows) - MAX_ROWS
    return "".join(rows) + (f"<p>and {left} more rows; see audit.json</p>" if left > 0 else "")


def _render_image(record: Record, image_set: ImageSet) -> str:
    """Return an HTML figure with a thumbnail and the file name, or the name alone on an error."""
    name = html.escape(printable(image_set.name(record)))
    try:
        thumbnail = Image.fromarray(read_picture(record.path)).resize((THUMBNAIL_SIZE,) * 2)
    except PictureError:
        return f"<figure>{name}</figure>"
    content = io.BytesIO()
    thumbnail.save(content, "JPEG", quality=80)
    data = base64.b64encode(content.getvalue()).decode()
    source = f"data:image/jpeg;base64,{data}"
    return f'<figure><img alt="{name}" src="{source}"><figcaption>{name}</figcaption></figure>'
