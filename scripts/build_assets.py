"""Build the bundled files: the images as WebP and the Inception-v3 backbone as float16.

    python scripts/build_assets.py                       # official archives, timm's weights
    python scripts/build_assets.py --archives DIR --weights FILE.safetensors --out DIR

With the same versions of Pillow and safetensors, the files are the same to the byte each time.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import timm
import torch
from PIL import Image

from horsehuman.data.archives import download_archives, local_archives
from horsehuman.errors import HorseHumanError, one_line
from horsehuman.models.inception import CUTS, load_pretrained, read_pretrained
from horsehuman.runtime import ASSETS, BACKBONE_FILE, DIGESTS, log_to_stderr, track

#: Last layer of the backbone that is kept.
CUT = "Mixed_6e"


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the files and print the SHA-256 of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--archives", type=Path, metavar="DIR", help="folder with both zips")
    parser.add_argument("--weights", default="tv_in1k", help="timm tag or safetensors file")
    parser.add_argument("--out", type=Path, default=ASSETS, metavar="DIR", help="target folder")
    options = parser.parse_args(arguments)
    log_to_stderr()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
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


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


if __name__ == "__main__":
    sys.exit(main())
