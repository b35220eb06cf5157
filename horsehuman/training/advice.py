"""What a run on a user's own images advises at its end, from what training has in memory."""

import shlex
from typing import Any

import lightning as L
from torch.nn import functional

from horsehuman.data.datamodule import HorseHumanDataModule
from horsehuman.data.records import is_unbalanced
from horsehuman.distributed import rank
from horsehuman.errors import printable
from horsehuman.evaluation.findings import (
    check_labels,
    check_near_duplicates,
    cluster_near_duplicates,
    rows_by,
)
from horsehuman.models.inception import Inception


def advise(model: L.LightningModule, data: HorseHumanDataModule) -> list[str]:
    """Return at most four lines, each a finding about the training images and what to type.

    Near-duplicates and labels are checked on features, as ``horsehuman audit`` does, if training
    has computed them. Nothing is advised about the official set, nor twice by several ranks.

    Args:
        model: The trained module.
        data: After training, with its features.
    """
    if data.source != "folder" or rank() != 0:
        return []
    network: Any = model.network
    records = [record for record in data.records if record.split == "train"]
    lines = []
    if model.hparams.get("cache_features") and model.hparams["pool"] != "flatten":
        features = functional.normalize(data.training_features(network.embed)[0], dim=1)
        clusters, is_grouped = cluster_near_duplicates(features), data.group_pattern is not None
        rows = rows_by(records, clusters)
        findings = [*check_near_duplicates(records, rows, features, grouped=is_grouped)]
        groups = [record.group for record in records] if is_grouped else clusters
        findings += check_labels(records, features, groups, data.class_names)
        command = f"horsehuman audit --data {shlex.quote(str(data.root))}"
        lines += [f"{f.message}: {f.remedy} ({command})" for f in findings if f.severity != "note"]
    labels = [record.label for record in records]
    if is_unbalanced(labels) and data.prior is None:
        rare = data.class_names[int(sum(labels) < len(labels) / 2)]
        lines.append(f"{rare} is rare, and answered more rarely: data.prior=0.5 finds more of it")
    if isinstance(network, Inception) and data.outliers is None:
        lines.append("pictures of neither class get a class: data.outliers=DIR teaches neither")
    if model.hparams.get("finetune") == 0:
        lines.append("the backbone is frozen: model.finetune=1 tunes its last block, in minutes")
    return [printable(line) for line in lines[:4]]
