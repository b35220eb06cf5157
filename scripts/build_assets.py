"""Build the bundled files: the images as WebP and the Inception-v3 backbone as float16.

    python scripts/build_assets.py                       # official archives, timm's weights
    python scripts/build_assets.py --archives DIR --weights FILE.safetensors --out DIR
    python scripts/build_assets.py --photos ZIP          # only the features of these photographs

With the same versions of Pillow and safetensors, the files are the same to the byte each time.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import timm
import torch
from PIL import Image

from horsehuman.data import datasets
from horsehuman.data.archives import download_archives, local_archives
from horsehuman.data.records import Record
from horsehuman.errors import HorseHumanError, one_line
from horsehuman.models.bundled import PHOTOGRAPHS_FILE, write_bundled
from horsehuman.models.inception import CUTS, Inception, load_pretrained, read_pretrained
from horsehuman.runtime import ASSETS, BACKBONE_FILE, DIGESTS, log_to_stderr, track

#: Photographs in ``other`` that show people, found by eye in contact sheets of all 446.
SHOW_PEOPLE = set(Path(__file__).with_name("show_people.txt").read_text().split())

#: Last layer of the backbone that is kept.
CUT = "Mixed_6e"


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the files and print the SHA-256 of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--archives", type=Path, metavar="DIR", help="folder with both zips")
    parser.add_argument("--weights", default="tv_in1k", help="timm tag or safetensors file")
    parser.add_argument("--out", type=Path, default=ASSETS, metavar="DIR", help="target folder")
    parser.add_argument("--photos", type=Path, metavar="ZIP", help="horses/, humans/ and other/")
    options = parser.parse_args(arguments)
    log_to_stderr()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if options.photos:
            record_digests([pack_photographs(options.photos, options.out / PHOTOGRAPHS_FILE)])
            return 0
        built = [pack_backbone(options.weights, options.out / BACKBONE_FILE)]
        archives = local_archives(options.archives) if options.archives else download_archives()
        built += [pack_images(path, options.out / path.name) for path in archives.values()]
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    record_digests(built)
    return 0


def record_digests(paths: Sequence[Path]) -> None:
    """Print the SHA-256 digest and size of new files, and list the digests beside them."""
    for path in paths:
        digests = path.with_name(DIGESTS)
        lines = digests.read_text().splitlines() if digests.exists() else []
        others = [line for line in lines if not line.endswith(f"  {path.name}")]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        digests.write_text("\n".join(sorted([*others, f"{digest}  {path.name}"])) + "\n")
        print(f"{digest}  {path.name}  {path.stat().st_size:,} bytes")


def pack_images(source: Path, target: Path) -> Path:
    """Recode the images of an archive as WebP.

    The members are sorted by name and have a fixed time, so that the archive is the same each time.

    Args:
        source: Zip archive of images.
        target: Zip archive to write.

    Returns:
        The target.

    Raises:
        HorseHumanError: An image has transparent pixels.
    """
    with zipfile.ZipFile(source) as archive:
        names = sorted(m.filename for m in archive.infolist() if not m.is_dir())
        originals = [archive.read(name) for name in names]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        recoded = list(track(pool.map(to_webp, originals), f"recoding {source.name}", len(names)))
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for name, data in zip(names, recoded, strict=True):
            member = zipfile.ZipInfo(str(PurePosixPath(name).with_suffix(".webp")))
            member.external_attr = 0o644 << 16
            archive.writestr(member, data)
    return target


def to_webp(original: bytes) -> bytes:
    """Recode an opaque image as WebP with quality 80 and method 6."""
    with Image.open(io.BytesIO(original)) as image:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            raise HorseHumanError("an image has transparent pixels: only opaque ones are packed")
        packed = io.BytesIO()
        image.convert("RGB").save(packed, "WEBP", quality=80, method=6)
        return packed.getvalue()


def pack_backbone(source: str, target: Path) -> Path:
    """Write the weights up to :data:`CUT`: convolutions as float16, the few others unchanged.

    Args:
        source: Tag of timm's weights, or a safetensors file.
        target: Safetensors file to write.

    Returns:
        The target.
    """
    backbone: Any = timm.create_model(
        "inception_v3", features_only=True, out_indices=(list(CUTS).index(CUT),)
    )
    load_pretrained(backbone, read_pretrained(source), CUT)
    tensors = {
        name: tensor.to(torch.float16 if tensor.ndim == 4 else tensor.dtype).contiguous()
        for name, tensor in backbone.state_dict().items()
    }
    safetensors.torch.save_file(tensors, target)
    target.chmod(0o644)
    return target


def pack_photographs(source: Path, target: Path) -> Path:
    """Write the features of photographs in the default backbone, as float16.

    Args:
        source: Zip archive with the folders ``horses`` (named by breed: the text before the last
            two numbers), ``humans`` and ``other``; :data:`SHOW_PEOPLE` are left out.
        target: Safetensors file to write.

    Returns:
        The target.
    """
    network = Inception()
    with zipfile.ZipFile(source) as archive, tempfile.TemporaryDirectory() as folder:
        archive.extractall(folder)
        paths = [p for p in sorted(Path(folder).rglob("*.jpg")) if p.stem not in SHOW_PEOPLE]
        images = datasets.OnDemandImages(
            [Record(path, 0, "", "") for path in paths], network.image_size
        )
        dataset = datasets.BatchDataset(images, torch.zeros(len(paths)), range(len(paths)))
        loader = datasets.make_loader(dataset, datasets.ShardSampler(len(paths)), 32, 0)
        features = datasets.embed_all(loader, network.feature_cache()).inputs
    assert isinstance(features, torch.Tensor)
    names = ("horses", "humans", "other")
    labels = torch.tensor([names.index(path.parent.name) for path in paths])
    tensors = {"features": features.half(), "labels": labels.to(torch.int8)}
    groups = [group_of_photograph(path) for path in paths]
    write_bundled(target, network, tensors, {"groups": groups})
    return target


def group_of_photograph(path: Path) -> str:
    """Return the breed of a horse, the file of anything else, after the name of the class."""
    breed = re.sub(r"^[\d_]+|[\d_]+$", "", path.stem)
    return f"{path.parent.name}/{breed if path.parent.name == 'horses' else path.stem}"


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


if __name__ == "__main__":
    sys.exit(main())
