from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from horsehuman.decision import Prediction
from horsehuman.inference.demo import answer_text, respond
from horsehuman.models.checkpoint import load_classifier

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


@pytest.mark.slow
def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "horsehuman", "demo", "--no-browser", "--model", "cnn"]
        done = subprocess.run(
            [*command, "--port", port], capture_output=True, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"error: --port {port} is in use or not permitted: use another\n"


def test_answers_are_sentences(tree: Path, tmp_path: Path) -> None:
    networks = {"cnn": load_classifier("cnn")}
    picture = str(tree / "test" / "humans" / "valhuman01-00.webp")
    answer, heat_map = respond(networks, picture, "cnn")
    assert "humans, " in answer
    assert "ms, cnn" in answer
    assert heat_map is not None
    assert heat_map.shape == (96, 96, 3)
    (tmp_path / "x.jpg").write_text("<script>")
    answer, heat_map = respond(networks, str(tmp_path / "x.jpg"), "cnn")
    assert "Cannot read this file: not an image format that Pillow supports, but a text" in answer
    assert heat_map is None
    assert "Waiting" in respond(networks, None, "cnn")[0]
    names = ("horses", "humans")
    unsure = Prediction("x", "horses", 0.55, -0.2, "unsure")
    assert answer_text(unsure, names) == "Unsure: perhaps horses, 55.0%"
    assert answer_text(Prediction("x", "", 0, 1, "neither"), names) == "Neither horses nor humans"
    assert answer_text(Prediction("x", "", 0.9, 1, "both"), names).startswith("Both horses and")


def test_the_evidence_for_both_classes_stands_side_by_side(tree: Path, tmp_path: Path) -> None:
    halves = [next((tree / "test" / name).iterdir()) for name in ("horses", "humans")]
    pixels = [np.asarray(Image.open(path).convert("RGB").resize((150, 300))) for path in halves]
    Image.fromarray(np.concatenate(pixels, axis=1)).save(tmp_path / "both.png")
    networks = {"inception": load_classifier("inception")}
    answer, heat_map = respond(networks, str(tmp_path / "both.png"), "inception")
    assert "Both horses and humans" in answer
    assert heat_map is not None
    assert heat_map.shape == (300, 600, 3)


#: Age in seconds above which the page of the tests deletes uploads; the real page waits longer.
UPLOAD_AGE = 30

#: Program that serves the page with that age.
SERVE = (
    "from horsehuman import cli; from horsehuman.inference import demo\n"
    f"demo.DELETIONS = (1, {UPLOAD_AGE}); cli.main()"
)


class Page(NamedTuple):
    """A served page: its address, the id of the server process, and the file of its stderr."""

    address: str
    pid: int
    stderr: Path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Serve the page with ``horsehuman demo``."""
    log = tmp_path_factory.mktemp("page") / "stderr.txt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVE, "demo", "--no-browser", "--port", str(port)]
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        assert process.stdout
        address = process.stdout.readline().split()[0]
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(address, timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield Page(address, process.pid, log)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Gradio's client
def test_the_documented_program_asks_the_page(
    page: Page, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = Path(__file__).parents[2] / "docs" / "use.md"
    (program,) = re.findall(r"```python\n(from gradio_client.*?)```", docs.read_text(), re.DOTALL)
    Image.open(tree / "test" / "horses" / "horse1-000.webp").save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(program.replace("http://127.0.0.1:7860", page.address), names)
    assert "horses, " in names["answer"]
    assert Path(names["heat_map"]).is_file()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start a browser; the test fails if it sends a request to another host."""
    if not BROWSER:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=options)
        yield chromium
        chromium.close()


@pytest.mark.slow
def test_the_page_in_a_browser(page: Page, browser: Any, tree: Path, tmp_path: Path) -> None:
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    requested: list[str] = []
    tab.on("request", lambda request: requested.append(request.url))
    tab.goto(page.address)
    status = tab.get_by_role("status").filter(has_text="Waiting")
    status.wait_for(timeout=60_000)

    def upload(path: Path) -> None:
        tab.locator("input[type=file]").first.set_input_files(path)

    def expect(text: str) -> None:
        tab.locator(".answer").filter(has_text=text).wait_for(timeout=60_000)

    upload(tree / "test" / "horses" / "horse1-000.webp")
    expect("horses, ")
    tab.get_by_alt_text("The picture, with the evidence in red").wait_for(timeout=60_000)
    shots = Path(os.environ.get("HORSEHUMAN_SHOTS", tmp_path))
    tab.screenshot(path=shots / "horse.png")
    tab.get_by_label("cnn").check()
    expect("cnn")
    tab.get_by_label("Remove Image").or_(tab.get_by_label("Clear")).first.click()
    expect("Waiting")
    upload(tree / "test" / "humans" / "valhuman01-00.webp")
    expect("humans, ")
    tab.get_by_label("inception").check()
    tab.get_by_label("Remove Image").or_(tab.get_by_label("Clear")).first.click()
    expect("Waiting")
    (tmp_path / "text.jpg").write_text("no picture")
    upload(tmp_path / "text.jpg")
    expect("Cannot read this file: not an image format that Pillow supports")
    tab.screenshot(path=shots / "text.png")
    hosts = {url.split("/")[2].split(":")[0] for url in requested if url.startswith("http")}
    assert hosts == {"127.0.0.1"}

    tab.set_viewport_size({"width": 360, "height": 800})
    width = tab.evaluate("document.documentElement.scrollWidth")
    assert width <= 360
    tab.screenshot(path=shots / "narrow.png")
    tab.close()
