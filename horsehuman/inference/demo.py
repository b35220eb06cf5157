"""Serve a local web page that classifies an uploaded image and shows a heat map of the evidence.

The page is built with Gradio. It is served on the loopback interface only, and neither the page
nor the server sends a request to another host.
"""

import html
import logging
import os
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from horsehuman.data.archives import image_root
from horsehuman.data.images import PictureError, read_picture
from horsehuman.decision import Prediction, decide
from horsehuman.errors import HorseHumanError, printable
from horsehuman.inference.explain import explain_answer, overlay
from horsehuman.models.base import Network
from horsehuman.models.checkpoint import load_classifier
from horsehuman.plots import Image
from horsehuman.runtime import BUNDLED

log = logging.getLogger(__name__)

#: Address that the page is served on: the loopback interface.
HOST = "127.0.0.1"

#: Largest upload, in Gradio's notation, and largest number of requests that wait in the queue.
MAX_UPLOAD, MAX_WAITING = "20mb", 32

#: Interval between deletions of uploaded files, and age above which one is deleted, in seconds.
DELETIONS = (300, 300)

#: Example images on the page, below the folder of the bundled test set.
EXAMPLES = ("horses/horse1-105.webp", "horses/horse3-498.webp", "humans/valhuman01-00.webp")

# An answer and a note below it. Screen readers read a status out when it changes.
_ANSWER = (
    '<div class="answer" role="status" aria-live="polite" style="font-size: 1.5rem">{}'
    '<small style="display: block; font-size: 1rem; opacity: .8">{}</small></div>'
)


def serve(model: str, port: int, *, browser: bool) -> None:
    """Serve the page until the process is interrupted.

    Args:
        model: Name, run or checkpoint of the classifier that is selected at first; the bundled
            classifiers are offered beside it.
        port: TCP port.
        browser: Whether to open the page in a browser.

    Raises:
        HorseHumanError: If Gradio is not installed, the model cannot be loaded or the port cannot
            be used.
    """
    # Unless this is set before the import, Gradio reports the start to its own server.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise HorseHumanError("the page needs Gradio: pip install -e '.[demo]'") from error

    # Gradio calls it for every malformed request. This process serves only the page, so that no
    # other code is affected.
    traceback.print_exc = log_exception
    examples = image_root("box") / "test"
    page = build_page(gradio, model, examples)
    try:
        page.launch(
            server_name=HOST,
            server_port=port,
            inbrowser=browser,
            prevent_thread_lock=True,
            share=False,
            quiet=True,
            show_error=True,
            max_file_size=MAX_UPLOAD,
            allowed_paths=[str(examples)],  # the only files that are sent, beside uploads
            css="footer { display: none !important }",
            theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            footer_links=[],
        )
    except OSError as error:  # Gradio's text names its own options.
        raise HorseHumanError(f"--port {port} is in use or not permitted: use another") from error
    print(f"http://{HOST}:{port}  (press Ctrl-C to stop)", flush=True)
    page.block_thread()


def log_exception(*unused: object, **options: object) -> None:
    """Log the current exception as one line; a replacement for ``traceback.print_exc``."""
    log.warning("request failed (%s)", traceback.format_exc(limit=0).splitlines()[-1])


def build_page(gradio: Any, model: str, examples: Path) -> Any:
    """Build the page, a ``gradio.Blocks``.

    Args:
        gradio: The imported module.
        model: Name, run or checkpoint of the classifier that is selected at first.
        examples: Folder of the example images.

    Raises:
        HorseHumanError: If the model cannot be loaded.
    """
    networks = {name: load_classifier(name) for name in dict.fromkeys((model, *BUNDLED))}

    title = "Horse or human?"
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=DELETIONS) as page:
        gradio.Markdown(f"# {title}\nDrop, paste or take a picture, or choose one below.")
        with gradio.Row():
            with gradio.Column(min_width=300):
                picture = gradio.Image(
                    label="Picture", type="filepath", sources=["upload", "webcam", "clipboard"],
                    image_mode=None, height=320, alt_text="The picture to classify",
                )  # fmt: skip
                # Gradio's own preprocessing decodes the file and fails with a traceback.
                picture.preprocess = lambda payload: payload.path if payload else None
                choice = gradio.Radio(list(networks), value=model, label="Classifier")
                gradio.Examples([[str(examples / name)] for name in EXAMPLES], [picture])
            with gradio.Column(min_width=300):
                text = gradio.HTML(_status("Waiting for a picture"), label="Answer")
                heat = gradio.Image(
                    label="Evidence for the answer (red: strong)", interactive=False,
                    height=320, buttons=[], alt_text="The picture, with the evidence in red",
                )  # fmt: skip
        answer, inputs, outputs = partial(respond, networks), [picture, choice], [text, heat]
        for event, access in ((picture.change, "public"), (choice.change, "private")):
            options = {"show_progress": "minimal", "api_name": "answer", "api_visibility": access}
            event(answer, inputs, outputs, **options)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=1)
    return page


def respond(networks: dict[str, Network], path: str | None, name: str) -> tuple[str, Image | None]:
    """Classify an uploaded image and draw its heat map.

    Args:
        networks: Classifiers by name.
        path: The uploaded file; ``None`` if there is none.
        name: Key of the chosen classifier.

    Returns:
        The answer as HTML, and the image with the heat map over it, uint8 ``(S, S, 3)``, or two
        such side by side if the image shows both classes; ``None`` instead of the latter if there
        is no image or it cannot be read.
    """
    if path is None:
        return _status("Waiting for a picture"), None
    network, start = networks[name], time.perf_counter()
    try:
        image = network.preprocess(read_picture(Path(path), "this file"))
    except PictureError as error:
        message = str(error)
        return _status(f"{message[:1].upper()}{message[1:]}."), None
    scores, heats = explain_answer(network, image, layer=None)
    note = f"{1000 * (time.perf_counter() - start):.0f} ms, {printable(name)}"
    pictures = [overlay(image, heat) for heat in heats.values()]
    answer = answer_text(decide(network, path, scores), network.class_names)
    return _status(answer, note), np.concatenate(pictures, axis=1)


def answer_text(prediction: Prediction, class_names: tuple[str, str]) -> str:
    """Format a prediction as a sentence for the page."""
    if prediction.status == "neither":
        return f"Neither {' nor '.join(class_names)}"
    if prediction.status == "both":
        return f"Both {' and '.join(class_names)} (evidence for each, in this order)"
    answer = f"{prediction.class_name}, {prediction.probability:.1%}"
    return f"Unsure: perhaps {answer}" if prediction.status == "unsure" else answer


def _status(text: str, note: str = "") -> str:
    """Format text as an HTML status element, with a smaller note below it."""
    return _ANSWER.format(html.escape(text), html.escape(note))
