"""Load test of the page: many clients at once, some of them hostile.

For half a minute: pytest -m slow tests/inference/test_demo_load.py --seconds 30
"""

from __future__ import annotations

import io
import json
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from horsehuman.inference import demo
from tests.inference.test_demo import UPLOAD_AGE, Page, page

__all__ = ["page"]

CLIENTS = 20

#: Megabytes of a picture that a client sends, when it is decoded.
PICTURE_MB = 1500 * 1500 * 3 / 1e6

#: File that an upload would write if its name could lead out of the upload folder.
OUT = Path(f"/tmp/{uuid.uuid4().hex}.png")


def ask(url: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
    """Return the body of a response; raise for a status of 400 and above."""
    request = urllib.request.Request(url, body, {"Content-Type": kind} if body else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        content: bytes = answer.read()
    return content


def upload(address: str, name: str, content: bytes) -> str:
    """Upload a file as a browser does and return its path on the server."""
    mark = uuid.uuid4().hex
    head = f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{mark}--\r\n".encode()
    answer = ask(f"{address}/gradio_api/upload", body, f"multipart/form-data; boundary={mark}")
    return str(json.loads(answer)[0])


def answer_to(address: str, path: Any, name: str = "cnn") -> str:
    """Return the page's response to an uploaded file."""
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, name]
    call = f"{address}/gradio_api/call/answer"
    event = json.loads(ask(call, json.dumps({"data": data}).encode()))["event_id"]
    return ask(f"{call}/{event}").decode()


def hostile_requests(address: str) -> list[tuple[str, Callable[[], object]]]:
    """Return names and calls of requests that the page itself never sends."""
    api = f"{address}/gradio_api"
    garbage = [b"{", b"[]", b"null", b'{"data": 5}', b'{"data": []}', b"\xff" * 1000, b"[" * 50_000]
    return [
        *((f"call {body[:9]!r}", lambda b=body: ask(f"{api}/call/answer", b)) for body in garbage),
        *((f"join {body[:9]!r}", lambda b=body: ask(f"{api}/queue/join", b)) for body in garbage),
        ("a file of the machine", lambda: answer_to(address, "/etc/passwd")),
        ("a file beside", lambda: answer_to(address, "../../../../etc/passwd")),
        ("no path", lambda: answer_to(address, {"a": 1})),
        ("an address", lambda: answer_to(address, "http://127.0.0.1:9/x.png")),
        ("another classifier", lambda: answer_to(address, upload(address, "a", b"x"), "/etc/x")),
        ("to be given a file", lambda: ask(f"{api}/file=/etc/passwd")),
        ("to be given one above", lambda: ask(f"{api}/file=/proc/self/../self/environ")),
        ("the net through it", lambda: ask(f"{api}/proxy=http://127.0.0.1:9/")),
        ("no such page", lambda: ask(f"{address}/../../etc/passwd")),
        ("a name that leads out", lambda: upload(address, f"../../..{OUT}", b"x")),
        ("text", lambda: answer_to(address, upload(address, "a.png", b"no picture"))),
        ("a bomb", lambda: answer_to(address, upload(address, "bomb.png", bomb()))),
        ("too much", lambda: upload(address, "big.png", bytes(25_000_000))),
    ]


def bomb() -> bytes:
    import struct

    size = struct.pack(">IIBBBBBI", 60_000, 60_000, 8, 2, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + size


def resident(pid: int) -> float:
    """Return the resident memory of a process and its children in MB."""
    total = 0.0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = dict(
                line.split(":", 1) for line in status.read_text().splitlines() if ":" in line
            )
        except OSError:
            continue
        if str(pid) in (text["Pid"].strip(), text["PPid"].strip()) and "VmRSS" in text:
            total += int(text["VmRSS"].split()[0]) / 1000
    return total


@pytest.fixture(scope="module")
def uploaded(page: Page) -> Path:
    """A file that was uploaded before the other tests."""
    path = Path(upload(page.address, "a.png", b"no picture"))
    assert path.is_file()
    return path


def enlarged(path: Path) -> bytes:
    """Return a picture of 1500 x 1500 pixels, which take :data:`PICTURE_MB` when decoded."""
    content = io.BytesIO()
    Image.open(path).convert("RGB").resize((1500, 1500)).save(content, "JPEG")
    return content.getvalue()


@pytest.mark.slow
def test_many_clients_at_once(
    page: Page, uploaded: Path, tree: Path, request: pytest.FixtureRequest
) -> None:
    seconds = request.config.getoption("--seconds")
    pictures = {path.parent.name: enlarged(path) for path in (tree / "test").rglob("*.webp")}
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []

    def client(number: int, until: float, least: int) -> None:
        turn, latest = number, until + 100
        while time.monotonic() < (latest if outcomes["classified"] < least else until):
            turn += 1
            if number % 4 == 0:
                name, call = (bad := hostile_requests(page.address))[turn % len(bad)]
                try:
                    response = call()
                    outcomes["hostile, answered"] += 1
                    text = response if isinstance(response, bytes) else str(response).encode()
                    if b"root:" in text or b"PATH=" in text:
                        wrong.append(name)
                except urllib.error.HTTPError:
                    outcomes["hostile, refused"] += 1
                except OSError as error:  # The server closed the connection.
                    outcomes[f"hostile, {type(error).__name__}"] += 1
                continue
            kind = ("horses", "humans")[turn % 2]
            response = answer_to(page.address, upload(page.address, "a.webp", pictures[kind]))
            outcomes["classified"] += 1
            if f"{kind}, " not in response:
                wrong.append(f"{kind}: {response}")

    def run(length: float, least: int) -> None:
        """Let all clients ask for some seconds, and longer until there are as many answers."""
        until = time.monotonic() + length
        threads = [threading.Thread(target=client, args=(k, until, least)) for k in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run(seconds / 3, 20)  # until the allocator's arenas have their size
    before, answered = resident(page.pid), outcomes["classified"]
    run(seconds, answered + 40)
    after = resident(page.pid)
    decoded = (outcomes["classified"] - answered) * PICTURE_MB
    print(f"{dict(outcomes)}; memory {before:.0f}, then {after:.0f} MB")
    assert not wrong, wrong[:3]
    assert "Traceback" not in page.stderr.read_text()
    assert outcomes["classified"] > seconds
    assert sum(count for name, count in outcomes.items() if name.startswith("hostile")) > 10
    assert before > 0
    assert decoded > 200
    assert after - before < 0.8 * decoded  # the pictures do not stay in memory
    assert not OUT.exists()
    assert "humans, " in answer_to(page.address, upload(page.address, "a", pictures["humans"]))


@pytest.mark.slow
def test_uploads_are_deleted(page: Page, uploaded: Path) -> None:
    deadline = time.monotonic() + 4 * UPLOAD_AGE
    while uploaded.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not uploaded.exists()
    assert sum(demo.DELETIONS) <= 600
