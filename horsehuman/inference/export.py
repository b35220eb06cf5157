"""A classifier as one file for other programs: pictures of any size in, answers out."""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from horsehuman.data.archives import image_root
from horsehuman.data.images import read_picture
from horsehuman.errors import HorseHumanError, check_choice, printable
from horsehuman.inference.onnx import DIGEST, FORMAT, INPUT, OUTPUTS, OnnxClassifier, digest_of
from horsehuman.models.base import Network
from horsehuman.models.checkpoint import load_classifier
from horsehuman.run_dir import check_output_file, write_bytes

log = logging.getLogger(__name__)

#: What ``--format`` takes, and what it needs beside the package.
FORMATS = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "torch": ()}

#: Largest difference of probabilities between a network and its exported file that passes. Both
#: round resized pictures to whole levels, and arithmetic in another order rounds a few otherwise.
TOLERANCE = 2e-3

#: Height and width of the pictures that both are compared on.
SIZES = ((300, 300), (96, 96), (224, 310), (480, 640), (75, 50), (1, 1))

Run = Callable[[Tensor], Sequence[Any]]


class ExportedNetwork(nn.Module):
    """A network with its calibration and its answers: what an exported file computes.

    Args:
        network: Which one.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network.eval()

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 ``(N, 3, H, W)`` to logits, probabilities of class 1 and strangeness, ``(N,)``."""
        return self.network.score_features(
            self.network.pool_features(self.network.forward_features(pictures))
        )


def export(model: str, form: str, out: Path, *, force: bool) -> float:
    """Write a classifier as one file, and compare it with the network on real pictures.

    Args:
        model: See :func:`~horsehuman.checkpoint.load_classifier`.
        form: One of :data:`FORMATS`.
        out: The file.
        force: Write over it.

    Returns:
        The largest difference of probabilities that was seen.

    Raises:
        HorseHumanError: Something that the format needs is not installed, the file cannot be
            written, or it answers otherwise than the network.
    """
    check_choice("--format", form, list(FORMATS))
    if missing := [name for name in FORMATS[form] if importlib.util.find_spec(name) is None]:
        raise HorseHumanError(
            f"--format {form} needs {', '.join(missing)}: pip install -e '.[export]'"
        )
    check_output_file(out, force=force)
    network = load_classifier(model)
    module = ExportedNetwork(network)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exported"
        run = (_to_onnx if form == "onnx" else _to_torch)(module, path)
        found = largest_difference(module, run)
        if not found <= TOLERANCE:
            raise HorseHumanError(
                f"the exported file's probabilities or strangeness differ by {found:.2g} from the "
                f"network's, more than {TOLERANCE:g}: it is not written; please report it with "
                "your versions"
            )
        data = path.read_bytes()
    try:
        write_bytes(out, data)
    except OSError as error:
        raise HorseHumanError(f"cannot write --out {printable(out)}: {error.strerror}") from error
    return found


def metadata(network: Network) -> dict[str, str]:
    """What a program must know of a file to make answers of its numbers; all values are text."""
    return {
        "horsehuman_format": str(FORMAT),
        "class_names": json.dumps(network.class_names),
        "threshold": str(network.threshold),
        "certain_from": str(network.confidence_threshold),
    }


def largest_difference(module: ExportedNetwork, run: Run) -> float:
    """Of probabilities and strangeness, on real pictures of many sizes, 1 to 4 at a time."""
    box = image_root("box") / "train"
    paths = [sorted((box / name).iterdir())[0] for name in ("horses", "humans")]
    pictures = [torch.from_numpy(read_picture(path)).permute(2, 0, 1) for path in paths]
    largest = 0.0
    for index, size in enumerate(SIZES):
        both = nn.functional.interpolate(torch.stack(pictures).float(), size, mode="bilinear")
        batch = both.round().to(torch.uint8).repeat(2, 1, 1, 1)[index % 4 :]
        with torch.inference_mode():
            mine = module(batch)
        for own, other in zip(mine[1:], run(batch)[1:], strict=True):
            difference = float(np.abs(own.numpy() - np.asarray(other)).max())
            largest = max(largest, difference) if difference == difference else float("inf")
    return largest


def _example() -> Tensor:
    """A batch to trace with."""
    return torch.zeros(2, 3, 310, 290, dtype=torch.uint8)


def _to_onnx(module: ExportedNetwork, path: Path) -> Run:
    free = torch.export.Dim.DYNAMIC  # a named one of 1 and more is refused by older exporters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter grumbles about itself
        program = torch.onnx.export(
            module,
            (_example(),),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes={INPUT: {0: free, 2: free, 3: free}},
        )
    assert program is not None
    program.model.metadata_props.update({**metadata(module.network), DIGEST: "0" * 64})
    program.save(path)
    content = _without_paths(path.read_bytes())
    path.write_bytes(content.replace(b"0" * 64, digest_of(content, "0" * 64).encode(), 1))
    classifier = OnnxClassifier(path)
    return lambda pictures: classifier.run(pictures.numpy())


def _without_paths(content: bytes) -> bytes:
    """Take out of an ONNX file which lines of which files of this machine each step comes from."""
    import onnx

    model = onnx.load_from_string(content)
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del part.metadata_props[:]
    written: bytes = model.SerializeToString()
    return written


def _to_torch(module: ExportedNetwork, path: Path) -> Run:
    sizes = torch.export.Dim
    free = {0: sizes("n", min=1), 2: sizes("height", min=1), 3: sizes("width", min=1)}
    program = torch.export.export(module, (_example(),), dynamic_shapes={"pictures": free})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names files of this machine
    archive = path.with_suffix(".pt2")  # torch.export.save wants this ending
    extra = {f"{name}.txt": value for name, value in metadata(module.network).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that are not on the CPU
        torch.export.save(program, archive, extra_files=extra)
    archive.rename(path)
    with path.open("rb") as file:
        loaded = torch.export.load(file).module()
    return lambda pictures: [tensor.detach() for tensor in loaded(pictures)]
