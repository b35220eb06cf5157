"""Measure *neither*: the tables of docs/neither.md.

    pip install -e '.[dev]' && python scripts/studies/neither.py --out neither

The first table compares scores in cross-validation by subject, breed and file, on the features of
the training images and of the bundled photographs' features. The second counts the predictions of a
classifier for images that are neither and that it was not trained on: noise, plain colours, pages
of text, plots, corners of training images, shuffled and blurred training images, and photographs
from scikit-image and scikit-learn.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import sklearn.datasets
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pytorch_ood.detector import KNN, EnergyBased, Mahalanobis, ViM  # type: ignore[import-untyped]
from rich.table import Table
from torchmetrics.functional.classification import binary_auroc

from horsehuman import HorseHumanDataModule, plots
from horsehuman.data.image_sets import find_image_set
from horsehuman.data.records import Record, group_folds
from horsehuman.decision import Floats, Ints
from horsehuman.errors import HorseHumanError, one_line
from horsehuman.evaluation.metrics import clopper_pearson_interval
from horsehuman.inference.predict import predict
from horsehuman.models.bundled import bundled_photographs
from horsehuman.models.calibration import FOLDS, fit_probe, known_quantile
from horsehuman.models.checkpoint import load_classifier
from horsehuman.models.inception import Inception
from horsehuman.runtime import console, log_to_stderr, table, track, tune_process

#: Number of images of each kind that is made.
COUNT = 40

#: Names of photographs in scikit-image and scikit-learn: of a person, and of something else.
HUMANS = ("astronaut", "camera")
OTHERS = (
    *("brick", "cell", "chelsea", "chessboard_RGB", "clock_motion", "coffee", "coins", "color"),
    *("grass", "gravel", "hubble_deep_field", "ihc", "logo", "microaneurysms", "moon"),
    *("motorcycle_left", "motorcycle_right", "page", "phantom", "retina", "rocket", "text"),
    *("china", "flower"),
)

WORDS = "he saw that many people find little time for long words and pages of plain text"

Generator = np.random.Generator


def main(arguments: Sequence[str] | None = None) -> int:
    """Make and predict the images, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="inception")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write the images there")
    options = parser.parse_args(arguments)
    log_to_stderr()
    tune_process()
    try:
        console(stderr=False).print(compare_scores(), count_unsure())
        classifier = load_classifier(options.model)
        columns = ("neither", "both", "unsure", *classifier.class_names)
        lines = table("", "pictures", *columns)
        kinds = {**make_images(find_image_set("box").split("train").records), **photographs()}
        for kind, images in track(kinds.items(), "predicting", len(kinds)):
            predictions = list(predict(classifier, images))
            statuses = [p.class_name if p.status == "ok" else p.status for p in predictions]
            counts = (statuses.count(column) for column in columns)
            lines.add_row(kind, str(len(predictions)), *map(str, counts))
            if options.out:
                write(options.out / kind, images)
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    console(stderr=False).print(lines)
    return 0


def compare_scores() -> Table:
    """Compare scores in cross-validation; a higher score means *neither*."""
    network = Inception()
    photographs = bundled_photographs(network)
    assert photographs is not None
    data = HorseHumanDataModule(val_fraction=0)
    data.setup()
    scenes, records = data.training_features(network.feature_cache())
    x = torch.cat([scenes, photographs.features])
    labels = np.concatenate([[record.label for record in records], photographs.labels])
    groups = [*(record.group for record in records), *photographs.groups]
    folds = np.zeros(len(x), np.int64)
    is_scene = np.arange(len(x)) < len(scenes)
    for stratum in range(6):
        member = np.flatnonzero(labels + 3 * is_scene == stratum)
        named = [groups[index] for index in member]
        if named:
            folds[member] = group_folds(np.zeros(len(named), np.int64), named, FOLDS)
    columns = ("AUROC", "others refused", "95 %", "horses kept", "people kept", "scenes kept")
    lines = table("score", *columns)
    for name, (score, used) in scores(is_scene, labels).items():
        values = np.zeros(len(x))
        for fold in range(FOLDS):
            fitted = torch.from_numpy((folds != fold) & used)
            held_out = torch.from_numpy(folds == fold)
            values[held_out] = score(x[fitted], labels[fitted], x[held_out])
        lines.add_row(name, *rates(values, labels, groups, is_scene))
    return lines


Score = Callable[[torch.Tensor, Ints, torch.Tensor], torch.Tensor]


def scores(is_scene: NDArray[np.bool_], labels: Ints) -> dict[str, tuple[Score, NDArray[np.bool_]]]:
    """Return scores by name, each with a mask of the images that it may be fitted to."""

    def probe(x: torch.Tensor, y: Ints, new: torch.Tensor) -> torch.Tensor:
        weight, bias = fit_probe(x, torch.from_numpy(y == 2).float(), balanced=True)
        return new @ weight + bias

    def detector(kind: Callable[..., Any]) -> Score:
        def score(x: torch.Tensor, y: Ints, new: torch.Tensor) -> torch.Tensor:
            targets = torch.from_numpy(y)
            weight, bias = fit_probe(x, targets.float())
            fitted = kind(torch.stack([-weight, weight]), torch.stack([-bias, bias]))
            values: torch.Tensor = fitted.fit_features(x, targets).predict_features(new)
            return values

        return score

    def energy(x: torch.Tensor, y: Ints, new: torch.Tensor) -> torch.Tensor:
        weight, bias = fit_probe(x, torch.from_numpy(y).float())
        logits = new @ weight + bias
        values: torch.Tensor = EnergyBased.score(torch.stack([-logits / 2, logits / 2], 1))
        return values

    known, everything = labels != 2, np.full(len(labels), True)
    return {
        "probe": (probe, everything),
        "probe, only scenes as known": (probe, is_scene | ~known),
        "probe, no photographs of people": (probe, is_scene | (labels != 1)),
        "nearest neighbours (KNN, k = 1)": (detector(lambda w, b: KNN(None, k=1)), known),
        "Mahalanobis": (detector(lambda w, b: Mahalanobis(None)), known),
        "ViM": (detector(lambda w, b: ViM(None, 256, w, b)), known),
        "energy": (energy, known),
    }


def rates(
    values: Floats, labels: Ints, groups: Sequence[str], is_scene: NDArray[np.bool_]
) -> list[str]:
    """Return the cells of a row at the threshold that :func:`fit_neither` would take."""
    other = labels == 2
    known = np.flatnonzero(~other)
    refused = values > known_quantile(values[known], [groups[index] for index in known.tolist()])
    photos = torch.from_numpy(np.flatnonzero(~is_scene))
    auroc = binary_auroc(torch.from_numpy(values)[photos], torch.from_numpy(other).int()[photos])
    interval = clopper_pearson_interval(int(refused[other].sum()), int(other.sum()))
    kept = [~refused[~is_scene & (labels == label)] for label in (0, 1)] + [~refused[is_scene]]
    cells = [f"{auroc:.3f}", f"{refused[other].mean():.1%}"]
    cells.append(" to ".join(f"{bound:.1%}" for bound in interval))
    return cells + [f"{mask.mean():.1%}" for mask in kept]


def count_unsure() -> Table:
    """Count unsure and wrong answers of the bundled classifier to the bundled photographs."""
    network = load_classifier("inception")
    assert isinstance(network, Inception)
    photographs = bundled_photographs(network)
    assert photographs is not None
    with torch.inference_mode():
        logits = network.calibrate(network.forward_head(photographs.features)).double().numpy()
    sure = 1 / (1 + np.exp(-np.abs(logits))) >= network.confidence_threshold
    lines = table("photographs", "pictures", "unsure", "wrong of the others")
    for label, name in enumerate(network.class_names):
        member = photographs.labels == label
        wrong = member & sure & ((logits >= 0) != bool(label))
        lines.add_row(name, *map(str, (member.sum(), (member & ~sure).sum(), wrong.sum())))
    return lines


def write(folder: Path, images: Sequence[Image.Image]) -> None:
    """Write images as numbered PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        image.convert("RGB").save(folder / f"{index}.png")


def make_images(records: Sequence[Record], seed: int = 0) -> dict[str, list[Image.Image]]:
    """Make :data:`COUNT` images of each kind; the training images are those of the records."""
    humans = [record for record in records if record.label == 1]
    generator = np.random.default_rng(seed)

    def draw(choices: Sequence[Record]) -> Image.Image:
        return Image.open(choices[int(generator.integers(len(choices)))].path).convert("RGB")

    def corner(generator: Generator, index: int) -> Image.Image:
        image = draw(humans)
        left = 0 if index % 2 else image.width - 110
        return image.crop((left, 0, left + 110, 110))

    def mosaic(generator: Generator, index: int) -> Image.Image:
        side = (19, 38)[index % 2]
        count = 304 // side
        grid = np.asarray(draw(records).resize((304, 304))).reshape(count, side, count, side, 3)
        tiles = grid.swapaxes(1, 2).reshape(-1, side, side, 3)
        tiles = tiles[generator.permutation(len(tiles))].reshape(count, count, side, side, 3)
        return Image.fromarray(tiles.swapaxes(1, 2).reshape(304, 304, 3))

    def blur(generator: Generator, index: int) -> Image.Image:
        return draw(records).filter(ImageFilter.GaussianBlur((12, 20)[index % 2]))

    kinds: dict[str, Callable[[Generator, int], Image.Image]] = {
        "noise": noise,
        "one colour": colour,
        "pages of text": text,
        "plots": plot,
        "shuffled training pictures": mosaic,
        "corners of training scenes": corner,
        "heavily blurred training pictures": blur,
    }
    return {kind: [make(generator, k) for k in range(COUNT)] for kind, make in kinds.items()}


def noise(generator: Generator, index: int) -> Image.Image:
    """Make fine, grey or coarse noise, by turns."""
    if index % 3 == 0:
        pixels = 256 * generator.random((300, 300, 3))
    elif index % 3 == 1:
        pixels = generator.normal(128, generator.uniform(10, 60), (300, 300, 1)).repeat(3, 2)
    else:
        side = int(generator.integers(4, 40))
        small = Image.fromarray(generator.integers(0, 256, (side, side, 3)).astype(np.uint8))
        return small.resize((300, 300), Image.Resampling.BICUBIC)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def colour(generator: Generator, index: int) -> Image.Image:
    """Make an image of one colour: white, black, grey, then random ones."""
    first = [(255, 255, 255), (0, 0, 0), (128, 128, 128)]
    chosen = first[index] if index < 3 else tuple(generator.integers(0, 256, 3).tolist())
    return Image.new("RGB", (300, 300), chosen)


def text(generator: Generator, index: int) -> Image.Image:
    """Make a page of text."""
    page = Image.new("RGB", (300, 400), "white")
    size = int(generator.integers(9, 20))
    font = ImageFont.load_default(size)
    for y in range(10, 390, int(size * 1.4)):
        line = " ".join(generator.choice(WORDS.split(), 12))
        ImageDraw.Draw(page).text((10, y), line, "black", font)
    return page


def plot(generator: Generator, index: int) -> Image.Image:
    """Crop the report figure of random predictions."""
    labels = generator.integers(0, 2, 60)
    probabilities = generator.random(60)
    groups = [f"g{k}" for k in generator.integers(0, 9, 60)]
    figure = plots.report(probabilities, labels, groups, 0.5, ("a", "b"), "report")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    top, left = index % 2 * 370, index % 3 * 400
    return Image.open(file).convert("RGB").crop((left, top, left + 400, top + 370))


def photographs() -> dict[str, list[Image.Image]]:
    """Return images that are part of the packages scikit-image and scikit-learn."""
    folders = Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"

    def find(name: str) -> Image.Image:
        return Image.open(next(path for folder in folders for path in folder.glob(f"{name}.*g")))

    faces = np.load(folders[0] / "lfw_subset.npy")[:100:3]
    return {
        "photographs of something else": [*map(find, OTHERS)],
        "photographs of a person": [*map(find, HUMANS)],
        "faces of 25 x 25 pixels": [Image.fromarray((f * 255).astype(np.uint8)) for f in faces],
        "silhouette of a horse": [find("horse")],
    }


if __name__ == "__main__":
    sys.exit(main())
