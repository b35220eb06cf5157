"""What happens beside training: lines and a bar on the terminal, exact seeds, the model's table."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.model_summary.model_summary import summarize
from rich.progress import Progress, TaskID
from rich.table import Table
from torch import Tensor

from horsehuman.distributed import rank, sync_buffers
from horsehuman.errors import printable
from horsehuman.models.checkpoint import write_checkpoint
from horsehuman.runtime import console, progress_bar

_METRICS_KEY, _SECONDS_KEY = "horsehuman_figures", "horsehuman_seconds"

log = logging.getLogger(__name__)


class EpochSeed(L.Callback):
    """Seed every epoch by itself, so that a run resumed between epochs repeats what it would do.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Seed torch's generators, which augmentation and dropout draw from."""
        epoch = 1_000_003 * self.seed + trainer.current_epoch
        torch.manual_seed(epoch + 500_009 * rank())


class SyncBuffers(L.Callback):
    """Let all processes evaluate with what the first one knows, which is what is saved."""

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the batch norms' statistics, averaged or not."""
        sync_buffers(pl_module)


class AverageWeights(WeightAveraging):
    """Exponential moving average of weights and batch norm statistics, for validation and saving.

    The decay rises to its value, ``min(decay, (1 + n) / (10 + n))`` after n steps (as in
    TensorFlow's ``ExponentialMovingAverage``), so that a short run does not end as an average of
    its first, random weights.

    Args:
        decay: Share of the average that a step leaves as it is, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        def update(averages: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
            steps = int(count)
            share = 1 - min(decay, (1 + steps) / (10 + steps))
            if averages[0].is_floating_point():
                torch._foreach_lerp_(averages, current, share)
            else:  # how many batches a batch norm has seen
                torch._foreach_copy_(averages, current)

        super().__init__(multi_avg_fn=update)


class TerminalProgress(L.Callback):
    """A bar over all steps, and a line for each epoch: loss, accuracy, held-out accuracy, time."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        self._show("training", trainer.estimated_stepping_batches)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *unused: object
    ) -> None:
        """Move the bar."""
        self._assign(trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the epoch's line."""
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        own: Any = pl_module  # what Lightning has logged may still be of the epoch before
        loss, accuracy = own.train_loss.compute(), own.train_accuracy.compute()
        line = f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}"
        line += f"  loss {loss:.4f}  accuracy {accuracy:6.1%}"
        if "val/acc" in found:
            on_test = getattr(trainer.datamodule, "validation", "") == "test"  # type: ignore[attr-defined]
            line += f"  {'test set' if on_test else 'held out'}: loss {found['val/loss']:.4f}"
            line += f"  accuracy {found['val/acc']:6.1%}"
        line += f"  {time.monotonic() - self._start:.1f} s"
        (self._bar.console if self._bar else console()).print(line)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the bar away."""
        self._hide()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar."""
        self._show("testing", sum(trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        *unused: object,
    ) -> None:
        """Move the bar."""
        self._assign(batch_idx + 1)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the bar away."""
        self._hide()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Take the bar away, whatever happened."""
        self._hide()

    def _show(self, description: str, total: float) -> None:
        self._bar = progress_bar()
        steps = None if total == float("inf") else total
        self._task = self._bar.add_task(description, total=steps)
        self._bar.start()

    def _assign(self, done: int) -> None:
        if self._bar:
            self._bar.update(self._task, completed=done)

    def _hide(self) -> None:
        if self._bar:
            self._bar.stop()


def print_summary(model: L.LightningModule, depth: int = 3) -> None:
    """Print a model's layers: name, type, output shape, parameters, trained or frozen.

    Args:
        model: With an ``example_input_array``.
        depth: Layers inside deeper modules are counted with these.
    """
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("type")
    table.add_column("output shape")
    table.add_column("parameters", justify="right")
    table.add_column("")
    summary = summarize(model, max_depth=-1)
    modules = dict(model.named_modules())
    for name, shape in zip(summary.layer_names, summary.out_sizes, strict=True):
        module = modules[name]
        is_leaf = not any(True for _ in module.children())
        level = name.count(".") + 1
        if shape == "?" or level > depth or not (is_leaf or level == depth):
            continue
        parameters = list(module.parameters())
        state = "trained" if any(p.requires_grad for p in parameters) else "frozen"
        table.add_row(
            name,
            type(module).__name__,
            " x ".join(map(str, ["N", *shape[1:]])),
            f"{sum(p.numel() for p in parameters):,}" if parameters else "",
            state if parameters else "",
        )
    console().print(table, crop=False, no_wrap=True)
    total, trained = summary.total_parameters, summary.trainable_parameters
    console().print(f"{total:,} parameters, {trained:,} of them trained")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes each checkpoint aside, syncs it to the disk and renames it.

    Whenever the process is killed, the one before is whole until the new one is. Where there is no
    room, that checkpoint is lost, and not the run.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write it, or say why not."""
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(Path(path), checkpoint)
        except OSError as error:
            log.warning(
                "%s is not saved (%s): the run goes on, with the one before, if any",
                printable(path),
                error.strerror,
            )


class CheckpointMetrics(L.Callback):
    """Puts figures and time into each checkpoint, and the log on the disk before it.

    Attributes:
        figures: Of the epoch that the checkpoint ends with, by name.
        before: Seconds that a run which goes on had taken up to its checkpoint.
    """

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self.before = 0.0
        self._started = time.monotonic()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the figures, and write what the log has waiting."""
        self.figures = epoch_metrics(trainer)
        checkpoint[_METRICS_KEY] = self.figures
        checkpoint[_SECONDS_KEY] = self.before + time.monotonic() - self._started
        logger: Any = trainer.logger
        logger.experiment.flush()

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take them back."""
        self.figures = dict(checkpoint.get(_METRICS_KEY, {}))
        self.before = float(checkpoint.get(_SECONDS_KEY, 0))


def epoch_metrics(trainer: L.Trainer) -> dict[str, float]:
    """The last epoch's figures by name; none where this process has trained no epoch."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}


class Histograms(L.Callback):
    """Histograms of all trained weights after every epoch."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write them."""
        writer: Any = trainer.logger.experiment  # type: ignore[union-attr]
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                writer.add_histogram(name, parameter.detach(), trainer.global_step)
