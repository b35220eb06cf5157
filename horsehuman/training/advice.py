"""What a run on a user's own images advises at its end, from what training has in memory."""

import shlex
from collections.abc import Sequence
from typing import Any

import lightning as L
from torch import Tensor
from torch.nn import functional

from horsehuman.data.datamodule import HorseHumanDataModule
from horsehuman.data.records import Record, is_unbalanced
from horsehuman.distributed import rank
from horsehuman.errors import printable
from horsehuman.evaluation.findings import (
    check_labels,
    cluster_near_duplicates,
    rows_by,
    suggest_pattern,
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
        clusters = cluster_near_duplicates(features)
        if data.group_pattern is None:
            lines += advise_groups(records, features, clusters)
        groups = [record.group for record in records] if data.group_pattern else clusters
        name = shlex.quote(str(data.root))
        for finding in check_labels(records, features, groups, data.class_names):
            if finding.rows:
                lines.append(f"{finding.message}: horsehuman audit --data {name}")
    labels = [record.label for record in records]
    if is_unbalanced(labels) and data.prior is None:
        rare = data.class_names[int(sum(labels) < len(labels) / 2)]
        text = f"{rare} is rare here, and answered more rarely still"
        lines.append(f"{text}: data.prior=0.5 finds more of it")
    if isinstance(network, Inception) and data.outliers is None:
        lines.append("pictures of neither class get a class: data.outliers=DIR teaches neither")
    return [printable(line) for line in lines]


def advise_groups(
    records: Sequence[Record], features: Tensor, clusters: Sequence[str]
) -> list[str]:
    """Return a line if a pattern of file names fits, or a tenth of the images are near-duplicates.

    Args:
        records: N images without groups.
        features: Their features, ``(N, F)``, each row of length 1.
        clusters: Output of :func:`~horsehuman.evaluation.findings.cluster_near_duplicates`.
    """
    count = sum(len(row) for row in rows_by(records, clusters) if len(row) > 1)
    pattern, _ = suggest_pattern(records, features)
    if pattern is None and count < 0.1 * len(records):
        return []
    text = f"{count:,} of {len(records):,} pictures have near-duplicates, which inflate accuracy"
    return [f"""{text}: 'data.group_pattern="{pattern or "REGEX"}"' keeps them together"""]
