"""Heat maps of the evidence in an image (HiResCAM), feature maps by layer, and their figures."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from horsehuman import plots
from horsehuman.data.datasets import decode
from horsehuman.data.images import WHITE_LEVEL, PictureError
from horsehuman.data.records import Record, evenly_spaced
from horsehuman.data.sources import expand_sources, read_source
from horsehuman.decision import Scores, decide
from horsehuman.errors import HorseHumanError, closest, printable
from horsehuman.models.base import Network, to_scores
from horsehuman.models.checkpoint import load_classifier
from horsehuman.run_dir import check_output_file, unused_path
from horsehuman.runtime import track

#: Number of images in a batch of :func:`heat_on_subject`.
BATCH_SIZE = 8

#: Largest number of images on a contact sheet.
MAX_IMAGES = 160

# RGB of vermilion, which colour-blind readers can distinguish from the colours of most images
# (Okabe and Ito 2008).
_HEAT_COLOUR = torch.tensor([213.0, 94.0, 0.0])

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Explanation:
    """The heat map and the scores of one image.

    Attributes:
        heat: float32 ``(S, S)``, where S is the network's image size: positive at locations that
            are evidence for class 1, negative at those that are evidence for class 0. With a
            linear head its sum is the logit minus the bias, up to the error of upscaling.
        scores: Calibrated logit, probability of class 1 and neither score of the image.
    """

    heat: Tensor
    scores: Scores

    def for_class(self, label: int) -> Tensor:
        """Return the evidence for a class, 0 or 1: float32 ``(S, S)``, at least 0."""
        return (self.heat if label else -self.heat).clamp_min(0)


def explain(network: Network, images: Tensor, layer: str | None = None) -> list[Explanation]:
    """Compute a heat map for each image with HiResCAM.

    HiResCAM (Draelos and Carin 2020, arXiv 2011.08891) multiplies the feature maps of a layer by
    the gradient of the logit and sums over channels. At the last feature maps, with average
    pooling and a linear head, it equals Grad-CAM (Selvaraju et al. 2017) and CAM (Zhou et al.
    2016) before rectification. Unlike Grad-CAM, it does not spread the gradient of a max pooling
    over all locations. The layer may therefore stand before a max pooling, where the feature maps
    are larger. At an earlier layer the heat map is sharper, but it does not sum to the logit: it
    shows the effect of small changes of the feature maps there.

    Args:
        network: The classifier; it is switched to eval mode.
        images: uint8 ``(N, 3, H, W)`` on the network's device.
        layer: Full name of a layer with feature maps, see :func:`find_layer`; by default the
            network's ``heat_layer``.

    Returns:
        One explanation per image, on the CPU, in order.
    """
    network.eval()
    size = network.image_size
    with torch.enable_grad(), _capture_outputs(network, layer or network.heat_layer) as outputs:
        scores = network.score_features(network.pool_features(network.forward_features(images)))
        gradients = torch.autograd.grad(scores[0].sum(), outputs)
    heat = torch.zeros(len(images), size, size)
    for variant, (maps, gradient) in enumerate(zip(outputs, gradients, strict=True)):
        small = (maps * gradient).sum(1, keepdim=True).detach()
        if variant and network.settings.get("mirror"):
            small = small.flip(3)  # The second variant of the CNN is the mirrored image.
        # Upscaling must preserve the sum, which is this variant's contribution to the logit.
        small *= small.shape[2] * small.shape[3] / size**2
        large = functional.interpolate(small, (size, size), mode="bilinear", align_corners=False)
        heat += large[:, 0].cpu()
    return [Explanation(*pair) for pair in zip(heat, to_scores(scores), strict=True)]


@contextlib.contextmanager
def _capture_outputs(network: Network, layer: str) -> Iterator[list[Tensor]]:
    """Collect a layer's outputs, one per call, as leaf tensors that the logits depend on."""
    outputs: list[Tensor] = []

    def replace_output(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        outputs.append(output.detach().clone().requires_grad_())
        return outputs[-1].clone()  # A ReLU that follows may work in place.

    handle = network.get_submodule(layer).register_forward_hook(replace_output)
    try:
        yield outputs
    finally:
        handle.remove()


@torch.inference_mode()
def activations(network: Network, image: Tensor) -> dict[str, Tensor]:
    """Compute the feature maps of all layers for one image.

    Args:
        network: The classifier; it is switched to eval mode.
        image: uint8 ``(3, H, W)`` on the network's device.

    Returns:
        Feature maps ``(C, H', W')`` by layer name, in the order of computation, for layers whose
        maps have more than one location. Where a network computes several variants of an image,
        such as scales, the maps are those of the first. Where an in-place ReLU follows a layer,
        the maps are those after the ReLU.
    """
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, module in network.named_modules():

        def store(module: nn.Module, inputs: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                outputs.setdefault(name, output[0])

        if "." in name and not name.startswith("normalize"):
            handles.append(module.register_forward_hook(store))
    try:
        network.eval()(image[None])
    finally:
        for handle in handles:
            handle.remove()
    return {name: maps for name, maps in outputs.items() if maps.shape[1] * maps.shape[2] > 1}


def stages(maps: Mapping[str, Tensor]) -> list[str]:
    """Return the name of the last outermost layer at each resolution.

    Args:
        maps: Feature maps by layer name, as :func:`activations` returns them.
    """
    last: dict[torch.Size, str] = {}
    for name, tensor in maps.items():
        size = tensor.shape[1:]
        if size not in last or name.count(".") <= last[size].count("."):
            last[size] = name
    return list(last.values())


def short_layer_name(layer: str) -> str:
    """Return a layer's name without the prefix that all layers of the backbone share."""
    return layer.removeprefix("backbone.trunk.")


def find_layer(network: Network, name: str) -> str:
    """Return the full name of a layer with feature maps.

    Args:
        network: The classifier.
        name: Its full name, or the end of it from a dot on, such as ``Mixed_6a``.

    Raises:
        HorseHumanError: If no layer or several layers match.
    """
    size = network.image_size
    maps = activations(network, torch.zeros(3, size, size, dtype=torch.uint8))
    name = name.removeprefix("network.")
    matches = [layer for layer in maps if layer == name or layer.endswith(f".{name}")]
    if name in maps or len(matches) == 1:
        return name if name in maps else matches[0]
    if matches:
        names = " | ".join(map(short_layer_name, matches[:4]))
        raise HorseHumanError(f"--layer {printable(name)} is ambiguous: use one such as {names}")
    hint = closest(name, {short_layer_name(layer) for layer in maps})
    names = " | ".join(map(short_layer_name, stages(maps)))
    raise HorseHumanError(
        f"--layer {printable(name)}: no such layer with feature maps{hint}: use one such as {names}"
    )


def overlay(image: Tensor, heat: Tensor) -> NDArray[np.uint8]:
    """Blend a heat map over an image.

    Args:
        image: uint8 ``(3, S, S)``.
        heat: ``(S, S)``, at least 0. Its 99th percentile and above get the full colour.

    Returns:
        uint8 ``(S, S, 3)``.
    """
    weight = 0.75 * (heat / heat.flatten().quantile(0.99).clamp_min(1e-12)).clamp(0, 1)
    blended = torch.lerp(image.float(), _HEAT_COLOUR.view(3, 1, 1), weight)
    return blended.round().to(torch.uint8).permute(1, 2, 0).numpy()


def heat_on_subject(
    network: Network, records: Sequence[Record], limit: int = 32
) -> dict[str, float] | None:
    """Measure how much of the evidence lies on the subject, for cut-outs on a white background.

    The foreground is every pixel with at least one channel below 245. An image is a cut-out if
    nine tenths of its border pixels are white, or all of them on at least three sides.

    Args:
        network: The classifier.
        records: Images. Those that are not cut-outs or cannot be read are skipped.
        limit: Largest number of images that are read, evenly spaced over ``records``.

    Returns:
        ``pictures``: the number of images that were measured. ``share of heat``: the mean share,
        0 to 1, of the evidence for the predicted class that lies on the foreground. ``share of
        area``: the mean share of the image that the foreground covers, 0 to 1, which is the
        expected share of heat if the evidence were spread evenly. ``None`` if no image could be
        measured.
    """
    step = max(1, -(-len(records) // limit))
    images, foregrounds = [], []
    for record in records[::step]:
        with contextlib.suppress(PictureError):
            image = decode(record.path, network.image_size)
            foreground = (image < WHITE_LEVEL).any(0)
            if _is_cut_out(foreground):
                images.append(image)
                foregrounds.append(foreground)
    shares = []
    for start in range(0, len(images), BATCH_SIZE):
        explanations = explain(network, torch.stack(images[start : start + BATCH_SIZE]))
        for explanation, mask in zip(explanations, foregrounds[start:], strict=False):
            heat = explanation.for_class(int(explanation.scores.probability >= network.threshold))
            if heat.any():
                shares.append((float(heat[mask].sum() / heat.sum()), float(mask.float().mean())))
    if not shares:
        return None
    heat_share, area = (math.fsum(values) / len(shares) for values in zip(*shares, strict=True))
    return {"pictures": len(shares), "share of heat": heat_share, "share of area": area}


def _is_cut_out(foreground: Tensor) -> bool:
    """Return whether a foreground mask, bool ``(S, S)``, is that of a cut-out on white."""
    sides = [foreground[0], foreground[-1], foreground[:, 0], foreground[:, -1]]
    white = 1 - torch.stack(sides).float().mean(1)
    return bool(foreground.sum() > 0 and (white.mean() >= 0.9 or (white == 1).sum() >= 3))


def explain_and_draw(
    model: str, sources: Sequence[str], layer: str | None, out: Path | None, *, force: bool
) -> bool:
    """Explain images and write the figure: the work of ``horsehuman explain``.

    The figure of one image shows the feature maps of each stage, that of several is a contact
    sheet.

    Args:
        model: See :func:`~horsehuman.models.checkpoint.load_classifier`.
        sources: Files, folders, patterns, addresses, or ``-`` for names on stdin.
        layer: A layer's name, see :func:`find_layer`; by default the network's ``heat_layer``.
        out: PNG file to write; by default ``explain.png``, or with a number if that exists.
        force: Whether to replace ``out`` if it exists.

    Returns:
        Whether all images could be read.

    Raises:
        HorseHumanError: If ``out`` cannot be written, there is no such model or layer, or no image
            can be read.
    """
    out = out or unused_path(Path("explain.png"), Path.exists)
    check_output_file(out, force=force)
    if out.suffix.lower() != ".png":
        raise HorseHumanError(f"--out {printable(out)}: the figure is a PNG file: name it *.png")
    network = load_classifier(model)
    layer = find_layer(network, layer) if layer else None
    names = list(expand_sources(sources, recursive=True))
    if len(names) > MAX_IMAGES:
        log.warning("drawing %d of %d pictures, evenly spaced", MAX_IMAGES, len(names))
        names = evenly_spaced(names, MAX_IMAGES)
    images, heat_maps, captions, errors = [], [], [], []
    for name in track(names, "explaining", len(names)):
        try:
            image = network.preprocess(read_source(name))
        except PictureError as error:
            errors.append(str(error))
            continue
        heat, caption = _explain_answer(network, name, image, layer)
        images.append(image)
        heat_maps.append(overlay(image, heat))
        captions.append(f"{printable(Path(name).stem)[-22:]}\n{caption}")
    if not images:
        raise HorseHumanError(errors[0] if errors else "no pictures to explain: name at least one")
    for text in errors:
        log.warning("error: %s", text)
    place = f" at {short_layer_name(layer)}" if layer else ""
    title = f"Evidence for the answer of {printable(model)}{place} (red: strong)"
    if len(images) == 1:
        figure = _draw_layers(network, images[0], heat_maps[0], captions[0], title)
    else:
        figure = plots.contact_sheet(heat_maps, captions, [False] * len(heat_maps), title)
    plots.save(figure, out)
    print(printable(out))
    return not errors


def _explain_answer(
    network: Network, name: str, image: Tensor, layer: str | None
) -> tuple[Tensor, str]:
    """Return the evidence ``(S, S)`` for the predicted class, and the prediction as a caption."""
    (explanation,) = explain(network, image[None], layer)
    prediction = decide(network, name, explanation.scores, always_answer=True)
    class_name = prediction.class_name
    heat = explanation.for_class(network.class_names.index(class_name))
    caption = f"{class_name} {prediction.probability:.0%}"
    if not heat.any():
        log.warning(
            "%s: no location is evidence for %s: the heat map is empty", printable(name), class_name
        )
        caption += ", no heat"
    return heat, caption


def _draw_layers(
    network: Network, image: Tensor, heat_map: NDArray[np.uint8], caption: str, title: str
) -> Figure:
    """Draw an image, its heat map and, for each stage, the ten channels that vary most in space."""
    activations_by_layer = activations(network, image)
    rows = []
    for name in stages(activations_by_layer):
        maps = activations_by_layer[name].clamp_min(0)  # as after a ReLU
        strongest = maps.flatten(1).std(1).topk(min(10, len(maps))).indices
        channels, height, width = maps.shape
        row_title = f"{short_layer_name(name)}\n{channels} x {height} x {width}"
        rows.append((row_title, maps[strongest].numpy()))
    return plots.layers(image.permute(1, 2, 0).numpy(), heat_map, caption, rows, title)
