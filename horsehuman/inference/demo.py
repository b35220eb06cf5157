"""Serve a local web page that classifies an uploaded image and shows a heat map of the evidence.

The page is built with Gradio. It is served on the loopback interface only, and neither the page
nor the server sends a request to another host.
"""

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

#: Address that the page is served on: the loopback interface.
HOST = "127.0.0.1"

#: Largest upload, in Gradio's notation, and largest number of requests that wait in the queue.
MAX_UPLOAD, MAX_WAITING = "20mb", 32

#: Age in seconds above which an uploaded file is deleted, and the interval between deletions.
MAX_AGE = 300

#: Number of consecutive ports that are tried, the requested one included.
PORTS = 20

#: Example images on the page, below the folder of the bundled test set.
EXAMPLES = ("horses/horse1-105.webp", "horses/horse3-498.webp", "humans/valhuman01-00.webp")

_CSS = """
footer { display: none !important }
.answer { font-size: 1.5rem; line-height: 1.4 }
.answer small { display: block; font-size: 1rem; opacity: .8 }
"""


def serve(model: str, port: int, *, browser: bool) -> None:
    """Serve the page until the process is interrupted.

    Args:
        model: Name, run or checkpoint of the classifier that is selected at first; the bundled
            classifiers are offered beside it.
        port: TCP port. If it is in use, the next free one is taken and a warning is logged.
        browser: Whether to open the page in a browser.

    Raises:
        HorseHumanError: If Gradio is not installed, the model cannot be loaded or no port is free.
    """
    traceback.print_exc = log_exception  # Gradio calls it for every malformed request.
    free_port = next_free_port(port)
    page, options = build(model)
    if free_port != port:
        log.warning("port %d is in use: using port %d", port, free_port)
    print(f"http://{HOST}:{free_port}  (press Ctrl-C to stop)", flush=True)
    page.launch(server_port=free_port, inbrowser=browser, **options)


def log_exception(*unused: object, **options: object) -> None:
    """Log the current exception as one line; a replacement for ``traceback.print_exc``."""
    error = sys.exc_info()[1]
    if error is not None:
        log.warning("request failed (%s: %s)", type(error).__name__, first_line(error))


def next_free_port(first: int) -> int:
    """Return the first free port among :data:`PORTS` consecutive ones.

    Args:
        first: Port to start with.

    Raises:
        HorseHumanError: If all of them are in use.
    """
    for port in range(first, min(first + PORTS, 65_536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise HorseHumanError(f"--port {first} and the next {PORTS - 1} are in use: name another port")


def build(model: str) -> tuple[Any, dict[str, Any]]:
    """Build the page.

    Args:
        model: Name, run or checkpoint of the classifier that is selected at first.

    Returns:
        The ``gradio.Blocks`` and the options of its ``launch`` method.

    Raises:
        HorseHumanError: If Gradio is not installed or the model cannot be loaded.
    """
    # Gradio reads this at import time; without it, it reports the start to a host of its own.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise HorseHumanError("the page needs Gradio: pip install -e '.[demo]'") from error

    networks = {name: load_classifier(name) for name in dict.fromkeys((model, *BUNDLED))}
    examples = image_root("box") / "test"

    def answer(path: str | None, name: str) -> tuple[str, NDArray[np.uint8] | None]:
        return respond(networks, path, name)

    with gradio.Blocks(
        title="Horse or human?", analytics_enabled=False, delete_cache=(MAX_AGE, MAX_AGE)
    ) as page:
        gradio.Markdown("# Horse or human?\nDrop, paste or take a picture, or choose one below.")
        with gradio.Row():
            with gradio.Column(min_width=300):
                picture = gradio.Image(
                    label="Picture", type="filepath", sources=["upload", "webcam", "clipboard"],
                    image_mode=None, height=320, alt_text="The picture to classify",
                )  # fmt: skip
                # Gradio's own preprocessing decodes the file and fails with a traceback.
                picture.preprocess = _upload_path  # type: ignore[method-assign]
                choice = gradio.Radio(list(networks), value=model, label="Classifier")
                gradio.Examples([[str(examples / name)] for name in EXAMPLES], [picture])
            with gradio.Column(min_width=300):
                answer = gradio.HTML(_status("Waiting for a picture"), label="Answer")
                heat = gradio.Image(
                    label="Evidence for the answer (red: strong)", interactive=False,
                    height=320, buttons=[], alt_text="The picture, with the evidence in red",
                )  # fmt: skip
        inputs, outputs = [picture, choice], [answer, heat]
        for event in (picture.change, choice.change):
            event(answer, inputs, outputs, show_progress="minimal")
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return page, launch_options(gradio, examples)


def launch_options(gradio: Any, examples: Path) -> dict[str, Any]:
    """Return options of Gradio's ``launch`` that keep the page local.

    Args:
        gradio: The imported module.
        examples: The only folder whose files the server may send, beside uploads.
    """
    return {
        "server_name": HOST,
        "share": False,
        "quiet": True,
        "show_error": True,
        "max_file_size": MAX_UPLOAD,
        "allowed_paths": [str(examples)],
        "css": _CSS,
        "theme": gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        "footer_links": [],
    }


def _upload_path(payload: Any) -> str | None:
    """Return the path of an uploaded file, or ``None`` if nothing was uploaded."""
    return payload.path if payload else None


def respond(
    networks: Mapping[str, Network], path: str | None, name: str
) -> tuple[str, NDArray[np.uint8] | None]:
    """Classify an uploaded image and draw its heat map.

    Args:
        networks: Classifiers by name.
        path: The uploaded file; ``None`` if there is none.
        name: Key of the chosen classifier.

    Returns:
        The answer as HTML, and the image with the heat map over it, uint8 ``(S, S, 3)``; ``None``
        instead of the latter if there is no image or it cannot be read.
    """
    if path is None:
        return _status("Waiting for a picture"), None
    network = networks[name]
    start = time.perf_counter()
    try:
        image = network.preprocess(read_picture(Path(path), "This file"))
    except PictureError as error:
        return _status(f"{error}.".replace(":", "", 1)), None
    (explanation,) = explain(network, image[None])
    seconds = time.perf_counter() - start
    prediction = decide(network, path, explanation.scores)
    label = int(explanation.scores.probability >= network.threshold)
    heat_map = overlay(image, explanation.for_class(label))
    return _status(sentence(prediction), f"{1000 * seconds:.0f} ms, {printable(name)}"), heat_map


def sentence(prediction: Prediction) -> str:
    """Format a prediction as a sentence for the page."""
    if prediction.status == "neither":
        return "Neither: unlike anything that this classifier was trained on"
    answer = f"{prediction.class_name}, {prediction.probability:.1%}"
    return f"Unsure: perhaps {answer}" if prediction.status == "unsure" else answer


def _status(text: str, note: str = "") -> str:
    """Format text as an HTML status element, which screen readers read out when it changes."""
    small = f"<small>{html.escape(note)}</small>" if note else ""
    return f'<div class="answer" role="status" aria-live="polite">{html.escape(text)}{small}</div>'
