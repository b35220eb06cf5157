"""What happens beside training: lines and a bar on the terminal, exact seeds, the model's table."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.model_summary.model_summary import summarize
from rich.progress import Progress, TaskID
from rich.table import Table
from torch import Tensor

from horsehuman.processes import rank, same_buffers
from horsehuman.terminal import console, progress_bar


class SeedEpochs(L.Callback):
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


class SameStatistics(L.Callback):
    """Let all processes evaluate with what the first one knows, which is what is saved."""

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the batch norms' statistics, averaged or not."""
        same_buffers(pl_module)


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
        self._move(trainer.global_step)

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
        self._move(batch_idx + 1)

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

    def _move(self, done: int) -> None:
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
