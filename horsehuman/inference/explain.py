"""Where a network looked: heat maps, and what its layers see."""

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

#: Pictures that are explained at a time.
CHUNK = 8

# Vermilion, which the colour-blind tell from what pictures are made of (Okabe and Ito 2008).
_HEAT = torch.tensor([213.0, 94.0, 0.0])

#: Pictures on a sheet.
LIMIT = 160

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Explanation:
    """What speaks for which class, and where.

    Attributes:
        heat: ``(S, S)``, float32: positive where a place speaks for class 1, negative where it
            speaks for class 0. With a linear head its sum is the logit less the bias, but for the
            blur of scaling it up.
        answer: What the network says of the picture.
    """

    heat: Tensor
    answer: Scores

    def for_class(self, label: int) -> Tensor:
        """Heat that speaks for a class, ``(S, S)``, at least 0."""
        return (self.heat if label else -self.heat).clamp_min(0)


def explain(network: Network, pictures: Tensor, layer: str | None = None) -> list[Explanation]:
    """Heat maps of pictures, uint8 ``(N, 3, H, W)``, each S x S, the network's own size.

    Activations of a layer's maps times the gradient of the logit, summed over channels (HiResCAM,
    Draelos and Carin 2020, arXiv 2011.08891). At the last maps, with average pooling and a linear
    head, this is Grad-CAM (Selvaraju et al. 2017) and CAM (Zhou et al. 2016) before they are
    rectified; unlike Grad-CAM it does not smear what maximum pooling took from one place over all
    of them, and so it can stand before a maximum pooling, where maps are larger. At an earlier
    layer it is sharper, does not add up to the logit, and says what a small change there would do.

    Args:
        network: Which network.
        pictures: What it looks at.
        layer: A name that :func:`find_layer` gives; by default the network's ``heat_layer``.
    """
    network.eval()
    size = network.image_size
    with torch.enable_grad(), _capture_outputs(network, layer or network.heat_layer) as maps:
        found = network.score_features(network.pool_features(network.forward_features(pictures)))
        gradients = torch.autograd.grad(found[0].sum(), maps)
    heat = torch.zeros(len(pictures), size, size)
    for index, (own, gradient) in enumerate(zip(maps, gradients, strict=True)):
        small = (own * gradient).sum(1, keepdim=True).detach()
        if index and network.settings.get("mirror"):
            small = small.flip(3)
        # each place's share of the logit, whatever the size of the maps
        small *= small.shape[2] * small.shape[3] / size**2
        large = functional.interpolate(small, (size, size), mode="bilinear", align_corners=False)
        heat += large[:, 0].cpu()
    return [Explanation(*each) for each in zip(heat, to_scores(found), strict=True)]


@contextlib.contextmanager
def _capture_outputs(network: Network, layer: str) -> Iterator[list[Tensor]]:
    """Collect what a layer gives each time, as leaves of the graph that grows from there."""
    found: list[Tensor] = []

    def cut(module: nn.Module, given: object, output: Tensor) -> Tensor:
        found.append(output.detach().clone().requires_grad_())
        return found[-1].clone()  # a ReLU that follows may work in place

    handle = network.get_submodule(layer).register_forward_hook(cut)
    try:
        yield found
    finally:
        handle.remove()


@torch.inference_mode()
def activations(network: Network, picture: Tensor) -> dict[str, Tensor]:
    """What every layer up to the last maps gives for a picture, in the order of their work.

    Args:
        network: Which network; of several ways of looking the first counts.
        picture: uint8 ``(3, H, W)``.

    Returns:
        For each layer with maps ``(C, H', W')``, where a ReLU works in place after it.
    """
    found: dict[str, Tensor] = {}
    handles = []
    for name, module in network.named_modules():

        def keep(module: nn.Module, given: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                found.setdefault(name, output[0])

        if "." in name and not name.startswith("preprocess"):
            handles.append(module.register_forward_hook(keep))
    try:
        network.eval()(picture[None])
    finally:
        for handle in handles:
            handle.remove()
    return {name: maps for name, maps in found.items() if maps.shape[1] * maps.shape[2] > 1}


def stages(maps: Mapping[str, Tensor]) -> list[str]:
    """Of what :func:`activations` gives, the last layer of each size that is part of no other."""
    last: dict[torch.Size, str] = {}
    for name, tensor in maps.items():
        size = tensor.shape[1:]
        if size not in last or name.count(".") <= last[size].count("."):
            last[size] = name
    return list(last.values())


def short_layer_name(layer: str) -> str:
    """A layer's name without what goes without saying."""
    return layer.removeprefix("backbone.trunk.")


def find_layer(network: Network, name: str) -> str:
    """The full name of a layer with maps, given that or its end, such as ``Mixed_6a``.

    Raises:
        HorseHumanError: There is none, or several.
    """
    size = network.image_size
    maps = activations(network, torch.zeros(3, size, size, dtype=torch.uint8))
    name = name.removeprefix("network.")
    fitting = [full for full in maps if full == name or full.endswith(f".{name}")]
    if name in maps or len(fitting) == 1:
        return name if name in maps else fitting[0]
    if fitting:
        some = " | ".join(map(short_layer_name, fitting[:4]))
        raise HorseHumanError(f"--layer {printable(name)} may be {some}: say which")
    near = closest(name, {short_layer_name(full) for full in maps})
    some = " | ".join(map(short_layer_name, stages(maps)))
    raise HorseHumanError(
        f"--layer {printable(name)}: there is no such layer with maps{near}: use one such as {some}"
    )


def heat_on_subject(
    network: Network, records: Sequence[Record], limit: int = 32
) -> dict[str, float] | None:
    """How much of what spoke for the answers lies on the figure, for cut-outs on white.

    The figure is what is not white: at least one channel below 245. A picture is a cut-out where
    nine tenths of its edge are white, or all of it on three sides.

    Args:
        network: Which network.
        records: Pictures; those that are no cut-outs, or cannot be read, are passed over.
        limit: Of many pictures so many are looked at, evenly spread.

    Returns:
        ``pictures``: how many counted; ``share of heat``: mean share of the heat for the answer
        that lies on the figure, 0 to 1; ``share of area``: mean share of the picture that the
        figure takes, which is what heat without aim would have. ``None`` where none counted.
    """
    step = max(1, -(-len(records) // limit))
    pictures, figures = [], []
    for record in records[::step]:
        with contextlib.suppress(PictureError):
            picture = decode(record.path, network.image_size)
            figure = (picture < WHITE_LEVEL).any(0)
            if _is_cut_out(figure):
                pictures.append(picture)
                figures.append(figure)
    found = []
    for start in range(0, len(pictures), CHUNK):
        said = explain(network, torch.stack(pictures[start : start + CHUNK]))
        for own, figure in zip(said, figures[start:], strict=False):
            heat = own.for_class(int(own.answer.probability >= network.threshold))
            if heat.any():
                found.append((float(heat[figure].sum() / heat.sum()), float(figure.float().mean())))
    if not found:
        return None
    heat_share, area = (math.fsum(values) / len(found) for values in zip(*found, strict=True))
    return {"pictures": len(found), "share of heat": heat_share, "share of area": area}


def _is_cut_out(figure: Tensor) -> bool:
    """Whether a figure, bool ``(S, S)``, stands on white."""
    sides = [figure[0], figure[-1], figure[:, 0], figure[:, -1]]
    white = 1 - torch.stack(sides).float().mean(1)
    return bool(figure.sum() > 0 and (white.mean() >= 0.9 or (white == 1).sum() >= 3))


def explain_and_draw(
    model: str, sources: Sequence[str], layer: str | None, out: Path | None, *, force: bool
) -> bool:
    """What ``horsehuman explain`` does; returns whether all pictures could be read.

    One picture is drawn with what each layer sees of it, several are a contact sheet.

    Raises:
        HorseHumanError: ``out`` is there already, there is no such layer, or no picture can be
            read.
    """
    out = out or unused_path(Path("explain.png"), Path.exists)
    check_output_file(out, force=force)
    if out.suffix.lower() != ".png":
        raise HorseHumanError(f"--out {printable(out)}: the drawing is PNG; let the name end so")
    network = load_classifier(model)
    layer = find_layer(network, layer) if layer else None
    names = list(expand_sources(sources, recursive=True))
    if len(names) > LIMIT:
        log.warning("%d of %d pictures are drawn, evenly spread", LIMIT, len(names))
        names = evenly_spaced(names, LIMIT)
    pictures, drawn, captions, errors = [], [], [], []
    for name in track(names, "explaining", len(names)):
        try:
            picture = network.preprocess(read_source(name))
        except PictureError as error:
            errors.append(str(error))
            continue
        heat, caption = _explained(network, name, picture, layer)
        pictures.append(picture)
        drawn.append(overlay(picture, heat))
        captions.append(f"{printable(Path(name).stem)[-22:]}\n{caption}")
    if not pictures:
        raise HorseHumanError(errors[0] if errors else "no picture is named")
    for text in errors:
        log.warning("error: %s", text)
    where = f" at {short_layer_name(layer)}" if layer else ""
    title = f"What spoke for the answer of {printable(model)}{where} (vermilion: most)"
    if len(pictures) == 1:
        figure = _layers(network, pictures[0], drawn[0], captions[0], title)
    else:
        figure = plots.contact_sheet(drawn, captions, [False] * len(drawn), title)
    plots.save(figure, out)
    print(printable(out))
    return not errors


def _explained(
    network: Network, name: str, picture: Tensor, layer: str | None
) -> tuple[Tensor, str]:
    """Heat ``(S, S)`` for the answer, and the answer in words."""
    (found,) = explain(network, picture[None], layer)
    said = decide(network, name, found.answer, always_answer=True)
    heat = found.for_class(network.class_names.index(said.class_name))
    caption = f"{said.class_name} {said.probability:.0%}"
    if not heat.any():
        log.warning(
            "%s: nothing in it speaks for %s, so there is no heat", printable(name), said.class_name
        )
        caption += ", no heat"
    return heat, caption


def overlay(picture: Tensor, heat: Tensor) -> NDArray[np.uint8]:
    """A picture, coloured where the heat is.

    Args:
        picture: uint8 ``(3, S, S)``.
        heat: ``(S, S)``, at least 0; scaled so that its 99th percentile is full colour.

    Returns:
        uint8 ``(S, S, 3)``.
    """
    share = 0.75 * (heat / heat.flatten().quantile(0.99).clamp_min(1e-12)).clamp(0, 1)
    coloured = torch.lerp(picture.float(), _HEAT.view(3, 1, 1), share)
    return coloured.round().to(torch.uint8).permute(1, 2, 0).numpy()


def _layers(
    network: Network, picture: Tensor, drawn: NDArray[np.uint8], caption: str, title: str
) -> Figure:
    """The picture, its heat, and of each stage the maps that differ most from place to place."""
    maps = activations(network, picture)
    rows = []
    for name in stages(maps):
        own = maps[name].clamp_min(0)  # what a ReLU lets through
        chosen = own.flatten(1).std(1).topk(min(10, len(own))).indices
        channels, height, width = own.shape
        title_of_row = f"{short_layer_name(name)}\n{channels} x {height} x {width}"
        rows.append((title_of_row, own[chosen].numpy()))
    plain = picture.permute(1, 2, 0).numpy()
    return plots.layers(plain, drawn, caption, rows, title)
