"""Export a classifier as an ONNX file for other programs, and compare it with the network.

The exported file contains preprocessing, network and calibration: it takes uint8 images of any size
and returns calibrated logits, probabilities, and the logits of *neither* and *both*.
"""

import importlib.util
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from horsehuman.data.archives import image_root
from horsehuman.data.images import read_picture
from horsehuman.errors import HorseHumanError, os_errors, printable
from horsehuman.inference.onnx import DIGEST, FORMAT, INPUT, OUTPUTS, OnnxClassifier, digest_of
from horsehuman.models.base import Network
from horsehuman.models.checkpoint import load_classifier
from horsehuman.run_dir import check_output_file, write_bytes

log = logging.getLogger(__name__)

#: Packages that the export needs in addition to this package's own.
PACKAGES = ("onnx", "onnxruntime", "onnxscript")

#: Largest accepted difference of probabilities between a network and its exported file; of the
#: logits of *neither* and *both*, which have a larger range, ten times as much. Both round resized
#: images to integers, and operations in another order change the rounding of a few pixels.
TOLERANCE = 2e-3

#: Heights and widths in pixels of the images that both are compared on.
SIZES = ((300, 300), (96, 96), (224, 310), (480, 640), (75, 50), (1, 1))


def export_and_report(model: str, out: Path, *, force: bool) -> None:
    """Write a classifier as an ONNX file after comparing it with the network on real images.

    Its size and the largest difference of its outputs are printed.

    Args:
        model: See :func:`~horsehuman.models.checkpoint.load_classifier`.
        out: File to write.
        force: Whether to replace ``out`` if it exists.

    Raises:
        HorseHumanError: If one of :data:`PACKAGES` is not installed, the file cannot be written,
            or the difference is above :data:`TOLERANCE`.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise HorseHumanError(f"export needs {', '.join(missing)}: pip install -e '.[export]'")
    check_output_file(out, force=force)
    module = ExportedNetwork(load_classifier(model))
    log.info("exporting and comparing: some ten seconds")
    content = _to_onnx(module)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "exported.onnx"
        path.write_bytes(content)
        difference = largest_difference(module, OnnxClassifier(path))
    if not difference <= TOLERANCE:  # also true for NaN
        excess = f"probabilities differ by {difference:.2g} from the network's, over {TOLERANCE:g}"
        raise HorseHumanError(f"export cancelled: {excess}; please report this with your versions")
    with os_errors("write", f"--out {out}"):
        write_bytes(out, content)
    print(f"{printable(out)}: {len(content) / 1e6:.1f} MB")
    largest = f"at most {difference:.1g}, other outputs by {10 * difference:.1g}"
    print(f"probabilities differ from the checkpoint's by {largest}")


class ExportedNetwork(nn.Module):
    """The computation of an exported file: a network with its calibration and all its scores.

    Args:
        network: The network; it is switched to eval mode.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network.eval()

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute the outputs of the exported file.

        ``pictures`` must equal ``onnx.INPUT``: the exporter takes the name from this signature.

        Args:
            pictures: uint8 ``(N, 3, H, W)``.

        Returns:
            See :meth:`~horsehuman.inference.onnx.OnnxClassifier.predict_batch`.
        """
        return self.network.score_maps(self.network.forward_features(pictures))


def largest_difference(module: ExportedNetwork, classifier: OnnxClassifier) -> float:
    """Compare an exported file with its network on real images of :data:`SIZES`.

    Batches have one to four images.

    Args:
        module: The network.
        classifier: The exported file.

    Returns:
        The largest absolute difference of probabilities, or a tenth of that of the logits of
        *neither* and *both*; NaN if one is NaN.
    """
    folders = [image_root("box") / "train" / name for name in ("horses", "humans")]
    pictures = [read_picture(min(folder.iterdir())) for folder in folders]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float()
    differences = []
    for index, size in enumerate(SIZES):
        batch_size = 4 - index % 4
        resized = nn.functional.interpolate(images, size, mode="bilinear")
        batch = resized.round().to(torch.uint8).repeat(2, 1, 1, 1)[-batch_size:]
        with torch.inference_mode():
            expected = module(batch)
        exported = classifier.predict_batch(batch.numpy())
        gaps = np.abs(np.stack(expected[1:]) - np.stack(exported[1:])).max(1)
        differences.append((gaps / [1, 10, 10]).max())
    return float(np.max(differences))


def _to_onnx(module: ExportedNetwork) -> bytes:
    """Return the content of an ONNX file with decision settings and digest in its metadata."""
    # DYNAMIC lets the exporter choose bounds; older ones refuse a named dimension with min=1.
    dynamic = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The exporter warns about its own internals.
        program: Any = torch.onnx.export(
            module,
            (torch.zeros(2, 3, 310, 290, dtype=torch.uint8),),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            dynamic_shapes={INPUT: {0: dynamic, 2: dynamic, 3: dynamic}},
        )
    network, placeholder = module.network, "0" * 64
    program.model.metadata_props.update(
        horsehuman_format=str(FORMAT),
        class_names=json.dumps(network.class_names),
        threshold=str(network.threshold),
        confidence_threshold=str(network.confidence_threshold),
        **{DIGEST: placeholder},
    )
    model = program.model_proto
    for part in (*model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del part.metadata_props[:]  # The exporter's notes name source files of this machine.
    content: bytes = model.SerializeToString()
    return content.replace(placeholder.encode(), digest_of(content, placeholder).encode(), 1)
