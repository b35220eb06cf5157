"""Heat maps of the evidence in an image (HiResCAM), feature maps by layer, and their figures."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from horsehuman import plots
from horsehuman.data.images import PictureError
from horsehuman.data.records import evenly_spaced
from horsehuman.data.sources import expand_sources, read_source
from horsehuman.decision import Prediction, Scores, decide, format_prediction
from horsehuman.errors import HorseHumanError, closest, printable
from horsehuman.inference.output import as_row
from horsehuman.models.base import Network, to_scores
from horsehuman.models.checkpoint import load_classifier
from horsehuman.run_dir import ReportOptions, check_output_file, print_json
from horsehuman.runtime import track

#: Largest number of images on a contact sheet.
MAX_IMAGES = 160

#: An image uint8 ``(3, S, S)``, the heat map over it uint8 ``(S, S, 3)``, and a caption.
Panel = tuple[Tensor, plots.Image, str]

#: The prediction on an image and its panels: one, or one for each class that is visible, or none if
#: the image cannot be read.
Explained = tuple[Prediction, list[Panel]]

# RGB of vermilion, which colour-blind readers can distinguish from the colours of most images
# (Okabe and Ito 2008).
_HEAT_COLOUR = torch.tensor([213.0, 94.0, 0.0])

log = logging.getLogger(__name__)


def explain(
    network: Network, images: Tensor, layer: str | None = None
) -> tuple[Tensor, list[Scores]]:
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
        Heat maps on the CPU, float32 ``(N, S, S)``, where S is the network's image size: positive
        at locations that are evidence for class 1, negative at those that are evidence for class
        0. With a linear head the sum of a heat map is the logit minus the bias, up to the error of
        upscaling. And the scores of each image.
    """
    size = network.image_size
    outputs: list[Tensor] = []  # one per variant of the images, as leaves of the graph

    def replace_output(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        outputs.append(output.detach().clone().requires_grad_())
        return outputs[-1].clone()  # A ReLU that follows may work in place.

    layer_module = network.eval().get_submodule(layer or network.heat_layer)
    with torch.enable_grad(), layer_module.register_forward_hook(replace_output):
        scores = network.score_maps(network.forward_features(images))
        gradients = torch.autograd.grad(scores[0].sum(), outputs)
    heat = torch.zeros(len(images), size, size)
    for variant, (maps, gradient) in enumerate(zip(outputs, gradients, strict=True)):
        small = (maps * gradient).sum(1, keepdim=True).detach()
        if variant and network.settings.get("mirror"):
            small = small.flip(3)  # The second variant of the CNN is the mirrored image.
        # Upscaling must preserve the sum, which is this variant's contribution to the logit.
        small *= small.shape[2] * small.shape[3] / size**2
        large = nn.functional.interpolate(small, (size, size), mode="bilinear", align_corners=False)
        heat += large[:, 0].cpu()
    return heat, to_scores(scores)


def explain_answer(
    network: Network, image: Tensor, layer: str | None
) -> tuple[Scores, dict[int, Tensor]]:
    """Compute the scores of an image and the evidence for the predicted class, or for both.

    Args:
        network: The classifier; it is switched to eval mode.
        image: uint8 ``(3, H, W)`` on the network's device.
        layer: See :func:`explain`.

    Returns:
        The scores, and heat maps by class, 0 or 1: of the class that the threshold gives, unsure or
        not, or of both classes if the image shows both. float32 ``(S, S)``, at least 0.
    """
    (heat,), (scores,) = explain(network, image[None], layer)
    labels = (0, 1) if scores.both_score >= 0 else (int(scores.probability >= network.threshold),)
    return scores, {label: (heat if label else -heat).clamp_min(0) for label in labels}


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

    def store(name: str, module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            outputs.setdefault(name, output[0])

    with ExitStack() as hooks:
        for name, module in network.named_modules():
            if "." in name and not name.startswith("normalize"):
                hooks.enter_context(module.register_forward_hook(partial(store, name)))
        network.eval()(image[None])
    return {name: maps for name, maps in outputs.items() if maps.shape[1] * maps.shape[2] > 1}


def stages(maps: Mapping[str, Tensor]) -> list[str]:
    """Return the name of the last outermost layer at each resolution.

    Args:
        maps: Feature maps by layer name, as :func:`activations` returns them.
    """
    outermost_last = sorted(maps, key=lambda name: -name.count("."))
    by_size = {maps[name].shape[1:]: name for name in outermost_last}
    return [name for name in maps if name in by_size.values()]


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
    maps = activations(network, torch.zeros(3, 8, 8, dtype=torch.uint8))
    name = name.removeprefix("network.")
    matches = [name] if name in maps else [layer for layer in maps if layer.endswith(f".{name}")]
    if len(matches) == 1:
        return matches[0]
    hint = closest(name, map(short_layer_name, maps))
    reason = "is ambiguous" if matches else f"is not a layer with feature maps{hint}"
    examples = " | ".join(map(short_layer_name, matches[:4] or stages(maps)))
    raise HorseHumanError(f"--layer {printable(name)} {reason}: use one such as {examples}")


def overlay(image: Tensor, heat: Tensor) -> plots.Image:
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


def explain_and_report(
    model: str, sources: Sequence[str], layer: str | None, options: ReportOptions
) -> bool:
    """Explain images and draw the heat maps: the work of ``horsehuman explain``.

    The figure of one image shows the feature maps of each stage, that of several is a contact
    sheet of at most :data:`MAX_IMAGES`. JSON has ``pictures``, for each image the row of
    ``horsehuman predict --format json``, and ``drawing``, the name of the figure or ``None``.

    Args:
        model: See :func:`~horsehuman.models.checkpoint.load_classifier`.
        sources: Files, folders, patterns, addresses, or ``-`` for names on stdin.
        layer: A layer's name, see :func:`find_layer`; by default the network's ``heat_layer``.
        options: ``out`` is the PNG file to write, by default ``explain.png``. Without ``plot``
            nothing is drawn, and the predictions are printed.

    Returns:
        Whether all images could be read.

    Raises:
        HorseHumanError: If ``out`` cannot be written, there is no such model or layer, or there
            are no images.
    """
    out = options.out or Path("explain.png")
    if options.plot:
        if out.suffix.lower() != ".png":
            raise HorseHumanError(f"--out {printable(out)}: name a PNG file, such as explain.png")
        check_output_file(out, force=options.force)
    network = load_classifier(model)
    layer = find_layer(network, layer) if layer else None
    names = list(expand_sources(sources, recursive=True))
    if options.plot and len(names) > MAX_IMAGES:
        log.warning("drawing %d of %d pictures, evenly spaced", MAX_IMAGES, len(names))
        names = evenly_spaced(names, MAX_IMAGES)
    explained = _explain_each(network, names, layer)
    pairs = [(answer, panels if options.plot else []) for answer, panels in explained]
    predictions = [answer for answer, _ in pairs]
    panels = [panel for _, panels in pairs for panel in panels]
    if not predictions:
        raise HorseHumanError("no pictures to explain: name at least one")
    if panels:
        place = f" at {short_layer_name(layer)}" if layer else ""
        title = f"Evidence for the answer of {printable(model)}{place} (red: strong)"
        plots.save(_draw(network, panels, title), out)
    if options.json:
        rows = [as_row(prediction) for prediction in predictions]
        print_json({"pictures": rows, "drawing": str(out) if panels else None})
    elif panels:
        print(printable(out))
    elif not options.plot:
        for prediction in predictions:
            print(f"{printable(prediction.source)}  {format_prediction(prediction)}")
    return not any(prediction.error for prediction in predictions)


def _explain_each(network: Network, names: Sequence[str], layer: str | None) -> Iterator[Explained]:
    """Yield the prediction on each image and its panels.

    The caption of a panel has the status unless it is ``ok``, the class and its probability.
    """
    for name in track(names, "explaining", len(names)):
        try:
            image = network.preprocess(read_source(name))
        except PictureError as error:
            log.warning("error: %s", error)
            yield Prediction(name, error=str(error)), []
            continue
        scores, heats = explain_answer(network, image, layer)
        answer = decide(network, name, scores)
        panels = []
        for label, heat in heats.items():
            class_name = network.class_names[label]
            probability = scores.probability if label else 1 - scores.probability
            text = class_name if answer.status == "both" else f"{class_name} {probability:.0%}"
            text = text if answer.status == "ok" else f"{answer.status} ({text})"
            caption = f"{printable(Path(name).stem)[-22:]}\n{text}"
            if not heat.any():
                log.warning("%s: the heat map for %s is empty", printable(name), class_name)
                caption += ", no heat"
            panels.append((image, overlay(image, heat), caption))
        yield answer, panels


def _draw(network: Network, panels: Sequence[Panel], title: str) -> Figure:
    """Draw a contact sheet of several images.

    For one image, draw also the ten channels of each stage that vary most in space.
    """
    images, heat_maps, captions = zip(*panels, strict=True)
    if len(panels) > 1:
        return plots.contact_sheet(heat_maps, captions, [False] * len(panels), title)
    activations_by_layer = activations(network, images[0])
    rows = []
    for name in stages(activations_by_layer):
        maps = activations_by_layer[name].clamp_min(0)  # as after a ReLU
        strongest = maps.flatten(1).std(1).topk(min(10, len(maps))).indices
        shape = " x ".join(map(str, maps.shape))
        rows.append((f"{short_layer_name(name)}\n{shape}", maps[strongest].numpy()))
    picture = images[0].permute(1, 2, 0).numpy()
    return plots.layers((picture, heat_maps[0], captions[0]), rows, title)
