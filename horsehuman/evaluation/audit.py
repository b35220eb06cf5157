"""``horsehuman audit``: print the findings about an image set, and write JSON and a page."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from horsehuman.data.image_sets import ImageQuery, ImageSet, find_image_set
from horsehuman.data.images import PictureError, read_picture
from horsehuman.data.records import Record
from horsehuman.errors import check_choice, printable
from horsehuman.evaluation.findings import Finding, audit
from horsehuman.run_dir import ReportOptions, write_bytes, write_json
from horsehuman.runtime import table

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
figure{{display:inline-block;margin:.2rem;width:96px;font-size:.7rem;overflow-wrap:anywhere}}
img{{width:96px;height:96px}}</style><h1>{title}</h1>{sections}</html>
"""


def audit_and_report(query: ImageQuery, options: ReportOptions, fail_on: str) -> bool:
    """Audit an image set, print the findings and write the report.

    Args:
        query: The images; its ``split`` is not used.
        options: The report's folder, by default ``outputs/audit``, and what it consists of: without
            figures there is no page.
        fail_on: Value of ``--fail-on``, a key of :data:`FAIL_ON`.

    Returns:
        Whether the set passes: no finding has a severity that ``fail_on`` selects.

    Raises:
        HorseHumanError: If an option is invalid, the set does not exist or has no images, or the
            report cannot be written.
    """
    check_choice("--fail-on", fail_on, list(FAIL_ON))
    image_set = find_image_set(query.data or "box", query.group_pattern)
    with options.replace_report(Path("outputs/audit"), REPORT_FILES) as folder:
        findings = audit(image_set)
    content = [
        {
            "severity": finding.severity,
            "what": finding.message,
            "remedy": finding.remedy,
            "pictures": [[image_set.name(record) for record in row] for row in finding.rows],
        }
        for finding in findings
    ]
    report = {"data": str(image_set.root), "findings": content}
    write_json(folder / REPORT_FILES[0], report)
    if options.plot:
        page = render_page(findings, image_set)
        write_bytes(folder / REPORT_FILES[1], page.encode(errors="replace"))
    lines = table("", "finding", "remedy", left=3)
    for finding in findings:
        lines.add_row(finding.severity, printable(finding.message), printable(finding.remedy))
    options.print(report, [lines], "report", folder / REPORT_FILES[options.plot])
    return not any(finding.severity in FAIL_ON[fail_on] for finding in findings)


def render_page(findings: Sequence[Finding], image_set: ImageSet) -> str:
    """Return an HTML page of the findings with their images embedded.

    Args:
        findings: The findings, in the order of the page.
        image_set: The set that was audited.
    """
    sections = ""
    for finding in findings:
        message, remedy = (html.escape(printable(x)) for x in (finding.message, finding.remedy))
        sections += f'<section class="{finding.severity}"><h2>{finding.severity}: {message}</h2>'
        sections += f"<p>{remedy}</p>"
        for row in finding.rows[:MAX_ROWS]:
            images = "".join(_render_image(record, image_set) for record in row[:MAX_COLUMNS])
            sections += f"<div>{images}</div>"
        left = len(finding.rows) - MAX_ROWS
        sections += f"<p>and {left} more rows; see audit.json</p>" if left > 0 else ""
        sections += "</section>"
    title = f"{printable(image_set.root)}: {len(image_set.records):,} pictures"
    return _PAGE.format(title=html.escape(title), sections=sections)


def _render_image(record: Record, image_set: ImageSet) -> str:
    """Return an HTML figure with a thumbnail and the file name, or the name alone on an error."""
    name = html.escape(printable(image_set.name(record)))
    try:
        thumbnail = Image.fromarray(read_picture(record.path)).resize((THUMBNAIL_SIZE,) * 2)
    except PictureError:
        return f"<figure>{name}</figure>"
    content = io.BytesIO()
    thumbnail.save(content, "JPEG", quality=80)
    source = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
    return f'<figure><img alt="{name}" src="{source}"><figcaption>{name}</figcaption></figure>'
