"""Build what is in the box: the pictures as WebP and the Inception-v3 trunk as float16.

    python scripts/build_assets.py                       # official archives, timm's weights
    python scripts/build_assets.py --archives DIR --weights FILE.safetensors --out DIR

Built twice with the same versions of Pillow and safetensors, the files are the same to the byte.
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
from horsehuman.errors import HorseHumanError
from horsehuman.models.inception import CUTS, load_pretrained, read_pretrained
from horsehuman.runtime import log_to_stderr, track

CUT = "Mixed_6e"


def main(arguments: Sequence[str] | None = None) -> int:
    """Build what was asked for and print the digest of each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--archives", type=Path, metavar="DIR", help="folder with both zips")
    parser.add_argument("--weights", default="tv_in1k", help="timm tag or safetensors file")
    parser.add_argument("--out", type=Path, default=_assets(), metavar="DIR", help="target folder")
    given = parser.parse_args(arguments)
    log_to_stderr()
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        built = [pack_trunk(given.weights, given.out / "inception_v3_trunk.safetensors")]
        archives = local_archives(given.archives) if given.archives else download_archives()
        built += [pack_pictures(path, given.out / path.name) for path in archives.values()]
    except (HorseHumanError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in built:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{digest}  {path.name}  {path.stat().st_size:,} bytes")
    return 0


def pack_pictures(source: Path, target: Path) -> Path:
    """Recode an archive of pictures as WebP; order, names and times do not depend on the day."""
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
    """Recode one picture, whose alpha channel must be opaque, with quality 80 and method 6."""
    with Image.open(io.BytesIO(original)) as image:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            raise HorseHumanError("a picture is transparent: only opaque ones are packed")
        packed = io.BytesIO()
        image.convert("RGB").save(packed, "WEBP", quality=80, method=6)
        return packed.getvalue()


def pack_trunk(source: str, target: Path) -> Path:
    """Keep the weights up to the cut; convolutions as float16, the few others as they are."""
    trunk: Any = timm.create_model(
        "inception_v3", features_only=True, out_indices=(list(CUTS).index(CUT),)
    )
    load_pretrained(trunk, read_pretrained(source), CUT)
    tensors = {
        name: tensor.to(torch.float16 if tensor.ndim == 4 else tensor.dtype).contiguous()
        for name, tensor in trunk.state_dict().items()
    }
    safetensors.torch.save_file(tensors, target)
    target.chmod(0o644)
    return target


def _assets() -> Path:
    return Path(__file__).resolve().parents[1] / "horsehuman" / "assets"


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


if __name__ == "__main__":
    sys.exit(main())
