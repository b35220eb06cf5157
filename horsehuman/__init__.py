"""Horse or human: two PyTorch image classifiers with their data and weights bundled.

Importing the package does not import torch: a public name is imported when it is first used (PEP
562).
"""

import importlib
from typing import TYPE_CHECKING, Any

from horsehuman.errors import HorseHumanError

if TYPE_CHECKING:
    from horsehuman.data.datamodule import HorseHumanDataModule
    from horsehuman.data.images import read_picture
    from horsehuman.decision import Prediction
    from horsehuman.inference.predict import predict
    from horsehuman.models.checkpoint import load_classifier
    from horsehuman.training.module import CNNClassifier, InceptionClassifier

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

# The module that defines each public name, for __getattr__.
_MODULES = {
    "CNNClassifier": "horsehuman.training.module",
    "HorseHumanDataModule": "horsehuman.data.datamodule",
    "InceptionClassifier": "horsehuman.training.module",
    "load_classifier": "horsehuman.models.checkpoint",
    "Prediction": "horsehuman.decision",
    "predict": "horsehuman.inference.predict",
    "read_picture": "horsehuman.data.images",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
