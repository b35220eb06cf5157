"""Export a classifier as one file for other programs, and compare the file with the network.

The exported file contains preprocessing, network and calibration: it takes uint8 images of any size
and returns calibrated logits, probabilities and strangeness.
"""

from __future__ import annotations

import importlib.util
import json
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

#: Values of ``--format``, and the packages that each needs in addition to this package's own.
FORMATS = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "torch": ()}

#: Largest accepted difference of probabilities and of strangeness between a network and its
#: exported file. Both round resized images to integers, and operations in another order change
#: the rounding of a few pixels.
TOLERANCE = 2e-3

#: Heights and widths in pixels of the images that both are compared on.
SIZES = ((300, 300), (96, 96), (224, 310), (480, 640), (75, 50), (1, 1))

#: An exported file as a function: uint8 ``(N, 3, H, W)`` to one array ``(N,)`` for each output.
ExportedFunction = Callable[[Tensor], Sequence[Any]]


def export(model: str, export_format: str, out: Path, *, force: bool) -> float:
    """Write a classifier as one file after comparing it with the network on real images.

    Args:
        model: See :func:`~horsehuman.models.checkpoint.load_classifier`.
        export_format: One of :data:`FORMATS`.
        out: File to write.
        force: Whether to replace ``out`` if it exists.

    Returns:
        The largest absolute difference of probabilities and strangeness.

    Raises:
        HorseHumanError: If a package that the format needs is not installed, the file cannot be
            written, or the difference is above :data:`TOLERANCE`.
    """
    check_choice("--format", export_format, list(FORMATS))
    required = FORMATS[export_format]
    if missing := [name for name in required if importlib.util.find_spec(name) is None]:
        raise HorseHumanError(
            f"--format {export_format} needs {', '.join(missing)}: pip install -e '.[export]'"
        )
    check_output_file(out, force=force)
    module = ExportedNetwork(load_classifier(model))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exported"
        exported = (_to_onnx if export_format == "onnx" else _to_torch)(module, path)
        difference = largest_difference(module, exported)
        if not difference <= TOLERANCE:
            raise HorseHumanError(
                "the exported file is not written: its probabilities or strangeness differ by "
                f"{difference:.2g} from the network's, more than {TOLERANCE:g}; please report it "
                "with the versions of your packages"
            )
        data = path.read_bytes()
    try:
        write_bytes(out, data)
    except OSError as error:
        raise HorseHumanError(f"cannot write --out {printable(out)}: {error.strerror}") from error
    return difference


class ExportedNetwork(nn.Module):
    """The computation of an exported file: a network with its calibration and its neither score.

    Args:
        network: The network; it is switched to eval mode.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network.eval()

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the outputs of the exported file; the argument's name is that of its input.

        Args:
            pictures: uint8 ``(N, 3, H, W)``.

        Returns:
            Calibrated logits, probabilities of class 1 (0 to 1) and strangeness, which is the
            neither score (1 and above is neither class); float32 ``(N,)`` each.
        """
        return self.network.score_features(
            self.network.pool_features(self.network.forward_features(pictures))
        )


def metadata(network: Network) -> dict[str, str]:
    """Return the metadata of an exported file: its format, and the network's decision settings."""
    return {
        "horsehuman_format": str(FORMAT),
        "class_names": json.dumps(network.class_names),
        "threshold": str(network.threshold),
        "certain_from": str(network.confidence_threshold),
    }


def largest_difference(module: ExportedNetwork, exported: ExportedFunction) -> float:
    """Compare an exported file with its network on real images of :data:`SIZES`.

    Batches have one to four images.

    Args:
        module: The network.
        exported: The exported file as a function.

    Returns:
        The largest absolute difference of probabilities and strangeness; infinite if one is NaN.
    """
    folder = image_root("box") / "train"
    paths = [sorted((folder / name).iterdir())[0] for name in ("horses", "humans")]
    images = [torch.from_numpy(read_picture(path)).permute(2, 0, 1) for path in paths]
    largest = 0.0
    for index, size in enumerate(SIZES):
        resized = nn.functional.interpolate(torch.stack(images).float(), size, mode="bilinear")
        batch = resized.round().to(torch.uint8).repeat(2, 1, 1, 1)[index % 4 :]
        with torch.inference_mode():
            expected = module(batch)
        for values, others in zip(expected[1:], exported(batch)[1:], strict=True):
            difference = float(np.abs(values.numpy() - np.asarray(others)).max())
            largest = max(largest, difference) if difference == difference else float("inf")
    return largest


def _to_onnx(module: ExportedNetwork, path: Path) -> ExportedFunction:
    """Write an ONNX file with metadata and digest, and return it as a function."""
    dynamic = torch.export.Dim.DYNAMIC  # Older exporters refuse a named dimension with min=1.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The exporter warns about its own internals.
        program = torch.onnx.export(
            module,
            (_example(),),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes={INPUT: {0: dynamic, 2: dynamic, 3: dynamic}},
        )
    assert program is not None
    program.model.metadata_props.update({**metadata(module.network), DIGEST: "0" * 64})
    program.save(path)
    content = _without_paths(path.read_bytes())
    path.write_bytes(content.replace(b"0" * 64, digest_of(content, "0" * 64).encode(), 1))
    classifier = OnnxClassifier(path)
    return lambda images: classifier.run(images.numpy())


def _without_paths(content: bytes) -> bytes:
    """Remove the exporter's notes from an ONNX file: they name source files of this machine."""
    import onnx

    model = onnx.load_from_string(content)
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del part.metadata_props[:]
    cleaned: bytes = model.SerializeToString()
    return cleaned


def _to_torch(module: ExportedNetwork, path: Path) -> ExportedFunction:
    """Write a file of ``torch.export`` with metadata, and return it as a function."""
    dim = torch.export.Dim
    dynamic = {0: dim("n", min=1), 2: dim("height", min=1), 3: dim("width", min=1)}
    program = torch.export.export(module, (_example(),), dynamic_shapes={"pictures": dynamic})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # It names source files of this machine.
    archive = path.with_suffix(".pt2")  # torch.export.save requires this suffix.
    extra = {f"{name}.txt": value for name, value in metadata(module.network).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It warns about tensors that are not on the CPU.
        torch.export.save(program, archive, extra_files=extra)
    archive.rename(path)
    with path.open("rb") as file:
        loaded = torch.export.load(file).module()
    return lambda images: [tensor.detach() for tensor in loaded(images)]


def _example() -> Tensor:
    """Return the batch to trace with: uint8 ``(2, 3, 310, 290)``."""
    return torch.zeros(2, 3, 310, 290, dtype=torch.uint8)
