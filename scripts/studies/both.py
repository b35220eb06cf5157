"""Fit and evaluate the probes of *both*: whether regions of an image show a horse, or a person.

    python scripts/studies/cutouts.py --out cutouts
    python scripts/studies/both.py --cutouts cutouts --photos ZIP            # the table
    python scripts/studies/both.py --cutouts cutouts --photos ZIP --build    # and the bundled file

The probes are linear classifiers of the mean features of regions, fitted by multiple-instance
learning: the label is known for an image, not for its regions. Singles show one class: training
scenes, photographs, and cut-outs on white as they are and rotated. Composites show both: a cut-out
person in a scene or photograph of a horse, a cut-out horse in a scene of a person, both cut-outs on
white, and halves of two photographs. In cross-validation by subject, breed and file, a composite is
held out if both parts are.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))
from build_assets import group_of_photograph, record_digests

from horsehuman.data.archives import image_root
from horsehuman.errors import HorseHumanError, one_line
from horsehuman.models.bundled import PRESENCE_FILE, write_bundled
from horsehuman.models.inception import Inception, average_regions, presence_logits
from horsehuman.runtime import ASSETS, console, log_to_stderr, table, track, tune_process

FOLDS, COUNT, SIDE = 5, 200, 300

#: Photographs of horses that show people, too, found by eye in contact sheets of all 400.
BESIDE = set(Path(__file__).with_name("people_beside_horses.txt").read_text().split())

#: Share of held-out composites that the threshold finds.
FOUND = 0.9

#: Factor of the sum of squared weights in the loss.
RIDGE_PENALTY = 0.01


@dataclass(frozen=True)
class Sample:
    """An image of the study.

    Attributes:
        kind: Row of the table.
        shows: Whether it shows a horse, and a person.
        folds: Fold of each part; -1 for images that are never fitted.
        image: Loads it.
    """

    kind: str
    shows: tuple[bool, bool]
    folds: tuple[int, ...]
    image: Callable[[], Image.Image]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and write the probes if they are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cutouts", type=Path, required=True, metavar="DIR")
    parser.add_argument("--photos", type=Path, required=True, metavar="ZIP")
    parser.add_argument("--build", action="store_true", help="write the bundled file")
    options = parser.parse_args(arguments)
    log_to_stderr()
    tune_process()
    try:
        with zipfile.ZipFile(options.photos) as archive, tempfile.TemporaryDirectory() as folder:
            archive.extractall(folder)
            samples = [*singles(options.cutouts, Path(folder))]
            samples += composites(options.cutouts, Path(folder), np.random.default_rng(0))
            network = Inception()
            regions = embed(network, samples)
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    scores = cross_validate(samples, regions)
    composite = torch.tensor([all(sample.shows) for sample in samples])
    threshold = float(scores[composite & ~scores.isnan()].quantile(1 - FOUND))
    print_table(samples, scores - threshold)
    if options.build:
        fitted = [index for index, sample in enumerate(samples) if sample.folds[0] >= 0]
        weight, bias = fit_probes(samples, regions, fitted)
        tensors = {"presence.weight": weight, "presence.bias": bias}
        target = ASSETS / PRESENCE_FILE
        write_bundled(target, network, tensors, {"threshold": round(threshold, 4)})
        record_digests([target])
    return 0


def singles(cutouts: Path, photos: Path) -> Iterator[Sample]:
    """Yield images that show one class, or neither, or are official test images."""
    for label, name in enumerate(("horses", "humans")):
        shows = label == 0, label == 1
        scenes = sorted((image_root("box") / "train" / name).iterdir())
        folders = {f"scenes of {name}": scenes}
        for kind in ("framed", "reframed"):
            folders[f"{kind} cut-outs of {name}"] = sorted((cutouts / kind / name).iterdir())
        folders[f"photographs of {name}"] = sorted((photos / name).iterdir())
        for kind, paths in folders.items():
            for path in paths:
                part, image = (fold_of(path),), partial(read, path)
                if path.stem in BESIDE:
                    yield Sample("photographs of people beside horses", (True, True), part, image)
                else:
                    yield Sample(kind, shows, part, image)
        for path in sorted((cutouts / "reframed" / name).iterdir())[::2]:
            kind = f"rotated cut-outs of {name}"
            yield Sample(kind, shows, (fold_of(path),), partial(rotate, path))
        for path in sorted((image_root("box") / "test" / name).iterdir()):
            yield Sample(f"official test images of {name}", shows, (-1,), partial(read, path))
    for path in sorted((photos / "other").iterdir()):
        yield Sample("photographs of something else", (False, False), (-1,), partial(read, path))


def composites(cutouts: Path, photos: Path, generator: np.random.Generator) -> Iterator[Sample]:
    """Yield :data:`COUNT` images of each kind that show both classes; sizes and places vary."""
    framed = {n: sorted((cutouts / "framed" / n).iterdir()) for n in ("horses", "humans")}
    pictures = {n: sorted((photos / n).iterdir()) for n in ("horses", "humans")}

    def scene(path: Path) -> Path:
        return image_root("box") / "train" / path.parent.name / f"{path.stem}.webp"

    for _ in range(COUNT):
        horse, human = (framed[n][generator.integers(len(framed[n]))] for n in framed)
        photo, person = (pictures[n][generator.integers(len(pictures[n]))] for n in pictures)
        seed = int(generator.integers(2**31))
        for kind, parts, backdrop, pasted in (
            ("person in a scene of a horse", (horse, human), scene(horse), (human,)),
            ("horse in a scene of a person", (horse, human), scene(human), (horse,)),
            ("cut-outs side by side on white", (horse, human), None, (horse, human)),
            ("person in a photograph of a horse", (photo, human), photo, (human,)),
            ("halves of two photographs", (photo, person), None, ()),
        ):
            seeds = np.random.default_rng(seed)
            image = partial(compose, backdrop, pasted, seeds) if pasted else partial(halves, *parts)
            yield Sample(kind, (True, True), tuple(map(fold_of, parts)), image)


def fold_of(path: Path) -> int:
    """Return the fold of an image's subject, breed or file: a hash of its name."""
    if path.suffix == ".jpg":
        group = group_of_photograph(path)
    else:
        group = path.parent.name + path.stem.rpartition("-")[0]
    return int.from_bytes(group.encode(), "big") % 10007 % FOLDS


def read(path: Path) -> Image.Image:
    """Read an image and squash it."""
    return Image.open(path).convert("RGB").resize((SIDE, SIDE))


def rotate(path: Path) -> Image.Image:
    """Rotate a cut-out by up to 60 degrees, drawn by its name."""
    angle = np.random.default_rng(list(path.name.encode())).uniform(-60, 60)
    return read(path).rotate(angle, Image.Resampling.BICUBIC, fillcolor="white")


def compose(
    backdrop: Path | None, cutouts: Sequence[Path], generator: np.random.Generator
) -> Image.Image:
    """Paste one cut-out at one side of a backdrop, or two at both sides of a white one."""
    canvas = read(backdrop) if backdrop else Image.new("RGB", (SIDE, SIDE), "white")
    left = generator.random() < 0.5
    for index, path in enumerate(cutouts):
        image = Image.open(path).convert("RGB")
        mask = image.convert("L").point(lambda value: 255 * (value < 245))
        box = mask.getbbox() or (0, 0, *image.size)
        height = generator.uniform(0.5, 0.9) * SIDE
        width = height * (box[2] - box[0]) / (box[3] - box[1])
        shrink = min(1, 0.55 * SIDE / width)
        size = max(8, round(shrink * width)), max(8, round(shrink * height))
        at_left = left != bool(index)
        center = SIDE * (0.2 if at_left else 0.8) + generator.uniform(-20, 20)
        corner = round(center - size[0] / 2), round(SIDE - size[1] - generator.uniform(0, 30))
        canvas.paste(image.crop(box).resize(size), corner, mask.crop(box).resize(size))
    return canvas


def halves(first: Path, second: Path) -> Image.Image:
    """Put the centres of two images side by side."""
    canvas = Image.new("RGB", (SIDE, SIDE))
    for index, path in enumerate((first, second)):
        half = ImageOps.fit(Image.open(path).convert("RGB"), (SIDE // 2, SIDE))
        canvas.paste(half, (index * SIDE // 2, 0))
    return canvas


@torch.inference_mode()
def embed(network: Inception, samples: Sequence[Sample]) -> Tensor:
    """Return the mean features of all regions, float16 ``(N, R, C)``."""
    regions = []
    for start in track(range(0, len(samples), 8), "embedding", -(-len(samples) // 8)):
        images = np.stack([np.asarray(sample.image()) for sample in samples[start : start + 8]])
        maps = network.forward_features(torch.from_numpy(images).permute(0, 3, 1, 2))
        regions.append(average_regions(maps).half())
    return torch.cat(regions)


def fit_probes(
    samples: Sequence[Sample], regions: Tensor, indices: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Fit both probes to some samples by ridge-penalised logistic regression.

    Images that show the class weigh as much as those that do not; of the former, singles weigh as
    much as composites.

    Returns:
        Weight ``(2, C)`` and bias ``(2,)``.
    """
    x = regions[indices].float()
    mean, deviation = x.mean((0, 1)), x.std((0, 1)).clamp_min(1e-6)
    x = x.sub_(mean).div_(deviation)
    shows = torch.tensor([samples[index].shows for index in indices]).float()
    single = shows * (1 - shows.flip(1))
    weights = single / (4 * single.sum(0)) + (1 - shows) / (2 * (1 - shows).sum(0))
    weights += (shows - single) / (4 * (shows - single).sum(0))
    parameters = torch.zeros(x.shape[2] + 1, 2, requires_grad=True)  # row 0 holds the biases
    optimizer = torch.optim.LBFGS([parameters], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = presence_logits(x @ parameters[1:] + parameters[0])
        losses = functional.binary_cross_entropy_with_logits(logits, shows, reduction="none")
        value = (weights * losses).sum() + RIDGE_PENALTY * parameters[1:].square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    weight = (parameters.detach()[1:] / deviation[:, None]).T.contiguous()
    return weight, parameters.detach()[0] - weight @ mean


def cross_validate(samples: Sequence[Sample], regions: Tensor) -> Tensor:
    """Return the both scores of held-out samples, NaN for those that no fold holds out whole.

    The score of a sample that is never fitted is the mean over all folds.
    """
    scores = torch.full((len(samples),), float("nan"))
    unseen = [index for index, sample in enumerate(samples) if sample.folds[0] < 0]
    scores[unseen] = 0
    for fold in track(range(FOLDS), "fitting", FOLDS):
        fitted = [i for i, s in enumerate(samples) if s.folds[0] >= 0 and fold not in s.folds]
        held_out = [i for i, sample in enumerate(samples) if set(sample.folds) == {fold}]
        weight, bias = fit_probes(samples, regions, fitted)

        def score(indices: Sequence[int], weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            return presence_logits(regions[indices].float() @ weight.T + bias).amin(1)

        scores[held_out] = score(held_out)
        scores[unseen] += score(unseen) / FOLDS
    return scores


def print_table(samples: Sequence[Sample], scores: Tensor) -> None:
    """Print the share of images that are answered *both*, for each kind."""
    lines = table("", "pictures", "both")
    for kind in dict.fromkeys(sample.kind for sample in samples):
        member = torch.tensor([sample.kind == kind for sample in samples])
        known = scores[member & ~scores.isnan()]
        lines.add_row(kind, str(len(known)), f"{float((known >= 0).float().mean()):.1%}")
    console(stderr=False).print(lines)


if __name__ == "__main__":
    sys.exit(main())
