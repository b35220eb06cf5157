"""Where a network looked: heat maps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from horsehuman.checkpoint import load_classifier
from horsehuman.data.loading import decode
from horsehuman.errors import HorseHumanError, shown
from horsehuman.models.network import Network
from horsehuman.pictures import PictureError
from horsehuman.predict import answer_of
from horsehuman.terminal import track

# Vermilion, which the colour-blind tell from what pictures are made of (Okabe and Ito 2008).
_HEAT = torch.tensor([213.0, 94.0, 0.0])

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Explanation:
    """What speaks for which class, and where.

    Attributes:
        heat: ``(S, S)``, float32: positive where a place speaks for class 1, negative where it
            speaks for class 0. With a linear head its sum is the logit less the bias, but for the
            blur of scaling it up.
        logit: Calibrated.
        probability: Of class 1.
    """

    heat: Tensor
    logit: float
    probability: float

    def for_answer(self, label: int) -> Tensor:
        """Heat that speaks for a class, ``(S, S)``, at least 0."""
        return (self.heat if label else -self.heat).clamp_min(0)


def explain(network: Network, pictures: Tensor) -> list[Explanation]:
    """Heat maps of pictures, uint8 ``(N, 3, H, W)``, each S x S, the network's own size.

    Activations of the last maps times the gradient of the logit, summed over channels (HiResCAM,
    Draelos and Carin 2020, arXiv 2011.08891). With average pooling and a linear head this is
    Grad-CAM (Selvaraju et al. 2017) and CAM (Zhou et al. 2016) before they are rectified; unlike
    Grad-CAM it does not smear what maximum pooling took from one place over all of them.
    """
    network.eval()
    size = network.image_size
    with torch.no_grad():
        maps = network.maps(pictures)
    with torch.enable_grad():
        maps = [own.requires_grad_() for own in maps]
        logits = network.calibrate(network.classify(network.pooled(maps)))
        gradients = torch.autograd.grad(logits.sum(), maps)
    heat = torch.zeros(len(pictures), size, size)
    for index, (own, gradient) in enumerate(zip(maps, gradients, strict=True)):
        small = (own * gradient).sum(1, keepdim=True).detach()
        if index and network.settings.get("mirror"):
            small = small.flip(3)
        # each place's share of the logit, whatever the size of the maps
        small *= small.shape[2] * small.shape[3] / size**2
        large = functional.interpolate(small, (size, size), mode="bilinear", align_corners=False)
        heat += large[:, 0].cpu()
    return [
        Explanation(h, float(z), float(p))
        for h, z, p in zip(heat, logits.detach(), logits.detach().sigmoid(), strict=True)
    ]


def draw(model: str, sources: Sequence[Path], out: Path, *, force: bool) -> bool:
    """What ``horsehuman explain`` does; returns whether all pictures could be read.

    Raises:
        HorseHumanError: ``out`` is there already, or no picture can be read.
    """
    if out.exists() and not force:
        raise HorseHumanError(f"--out {shown(out)} is there already: name another, or add --force")
    network = load_classifier(model)
    paths = [path for source in sources for path in _files(source)]
    pictures, captions, errors = [], [], []
    for path in track(paths, "explaining", len(paths)):
        try:
            picture = decode(path, network.image_size)
        except PictureError as error:
            errors.append(str(error))
            continue
        (found,) = explain(network, picture[None])
        said = answer_of(network, path, found.logit, found.probability)
        label = network.class_names.index(said.class_name)
        pictures.append(overlay(picture, found.for_answer(label)))
        captions.append(f"{shown(path.stem)[-22:]}\n{said.class_name} {said.probability:.0%}")
    if not pictures:
        raise HorseHumanError(errors[0] if errors else "there is no picture in these folders")
    for text in errors:
        log.warning("error: %s", text)
    from horsehuman import plots  # matplotlib, once there is something to draw

    title = f"What spoke for the answer of {shown(model)} (vermilion: most)"
    wrong = [False] * len(pictures)
    plots.save(plots.contact_sheet(pictures, captions, wrong, title), out)
    print(shown(out))
    return not errors


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


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    return sorted(p for p in source.iterdir() if p.is_file() and not p.name.startswith("."))
