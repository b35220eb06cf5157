"""Run exported ONNX files as classifiers with ONNX Runtime; torch is not imported."""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from horsehuman.decision import Scores
from horsehuman.errors import HorseHumanError, is_out_of_memory, os_errors, printable

log = logging.getLogger(__name__)

#: Version of the export format. It increases when older code cannot read newer files.
FORMAT = 2

#: Name of the file's input.
INPUT = "pictures"

#: Names of the file's outputs.
OUTPUTS = ("logit", "probability", "neither", "both")

# Those of format 1. The third is a distance: from 1 on the image is of neither class.
_OUTPUTS_OF_FORMAT_1 = ("logit", "probability", "strangeness")

# The key ``location`` of a reference to a file with external data (``TensorProto.external_data`` in
# ``onnx.proto``), after the last byte of its length; no export has it.
_EXTERNAL_KEY = re.compile(rb"[\x00\x08]location")

#: Metadata key of the file's digest.
DIGEST = "horsehuman_digest"


class OnnxClassifier:
    """A :class:`~horsehuman.decision.Classifier` that runs a file written by ``horsehuman export``.

    Args:
        path: The ONNX file. No other file is read.

    Attributes:
        class_names: Names of class 0 and class 1.
        threshold: Smallest probability of class 1, in (0, 1), at which an image is of class 1.
        confidence_threshold: Probability of the predicted class, in [0.5, 1), below which a
            prediction is unsure.

    Raises:
        HorseHumanError: If ONNX Runtime is not installed, or the file cannot be read, is damaged
            or was not written by ``horsehuman export``.
    """

    def __init__(self, path: Path) -> None:
        name = printable(path)
        try:
            import onnxruntime
        except ImportError as error:
            raise HorseHumanError(f"{name} needs ONNX Runtime: pip install onnxruntime") from error
        with os_errors("read", path):
            content = path.read_bytes()
        options, provider = onnxruntime.SessionOptions(), "CPUExecutionProvider"
        options.log_severity_level = 4  # fatal errors only
        options.add_session_config_entry("session.load_model_format", "ONNX")
        fault = HorseHumanError(f"{name} is damaged or not a file of horsehuman: export it again")
        if _EXTERNAL_KEY.search(content):
            reason = "may read other files (external data): not opened"
            raise HorseHumanError(f"{name} {reason}; export it again")
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=[provider])
        except Exception as error:  # ONNX Runtime raises many types for damaged or foreign files.
            if is_out_of_memory(error):
                raise
            raise fault from error
        try:
            metadata = self._session.get_modelmeta().custom_metadata_map
            version, digest = metadata["horsehuman_format"], metadata.get(DIGEST)
            self._outputs: tuple[str, ...] = OUTPUTS
            confidence = "confidence_threshold"
            if version == "1":
                self._outputs, confidence = _OUTPUTS_OF_FORMAT_1, "certain_from"
                log.warning("%s has format 1: it cannot say both; export it again", name)
            elif version != str(FORMAT):
                reason = f"has format {printable(version)}, not {FORMAT}"
                raise HorseHumanError(f"{name} {reason}: export it again")
            first, second = json.loads(metadata["class_names"])
            self.class_names = str(first), str(second)
            self.threshold = float(metadata["threshold"])
            self.confidence_threshold = float(metadata[confidence])
        except (KeyError, RecursionError, TypeError, ValueError) as error:
            raise fault from error
        names = {entry.name for entry in self._session.get_inputs() + self._session.get_outputs()}
        is_damaged = digest and digest_of(content, digest) != digest
        if is_damaged or not names >= {INPUT, *self._outputs}:
            raise fault

    def predict_batch(self, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """Run the file on a batch.

        Args:
            images: uint8 ``(N, 3, H, W)``, RGB.

        Returns:
            Calibrated logits, probabilities of class 1 (0 to 1), and the logits of *neither* and
            *both* (from 0 on they hold; -1 without such an output); float32 ``(N,)`` each.
        """
        names = list(self._outputs)
        outputs: list[NDArray[np.float32]] = self._session.run(names, {INPUT: images})
        if len(outputs) == len(_OUTPUTS_OF_FORMAT_1):
            outputs = [*outputs[:2], outputs[2] - 1, np.full_like(outputs[2], -1)]
        return outputs

    def preprocess(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return an image ``(H, W, 3)`` as a batch ``(1, 3, H, W)``; the file itself resizes it."""
        return np.ascontiguousarray(image.transpose(2, 0, 1))[None]

    def score(self, images: Sequence[Any]) -> list[Scores]:
        """Score preprocessed images one at a time, because their sizes differ."""
        return [Scores(*np.concatenate(self.predict_batch(image)).tolist()) for image in images]


def digest_of(content: bytes, digest: str) -> str:
    """Return the SHA-256 in hex of a file that contains its own digest.

    Args:
        content: The file's bytes.
        digest: The digest that the file contains, 64 hex digits; its first occurrence is replaced
            by zeros before hashing.
    """
    return hashlib.sha256(content.replace(digest.encode(), b"0" * 64, 1)).hexdigest()
