"""An exported classifier in ONNX Runtime; torch is not imported."""

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

#: Format of exported files; grows when older code could not read a newer file.
FORMAT = 1

#: Names in the file.
INPUT, OUTPUTS = "pictures", ("logit", "probability", "strangeness")

#: Under which name a file says its own digest.
DIGEST = "horsehuman_digest"


def digest_of(content: bytes, found: str) -> str:
    """SHA-256, in hex, of a file in which its own digest stands, that being taken for zeros."""
    return hashlib.sha256(content.replace(found.encode(), b"0" * 64, 1)).hexdigest()


class OnnxClassifier:
    """What ``horsehuman export`` wrote, as a :class:`~horsehuman.prediction.Classifier`.

    Args:
        path: The file. Nothing beside it is read.

    Raises:
        HorseHumanError: ONNX Runtime is missing, or the file is no exported classifier.
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
        except Exception as error:  # a damaged or foreign file may hold anything
            raise HorseHumanError(
                f"{printable(path)} is damaged, or no ONNX file: export it again"
            ) from error
        self._check(path, content)
        self._read_metadata(path, self._session.get_modelmeta().custom_metadata_map)

    def _check(self, path: Path, content: bytes) -> None:
        """Refuse a file that is not as it was written, whatever was changed in it."""
        found = self._session.get_modelmeta().custom_metadata_map.get(DIGEST, "")
        if found and (len(found) != 64 or digest_of(content, found) != found):
            raise HorseHumanError(f"{printable(path)} has been damaged: copy or export it again")

    def _read_metadata(self, path: Path, found: dict[str, str]) -> None:
        if found.get("horsehuman_format") != str(FORMAT):
            kind = found.get("horsehuman_format")
            told = f"has format {printable(kind)}, not {FORMAT}" if kind else "is another program's"
            raise HorseHumanError(f"{printable(path)} {told}: use what horsehuman export writes")
        try:
            first, second = json.loads(found["class_names"])
            self.class_names = str(first), str(second)
            self.threshold = float(found["threshold"])
            self.confidence_threshold = float(found["certain_from"])
            names = {entry.name for entry in self._session.get_outputs()}
            if self._session.get_inputs()[0].name != INPUT or not names >= set(OUTPUTS):
                raise ValueError
        except (KeyError, ValueError, TypeError) as error:
            raise HorseHumanError(
                f"{printable(path)} does not say what its numbers mean: export it again"
            ) from error

    def run(self, pictures: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """uint8 ``(N, 3, H, W)`` to logits, probabilities of class 1 and strangeness, ``(N,)``."""
        found: list[NDArray[np.float32]] = self._session.run(list(OUTPUTS), {INPUT: pictures})
        return found

    def preprocess(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """``(H, W, 3)`` as ``(1, 3, H, W)``; the file resizes it."""
        return np.ascontiguousarray(picture.transpose(2, 0, 1))[None]

    def score(self, pictures: Sequence[Any]) -> list[Scores]:
        """Answer one by one, since sizes differ."""
        found = [self.run(picture) for picture in pictures]
        return [Scores(*(float(values[0]) for values in each)) for each in found]
