"""Write a model card, and a folder for a model hub with card, weights and config.

Every number of a card comes from the classifier's files: its checkpoint, its run and a report of
``horsehuman evaluate``.
"""

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
    """Return a model card as Markdown, with the YAML metadata that model hubs read.

    Args:
        model: See :func:`~horsehuman.models.checkpoint.load_classifier`.
        report: Folder of a report of ``horsehuman evaluate``; by default the newest one on the
            test set in the run or in ``outputs/evaluate``, if there is one.

    Raises:
        HorseHumanError: If a file cannot be read or ``report`` is not such a folder.
    """
    network = load_classifier(model)
    origin = read_classifier_file(find_checkpoint(model))["horsehuman"]
    run = find_run(model)
    data = str(run) if run else "box" if model in BUNDLED else None
    images = find_image_set(data) if data else None
    evaluation = _read_evaluation(model, report, images.root if images else None)
    source = read_run_config(run)["data"].get("source") if run else None
    official = model in BUNDLED or source in ("box", "archives")
    if official and images and Path(str(evaluation.get("data"))).name == images.root.name:
        evaluation["data"] = "Horses or Humans"
    sections = [
        _metadata(model, network, evaluation, official),
        f"# {_title(network)}\n",
        _description(network),
        _training(images, official, read_json(run / "metrics.json") if run else {}),
        _accuracy(evaluation),
        _calibration(origin.get("calibration", {}), network),
        _cost(network),
        _licences(network, official),
    ]
    return "\n".join(section for section in sections if section)


def write_hub_folder(model: str, folder: Path, text: str, *, force: bool) -> None:
    """Write a folder for a model hub, which ``load_classifier`` can read.

    It contains the card, the weights as safetensors, and the hyper-parameters and the checksum as
    JSON.

    Args:
        model: See :func:`~horsehuman.models.checkpoint.load_classifier`.
        folder: Folder to write; it is created if it does not exist.
        text: The model card.
        force: Whether to replace such files in the folder.

    Raises:
        HorseHumanError: If the folder contains such files already or cannot be written.
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
    checkpoint = {**config, "state_dict": dict(sorted(tensors.items()))}
    add_checksum(checkpoint)
    config["horsehuman"] = checkpoint["horsehuman"]
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


def _read_evaluation(model: str, report: Path | None, root: Path | None) -> dict[str, Any]:
    """Read the metrics of a report.

    Args:
        model: Name, run or checkpoint of the classifier.
        report: Folder of the report; ``None`` for the newest one of the classifier.
        root: Folder of the classifier's own images, if they are known: the newest report on these.

    Returns:
        The content of ``metrics.json``; empty if there is no report.

    Raises:
        HorseHumanError: If ``report`` is given and is not the folder of a report.
    """
    folder = report or latest_evaluation(model, root)
    evaluation = read_json(folder / "metrics.json")
    if "metrics" in evaluation:
        log.info("metrics are those of %s", printable(folder))
        return evaluation
    if report:
        raise HorseHumanError(f"--report {printable(report)}: not a report of horsehuman evaluate")
    log.warning("no report of %s: run horsehuman evaluate first", printable(model))
    return {}


def _title(network: Network) -> str:
    kind = "InceptionV3 head" if isinstance(network, Inception) else "Small CNN"
    return f"{kind}: {' or '.join(network.class_names)}"


def _metadata(model: str, network: Network, report: Mapping[str, Any], official: bool) -> str:
    """Return the card's YAML block, with the metrics of a report unless that is empty."""
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
    if report:
        values = {
            name: report["metrics"][name]["value"] for name in ("accuracy", "ROC-AUC", "log loss")
        }
        metrics = [
            {"type": name.replace(" ", "_").lower(), "value": value}
            for name, value in values.items()
            if value is not None
        ]
        task = {"type": "image-classification"}
        data = {"name": Path(report["data"]).name, "type": "imagefolder", "split": report["split"]}
        result = {"task": task, "dataset": data, "metrics": metrics}
        block["model-index"] = [{"name": Path(model).name, "results": [result]}]
    return f"---\n{yaml.safe_dump(block, sort_keys=False, allow_unicode=True)}---\n"


def _description(network: Network) -> str:
    first, second = network.class_names
    return f"""\
Classifies a picture as {first} or {second} and gives a probability. Made with horsehuman
{horsehuman.__version__}.

```python
from horsehuman import load_classifier, predict

for answer in predict(load_classifier("FOLDER"), ["picture.jpg"]):
    print(answer.class_name, answer.probability, answer.status)
```

## Intended use

Learning and teaching: what a network trained from scratch and a pretrained one learn from the same
few pictures, and how to report the results honestly. It is meant for pictures like those that it
was trained on.

## Out-of-scope use

Decisions about people or animals. The classifier has two classes and no third. It resizes every
picture to a square, without keeping its proportions. Subjects that fill a small part of a picture
are hard for it.
"""


def _training(images: ImageSet | None, official: bool, metrics: Mapping[str, Any]) -> str:
    """Return the section on the training data, with a table of splits, and the training time.

    Args:
        images: The images that the classifier was trained and tested on, if they are known.
        official: Whether these are Horses or Humans.
        metrics: Content of the run's ``metrics.json``; empty if there is no run.
    """
    if images is None:
        return "## Training data\n\nUnknown: the checkpoint is not in the folder of its run.\n"
    lines = ["## Training data\n", "| split | class | pictures | groups |", "|---|---|---|---|"]
    counts = Counter((r.split, r.label) for r in images.records)
    for (split, label), count in sorted(counts.items()):
        names = {r.group for r in images.records if (r.split, r.label) == (split, label)}
        groups = str(len(names)) if images.grouped else "not known"
        lines.append(f"| {split} | {printable(images.class_names[label])} | {count} | {groups} |")
    if official:
        lines.append(
            "\nA group is one rendered horse or person; its pictures are near-duplicates. The "
            "training pictures are scenes, and all test pictures are cut-outs on a white "
            "background, so the test requires something that training did not show."
        )
    if seconds := metrics.get("seconds_training"):
        memory = metrics.get("peak_memory_gb")
        lines.append(
            f"\nTrained for {metrics['epochs']} epochs in {seconds:.0f} s"
            + (f", using at most {memory:.2f} GB of memory." if memory else ".")
        )
    return "\n".join(lines) + "\n"


def _accuracy(report: Mapping[str, Any]) -> str:
    if not report:
        return "## Accuracy\n\nNot measured yet (`horsehuman evaluate`).\n"
    lines = [
        "## Accuracy\n",
        f"On {report['pictures']} pictures ({printable(report['split'])} split) of "
        f"{report['groups']} groups: {report['right']} pictures are classified correctly, and "
        f"{report['groups without an error']} groups have no error.\n",
        "| | value | 95 % by group | 95 % by picture |",
        "|---|---|---|---|",
    ]
    for name, metric in report["metrics"].items():
        values = (
            format_number(metric["value"]),
            format_interval(metric["by group"]),
            format_interval(metric["by picture"]),
        )
        lines.append(f"| {name} | {' | '.join(values)} |")
    lines.append("\nErrors within a group are not independent: rely on the intervals by group.")
    if report["unsure"] or report["neither"]:
        lines.append(
            f"\n{report['unsure']} answers are unsure, and {report['neither']} are neither."
        )
    return "\n".join(lines) + "\n"


def _calibration(calibration: Mapping[str, Any], network: Network) -> str:
    if not calibration:
        return "## Calibration\n\nNone (`scripts/calibrate.py`): probabilities are uncalibrated.\n"
    lines = ["## Calibration\n", "Fitted on training pictures, each scored by a classifier that"]
    lines += ["was not trained on its group.\n", "| | |", "|---|---|"]
    for name, value in calibration.items():
        lines.append(f"| {name} | {value if isinstance(value, int) else f'{value:.4f}'} |")
    has_neither_score = isinstance(network, Inception) and network.settings["far_from"] is not None
    lines.append(
        "\nPictures too far from all training pictures are classified as neither; docs/neither.md "
        "lists what is refused."
        if has_neither_score
        else "\nThere is no neither score: every picture is classified as one of the two classes."
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
        lines.append("- InceptionV3 weights: Google, Apache-2.0, distributed by timm.")
    lines.append("- horsehuman and the weights that it trained: MIT.")
    return "\n".join(lines) + "\n"
