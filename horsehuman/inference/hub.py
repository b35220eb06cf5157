"""A model card: what a classifier is, what it is for, and how far to trust it, from its files."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml

import horsehuman
from horsehuman.data.image_sets import ImageSet, find_image_set, read_run_config
from horsehuman.errors import HorseHumanError, printable
from horsehuman.models.base import FORMAT, Network
from horsehuman.models.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    add_checksum,
    find_checkpoint,
    load_classifier,
    read_classifier_file,
)
from horsehuman.models.inception import Inception
from horsehuman.run_dir import find_run, latest_evaluation, read_json, write_bytes
from horsehuman.runtime import BUNDLED, format_interval, format_number

log = logging.getLogger(__name__)


def model_card(model: str, report: Path | None = None) -> str:
    """Markdown of a model card, with the block of metadata that model hubs read.

    Every figure is out of the classifier's files: its checkpoint, its run, a report.

    Args:
        model: See :func:`~horsehuman.checkpoint.load_classifier`.
        report: Folder of a report of ``horsehuman evaluate``; by default the run's, or that in
            ``outputs/evaluate``, where there is one.

    Raises:
        HorseHumanError: A file cannot be read.
    """
    network = load_classifier(model)
    origin = read_classifier_file(find_checkpoint(model))["horsehuman"]
    run = find_run(model)
    pictures = (
        find_image_set(str(run)) if run else find_image_set("box") if model in BUNDLED else None
    )
    found = _evaluation(model, report, pictures.root if pictures else None)
    source = read_run_config(run)["data"].get("source") if run else None
    official = model in BUNDLED or source in ("box", "archives")
    if official and pictures and Path(str(found.get("data"))).name == pictures.root.name:
        found["data"] = "Horses or Humans"
    parts = [
        _metadata(model, network, found, official),
        f"# {_title(network)}\n",
        _what(network),
        _training(pictures, official, read_json(run / "metrics.json") if run else {}),
        _accuracy(found),
        _calibration(origin.get("calibration", {}), network),
        _cost(network),
        _licences(network, official),
    ]
    return "\n".join(part for part in parts if part)


def write_hub_folder(model: str, folder: Path, text: str, *, force: bool) -> None:
    """Write a folder for a model hub: card, weights as safetensors, config.

    ``load_classifier`` reads it.

    Raises:
        HorseHumanError: It holds such files already, or cannot be written.
    """
    taken = [name for name in ("README.md", WEIGHTS_FILE, CONFIG_FILE) if (folder / name).exists()]
    if taken and not force:
        raise HorseHumanError(
            f"--folder {printable(folder)} holds {', '.join(taken)}: name another, or add --force"
        )
    network = load_classifier(model)
    origin = read_classifier_file(find_checkpoint(model))["horsehuman"]
    tensors = {f"network.{k}": v.contiguous() for k, v in network.state_dict().items()}
    config: dict[str, Any] = {"hyper_parameters": network.settings, "horsehuman": origin}
    whole = {**config, "state_dict": dict(sorted(tensors.items()))}
    add_checksum(whole)
    config["horsehuman"] = whole["horsehuman"]
    content = {
        "README.md": text.encode(),
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS_FILE: safetensors.torch.save(tensors, metadata={"format": "pt"}),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in content.items():
            write_bytes(folder / name, data)
    except OSError as error:
        raise HorseHumanError(
            f"cannot write --folder {printable(folder)}: {error.strerror}"
        ) from error


def _evaluation(model: str, report: Path | None, root: Path | None) -> dict[str, Any]:
    """What a report says, or the newest one on the pictures in ``root``; empty without one."""
    folder = report or latest_evaluation(model, root)
    found = read_json(folder / "metrics.json")
    if "metrics" in found:
        log.info("figures are those of %s", printable(folder))
        return found
    if report:
        raise HorseHumanError(f"--report {printable(report)} is no report of horsehuman evaluate")
    log.warning("no report of %s is found: run horsehuman evaluate first", printable(model))
    return {}


def _title(network: Network) -> str:
    kind = "InceptionV3 head" if isinstance(network, Inception) else "Small CNN"
    return f"{kind}: {' or '.join(network.class_names)}"


def _metadata(model: str, network: Network, found: Mapping[str, Any], official: bool) -> str:
    inception = isinstance(network, Inception)
    block: dict[str, Any] = {
        "license": "apache-2.0" if inception else "mit",
        "library_name": "pytorch",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", *network.class_names, "horsehuman"],
        "metrics": ["accuracy"],
    }
    if official:
        block["datasets"] = ["horses-or-humans"]
    if inception:
        block["base_model"] = "timm/inception_v3.tf_in1k"
    if found:
        values = {
            name: found["metrics"][name]["value"]
            for name in ("accuracy", "ROC-AUC", "log loss")
            if found["metrics"][name]["value"] is not None
        }
        results = [
            {"type": name.replace(" ", "_").lower(), "value": v} for name, v in values.items()
        ]
        task = {"type": "image-classification"}
        data = {"name": Path(found["data"]).name, "type": "imagefolder", "split": found["split"]}
        result = {"task": task, "dataset": data, "metrics": results}
        block["model-index"] = [{"name": Path(model).name, "results": [result]}]
    return f"---\n{yaml.safe_dump(block, sort_keys=False, allow_unicode=True)}---\n"


def _what(network: Network) -> str:
    first, second = network.class_names
    return f"""\
Says whether a picture shows {first} or {second}, with a probability; made with horsehuman
{horsehuman.__version__}.

```python
from horsehuman import load_classifier, predict

for answer in predict(load_classifier("FOLDER"), ["picture.jpg"]):
    print(answer.class_name, answer.probability, answer.status)
```

## What it is for

Learning and teaching: what a network from scratch and a pretrained one make of the same few
pictures, and how to report that honestly. For pictures like those that it was trained on.

## What it is not for

Decisions about people or animals. It knows two classes and no third, and it looks at pictures
squashed to a square; figures that fill a small part of a picture are hard for it.
"""


def _training(pictures: ImageSet | None, official: bool, recorded: Mapping[str, Any]) -> str:
    if pictures is None:
        return "## Training data\n\nNot known: the checkpoint was taken out of its run.\n"
    lines = ["## Training data\n", "| split | class | pictures | groups |", "|---|---|---|---|"]
    counts = Counter((r.split, r.label) for r in pictures.records)
    for (split, label), count in sorted(counts.items()):
        own = {r.group for r in pictures.records if (r.split, r.label) == (split, label)}
        groups = str(len(own)) if pictures.grouped else "not known"
        lines.append(f"| {split} | {printable(pictures.class_names[label])} | {count} | {groups} |")
    if official:
        lines.append(
            "\nA group is one rendered figure; its pictures are near-duplicates. Training pictures "
            "are scenes, and all test pictures are cut-outs on white, so the test asks for "
            "something that training did not show."
        )
    if seconds := recorded.get("seconds_training"):
        memory = recorded.get("peak_memory_gb")
        lines.append(
            f"\n{recorded['epochs']} epochs in {seconds:.0f} s"
            + (f", at most {memory:.2f} GB of memory." if memory else ".")
        )
    return "\n".join(lines) + "\n"


def _accuracy(found: Mapping[str, Any]) -> str:
    if not found:
        return "## Accuracy\n\nNot measured yet (`horsehuman evaluate`).\n"
    lines = [
        "## Accuracy\n",
        f"On {found['pictures']} pictures ({printable(found['split'])} split), {found['groups']} "
        f"groups; {found['right']} are right, {found['groups without an error']} groups have no "
        "error.\n",
        "| | value | 95 % by group | 95 % by picture |",
        "|---|---|---|---|",
    ]
    for name, own in found["metrics"].items():
        values = (
            format_number(own["value"]),
            format_interval(own["by group"]),
            format_interval(own["by picture"]),
        )
        lines.append(f"| {name} | {' | '.join(values)} |")
    lines.append("\nPictures of a group are right or wrong together: trust the intervals by group.")
    if found["unsure"] or found["neither"]:
        lines.append(
            f"\nOf these {found['unsure']} answers are unsure and {found['neither']} pictures are "
            "taken for neither class."
        )
    return "\n".join(lines) + "\n"


def _calibration(found: Mapping[str, Any], network: Network) -> str:
    if not found:
        return "## Calibration\n\nNone (`scripts/calibrate.py`): probabilities are the network's.\n"
    lines = ["## Calibration\n", "From training pictures, each asked of a classifier that has not"]
    lines += ["seen its group.\n", "| | |", "|---|---|"]
    for name, value in found.items():
        lines.append(f"| {name} | {value if isinstance(value, int) else f'{value:.4f}'} |")
    strange = isinstance(network, Inception) and network.settings["far_from"] is not None
    lines.append(
        "\nPictures too far from all of training are called neither; see docs/neither.md for what "
        "that refuses."
        if strange
        else "\nIt has no score for pictures that are neither, and calls them one of the two."
    )
    return "\n".join(lines) + "\n"


def _cost(network: Network) -> str:
    parameters = list(network.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    return (
        f"## Cost\n\n{total:,} parameters ({4 * total / 1e6:.1f} MB), {trained:,} of them trained. "
        f"Checkpoint format {FORMAT}.\n"
    )


def _licences(network: Network, official: bool) -> str:
    lines = ["## Licences\n"]
    if official:
        lines.append("- Pictures: Horses or Humans by Laurence Moroney, CC BY 2.0.")
    if isinstance(network, Inception):
        lines.append("- InceptionV3 weights: Google, Apache-2.0, by way of timm.")
    lines.append("- horsehuman and what it trained: MIT.")
    return "\n".join(lines) + "\n"
