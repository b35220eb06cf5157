"""Build the bundled classifiers from the default recipes.

    python scripts/build_classifiers.py                 # both, into the package
    python scripts/build_classifiers.py cnn --out DIR   # one, elsewhere

They are trained on all training subjects, taken after the last epoch, and calibrated on held-out
subjects as ``horsehuman calibrate`` does it. The test set is not used. The pretrained backbone is a
bundled file of its own, so the checkpoints do not contain it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from build_assets import record_digests

from horsehuman.errors import HorseHumanError, check_choice, one_line
from horsehuman.models.checkpoint import load_classifier, write_checkpoint
from horsehuman.runtime import ASSETS, BUNDLED, log_to_stderr, tune_process
from horsehuman.training.calibrate import calibrate
from horsehuman.training.config import compose
from horsehuman.training.run import train

OVERRIDES = ["data.val_fraction=0", "test=false"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the classifiers and print the SHA-256 of each file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=" | ".join(BUNDLED))
    parser.add_argument("--out", type=Path, default=ASSETS, metavar="DIR", help="target folder")
    options = parser.parse_args(arguments)
    log_to_stderr()
    tune_process()
    try:
        for name in options.names or BUNDLED:
            check_choice("NAME", name, BUNDLED)
            options.out.mkdir(parents=True, exist_ok=True)
            build(name, options.out / f"{name}.ckpt")
            record_digests([options.out / f"{name}.ckpt"])
    except (HorseHumanError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def build(
    name: str, target: Path, overrides: Sequence[str] = (), *, calibrated: bool = True
) -> None:
    """Train a default recipe and write its checkpoint without the bundled backbone.

    Args:
        name: ``cnn`` or ``inception``.
        target: Checkpoint to write.
        overrides: Further options of the run.
        calibrated: Whether to calibrate the classifier, which trains five more runs.
    """
    config = compose(f"model={name}", *OVERRIDES, *overrides)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        train(config, run_dir)
        if calibrated:
            calibrate(run_dir)
        final = run_dir / "checkpoints" / "final.ckpt"
        checkpoint = torch.load(final, map_location="cpu", weights_only=True)
    if config.model.get("weights") == "box":
        state = checkpoint["state_dict"]
        head = {key: value for key, value in state.items() if ".backbone." not in key}
        checkpoint["state_dict"] = head
    write_checkpoint(target, checkpoint)
    load_classifier(target)  # raises if the checkpoint cannot be loaded


if __name__ == "__main__":
    sys.exit(main())
