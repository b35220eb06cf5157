"""Run exported ONNX files as classifiers with ONNX Runtime; torch is not imported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from horsehuman.decision import Scores
from horsehuman.errors import HorseHumanError, printable

#: Version of the export format. It increases when older code cannot read newer files.
FORMAT = 1

#: Names of the file's input and of its outputs.
INPUT, OUTPUTS = "pictures", ("logit", "probability", "strangeness")

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
        try:
            import onnxruntime
        except ImportError as error:
            raise HorseHumanError(
                f"--model {printable(path)} needs ONNX Runtime: pip install onnxruntime"
            ) from error
        try:
            content = path.read_bytes()
        except OSError as error:
            raise HorseHumanError(f"cannot read {printable(path)}: {error.strerror}") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(
                content, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises many types for damaged or foreign files.
            raise HorseHumanError(
                f"{printable(path)} is damaged or not an ONNX file: export it again"
            ) from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        self._check_digest(path, content, metadata.get(DIGEST, ""))
        self._read_metadata(path, metadata)

    def _check_digest(self, path: Path, content: bytes, digest: str) -> None:
        """Raise if a file has a digest that does not match its content."""
        if digest and (len(digest) != 64 or digest_of(content, digest) != digest):
            raise HorseHumanError(f"{printable(path)} has been damaged: copy or export it again")

    def _read_metadata(self, path: Path, metadata: dict[str, str]) -> None:
        """Read the decision settings; raise if the file's format, input or outputs are others."""
        version = metadata.get("horsehuman_format")
        if version != str(FORMAT):
            reason = "was not written by horsehuman"
            if version:
                reason = f"has format {printable(version)}, not {FORMAT}"
            raise HorseHumanError(f"{printable(path)} {reason}: write it with horsehuman export")
        try:
            first, second = json.loads(metadata["class_names"])
            self.class_names = str(first), str(second)
            self.threshold = float(metadata["threshold"])
            self.confidence_threshold = float(metadata["certain_from"])
            outputs = {entry.name for entry in self._session.get_outputs()}
            if self._session.get_inputs()[0].name != INPUT or not outputs >= set(OUTPUTS):
                raise ValueError
        except (KeyError, ValueError, TypeError) as error:
            raise HorseHumanError(
                f"{printable(path)} has missing or invalid metadata: export it again"
            ) from error

    def run(self, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """Run the file on a batch.

        Args:
            images: uint8 ``(N, 3, H, W)``, RGB.

        Returns:
            Calibrated logits, probabilities of class 1 (0 to 1) and neither scores (1 and above
            is neither class); float32 ``(N,)`` each.
        """
        outputs: list[NDArray[np.float32]] = self._session.run(list(OUTPUTS), {INPUT: images})
        return outputs

    def preprocess(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return an image ``(H, W, 3)`` as a batch ``(1, 3, H, W)``; the file itself resizes it."""
        return np.ascontiguousarray(image.transpose(2, 0, 1))[None]

    def score(self, images: Sequence[Any]) -> list[Scores]:
        """Score preprocessed images one at a time, because their sizes differ."""
        outputs = [self.run(image) for image in images]
        return [Scores(*(float(values[0]) for values in output)) for output in outputs]


def digest_of(content: bytes, digest: str) -> str:
    """Return the SHA-256 in hex of a file that contains its own digest.

    Args:
        content: The file's bytes.
        digest: The digest that the file contains, 64 hex digits; its first occurrence is replaced
            by zeros before hashing.
    """
    return hashlib.sha256(content.replace(digest.encode(), b"0" * 64, 1)).hexdigest()
