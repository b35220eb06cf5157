"""Cut the subjects of the training images out and lay them on white.

    pip install -e '.[dev]' && python scripts/studies/cutouts.py --out cutouts

A subject is a depicted horse or person. Every official validation image is a cut-out on white, and
no training image is. Recipes of the hand-built CNN are therefore chosen on these cut-outs of
held-out subjects (scripts/studies/folds.py), so that the official set is not used for it. The
cut-outs are rough. They are made in three steps:

1. A linear classifier on the pooled features of the frozen backbone gives the evidence for the
   image's class at each position of the feature maps: most of a head and a trunk, few legs.
2. GrabCut (Rother, Kolmogorov and Blake 2004) extends these positions to subjects.
3. A linear classifier separates subject and background at each position of the feature maps, for
   all images at once. Its probabilities are the next seeds of GrabCut. This is done three times.

A cut-out is left out if GrabCut and that classifier disagree (intersection over union).
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
from horsehuman.runtime import log_to_stderr, track, tune_process

#: Side in pixels of the images that GrabCut segments, and of the cut-outs.
SMALL, LARGE = 150, 300

#: Intersection over union up to which a cut-out is left out.
MIN_OVERLAP = 0.4

Mask = NDArray[np.uint8]
Maps = NDArray[np.float32]


@dataclass(frozen=True)
class Seeds:
    """Thresholds that turn the probability of the subject into the initial labels of GrabCut.

    Attributes:
        sure: Probability above which a pixel is subject, after the edges are eroded.
        likely: Probability above which a pixel is probably subject.
        far: A pixel is background if no pixel near it has a higher probability.
        reach: Side in pixels of the square that is near a pixel.
        erode: Side in pixels of the square that erodes the edges of sure pixels.
    """

    sure: float
    likely: float
    far: float
    reach: int
    erode: int = 1

    def __call__(self, probabilities: Maps) -> Mask:
        """Return GrabCut's labels ``(150, 150)`` for the probabilities ``(H, W)`` of an image."""
        fine = cv2.resize(probabilities, (SMALL, SMALL), interpolation=cv2.INTER_CUBIC)
        mask = np.full(fine.shape, cv2.GC_PR_BGD, np.uint8)
        mask[fine > self.likely] = cv2.GC_PR_FGD
        sure, near = ((fine > bound).astype(np.uint8) for bound in (self.sure, self.far))
        mask[cv2.erode(sure, _square(self.erode), borderValue=1) > 0] = cv2.GC_FGD
        mask[cv2.dilate(near, _square(self.reach)) == 0] = cv2.GC_BGD
        return mask


#: Seeds of the first rounds, which would otherwise include a margin around the subject, and of the
#: last round, which adds the legs.
NARROW = Seeds(sure=0.97, likely=0.5, far=0.2, reach=5, erode=9)
WIDE = Seeds(sure=0.97, likely=0.3, far=0.05, reach=9, erode=9)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the cut-outs and print how many are usable."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("cutouts"), metavar="DIR")
    out = parser.parse_args(arguments).out
    log_to_stderr()
    tune_process()
    cv2.setNumThreads(1)
    try:
        out.mkdir(parents=True)
        data = HorseHumanDataModule(LARGE, val_fraction=0)
        data.setup()
        write(out, *cut_out(data))
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def cut_out(data: HorseHumanDataModule) -> tuple[list[Path], NDArray[Any], list[Mask], Maps]:
    """Segment the subjects of all training images.

    Returns:
        The files; the images, uint8 ``(N, 300, 300, 3)``; their masks ``(150, 150)``, 1 on the
        subject and 0 elsewhere; and the overlap of each mask with the classifier's probabilities,
        0 to 1, ``(N,)``.
    """
    dataset: Any = data.train_dataloader().dataset
    tensors, labels = dataset.__getitems__(list(range(len(dataset))))
    images = tensors.permute(0, 2, 3, 1).numpy()
    network = Inception(scales=[299])
    chunks = torch.split(tensors, 32)
    maps = torch.cat([network.forward_features(c)[0] for c in track(chunks, "maps", len(chunks))])
    maps = (maps - maps.mean((0, 2, 3), True)) / (maps.std((0, 2, 3), keepdim=True) + 1e-6)

    probabilities = class_evidence(maps, labels)
    masks = segment_all(images, probabilities, Seeds(sure=0.75, likely=0.25, far=0.25, reach=25))
    for seeds in (NARROW, NARROW, WIDE):
        probabilities = subject_probabilities(maps, masks)
        masks = segment_all(images, probabilities, seeds)
    overlaps = np.array([overlap(m, p) for m, p in zip(masks, probabilities, strict=True)])
    return [data.records[index].path for index in dataset.indices], images, masks, overlaps


def class_evidence(maps: Tensor, labels: Tensor) -> Maps:
    """Return the evidence for each image's class, about 0 to 1, ``(N, H, W)``.

    Args:
        maps: Feature maps, ``(N, C, H, W)``.
        labels: 0 or 1, ``(N,)``.
    """
    weights, bias = logistic_regression(maps.mean((2, 3)), labels, decay=1e-2)
    evidence = torch.einsum("nchw,c->nhw", maps, weights) + bias
    evidence *= (2 * labels - 1).view(-1, 1, 1)
    highest = evidence.flatten(1).quantile(0.98, dim=1).clamp_min(1e-3)
    return (evidence / highest.view(-1, 1, 1)).numpy()


def subject_probabilities(maps: Tensor, masks: Sequence[Mask]) -> Maps:
    """Return the probability of the subject at each position, ``(N, H, W)``.

    Args:
        maps: Feature maps, ``(N, C, H, W)``.
        masks: The mask of each image, from which one classifier for all images is learned.
    """
    shares = np.stack([shrink(mask, maps.shape[-1]) for mask in masks])
    target = torch.from_numpy(shares.reshape(-1))
    features = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
    clear = (target > 0.7) | (target < 0.15)
    weights, bias = logistic_regression(features[clear], (target[clear] > 0.5).float(), decay=1e-3)
    return torch.sigmoid(features @ weights + bias).view(shares.shape).numpy()


def logistic_regression(features: Tensor, labels: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Fit weights ``(F,)`` and a bias ``(1,)`` with an L2 penalty on the weights.

    Args:
        features: ``(N, F)``.
        labels: 0 or 1, ``(N,)``.
        decay: Factor of the penalty.
    """
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


def segment_all(images: NDArray[Any], probabilities: Maps, seeds: Seeds) -> list[Mask]:
    """Segment every image with GrabCut, on all cores.

    Args:
        images: uint8 ``(N, 300, 300, 3)``.
        probabilities: Probability of the subject at each position, ``(N, H, W)``.
        seeds: Thresholds of GrabCut's initial labels.
    """

    def segment(index: int) -> Mask:
        small = cv2.resize(images[index], (SMALL, SMALL), interpolation=cv2.INTER_AREA)
        return grab_cut(small, seeds(probabilities[index]))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(track(pool.map(segment, range(len(images))), "cutting out", len(images)))


def grab_cut(image: NDArray[np.uint8], labels: Mask) -> Mask:
    """Return the mask of the subject without specks.

    Args:
        image: ``(150, 150, 3)``.
        labels: Initial labels ``(150, 150)``; GrabCut changes them in place.
    """
    subject = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
    if not subject.any() or subject.all():
        return subject.astype(np.uint8)
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(image, labels, None, *models, 8, cv2.GC_INIT_WITH_MASK)
    mask = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    _, parts, statistics, _ = cv2.connectedComponentsWithStats(mask)
    areas = statistics[1:, cv2.CC_STAT_AREA]
    large = [part + 1 for part, area in enumerate(areas) if area > 0.05 * areas.max()]
    return np.isin(parts, large).astype(np.uint8)


def shrink(mask: Mask, side: int) -> Maps:
    """Return the share of the subject, 0 to 1, in each cell of a grid ``(side, side)``."""
    share: Maps = cv2.resize(mask.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    return share


def overlap(mask: Mask, probabilities: Maps) -> float:
    """Return the intersection over union of a mask and probabilities ``(H, W)``, 0 to 1."""
    share = shrink(mask, probabilities.shape[-1])
    return float(np.minimum(share, probabilities).sum() / np.maximum(share, probabilities).sum())


def write(
    out: Path, paths: Sequence[Path], images: NDArray[Any], masks: Sequence[Mask], overlaps: Maps
) -> None:
    """Write each usable subject twice: ``framed`` in place, ``reframed`` at a drawn size and place.

    Args:
        out: Target folder.
        paths: Files of the images; their folders are the classes.
        images: uint8 ``(N, 300, 300, 3)``.
        masks: Their masks ``(150, 150)``.
        overlaps: Overlap of each mask, see :func:`overlap`; above :data:`MIN_OVERLAP` is usable.
    """
    generator = np.random.default_rng(0)
    usable: dict[str, list[bool]] = {}
    for path, image, mask, fit in zip(paths, images, masks, overlaps, strict=True):
        draw = generator.uniform(size=3)
        usable.setdefault(path.parent.name, []).append(bool(fit > MIN_OVERLAP))
        if fit <= MIN_OVERLAP:
            continue
        soft = cv2.resize(mask.astype(np.float32), (LARGE, LARGE), interpolation=cv2.INTER_LINEAR)
        soft = ((soft - 0.25) * 2).clip(0, 1)[..., None]
        framed = (image * soft + 255 * (1 - soft)).round().astype(np.uint8)
        for kind, cutout in (("framed", framed), ("reframed", reframe(framed, soft > 0.5, draw))):
            target = out / kind / path.parent.name / f"{path.stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(cutout).save(target)
    for name, flags in usable.items():
        print(f"{name}: {sum(flags)} of {len(flags)} subjects are cut out")
    print(f"written to {out}")


def reframe(image: NDArray[np.uint8], subject: NDArray[Any], draw: NDArray[Any]) -> Any:
    """Crop a subject and lay it on white; its longer side is 50 to 95 % of the image's.

    Args:
        image: ``(300, 300, 3)``.
        subject: Whether a pixel is subject, bool ``(300, 300, 1)``.
        draw: Three numbers from 0 to 1: the size, the top and the left of the subject.
    """
    rows, columns = np.nonzero(subject[..., 0])
    crop = image[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
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
