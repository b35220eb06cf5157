"""Write a model card, and a folder for a model hub with card, weights and config.

Every number of a card comes from the classifier's files: its checkpoint, its run and a report of
``horsehuman evaluate``. Its text is the Jinja template ``model_card.md``.
"""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import horsehuman
from horsehuman.data.image_sets import ImageSet, find_image_set
from horsehuman.data.records import file_digest
from horsehuman.errors import HorseHumanError, os_errors, printable
from horsehuman.models import checkpoint
from horsehuman.models.base import Network
from horsehuman.models.inception import Inception
from horsehuman.run_dir import evaluation_dir, find_run, read_json, write_bytes, write_json
from horsehuman.runtime import BUNDLED, format_interval, format_number

#: Metrics of a report that the metadata of a card contain, and their names in model hubs.
METRICS = {"accuracy": "accuracy", "ROC-AUC": "roc-auc", "log loss": "log_loss"}

log = logging.getLogger(__name__)


def write_model_card(model: str, report: Path | None, folder: Path | None, *, force: bool) -> None:
    """Print a model card, or write it to a folder for a model hub.

    The folder also contains the weights as safetensors, and the hyper-parameters and the checksum
    as JSON. ``load_classifier`` can read it.

    Args:
        model: See :func:`~horsehuman.models.checkpoint.load_classifier`.
        report: See :func:`model_card`.
        folder: Folder to write, whose name is then printed; ``None`` to print the card.
        force: Whether to replace such files in the folder.

    Raises:
        HorseHumanError: If a file cannot be read, ``report`` is not the folder of a report, or
            the folder contains such files already or cannot be written.
    """
    files = ("README.md", checkpoint.WEIGHTS_FILE, checkpoint.CONFIG_FILE)
    if folder and not force and (taken := [name for name in files if (folder / name).exists()]):
        place = f"--folder {printable(folder)}"
        raise HorseHumanError(f"{place} holds {', '.join(taken)}: name another, or add --force")
    network = checkpoint.load_classifier(model)
    stored = checkpoint.read_classifier_file(checkpoint.find_checkpoint(model))
    origin = stored["horsehuman"]
    if isinstance(network, Inception):
        has_backbone = any(".backbone." in key for key in stored["state_dict"])
        unrecorded = "unknown" if has_backbone else "box"  # by version 0.1
        origin = {**origin, "weights": printable(origin.get("weights", unrecorded))}
    card = model_card(model, network, origin, report)
    if folder is None:
        print(card)
        return
    metadata = {"hyper_parameters": network.settings, "horsehuman": origin}
    config = checkpoint.hub_checkpoint(metadata, network.state_dict(prefix="network."))
    checkpoint.add_checksum(config)  # It covers the tensors, too.
    weights = safetensors.torch.save(config.pop("state_dict"), {"format": "pt"})
    config["sha256"] = hashlib.sha256(weights).hexdigest()
    with os_errors("write", f"--folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / "README.md", f"{card}\n".encode())
        write_bytes(folder / checkpoint.WEIGHTS_FILE, weights)
        write_json(folder / checkpoint.CONFIG_FILE, config)
    print(printable(folder))


def model_card(model: str, network: Network, origin: Mapping[str, Any], report: Path | None) -> str:
    """Return a model card as Markdown, with the metadata that model hubs read.

    Args:
        model: See :func:`~horsehuman.models.checkpoint.load_classifier`.
        network: The loaded classifier.
        origin: The metadata of this package in its checkpoint. For InceptionV3, ``weights`` in it
            is the source of the backbone's weights.
        report: Folder of a report of ``horsehuman evaluate``; by default that in the default
            folder of the classifier, if it is on its own test set.

    Raises:
        HorseHumanError: If a file cannot be read or ``report`` is not such a folder.
    """
    run = find_run(model)
    data = str(run) if run else "box" if model in BUNDLED else None
    images = find_image_set(data) if data else None
    evaluation = _read_evaluation(model, report, images)
    official = data == "box" or bool(run and read_json(run / "run.json").get("official"))
    if official and images and Path(str(evaluation.get("data"))).name == images.root.name:
        evaluation["data"] = "Horses or Humans"
    card = ModelCard.from_template(
        _metadata(Path(model).name, network, origin.get("weights"), evaluation, official),
        template_path=str(Path(__file__).with_name("model_card.md")),
        version=horsehuman.__version__,
        class_names=[printable(name) for name in network.class_names],
        images=images,
        training=read_json(run / "metrics.json") if run else {},
        evaluation=evaluation,
        number=format_number,
        interval=format_interval,
        origin=origin,
        neither=network.settings.get("neither", False),
        both=network.settings.get("both_threshold") is not None,
        parameters=[(p.numel(), p.requires_grad) for p in network.parameters()],
    )
    return str(card)


def _read_evaluation(model: str, report: Path | None, images: ImageSet | None) -> dict[str, Any]:
    """Read the metrics of a report.

    Args:
        model: Name, run or checkpoint of the classifier.
        report: Folder of the report; ``None`` for the default folder of the classifier's report.
        images: The classifier's own images, if they are known. A report in the default folder
            must then be on their test split.

    Returns:
        The content of ``metrics.json``; empty if there is no report.

    Raises:
        HorseHumanError: If ``report`` is given and is not the folder of a report, or the report is
            of another checkpoint.
    """
    folder = report or evaluation_dir(model, "test")
    evaluation = read_json(folder / "metrics.json")
    data = Path(str(evaluation.get("data"))).name, evaluation.get("split")
    current = file_digest(checkpoint.find_checkpoint(model)).hex()
    if evaluation.get("checkpoint", current) != current:
        fix = "run horsehuman evaluate again"
        raise HorseHumanError(f"{printable(folder)} is a report of other weights: {fix}")
    if "metrics" in evaluation and (report or not images or data == (images.root.name, "test")):
        log.info("metrics are those of %s", printable(folder))
        return evaluation
    if report:
        raise HorseHumanError(f"--report {printable(report)}: not a report of horsehuman evaluate")
    log.warning("no report of %s: run horsehuman evaluate first", printable(model))
    return {}


def _metadata(
    name: str,
    network: Network,
    weights: str | None,
    evaluation: Mapping[str, Any],
    official: bool,
) -> ModelCardData:
    """Return the card's metadata, with the metrics of a report unless that is empty.

    Args:
        name: The classifier's name.
        network: The classifier.
        weights: Source of the backbone's weights; ``None`` if it has no backbone.
        evaluation: Content of a report's ``metrics.json``.
        official: Whether it was trained on the official images.
    """
    task, tags = "image-classification", timm.list_pretrained("inception_v3.*") if weights else []
    base_model = f"inception_v3.{weights}"
    results = []
    for metric, hub_name in METRICS.items() if evaluation else ():
        data, split = Path(evaluation["data"]).name, evaluation["split"]
        if (value := evaluation["metrics"][metric]["value"]) is not None:
            result = EvalResult(task, "imagefolder", data, hub_name, value, dataset_split=split)
            results.append(result)
    return ModelCardData(
        license={None: "mit", "box": "apache-2.0"}.get(weights, "unknown"),
        library_name="pytorch",
        pipeline_tag=task,
        tags=[task, *network.class_names, "horsehuman"],
        metrics=["accuracy"],
        datasets=["horses-or-humans"] if official else None,
        base_model=f"timm/{base_model}" if base_model in tags else None,
        model_name=name if results else None,
        eval_results=results or None,
    )
