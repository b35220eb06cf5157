"""``horsehuman audit``: print the findings about an image set, and write JSON and a page."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader
from PIL import Image

from horsehuman.data.image_sets import ImageQuery, ImageSet, find_image_set
from horsehuman.data.images import PictureError, read_picture
from horsehuman.errors import check_choice, printable
from horsehuman.evaluation.findings import Finding, audit
from horsehuman.run_dir import ReportOptions, write_bytes, write_json
from horsehuman.runtime import table

#: For each value of ``--fail-on``, the severities that make the command fail.
FAIL_ON = {"never": (), "error": ("error",), "warning": ("error", "warning")}

#: Names of the files that an audit writes.
REPORT_FILES = ("audit.json", "audit.html")

#: Rows of images that the page shows for a finding, and images in a row.
MAX_ROWS, MAX_COLUMNS = 12, 9


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
    page = Environment(loader=PackageLoader("horsehuman.evaluation", ""), autoescape=True)
    page.filters.update(printable=printable, thumbnail=thumbnail)
    return page.get_template("audit.html").render(
        findings=findings, images=image_set, max_rows=MAX_ROWS, max_columns=MAX_COLUMNS
    )


def thumbnail(path: Path) -> str:
    """Return an image as a JPEG data URL of 96 x 96 pixels; empty if it cannot be read."""
    try:
        image = Image.fromarray(read_picture(path)).resize((96, 96))
    except PictureError:
        return ""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
