"""A page in the browser: a picture in, the answer and what it stands on out. Loopback only."""

from __future__ import annotations

import html
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from horsehuman.data.archives import image_root
from horsehuman.data.images import PictureError, read_picture
from horsehuman.decision import Prediction, decide
from horsehuman.errors import HorseHumanError, first_line, printable
from horsehuman.inference.explain import explain, overlay
from horsehuman.models.base import Network
from horsehuman.models.checkpoint import load_classifier
from horsehuman.runtime import BUNDLED

log = logging.getLogger(__name__)

HOST = "127.0.0.1"

#: Largest file, and how many may wait.
MAX_FILE, MAX_WAITING = "20mb", 32

#: Seconds that a file which was sent is kept.
KEPT = 300

#: Ports that are tried after the one asked for.
PORTS = 20

#: Pictures of the box to begin with.
EXAMPLES = ("horses/horse1-105.webp", "horses/horse3-498.webp", "humans/valhuman01-00.webp")

_CSS = """
footer { display: none !important }
.answer { font-size: 1.5rem; line-height: 1.4 }
.answer small { display: block; font-size: 1rem; opacity: .8 }
"""


def log_exception(*unused: object, **options: object) -> None:
    """Say in one line what ``traceback.print_exc`` would say in many."""
    error = sys.exc_info()[1]
    if error is not None:
        log.warning("a request was not answered (%s: %s)", type(error).__name__, first_line(error))


def serve(model: str, port: int, *, browser: bool) -> None:
    """Serve the page until it is interrupted.

    Args:
        model: Offered beside those in the box.
        port: The next free one is taken, and said, if it is in use.
        browser: Open it there.

    Raises:
        HorseHumanError: Gradio is missing, or no port is free.
    """
    traceback.print_exc = log_exception  # Gradio calls it for every bad request
    chosen = next_free_port(port)
    page, options = build(model)
    if chosen != port:
        log.warning("port %d is in use: %d is taken", port, chosen)
    print(f"http://{HOST}:{chosen}  (Ctrl-C ends it)", flush=True)
    page.launch(server_port=chosen, inbrowser=browser, **options)


def next_free_port(first: int) -> int:
    """The first port that is free, of :data:`PORTS`.

    Raises:
        HorseHumanError: None is.
    """
    for port in range(first, min(first + PORTS, 65_536)):
        with socket.socket() as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                found.bind((HOST, port))
            except OSError:
                continue
            return port
    raise HorseHumanError(f"--port {first}: it and the next {PORTS - 1} are in use: name another")


def build(model: str) -> tuple[Any, dict[str, Any]]:
    """The page, and how it is launched.

    Raises:
        HorseHumanError: Gradio is missing, or there is no such model.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: no host is asked
    try:
        import gradio
    except ImportError as error:
        raise HorseHumanError("the page needs Gradio: pip install -e '.[demo]'") from error

    networks = {name: load_classifier(name) for name in dict.fromkeys((model, *BUNDLED))}
    box = image_root("box") / "test"

    def score(path: str | None, name: str) -> tuple[str, NDArray[np.uint8] | None]:
        return respond(networks, path, name)

    with gradio.Blocks(
        title="Horse or human?", analytics_enabled=False, delete_cache=(KEPT, KEPT)
    ) as page:
        gradio.Markdown("# Horse or human?\nDrop, paste or take a picture, or choose one below.")
        with gradio.Row():
            with gradio.Column(min_width=300):
                picture = gradio.Image(
                    label="Picture", type="filepath", sources=["upload", "webcam", "clipboard"],
                    image_mode=None, height=320, alt_text="The picture that is asked about",
                )  # fmt: skip
                # Gradio would decode it, and fail with a traceback.
                picture.preprocess = _identity  # type: ignore[method-assign]
                choice = gradio.Radio(list(networks), value=model, label="Classifier")
                gradio.Examples([[str(box / name)] for name in EXAMPLES], [picture])
            with gradio.Column(min_width=300):
                said = gradio.HTML(_said("Waiting for a picture"), label="Answer")
                heat = gradio.Image(
                    label="What spoke for the answer (vermilion: most)", interactive=False,
                    height=320, buttons=[], alt_text="The picture, coloured where it decided",
                )  # fmt: skip
        inputs, outputs = [picture, choice], [said, heat]
        for event in (picture.change, choice.change):
            event(score, inputs, outputs, show_progress="minimal")
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return page, launch_options(gradio, box)


def launch_options(gradio: Any, box: Path) -> dict[str, Any]:
    """How the page is launched: for this machine alone, with the examples in the box."""
    return {
        "server_name": HOST,
        "share": False,
        "quiet": True,
        "show_error": True,
        "max_file_size": MAX_FILE,
        "allowed_paths": [str(box)],
        "css": _CSS,
        "theme": gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        "footer_links": [],
    }


def _identity(payload: Any) -> str | None:
    """The path of an uploaded file."""
    return payload.path if payload else None


def respond(
    networks: Mapping[str, Network], path: str | None, name: str
) -> tuple[str, NDArray[np.uint8] | None]:
    """The answer as HTML, and the heat over the picture."""
    if path is None:
        return _said("Waiting for a picture"), None
    network = networks[name]
    start = time.perf_counter()
    try:
        picture = network.preprocess(read_picture(Path(path), "This file"))
    except PictureError as error:
        return _said(f"{error}.".replace(":", "", 1)), None
    (found,) = explain(network, picture[None])
    seconds = time.perf_counter() - start
    said = decide(network, path, found.answer)
    label = int(found.answer.probability >= network.threshold)
    drawn = overlay(picture, found.for_class(label))
    return _said(sentence(said), f"{1000 * seconds:.0f} ms, {printable(name)}"), drawn


def sentence(said: Prediction) -> str:
    """A prediction for a person who looks at it."""
    if said.status == "neither":
        return "Neither: it looks like nothing that this classifier was trained on"
    answer = f"{said.class_name}, {said.probability:.1%}"
    return f"Unsure: perhaps {answer}" if said.status == "unsure" else answer


def _said(text: str, note: str = "") -> str:
    """Text that a screen reader speaks when it changes."""
    small = f"<small>{html.escape(note)}</small>" if note else ""
    return f'<div class="answer" role="status" aria-live="polite">{html.escape(text)}{small}</div>'
