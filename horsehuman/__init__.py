"""Horse or human: two PyTorch picture classifiers with everything in the box.

Importing this package imports nothing heavy; a public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from horsehuman.errors import HorseHumanError

if TYPE_CHECKING:
    from horsehuman.checkpoint import load_classifier
    from horsehuman.data.datamodule import HorseHumanDataModule
    from horsehuman.models.classifier import CNNClassifier, InceptionClassifier
    from horsehuman.pictures import read_picture
    from horsehuman.prediction import Prediction, predict

__version__ = "0.1.0"

__all__ = [
    "CNNClassifier",
    "HorseHumanDataModule",
    "HorseHumanError",
    "InceptionClassifier",
    "Prediction",
    "__version__",
    "load_classifier",
    "predict",
    "read_picture",
]

_HOMES = {
    "CNNClassifier": "horsehuman.models.classifier",
    "HorseHumanDataModule": "horsehuman.data.datamodule",
    "InceptionClassifier": "horsehuman.models.classifier",
    "load_classifier": "horsehuman.checkpoint",
    "Prediction": "horsehuman.prediction",
    "predict": "horsehuman.prediction",
    "read_picture": "horsehuman.pictures",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
