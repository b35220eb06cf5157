"""The Lightning modules: how both networks are trained, measured and saved."""

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler
from torchmetrics import MeanMetric, MinMetric
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryRecall,
    BinarySpecificity,
    MulticlassAccuracy,
)

from horsehuman.data.datamodule import HorseHumanDataModule
from horsehuman.data.datasets import Batch
from horsehuman.distributed import broadcast
from horsehuman.errors import HorseHumanError, check_choice, check_flag, check_number
from horsehuman.models.base import FORMAT, Network, check_origin, to_plain, upgrade_settings
from horsehuman.models.cnn import CNN
from horsehuman.models.inception import Inception, warn_without_bf16

#: Test images that are answered end to end, to verify their features, and the largest difference
#: of a logit that is accepted.
VERIFIED, TOLERANCE = 16, 0.05

#: Learning rates of fine-tuning, for the head and for the last block of the backbone, as factors
#: of the head's learning rate before. Chosen in docs/finetune.md.
HEAD_LR, BLOCK_LR = 0.1, 0.01

log = logging.getLogger(__name__)

#: Schedules of the learning rate; see :func:`make_schedule`.
SCHEDULES = ("constant", "cosine", "one_cycle")

#: Optimizers by name: those of torch that need no sparse gradients and no closure.
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    if name not in ("Optimizer", "SparseAdam", "LBFGS", "Muon")  # Muon takes matrices only
}


class BinaryClassifier(L.LightningModule):
    """Train a network that gives one logit for each image, with binary cross-entropy.

    Args:
        network: The network.
        optimizer: See :func:`make_optimizer`.
        schedule: See :func:`make_schedule`.
        label_smoothing: A value s in [0, 1); training labels become ``s / 2`` and ``1 - s / 2``.
        options: Further hyper-parameters of a subclass, saved with the others.

    Raises:
        HorseHumanError: A value is out of range or unknown.
    """

    def __init__(
        self,
        network: Network,
        optimizer: Mapping[str, Any],
        schedule: str,
        label_smoothing: float,
        **options: Any,
    ) -> None:
        super().__init__()
        check_choice("model.schedule", schedule, SCHEDULES)
        check_number("model.label_smoothing", label_smoothing, float, at_least=0, below=1)
        check_optimizer(optimizer)
        training = {
            "optimizer": optimizer,
            "schedule": schedule,
            "label_smoothing": label_smoothing,
        }
        self.hparams.update(to_plain({**network.settings, **options, **training}))
        self.network = network
        size = network.image_size
        self.example_input_array = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.train_accuracy = BinaryAccuracy(validate_args=False)
        self.loss = MeanMetric(nan_strategy="disable")
        self.accuracy = BinaryAccuracy(validate_args=False)
        self.balanced_accuracy = MulticlassAccuracy(2, average="macro", validate_args=False)
        self.recall_0 = BinarySpecificity(validate_args=False)
        self.recall_1 = BinaryRecall(validate_args=False)
        self.margin = MinMetric(nan_strategy="disable")
        self._weights: tuple[float, float] | None = None
        self._shift = 0.0

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the canonical picture; give it to the data module."""
        return self.network.image_size

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``(N,)`` of images, uint8 ``(N, 3, H, W)``, or of features ``(N, F)``."""
        features = inputs if inputs.ndim == 2 else self.network.embed(inputs)
        return self.network.forward_head(features)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of images or features and labels, float32 ``(N,)``.

        Loss and accuracy of the epoch are logged at its end: logging each step would take longer
        than a step of a linear head.
        """
        inputs, labels = batch
        logits = self(inputs)
        smoothing = self.hparams["label_smoothing"]
        targets = labels * (1 - smoothing) + smoothing / 2
        weights = None
        if self._weights is not None:
            weights = torch.where(labels > 0.5, self._weights[1], self._weights[0])
        loss = functional.binary_cross_entropy_with_logits(logits - self._shift, targets, weights)
        self.train_accuracy.update(self._predicted_labels(logits.detach()), labels.int())
        self.train_loss.update(loss.detach())  # all batches of an epoch have the same size
        if batch_idx % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_train_epoch_start(self) -> None:
        """Reset the metrics of the epoch."""
        self.train_loss.reset()
        self.train_accuracy.reset()

    def on_train_epoch_end(self) -> None:
        """Log loss and accuracy of the epoch.

        Raises:
            HorseHumanError: A loss or a weight is not finite. No checkpoint is written then.
        """
        loss = self.train_loss.compute()
        metrics = {"train/loss": float(loss), "train/acc": float(self.train_accuracy.compute())}
        self.log_dict(metrics, logger=False)
        if self.logger:  # before the checkpoint: a resumed run must not log this epoch again
            metrics["epoch"] = self.current_epoch
            self.logger.log_metrics(metrics, step=self.global_step - 1)
        checked = [loss, self.trainer.callback_metrics.get("val/loss", loss)]
        checked += [p.detach().sum() for p in self.parameters() if p.requires_grad]
        if not all(bool(torch.isfinite(value)) for value in checked):
            fix = "lower model.optimizer.lr, or use trainer.precision=32-true"
            raise HorseHumanError(f"epoch {self.current_epoch + 1}: the loss is not finite: {fix}")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val/loss``, ``val/acc`` and the other metrics; see :meth:`test_step`."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``test/loss``, ``test/acc``, ``test/margin`` and the metrics for unbalanced classes.

        These are ``test/recall_0`` and ``test/recall_1``, the shares of the images of class 0 and
        class 1 that are classified correctly, and their mean, ``test/balanced_acc``.
        The margin is the smallest distance of a logit from the threshold, towards the right side:
        it is negative if an image is classified wrongly.
        """
        self._evaluate("test", batch)

    def _predicted_labels(self, logits: Tensor) -> Tensor:
        return (logits.sigmoid() >= self.network.threshold).int()

    def _evaluate(self, stage: str, batch: Batch) -> None:
        inputs, labels = batch
        logits = self.network.calibrate(self(inputs))
        losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        boundary = math.log(self.network.threshold / (1 - self.network.threshold))
        self.loss.update(losses)  # one by one: MeanMetric ignores weights without a NaN strategy
        predicted, truth = self._predicted_labels(logits), labels.int()
        for metric in (self.accuracy, self.balanced_accuracy, self.recall_0, self.recall_1):
            metric.update(predicted, truth)
        self.margin.update(((logits - boundary) * (2 * labels - 1)).min())
        # Metric objects reduce exactly over ranks; Lightning's mean over ranks rounds counts.
        metrics = {"loss": self.loss, "acc": self.accuracy, "margin": self.margin}
        metrics |= {"balanced_acc": self.balanced_accuracy}
        metrics |= {"recall_0": self.recall_0, "recall_1": self.recall_1}
        named: Any = {f"{stage}/{name}": metric for name, metric in metrics.items()}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=len(labels))

    def setup(self, stage: str) -> None:
        """Take class names, weights and the shift of the logits from the data module.

        The bias of the last layer starts at the shift, so that few steps suffice to learn it.
        """
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and isinstance(data, HorseHumanDataModule):
            names = list(data.class_names)
            self.hparams["class_names"] = self.network.settings["class_names"] = names
            self._weights, shift = data.class_weights()
            if shift != self._shift:
                last: Any = self.network.head[-1]
                with torch.no_grad():
                    last.bias += shift - self._shift
                self._shift = shift

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer and the schedule, which advances with every step."""
        optimizer = make_optimizer(self.hparams["optimizer"], self.parameters())
        schedule = self.hparams["schedule"]
        steps = 0 if schedule == "constant" else self.trainer.estimated_stepping_batches
        scheduler = make_schedule(schedule, optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the format and the name of the class."""
        origin = {"format": FORMAT, "classifier": type(self).__name__}
        if isinstance(self.network, Inception):
            origin["weights"] = Path(self.network.weights_source).name
        checkpoint["horsehuman"] = origin

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another program, format or class."""
        if (name := check_origin(checkpoint)) != type(self).__name__:
            raise HorseHumanError(f"the checkpoint is that of {name}, not of {type(self).__name__}")
        if isinstance(self.network, Inception):
            checkpoint["state_dict"].pop("network.class_means", None)  # of format 2
            before = self.network.weights_source
            self.network.weights_source = checkpoint["horsehuman"].get("weights", before)


class CNNClassifier(BinaryClassifier):
    """Train the hand-built network.

    Args:
        optimizer: See :func:`make_optimizer`.
        schedule: See :func:`make_schedule`.
        label_smoothing: See :class:`BinaryClassifier`.
        **network: Arguments of :class:`~horsehuman.models.cnn.CNN`.

    Raises:
        HorseHumanError: A value is out of range or unknown.

    Example:
        >>> from horsehuman import CNNClassifier
        >>> model = CNNClassifier(channels=[16, 32], optimizer={"name": "SGD", "lr": 0.1})
        >>> model.image_size
        96
        >>> model.hparams.channels, model.hparams.optimizer
        ([16, 32], {'name': 'SGD', 'lr': 0.1})
    """

    def __init__(
        self,
        optimizer: Mapping[str, Any] = {"name": "AdamW", "lr": 0.002, "weight_decay": 0.05},
        schedule: str = "one_cycle",
        label_smoothing: float = 0.1,
        **network: Any,
    ) -> None:
        super().__init__(CNN(**upgrade_settings(network)), optimizer, schedule, label_smoothing)


class InceptionClassifier(BinaryClassifier):
    """Transfer learning: train a head on a frozen Inception-v3.

    Args:
        cache_features: Compute the features of every image once, before training, train the head
            on them, and keep them in the user's cache for other runs.
        finetune: Number of the last blocks of the backbone, 0 to 2, to fine-tune after the head is
            trained; see :func:`~horsehuman.training.run.finetune`.
        optimizer: See :func:`make_optimizer`.
        schedule: See :func:`make_schedule`.
        label_smoothing: See :class:`BinaryClassifier`.
        **network: Arguments of :class:`~horsehuman.models.inception.Inception`.

    Raises:
        HorseHumanError: A value is out of range or unknown, or the weights cannot be read.

    Example:
        >>> import torch
        >>> from horsehuman import InceptionClassifier
        >>> model = InceptionClassifier(scales=[150]).eval()
        >>> model.network.embed(torch.zeros(2, 3, 300, 200, dtype=torch.uint8)).shape
        torch.Size([2, 768])
    """

    network: Inception

    def __init__(
        self,
        cache_features: bool = True,
        finetune: int = 0,
        optimizer: Mapping[str, Any] = {"name": "AdamW", "lr": 0.03, "weight_decay": 0.01},
        schedule: str = "cosine",
        label_smoothing: float = 0.0,
        **network: Any,
    ) -> None:
        check_flag("model.cache_features", cache_features)
        check_number("model.finetune", finetune, int, at_least=0, at_most=2)
        network = upgrade_settings(network)
        if finetune and (not cache_features or network.get("weights") == "random"):
            needed = "model.cache_features=true and pretrained weights"
            raise HorseHumanError(f"model.finetune={finetune} needs {needed}: set them, or 0")
        options = {"cache_features": cache_features, "finetune": finetune}
        super().__init__(Inception(**network), optimizer, schedule, label_smoothing, **options)
        self._is_unfrozen = False

    def freeze_blocks(self, frozen: bool) -> None:
        """Freeze the last blocks of the backbone, or give them gradients for fine-tuning."""
        blocks = self.network.backbone.split(self.hparams["finetune"])[1]
        blocks.requires_grad_(not frozen)
        self._is_unfrozen = not frozen

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits ``(N,)`` of images, features, or feature maps ``(N, L, C)``."""
        if inputs.ndim == 3:
            inputs = self.network.forward_last(inputs, self.hparams["finetune"])
        return super().forward(inputs)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build optimizer and schedule; for fine-tuning, AdamW with a warm-up and cosine decay.

        Each block nearer to the input has half the learning rate of the next (Howard and Ruder
        2018, arXiv:1801.06146).
        """
        if not self._is_unfrozen:
            return super().configure_optimizers()
        lr, steps = self.hparams["optimizer"]["lr"], self.trainer.estimated_stepping_batches
        blocks = list(self.network.backbone.split(self.hparams["finetune"])[1])
        rates = [lr * HEAD_LR, *(lr * BLOCK_LR / 2**k for k in range(len(blocks)))]
        groups = [
            {"params": list(part.parameters()), "lr": rate}
            for part, rate in zip([self.network.head, *reversed(blocks)], rates, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        schedule = lr_scheduler.OneCycleLR(
            optimizer, rates, max(int(steps), 20), pct_start=0.1, cycle_momentum=False
        )
        scheduler: Any = {"scheduler": schedule, "interval": "step", "name": "lr"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def setup(self, stage: str) -> None:
        """Replace the images of the data module by their features, if they are to be cached."""
        super().setup(stage)
        if not self.network.has_weights:
            fix = "use box, or load the checkpoint that has them"
            raise HorseHumanError(f"model.weights=checkpoint names no weights: {fix}")
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and self.network.precision == "bfloat16":
            warn_without_bf16(self.network.to(self.trainer.strategy.root_device))
        cached = self.hparams["cache_features"] and stage in ("fit", "test")
        if not cached or not isinstance(data, HorseHumanDataModule):
            return
        self.network.to(self.trainer.strategy.root_device)
        if stage == "fit" and self._is_unfrozen:
            blocks = self.hparams["finetune"]
            data.use_feature_maps(lambda images: self.network.forward_frozen(images, blocks))
            return
        cache = self.network.feature_cache()
        # flattened features take nearly 1 MB an image: they are not kept on disk
        data.use_features(cache if self.hparams["pool"] != "flatten" else cache.embed, stage)
        if stage == "test":
            self._verify_test_features(data)

    def _verify_test_features(self, data: HorseHumanDataModule) -> None:
        """Answer some test images end to end, and all of them if the features do not agree."""
        images, features = data.sample_test(VERIFIED, self.device)
        with torch.no_grad():
            difference = float((self(images) - self(features)).abs().max())
        if not broadcast(difference <= TOLERANCE):
            text = (
                "test features differ by %.3g in the logit, above %g: all are answered end to end"
            )
            log.warning(text, difference, TOLERANCE)
            data.discard_features()


def check_optimizer(options: Mapping[str, Any]) -> None:
    """Check the name, the learning rate and the weight decay of an optimizer.

    Raises:
        HorseHumanError: There is no such optimizer, or a value is out of range.
    """
    if not isinstance(options, Mapping):
        raise HorseHumanError(f"model.optimizer={options!r} does not work: give name, lr, ...")
    check_choice("model.optimizer.name", options.get("name"), sorted(OPTIMIZERS))
    check_number("model.optimizer.lr", options.get("lr"), float, above=0)
    decay = options.get("weight_decay", 0.0)
    check_number("model.optimizer.weight_decay", decay, float, at_least=0)


def make_optimizer(
    options: Mapping[str, Any], parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Build an optimizer over the parameters that require gradients.

    Args:
        options: ``name``, one of :data:`OPTIMIZERS`, and its arguments. Weight decay is not applied
            to parameters of one dimension (biases, batch norm).
        parameters: All parameters of a module.

    Raises:
        HorseHumanError: The optimizer does not take an argument.
    """
    arguments = dict(options)
    name, decay = arguments.pop("name"), arguments.pop("weight_decay", 0.0)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    try:
        return OPTIMIZERS[name](groups, **arguments)
    except (TypeError, ValueError) as error:
        raise HorseHumanError(f"model.optimizer: {name} does not take this: {error}") from error


def make_schedule(
    schedule: str, optimizer: torch.optim.Optimizer, steps: float
) -> lr_scheduler.LRScheduler:
    """Build the schedule of the learning rate.

    Args:
        schedule: ``constant``, ``cosine`` (to zero) or ``one_cycle`` (Smith 2018, with torch's
            proportions).
        optimizer: The optimizer whose learning rate it changes.
        steps: Number of training steps; infinite if training has no end.

    Raises:
        HorseHumanError: The schedule needs a finite number of steps.
    """
    if schedule == "constant":
        return lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if steps == float("inf"):
        fix = "set trainer.max_epochs, or use constant"
        raise HorseHumanError(f"model.schedule={schedule} needs an end: {fix}")
    if schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(steps))
    lr, momentum = float(optimizer.defaults["lr"]), "betas" in optimizer.defaults
    return lr_scheduler.OneCycleLR(optimizer, lr, max(int(steps), 4), cycle_momentum=momentum)
