"""What both classifiers share: steps, metrics, optimizer, schedule, what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional
from torchmetrics.classification import BinaryAccuracy

from horsehuman.errors import HorseHumanError, check_choice, check_number

#: Format of our part of a checkpoint; grows when older code could not read a newer file.
FORMAT = 1

SCHEDULES = ("constant", "cosine", "one_cycle")

Batch = tuple[Tensor, Tensor]


class BinaryClassifier(L.LightningModule):
    """A classifier that eats pictures and gives one logit.

    A subclass saves its hyper-parameters, hands the shared ones on, and defines :meth:`forward`.

    Args:
        class_names: Names of class 0 and class 1; taken from the data when training starts.
        threshold: From this probability on a picture is of class 1.
        temperature: Logits are divided by it before they become probabilities.
        optimizer: ``name`` of a class in :mod:`torch.optim` and its arguments. Weight decay
            spares what has one dimension (biases, batch norm).
        schedule: Of the learning rate over all steps: ``constant``, ``cosine`` (to zero) or
            ``one_cycle`` (Smith 2018, with torch's proportions).
        label_smoothing: Training labels become ``s / 2`` and ``1 - s / 2``; in [0, 1).

    Raises:
        HorseHumanError: A value does not work.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        threshold: float,
        temperature: float,
        optimizer: Mapping[str, Any],
        schedule: str,
        label_smoothing: float,
    ) -> None:
        super().__init__()
        if class_names is None or isinstance(class_names, str) or len(class_names) != 2:
            raise HorseHumanError(f"model.class_names={class_names!r} does not work: give two")
        check_number("model.threshold", threshold, float, above=0, below=1)
        check_number("model.temperature", temperature, float, above=0)
        check_choice("model.schedule", schedule, SCHEDULES)
        check_number("model.label_smoothing", label_smoothing, float, at_least=0, below=1)
        self._optimizer_class(optimizer)
        self.train_accuracy = BinaryAccuracy(validate_args=False)
        self.val_accuracy = BinaryAccuracy(threshold, validate_args=False)
        self.test_accuracy = BinaryAccuracy(threshold, validate_args=False)

    def _keep_plain(self) -> None:
        """Copy saved sequences and mappings: a checkpoint holds nothing but plain values."""
        for name, value in self.hparams.items():
            self.hparams[name] = _plain(value)

    @property
    def class_names(self) -> tuple[str, str]:
        """Names of class 0 and class 1."""
        first, second = self.hparams["class_names"]
        return first, second

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the canonical picture, which data should be kept at."""
        return int(self.hparams["image_size"])

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Probability of class 1.

        Args:
            images: uint8 of shape ``(N, 3, H, W)`` on the model's device.

        Returns:
            float32 of shape ``(N,)``, 0 to 1.
        """
        self.eval()
        return self._probabilities(self(images))

    def _probabilities(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits / self.hparams["temperature"])

    def _logits(self, inputs: Tensor) -> Tensor:
        """Logits of what a loader yields: pictures, or what a subclass computed from them."""
        logits: Tensor = self(inputs)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of ``(pictures or features, labels float32 (N,))``; logs its mean and accuracy."""
        inputs, labels = batch
        logits = self._logits(inputs)
        smoothing = self.hparams["label_smoothing"]
        targets = labels * (1 - smoothing) + smoothing / 2
        loss = functional.binary_cross_entropy_with_logits(logits, targets)
        self.train_accuracy(logits.detach().sigmoid(), labels.int())
        self._log_epoch("train", loss, self.train_accuracy, len(labels))
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_train_epoch_end(self) -> None:
        """Stop when the loss is no number any more, before anything is saved."""
        if not torch.isfinite(self.trainer.callback_metrics["train/loss"]):
            raise HorseHumanError(
                f"the loss is not finite after epoch {self.current_epoch + 1}: lower "
                "model.optimizer.lr, or use trainer.precision=32-true"
            )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/acc``."""
        self._evaluate("val", batch, self.val_accuracy)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``test/loss`` and ``test/acc``."""
        self._evaluate("test", batch, self.test_accuracy)

    def _evaluate(self, stage: str, batch: Batch, accuracy: BinaryAccuracy) -> None:
        inputs, labels = batch
        logits = self._logits(inputs)
        loss = functional.binary_cross_entropy_with_logits(
            logits / self.hparams["temperature"], labels
        )
        accuracy.update(self._probabilities(logits), labels.int())
        self._log_epoch(stage, loss, accuracy, len(labels))

    def _log_epoch(self, stage: str, loss: Tensor, accuracy: BinaryAccuracy, size: int) -> None:
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True, batch_size=size)
        self.log(f"{stage}/acc", accuracy, on_step=False, on_epoch=True, batch_size=size)

    def setup(self, stage: str) -> None:
        """Take the names of the classes from the data that training starts on."""
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if stage == "fit" and names:
            self.hparams["class_names"] = list(names)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build what ``optimizer`` and ``schedule`` name, over what is trained."""
        given = dict(self.hparams["optimizer"])
        optimizer_class = self._optimizer_class(given)
        name, decay = given.pop("name"), given.pop("weight_decay", 0.0)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        try:
            optimizer = optimizer_class(groups, **given)
        except (TypeError, ValueError) as error:
            raise HorseHumanError(f"model.optimizer: {name} does not take this: {error}") from error
        scheduler = self._scheduler(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }

    def _scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        schedules = torch.optim.lr_scheduler
        schedule = self.hparams["schedule"]
        if schedule == "constant":
            return schedules.ConstantLR(optimizer, factor=1.0)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise HorseHumanError(
                f"model.schedule={schedule} needs an end: set trainer.max_epochs, or use constant"
            )
        if schedule == "cosine":
            return schedules.CosineAnnealingLR(optimizer, T_max=int(steps))
        return schedules.OneCycleLR(
            optimizer,
            max_lr=[float(group["lr"]) for group in optimizer.param_groups],
            total_steps=max(int(steps), 4),
            cycle_momentum="betas" in optimizer.defaults,
        )

    @staticmethod
    def _optimizer_class(given: Mapping[str, Any]) -> type[torch.optim.Optimizer]:
        found = {
            name: kind
            for name, kind in vars(torch.optim).items()
            if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        }
        if not isinstance(given, Mapping):
            raise HorseHumanError(f"model.optimizer={given!r} does not work: give name, lr, ...")
        name = given.get("name")
        unfit = {"Optimizer", "SparseAdam", "LBFGS", "Muon"}  # sparse; closures; matrices only
        check_choice("model.optimizer.name", name, sorted(set(found) - unfit))
        decay = given.get("weight_decay", 0.0)
        check_number("model.optimizer.weight_decay", decay, float, at_least=0)
        check_number("model.optimizer.lr", given.get("lr"), float, above=0)
        return found[str(name)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write which class it is and in which format."""
        checkpoint["horsehuman"] = {"format": FORMAT, "classifier": type(self).__name__}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what this class cannot read."""
        check_origin(checkpoint, type(self).__name__)


def _plain(value: Any) -> Any:
    """Copy a value as str, int, float, bool, list, dict or None; NumPy's become Python's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return value


def check_origin(checkpoint: Mapping[str, Any], classifier: str | None = None) -> str:
    """Check that this code can read a checkpoint.

    Args:
        checkpoint: The loaded file.
        classifier: Name of the class that wants it; ``None`` for any.

    Returns:
        Name of the class that it belongs to.

    Raises:
        HorseHumanError: It is another program's, another class's, or of a newer format.
    """
    origin = checkpoint.get("horsehuman")
    if not isinstance(origin, dict) or not {"format", "classifier"} <= origin.keys():
        raise HorseHumanError("this checkpoint was not written by horsehuman")
    if origin["format"] > FORMAT:
        raise HorseHumanError(
            f"this checkpoint has format {origin['format']}, this code reads {FORMAT}: upgrade it"
        )
    name = str(origin["classifier"])
    if classifier not in (None, name):
        raise HorseHumanError(f"this checkpoint holds a {name}, no {classifier}")
    return name
