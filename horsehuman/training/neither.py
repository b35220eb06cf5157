"""Add the outputs *neither* and *both* to the checkpoints of a run, after its head is trained.

Both work on features of the frozen backbone and do not depend on the head.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor

from horsehuman.data.datamodule import HorseHumanDataModule
from horsehuman.distributed import rank
from horsehuman.errors import printable
from horsehuman.models.bundled import bundled_photographs, bundled_presence
from horsehuman.models.calibration import fit_neither
from horsehuman.models.checkpoint import read_checkpoint, write_checkpoint
from horsehuman.models.inception import Inception

log = logging.getLogger(__name__)

#: Share of refused held-out outliers below which a warning says that they resemble the classes.
FEW_REFUSED = 0.5


class Outputs(NamedTuple):
    """The output layers that a run adds to its network.

    Attributes:
        state: Tensors by their names in the network's state dict.
        settings: Arguments of the network by name.
        metrics: Rates on held-out images and numbers of images, for ``metrics.json``.
    """

    state: dict[str, Tensor]
    settings: dict[str, Any]
    metrics: dict[str, float]


NO_OUTPUTS = Outputs({}, {}, {})


def add_outputs(
    model: L.LightningModule, data: HorseHumanDataModule, run_dir: Path
) -> dict[str, float]:
    """Fit the outputs and write them into the final and the best checkpoint of a run.

    Args:
        model: The trained module.
        data: After training, with its trainer.
        run_dir: The run folder, whose checkpoints rank 0 replaces.

    Returns:
        Rates on held-out images and numbers of images; empty for the CNN, and if the run cannot
        learn *neither*, which is logged.
    """
    network = model.network
    if not isinstance(network, Inception):
        return {}
    trainer: Any = data.trainer
    outputs = fit_outputs(network.to(trainer.strategy.root_device), data)
    for name in ("final", "best") if outputs.state else ():
        path = run_dir / "checkpoints" / f"{name}.ckpt"
        if rank() == 0 and path.is_file():
            checkpoint = read_checkpoint(path)
            checkpoint["state_dict"] |= {f"network.{k}": v for k, v in outputs.state.items()}
            checkpoint["hyper_parameters"] |= outputs.settings
            write_checkpoint(path, checkpoint)
    return outputs.metrics


def fit_outputs(network: Inception, data: HorseHumanDataModule) -> Outputs:
    """Fit *neither* to training images, outliers and the bundled photographs; look up *both*.

    The bundled photographs and the probes of *both* are of horses and humans and of the bundled
    backbone: they are used with the official set and the same backbone and preprocessing only.

    Args:
        network: The network.
        data: After training, with its features.
    """
    if network.settings["pool"] == "flatten":
        log.info("this classifier will not say neither: model.pool=flatten has too many features")
        return NO_OUTPUTS
    cache, official = network.feature_cache(), data.source != "folder"
    outliers = data.outlier_features(cache)
    photographs = bundled_photographs(network) if official else None
    if outliers is None and photographs is None:
        if official:  # a folder's run advises it at the end
            reason = "the bundled photographs are of another backbone: give data.outliers=DIR"
            log.info("this classifier will not say neither: %s", reason)
        return NO_OUTPUTS
    features, records = data.training_features(cache)
    outliers = features[:0] if outliers is None else outliers
    labels = np.array([record.label for record in records])
    groups = [record.group for record in records]
    if photographs is not None:
        known = np.flatnonzero(photographs.labels != 2)
        outliers = torch.cat([outliers, photographs.features[photographs.labels == 2]])
        features = torch.cat([features, photographs.features[known]])
        labels = np.concatenate([labels, photographs.labels[known]])
        groups += [photographs.groups[index] for index in known]
    probe = fit_neither(features, labels, groups, outliers)
    if probe is None:
        log.info("this classifier will not say neither: a class has a single group")
        return NO_OUTPUTS
    if probe.refused < FEW_REFUSED and data.outliers is not None:
        text = "data.outliers=%s: %.0f %% of them look like the classes: do they show one?"
        log.warning(text, printable(data.outliers), 100 * (1 - probe.refused))
    counts = {"neither/known": len(features), "neither/outliers": len(outliers)}
    rates = {f"neither/{n}": round(getattr(probe, n), 4) for n in ("kept", "refused", "auroc")}
    state = {"neither.weight": probe.weight[None], "neither.bias": probe.bias[None]}
    settings: dict[str, Any] = {"neither": True}
    if official and (presence := bundled_presence(network)):
        state |= presence[0]
        settings["both_threshold"] = presence[1]
    return Outputs(state, settings, rates | counts)
