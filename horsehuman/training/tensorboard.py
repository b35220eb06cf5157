"""TensorBoard's images, curves and hyper-parameters; Lightning logs the scalars."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from horsehuman.data.datamodule import HorseHumanDataModule
from horsehuman.distributed import gather_sharded, rank


def log_run_inputs(logger: TensorBoardLogger, config: str, samples: Tensor) -> None:
    """Log the config as text and a sheet of training images.

    Args:
        logger: The run's logger.
        config: YAML.
        samples: uint8 ``(3, H, W)``.
    """
    code = "\n".join(f"    {line}" for line in config.splitlines())  # a Markdown code block
    logger.experiment.add_text("config", code)
    logger.experiment.add_image("samples", samples)


def log_validation_report(
    logger: TensorBoardLogger, model: L.LightningModule, data: HorseHumanDataModule, step: int
) -> None:
    """Log a precision-recall curve and the report figure of the validation images.

    The figure has the six panels of ``horsehuman evaluate``. Nothing is logged if there are no
    validation images. All ranks must call this; rank 0 logs.

    Args:
        logger: The run's logger.
        model: The trained model.
        data: Its data module, whose loaders yield images or features.
        step: Number of training steps, the position in the log.
    """
    records = data.validation_records()
    if not records:
        return
    network: Any = model.network
    model.eval()
    with torch.no_grad():
        logits = [model(inputs.to(model.device)).cpu() for inputs, _ in data.val_dataloader()]
    probabilities = network.calibrate(gather_sharded(torch.cat(logits)).float()).sigmoid()
    if rank() > 0:
        return
    from horsehuman import plots  # imports matplotlib

    labels = np.array([record.label for record in records])
    name = "test set" if data.validation == "test" else "held out"
    writer: Any = logger.experiment
    writer.add_pr_curve(f"{name}/precision and recall", labels, probabilities, step)
    values, groups = probabilities.double().numpy(), [record.group for record in records]
    title = f"{name}, after training: {len(records)} pictures"
    figure = plots.report(values, labels, groups, network.threshold, network.class_names, title)
    writer.add_figure(f"{name}/report", figure, step)


def log_hyperparameters(
    logger: TensorBoardLogger, config: DictConfig, metrics: Mapping[str, Any], step: int
) -> None:
    """Fill the HParams tab with the config and the final metrics, and close the log."""
    final = {f"final/{name}": float(value) for name, value in metrics.items() if "/" in name}
    logger.log_hyperparams(OmegaConf.to_container(config, resolve=True), final, step)  # type: ignore[arg-type]
    logger.finalize("success")
    Path(logger.log_dir, "hparams.yaml").unlink(missing_ok=True)  # config.yaml is complete


def write_samples(folder: Path, pictures: Tensor, columns: int = 8) -> Tensor:
    """Write ``samples.png``, a sheet of images as the model gets them.

    Args:
        folder: The run folder.
        pictures: uint8 ``(N, 3, S, S)``.
        columns: Images in a row.

    Returns:
        The sheet, uint8 ``(3, H, W)``.
    """
    from torchvision.utils import make_grid  # takes a second to import

    sheet: Tensor = make_grid(pictures, nrow=columns, padding=2, pad_value=127)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(folder / "samples.png")
    return sheet
