"""An explanation as a person sees it: heat laid over pictures, and maps layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from horsehuman import drawings, plots
from horsehuman.checkpoint import load_classifier
from horsehuman.data.folders import spread
from horsehuman.errors import HorseHumanError, shown
from horsehuman.explain import activations, explain, find_layer, short, stages
from horsehuman.models.network import Network
from horsehuman.pictures import PictureError
from horsehuman.places import check_free, free_path
from horsehuman.prediction import prediction_of
from horsehuman.sources import expand, open_picture
from horsehuman.terminal import track

# Vermilion, which the colour-blind tell from what pictures are made of (Okabe and Ito 2008).
_HEAT = torch.tensor([213.0, 94.0, 0.0])

#: Pictures on a sheet.
LIMIT = 160

log = logging.getLogger(__name__)


def draw(
    model: str, sources: Sequence[str], layer: str | None, out: Path | None, *, force: bool
) -> bool:
    """What ``horsehuman explain`` does; returns whether all pictures could be read.

    One picture is drawn with what each layer sees of it, several are a contact sheet.

    Raises:
        HorseHumanError: ``out`` is there already, there is no such layer, or no picture can be
            read.
    """
    out = out or free_path(Path("explain.png"), Path.exists)
    check_free(out, force=force)
    if out.suffix.lower() != ".png":
        raise HorseHumanError(f"--out {shown(out)}: the drawing is PNG; let the name end so")
    network = load_classifier(model)
    layer = find_layer(network, layer) if layer else None
    names = list(expand(sources, recursive=True))
    if len(names) > LIMIT:
        log.warning("%d of %d pictures are drawn, evenly spread", LIMIT, len(names))
        names = spread(names, LIMIT)
    pictures, drawn, captions, errors = [], [], [], []
    for name in track(names, "explaining", len(names)):
        try:
            picture = network.read(open_picture(name))
        except PictureError as error:
            errors.append(str(error))
            continue
        heat, caption = _explained(network, name, picture, layer)
        pictures.append(picture)
        drawn.append(overlay(picture, heat))
        captions.append(f"{shown(Path(name).stem)[-22:]}\n{caption}")
    if not pictures:
        raise HorseHumanError(errors[0] if errors else "no picture is named")
    for text in errors:
        log.warning("error: %s", text)
    where = f" at {short(layer)}" if layer else ""
    title = f"What spoke for the answer of {shown(model)}{where} (vermilion: most)"
    if len(pictures) == 1:
        figure = _layers(network, pictures[0], drawn[0], captions[0], title)
    else:
        figure = drawings.contact_sheet(drawn, captions, [False] * len(drawn), title)
    plots.save(figure, out)
    print(shown(out))
    return not errors


def _explained(
    network: Network, name: str, picture: Tensor, layer: str | None
) -> tuple[Tensor, str]:
    """Heat ``(S, S)`` for the answer, and the answer in words."""
    (found,) = explain(network, picture[None], layer)
    said = prediction_of(network, name, found.answer, always_answer=True)
    heat = found.for_answer(network.class_names.index(said.class_name))
    caption = f"{said.class_name} {said.probability:.0%}"
    if not heat.any():
        log.warning(
            "%s: nothing in it speaks for %s, so there is no heat", shown(name), said.class_name
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
        title_of_row = f"{short(name)}\n{channels} x {height} x {width}"
        rows.append((title_of_row, own[chosen].numpy()))
    plain = picture.permute(1, 2, 0).numpy()
    return drawings.layers(plain, drawn, caption, rows, title)
