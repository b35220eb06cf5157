"""Cut the training figures out and lay them on white: the question that the official set asks.

    pip install -e '.[dev]' && python scripts/cutouts.py --out cutouts

Every official validation picture is a cut-out on white, no training picture is. Recipes for the
hand-built CNN are chosen on these cut-outs of held-out figures (scripts/folds.py), so that nobody
has to look at the official set for it. The cut-outs are rough. They are made in three steps:

1. A linear classifier on the pooled maps of the frozen trunk says which places speak for the class
   of a picture: most of a head and a trunk, few legs.
2. GrabCut (Rother, Kolmogorov and Blake 2004) grows these places to figures.
3. A linear classifier tells figure from background at each place of the maps, for all pictures at
   once; what it says seeds GrabCut again, twice.

A cut-out is left out where GrabCut and that classifier disagree (intersection over union).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from horsehuman import HorseHumanDataModule
from horsehuman.errors import HorseHumanError, one_line
from horsehuman.models.inception import Inception
from horsehuman.runtime import keep_freed_memory, log_to_stderr, track

#: Pixels of the pictures that GrabCut sees, and of the cut-outs.
SMALL, LARGE = 150, 300

#: Intersection over union below which a cut-out is left out.
USABLE = 0.4

Mask = NDArray[np.uint8]
Place = NDArray[np.float32]


@dataclass(frozen=True)
class Seeds:
    """What GrabCut starts from, given how probable the figure is at each place of the maps.

    Attributes:
        sure: From here on it is figure, after ``erode`` pixels are taken off the edge.
        likely: From here on it probably is.
        far: Beyond ``reach`` pixels around all above this it is background.
        reach: See ``far``.
        erode: See ``sure``.
    """

    sure: float
    likely: float
    far: float
    reach: int
    erode: int = 1

    def __call__(self, places: Place) -> Mask:
        """Labels of GrabCut for the picture."""
        fine = cv2.resize(places, (SMALL, SMALL), interpolation=cv2.INTER_CUBIC)
        mask = np.full(fine.shape, cv2.GC_PR_BGD, np.uint8)
        mask[fine > self.likely] = cv2.GC_PR_FGD
        sure, near = ((fine > bound).astype(np.uint8) for bound in (self.sure, self.far))
        mask[cv2.erode(sure, _square(self.erode), borderValue=1) > 0] = cv2.GC_FGD
        mask[cv2.dilate(near, _square(self.reach)) == 0] = cv2.GC_BGD
        return mask


#: First keep to what is certain, or the halo of the maps grows; in the end look for the legs.
WITHIN = Seeds(sure=0.97, likely=0.5, far=0.2, reach=5, erode=9)
AROUND = Seeds(sure=0.97, likely=0.3, far=0.05, reach=9, erode=9)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the cut-outs and print how many are usable."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("cutouts"), metavar="DIR")
    given = parser.parse_args(arguments)
    log_to_stderr()
    keep_freed_memory()
    cv2.setNumThreads(1)
    try:
        given.out.mkdir(parents=True)
        data = HorseHumanDataModule(LARGE, val_fraction=0)
        data.setup()
        write(given.out, *cut_out(data))
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def cut_out(data: HorseHumanDataModule) -> tuple[list[Path], NDArray[Any], list[Mask], Place]:
    """Masks of all training figures.

    Returns:
        Their files, their pictures ``(N, 300, 300, 3)``, masks of 150 x 150 pixels (1 is figure),
        and how well each mask agrees with the trunk, 0 to 1.
    """
    loader = data.train_dataloader()
    indices = loader.dataset.indices  # type: ignore[attr-defined]
    images, labels = loader.dataset.__getitems__(list(range(len(indices))))  # type: ignore[attr-defined]
    pictures = images.permute(0, 2, 3, 1).numpy()
    network = Inception(scales=[299])
    chunks = torch.split(images, 32)
    maps = torch.cat(
        [network.forward_features(c)[0] for c in track(chunks, "looking", len(chunks))]
    )
    maps = (maps - maps.mean((0, 2, 3), True)) / (maps.std((0, 2, 3), keepdim=True) + 1e-6)

    places = places_of_the_class(maps, labels)
    masks = grab_all(pictures, places, Seeds(sure=0.75, likely=0.25, far=0.25, reach=25))
    for start in (WITHIN, WITHIN, AROUND):
        places = places_of_figures(maps, masks)
        masks = grab_all(pictures, places, start)
    agreement = np.array([overlap(m, p) for m, p in zip(masks, places, strict=True)])
    return [data.records[index].path for index in indices], pictures, masks, agreement


def places_of_the_class(maps: Tensor, labels: Tensor) -> Place:
    """How much each place of the maps ``(N, C, H, W)`` speaks for the class, about 0 to 1."""
    weights, bias = logistic_regression(maps.mean((2, 3)), labels, decay=1e-2)
    evidence = torch.einsum("nchw,c->nhw", maps, weights) + bias
    evidence *= (2 * labels - 1).view(-1, 1, 1)
    highest = evidence.flatten(1).quantile(0.98, dim=1).clamp_min(1e-3)
    return (evidence / highest.view(-1, 1, 1)).numpy()


def places_of_figures(maps: Tensor, masks: Sequence[Mask]) -> Place:
    """Probability of figure at each place ``(N, H, W)``, learned from masks of all pictures."""
    share = np.stack([to_places(mask, maps.shape[-1]) for mask in masks])
    target = torch.from_numpy(share.reshape(-1))
    features = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
    clear = (target > 0.7) | (target < 0.15)
    weights, bias = logistic_regression(features[clear], (target[clear] > 0.5).float(), decay=1e-3)
    return torch.sigmoid(features @ weights + bias).view(share.shape).numpy()


def logistic_regression(features: Tensor, labels: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Weights ``(F,)`` and bias of a logistic regression with L2 penalty ``decay``."""
    weights = torch.zeros(features.shape[1], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=50)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = binary_cross_entropy_with_logits(features @ weights + bias, labels)
        value = value + decay * weights.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weights.detach(), bias.detach()


def grab_all(pictures: NDArray[Any], places: Place, start: Seeds) -> list[Mask]:
    """GrabCut every picture, on all processors."""

    def grab(index: int) -> Mask:
        small = cv2.resize(pictures[index], (SMALL, SMALL), interpolation=cv2.INTER_AREA)
        return grab_cut(small, start(places[index]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(track(pool.map(grab, range(len(places))), "cutting out", len(places)))


def grab_cut(picture: NDArray[np.uint8], mask: Mask) -> Mask:
    """The figure without specks: 1 where it is, 0 elsewhere."""
    figure = np.isin(mask, (cv2.GC_FGD, cv2.GC_PR_FGD))
    if not figure.any() or figure.all():
        return figure.astype(np.uint8)
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(picture, mask, None, *models, 8, cv2.GC_INIT_WITH_MASK)
    figure = np.isin(mask, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    _, parts, sizes, _ = cv2.connectedComponentsWithStats(figure)
    areas = sizes[1:, cv2.CC_STAT_AREA]
    large = [part + 1 for part, area in enumerate(areas) if area > 0.05 * areas.max()]
    return np.isin(parts, large).astype(np.uint8)


def to_places(mask: Mask, count: int) -> Place:
    """Share of figure at each of ``count`` x ``count`` places."""
    share: Place = cv2.resize(mask.astype(np.float32), (count, count), interpolation=cv2.INTER_AREA)
    return share


def overlap(mask: Mask, places: Place) -> float:
    """Intersection over union of a mask and the trunk's opinion."""
    share = to_places(mask, places.shape[-1])
    return float(np.minimum(share, places).sum() / np.maximum(share, places).sum())


def write(
    out: Path, paths: Sequence[Path], pictures: NDArray[Any], masks: Sequence[Mask], fits: Place
) -> None:
    """Write each usable figure twice: where it stood, and at a drawn size and place."""
    generator = np.random.default_rng(0)
    kept: dict[str, list[bool]] = {}
    for path, picture, mask, fit in zip(paths, pictures, masks, fits, strict=True):
        draw = generator.uniform(size=3)
        usable = bool(fit > USABLE)
        kept.setdefault(path.parent.name, []).append(usable)
        if not usable:
            continue
        soft = cv2.resize(mask.astype(np.float32), (LARGE, LARGE), interpolation=cv2.INTER_LINEAR)
        soft = ((soft - 0.25) * 2).clip(0, 1)[..., None]
        framed = (picture * soft + 255 * (1 - soft)).round().astype(np.uint8)
        for kind, image in (("framed", framed), ("reframed", reframe(framed, soft > 0.5, draw))):
            target = out / kind / path.parent.name / f"{path.stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(target)
    for name, flags in kept.items():
        print(f"{name}: {sum(flags)} of {len(flags)} figures are cut out")
    print(f"written to {out}")


def reframe(picture: NDArray[np.uint8], figure: NDArray[Any], draw: NDArray[Any]) -> Any:
    """Crop a figure and lay it on white, its longer side 50 to 95 % of the picture's."""
    rows, columns = np.nonzero(figure[..., 0])
    crop = picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    scale = (0.5 + 0.45 * draw[0]) * LARGE / max(crop.shape[:2])
    height, width = (max(8, round(side * scale)) for side in crop.shape[:2])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    top, left = int(draw[1] * (LARGE - height)), int(draw[2] * (LARGE - width))
    canvas = np.full((LARGE, LARGE, 3), 255, np.uint8)
    resized = cv2.resize(crop, (width, height), interpolation=method)
    canvas[top : top + height, left : left + width] = resized
    return canvas


def _square(side: int) -> Mask:
    return np.ones((side, side), np.uint8)


if __name__ == "__main__":
    sys.exit(main())
