"""What a classifier says of pictures that are neither, by kind: the table of docs/neither.md.

    pip install -e '.[dev]' && python scripts/neither.py --out neither

Makes pictures that are neither horse nor human (noise, plain colours, pages of text, plots, corners
of training scenes, shuffled and blurred training pictures), takes photographs out of scikit-image
and scikit-learn, and asks the classifier about all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from horsehuman import plots
from horsehuman.data.image_sets import find_image_set
from horsehuman.data.records import Record
from horsehuman.errors import HorseHumanError, one_line
from horsehuman.inference.predict import predict
from horsehuman.models.checkpoint import load_classifier
from horsehuman.runtime import console, keep_freed_memory, log_to_stderr, table, track

#: Pictures of each kind that is made.
COUNT = 40

#: Photographs in scikit-image and scikit-learn that show a person, and others.
HUMANS = ("astronaut", "camera")
OTHERS = (
    *("brick", "cell", "chelsea", "chessboard_RGB", "clock_motion", "coffee", "coins", "color"),
    *("grass", "gravel", "hubble_deep_field", "ihc", "logo", "microaneurysms", "moon"),
    *("motorcycle_left", "motorcycle_right", "page", "phantom", "retina", "rocket", "text"),
    *("china", "flower"),
)

WORDS = "he saw that many people find little time for long words and pages of plain text"

Generator = np.random.Generator


def noise(generator: Generator, index: int) -> Image.Image:
    """Fine, grey or coarse noise."""
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
    """One colour; white, black and grey first."""
    first = [(255, 255, 255), (0, 0, 0), (128, 128, 128)]
    chosen = first[index] if index < 3 else tuple(generator.integers(0, 256, 3).tolist())
    return Image.new("RGB", (300, 300), chosen)


def text(generator: Generator, index: int) -> Image.Image:
    """A page of text."""
    page = Image.new("RGB", (300, 400), "white")
    size = int(generator.integers(9, 20))
    font = ImageFont.load_default(size)
    for y in range(10, 390, int(size * 1.4)):
        ImageDraw.Draw(page).text(
            (10, y), " ".join(generator.choice(WORDS.split(), 12)), "black", font
        )
    return page


def plot(generator: Generator, index: int) -> Image.Image:
    """A report's panels on made-up answers."""
    labels = generator.integers(0, 2, 60)
    answers = generator.random(60)
    groups = [f"g{k}" for k in generator.integers(0, 9, 60)]
    whole = plots.pixels(plots.report(answers, labels, groups, 0.5, ("a", "b"), "report"))
    top, left = (int(index % 2) * 370, int(index % 3) * 400)
    return Image.fromarray(np.ascontiguousarray(whole[top : top + 370, left : left + 400]))


def made(records: Sequence[Record], seed: int = 0) -> dict[str, list[Image.Image]]:
    """Kinds of pictures that are neither, :data:`COUNT` of each."""
    humans = [r for r in records if r.label == 1]
    generator = np.random.default_rng(seed)

    def one(of: Sequence[Record]) -> Image.Image:
        return Image.open(of[int(generator.integers(len(of)))].path).convert("RGB")

    def corner(generator: Generator, index: int) -> Image.Image:
        picture = one(humans)
        left = 0 if index % 2 else picture.width - 110
        return picture.crop((left, 0, left + 110, 110))

    def mosaic(generator: Generator, index: int) -> Image.Image:
        side = (19, 38)[index % 2]
        count = 304 // side
        pixels = np.asarray(one(records).resize((304, 304)))
        tiles = (
            pixels.reshape(count, side, count, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        )
        tiles = tiles[generator.permutation(len(tiles))].reshape(count, count, side, side, 3)
        return Image.fromarray(tiles.swapaxes(1, 2).reshape(304, 304, 3))

    def blur(generator: Generator, index: int) -> Image.Image:
        return one(records).filter(ImageFilter.GaussianBlur((12, 20)[index % 2]))

    kinds: dict[str, Callable[[Generator, int], Image.Image]] = {
        "noise": noise,
        "one colour": colour,
        "pages of text": text,
        "plots": plot,
        "shuffled training pictures": mosaic,
        "corners of training scenes": corner,
        "heavily blurred training pictures": blur,
    }
    return {
        kind: [make(generator, index) for index in range(COUNT)] for kind, make in kinds.items()
    }


def photographs() -> dict[str, list[Image.Image]]:
    """What lies in the wheels of scikit-image and scikit-learn."""
    places = Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"

    def found(names: Sequence[str]) -> list[Image.Image]:
        return [
            Image.open(next(path for place in places for path in place.glob(f"{name}.*g")))
            for name in names
        ]

    faces = np.load(places[0] / "lfw_subset.npy")[:100:3]
    return {
        "photographs of something else": found(OTHERS),
        "photographs of a person": found(HUMANS),
        "faces of 25 x 25 pixels": [Image.fromarray((f * 255).astype(np.uint8)) for f in faces],
        "silhouette of a horse": found(["horse"]),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Make, ask and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="inception")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the pictures there")
    given = parser.parse_args(arguments)
    log_to_stderr()
    keep_freed_memory()
    try:
        classifier = load_classifier(given.model)
        lines = table("", "pictures", "neither", "unsure", *classifier.class_names)
        records = find_image_set("box").split("train").records
        kinds = {**made(records), **photographs()}
        for kind, pictures in track(kinds.items(), "asking", len(kinds)):
            found = list(predict(classifier, pictures))
            counts = [sum(p.status == status for p in found) for status in ("neither", "unsure")]
            counts += [
                sum(p.status == "ok" and p.class_name == name for p in found)
                for name in classifier.class_names
            ]
            lines.add_row(kind, str(len(found)), *map(str, counts))
            if given.out:
                (given.out / kind).mkdir(parents=True, exist_ok=True)
                for index, picture in enumerate(pictures):
                    picture.convert("RGB").save(given.out / kind / f"{index}.png")
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    console(stderr=False).print(lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
