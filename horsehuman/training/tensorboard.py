"""What TensorBoard is told of a run, beside the figures that Lightning logs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor

from horsehuman.data.datamodule import HorseHumanDataModule
from horsehuman.distributed import gather_sharded, rank


def log_run_inputs(logger: TensorBoardLogger, config: str, samples: Tensor) -> None:
    """Show the config, as YAML, and a sheet of training pictures, uint8 ``(3, H, W)``."""
    code = "\n".join(f"    {line}" for line in config.splitlines())  # Markdown for verbatim
    logger.experiment.add_text("config", code)
    logger.experiment.add_image("samples", samples)


def log_validation_report(
    logger: TensorBoardLogger, model: L.LightningModule, data: HorseHumanDataModule, step: int
) -> None:
    """Show how a trained model does on the pictures that validate: a PR curve, and six panels.

    The panels are those of ``horsehuman evaluate``: confusion matrix, ROC, precision and recall,
    reliability, histogram, groups. Nothing is shown where nothing validates.

    Args:
        logger: Where to.
        model: After training.
        data: Its batches, of pictures or of features.
        step: Steps that were trained.
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
    from horsehuman import plots  # matplotlib, once there is something to draw

    labels = np.array([record.label for record in records])
    name = "test set" if data.validation == "test" else "held out"
    writer: Any = logger.experiment
    writer.add_pr_curve(f"{name}/precision and recall", labels, probabilities, step)
    figure = plots.report(
        probabilities.double().numpy(),
        labels,
        [record.group for record in records],
        network.threshold,
        network.class_names,
        f"{name}, after training: {len(records)} pictures",
    )
    writer.add_image(f"{name}/report", plots.pixels(figure), step, dataformats="HWC")


def log_hyperparameters(
    logger: TensorBoardLogger, config: Any, metrics: Mapping[str, Any], step: int
) -> None:
    """Fill the hparams tab: the config beside the figures of the last step; and close the log."""
    final = {f"final/{name}": float(value) for name, value in metrics.items() if "/" in name}
    logger.log_hyperparams(config, final, step)
    logger.finalize("success")
    Path(logger.log_dir, "hparams.yaml").unlink(missing_ok=True)  # config.yaml holds more


def write_samples(folder: Path, pictures: Tensor, columns: int = 8) -> Tensor:
    """Write ``samples.png``, training pictures as the model gets them; returns it, uint8 CHW."""
    from torchvision.utils import make_grid  # a second to import, for commands that train

    sheet: Tensor = make_grid(pictures, nrow=columns, padding=2, pad_value=127)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(folder / "samples.png")
    return sheet
