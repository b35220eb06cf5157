"""Build the trained classifiers in the box from the default recipes.

    python scripts/build_classifiers.py                 # both, into the package
    python scripts/build_classifiers.py cnn --out DIR   # one, elsewhere

They are trained on all training figures, kept as they are after the last epoch, and calibrated on
held-out figures (scripts/calibrate.py); the test set is not looked at. What the package holds
already, the pretrained trunk, is left out of them.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from calibrate import calibrate

from horsehuman.errors import HorseHumanError, check_choice, one_line
from horsehuman.models.checkpoint import find_checkpoint, load_classifier, write_checkpoint
from horsehuman.runtime import BUNDLED, keep_freed_memory, log_to_stderr
from horsehuman.training.config import compose
from horsehuman.training.run import train

OVERRIDES = ["data.val_fraction=0", "test=false"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, pack and print the digest of each file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=" | ".join(BUNDLED))
    parser.add_argument("--out", type=Path, metavar="DIR", help="target folder [the package]")
    given = parser.parse_args(arguments)
    log_to_stderr()
    keep_freed_memory()
    try:
        for name in given.names or BUNDLED:
            check_choice("NAME", name, BUNDLED)
            target = given.out / f"{name}.ckpt" if given.out else find_checkpoint(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            build(name, target)
            digest = hashlib.sha256(target.read_bytes()).hexdigest()
            print(f"{digest}  {target.name}  {target.stat().st_size:,} bytes")
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def build(
    name: str, target: Path, overrides: Sequence[str] = (), *, calibrated: bool = True
) -> None:
    """Train the default recipe of ``name`` and write what the package does not hold yet."""
    config = compose(f"model={name}", *OVERRIDES, *overrides)
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run")
        if calibrated:
            calibrate(Path(folder) / "run", config)
        final = Path(folder) / "run" / "checkpoints" / "final.ckpt"
        checkpoint = torch.load(final, map_location="cpu", weights_only=True)
    if config.model.get("weights") == "box":
        state = checkpoint["state_dict"]
        kept = {key: value for key, value in state.items() if ".backbone." not in key}
        checkpoint["state_dict"] = kept
    write_checkpoint(target, checkpoint)
    load_classifier(target)


if __name__ == "__main__":
    sys.exit(main())
