"""The Lightning modules: how both networks are trained, measured and saved."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import lr_scheduler
from torchmetrics import MeanMetric, MinMetric
from torchmetrics.classification import BinaryAccuracy

from horsehuman.errors import HorseHumanError, check_choice, check_flag, check_number, closest
from horsehuman.models.base import FORMAT, Network, check_origin, to_plain
from horsehuman.models.cnn import CNN
from horsehuman.models.inception import Inception

Batch = tuple[Tensor, Tensor]

SCHEDULES = ("constant", "cosine", "one_cycle")

_UNFIT = {"Optimizer", "SparseAdam", "LBFGS", "Muon"}  # sparse; closures; matrices only


class BinaryClassifier(L.LightningModule):
    """Trains a network that gives one logit for each picture.

    Args:
        network: What is trained.
        optimizer: See :func:`~horsehuman.models.optimization.make_optimizer`.
        schedule: See :func:`~horsehuman.models.optimization.make_schedule`.
        label_smoothing: Training labels become ``s / 2`` and ``1 - s / 2``; in [0, 1).
        options: What else a subclass takes.

    Raises:
        HorseHumanError: A value does not work.
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
        optimizer_class(optimizer)
        own = {"optimizer": optimizer, "schedule": schedule, "label_smoothing": label_smoothing}
        self.hparams.update(to_plain({**network.settings, **own, **options}))
        self.network = network
        size = network.image_size
        self.example_input_array = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        self.train_loss = MeanMetric(nan_strategy="disable")
        self.train_accuracy = BinaryAccuracy(validate_args=False)
        self.loss = MeanMetric(nan_strategy="disable")
        self.accuracy = BinaryAccuracy(validate_args=False)
        self.margin = MinMetric(nan_strategy="disable")

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the canonical picture, which data should be kept at."""
        return self.network.image_size

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``(N,)`` of what a loader yields: pictures, or features computed from them."""
        logits: Tensor
        logits = self.network.forward_head(inputs) if inputs.ndim == 2 else self.network(inputs)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of ``(pictures or features, labels float32 (N,))``; logs the epoch's at its end."""
        inputs, labels = batch
        logits = self(inputs)
        smoothing = self.hparams["label_smoothing"]
        targets = labels * (1 - smoothing) + smoothing / 2
        loss = functional.binary_cross_entropy_with_logits(logits, targets)
        self.train_accuracy.update(self._answers(logits.detach()), labels.int())
        self.train_loss.update(loss.detach())  # all batches of an epoch are of one size
        if batch_idx % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss  # the epoch is logged at its end: each step would cost more than a head does

    def on_train_epoch_start(self) -> None:
        """Begin the epoch's loss and accuracy anew."""
        self.train_loss.reset()
        self.train_accuracy.reset()

    def on_train_epoch_end(self) -> None:
        """Log loss and accuracy; stop when they are no numbers any more, before it is saved."""
        loss = self.train_loss.compute()
        figures = {"train/loss": loss, "train/acc": self.train_accuracy.compute()}
        self.log_dict(figures, logger=False)
        if self.logger:  # now and not after the checkpoint, which stands for all that is logged
            figures["epoch"] = torch.tensor(float(self.current_epoch))
            values = {name: float(value) for name, value in figures.items()}
            self.logger.log_metrics(values, step=self.global_step - 1)
        numbers = [loss, self.trainer.callback_metrics.get("val/loss", loss)]
        numbers += [p.detach().sum() for p in self.parameters() if p.requires_grad]
        if not all(bool(torch.isfinite(number)) for number in numbers):
            raise HorseHumanError(
                f"the loss is not finite after epoch {self.current_epoch + 1}: lower "
                "model.optimizer.lr, or use trainer.precision=32-true"
            )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val/loss``, ``val/acc`` and ``val/margin``; see :meth:`test_step`."""
        self._evaluate("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``test/loss``, ``test/acc`` and ``test/margin``.

        The margin is how far, in logits, the picture nearest to the wrong side of the threshold is
        from it: below 0 it is wrong.
        """
        self._evaluate("test", batch)

    def _answers(self, logits: Tensor) -> Tensor:
        return (logits.sigmoid() >= self.network.threshold).int()

    def _evaluate(self, stage: str, batch: Batch) -> None:
        inputs, labels = batch
        logits = self.network.calibrate(self(inputs))
        losses = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        between = math.log(self.network.threshold / (1 - self.network.threshold))
        self.loss.update(losses)  # one by one: without a NaN strategy weights are left out
        self.accuracy.update(self._answers(logits), labels.int())
        self.margin.update(((logits - between) * (2 * labels - 1)).min())
        # Objects, which add up over all processes: Lightning's own mean over them rounds counts.
        figures = {"loss": self.loss, "acc": self.accuracy, "margin": self.margin}
        for name, figure in figures.items():
            self.log(
                f"{stage}/{name}", figure, on_step=False, on_epoch=True, batch_size=len(labels)
            )

    def setup(self, stage: str) -> None:
        """Take the names of the classes from the data that training starts on."""
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if stage == "fit" and names:
            self.hparams["class_names"] = self.network.settings["class_names"] = list(names)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build what ``optimizer`` and ``schedule`` name, over what is trained."""
        optimizer = make_optimizer(self.hparams["optimizer"], self.parameters())
        schedule = self.hparams["schedule"]
        steps = 0 if schedule == "constant" else self.trainer.estimated_stepping_batches
        scheduler = make_schedule(schedule, optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write which class it is and in which format."""
        checkpoint["horsehuman"] = {"format": FORMAT, "classifier": type(self).__name__}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what this class cannot read."""
        check_origin(checkpoint, type(self).__name__)


class CNNClassifier(BinaryClassifier):
    """The hand-built network.

    Args:
        optimizer: See :class:`BinaryClassifier`, as the next two.
        schedule: Of the learning rate.
        label_smoothing: In [0, 1).
        **network: Arguments of :class:`~horsehuman.models.cnn.CNN`.

    Raises:
        HorseHumanError: A value does not work.
    """

    def __init__(
        self,
        optimizer: Mapping[str, Any] = {"name": "AdamW", "lr": 0.002, "weight_decay": 0.05},
        schedule: str = "one_cycle",
        label_smoothing: float = 0.1,
        **network: Any,
    ) -> None:
        super().__init__(_build(CNN, network), optimizer, schedule, label_smoothing)


class InceptionClassifier(BinaryClassifier):
    """Transfer learning: a head on a frozen Inception-v3.

    Args:
        cache_features: Compute the features of every picture once, before training, train the
            head on them, and keep them in the user's cache for other runs.
        views: With ``cache_features``: how many views of each training picture are embedded. The
            first is the picture itself, the others are augmented as the data says, fixed by the
            run's seed.
        optimizer: See :class:`BinaryClassifier`, as the next two.
        schedule: Of the learning rate.
        label_smoothing: In [0, 1).
        **network: Arguments of :class:`~horsehuman.models.inception.Inception`.

    Raises:
        HorseHumanError: A value does not work, or the weights cannot be read.
    """

    network: Inception

    def __init__(
        self,
        cache_features: bool = True,
        views: int = 1,
        optimizer: Mapping[str, Any] = {"name": "AdamW", "lr": 0.03, "weight_decay": 0.01},
        schedule: str = "cosine",
        label_smoothing: float = 0.0,
        **network: Any,
    ) -> None:
        check_flag("model.cache_features", cache_features)
        check_number("model.views", views, int, at_least=1, at_most=1000)
        if views > 1 and not cache_features:
            raise HorseHumanError(
                f"model.views={views} goes with model.cache_features=true: without it every epoch "
                "sees a new view anyway"
            )
        options = {"cache_features": cache_features, "views": views}
        super().__init__(
            _build(Inception, network), optimizer, schedule, label_smoothing, **options
        )

    def setup(self, stage: str) -> None:
        """Compute the features of the data's pictures, if they are to be cached."""
        super().setup(stage)
        if not self.network.has_weights:
            raise HorseHumanError(
                "model.weights=checkpoint names no weights: use box, or load the checkpoint that "
                "has them"
            )
        replace = getattr(getattr(self.trainer, "datamodule", None), "replace_pictures", None)
        if stage == "fit" and self.hparams["cache_features"] and replace:
            self.network.to(self.trainer.strategy.root_device)
            keep = self.hparams["pool"] != "flatten"  # nearly 1 MB for each picture
            cache = self.network.feature_cache()
            replace(cache if keep else cache.embed, self.hparams["views"])


def _build(kind: type[Network], arguments: Mapping[str, Any]) -> Network:
    """Build a network; an argument that it does not have is an error with the closest names."""
    known = list(inspect.signature(kind).parameters)
    for name in arguments:
        if name not in known:
            near = closest(name, known)
            raise HorseHumanError(f"model.{name} is not an option of {kind.__name__}{near}")
    return kind(**arguments)


def optimizer_class(given: Mapping[str, Any]) -> type[torch.optim.Optimizer]:
    """Look up ``given["name"]`` in :mod:`torch.optim`.

    Raises:
        HorseHumanError: There is no such optimizer, or its rate or weight decay does not work.
    """
    found = {
        name: kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    }
    if not isinstance(given, Mapping):
        raise HorseHumanError(f"model.optimizer={given!r} does not work: give name, lr, ...")
    name = given.get("name")
    check_choice("model.optimizer.name", name, sorted(set(found) - _UNFIT))
    decay = given.get("weight_decay", 0.0)
    check_number("model.optimizer.weight_decay", decay, float, at_least=0)
    check_number("model.optimizer.lr", given.get("lr"), float, above=0)
    return found[str(name)]


def make_optimizer(
    given: Mapping[str, Any], parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Build an optimizer over what is trained.

    Args:
        given: ``name`` of a class in :mod:`torch.optim` and its arguments. Weight decay spares
            what has one dimension (biases, batch norm).
        parameters: Those without ``requires_grad`` are left aside.

    Raises:
        HorseHumanError: The optimizer does not take an argument.
    """
    kind, arguments = optimizer_class(given), dict(given)
    name, decay = arguments.pop("name"), arguments.pop("weight_decay", 0.0)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    try:
        return kind(groups, **arguments)
    except (TypeError, ValueError) as error:
        raise HorseHumanError(f"model.optimizer: {name} does not take this: {error}") from error


def make_schedule(
    schedule: str, optimizer: torch.optim.Optimizer, steps: float
) -> lr_scheduler.LRScheduler:
    """Build the schedule of the learning rate.

    Args:
        schedule: ``constant``, ``cosine`` (to zero) or ``one_cycle`` (Smith 2018, with torch's
            proportions).
        optimizer: What it changes.
        steps: All steps of training; infinite where training has no end.

    Raises:
        HorseHumanError: The schedule needs an end and there is none.
    """
    if schedule == "constant":
        return lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if steps == float("inf"):
        raise HorseHumanError(
            f"model.schedule={schedule} needs an end: set trainer.max_epochs, or use constant"
        )
    if schedule == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=int(steps))
    return lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=[float(group["lr"]) for group in optimizer.param_groups],
        total_steps=max(int(steps), 4),
        cycle_momentum="betas" in optimizer.defaults,
    )
