"""Callbacks: exact seeds, averaged weights, atomic checkpoints, and lines on the terminal."""

import copy
import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities.model_summary.model_summary import summarize
from torch import Tensor

from horsehuman.distributed import rank, sync_buffers, world_size
from horsehuman.errors import printable
from horsehuman.models.checkpoint import write_checkpoint
from horsehuman.runtime import console, progress_bar, raise_on_signals, table

log = logging.getLogger(__name__)

#: Share of the time between two epochs' checkpoints that writing may take, about; the files of an
#: epoch are written together.
WRITE_SHARE = 0.1


class EpochSeed(L.Callback):
    """Seed every epoch, so that a run resumed between epochs draws the same random numbers.

    Args:
        seed: The run's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, *unused: Any) -> None:
        """Seed torch's generators, which augmentation and dropout draw from."""
        epoch = 1_000_003 * self.seed + trainer.current_epoch
        torch.manual_seed(epoch + 500_009 * rank())


class TorchrunSignals(L.Callback):
    """Raise ``Interrupted`` when torchrun ends a rank; Lightning's handler waits for all ranks."""

    def on_fit_start(self, *unused: Any) -> None:
        """Replace Lightning's handler of SIGTERM."""
        if world_size() > 1:
            raise_on_signals()


class SyncBuffers(L.Callback):
    """Make all ranks validate with rank 0's batch-norm statistics, which are those saved."""

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Broadcast rank 0's buffers, averaged or not."""
        sync_buffers(pl_module)


class AverageWeights(WeightAveraging):
    """Exponential moving average of weights and batch-norm statistics, for validation and saving.

    The decay rises to its value, ``min(decay, (1 + n) / (10 + n))`` after n steps (as in
    TensorFlow's ``ExponentialMovingAverage``), so that a short run does not end as an average of
    its first, random weights.

    Args:
        decay: Weight of the old average in each update, in (0, 1).
    """

    def __init__(self, decay: float) -> None:
        def update(averages: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
            steps = int(count)
            weight = 1 - min(decay, (1 + steps) / (10 + steps))
            if averages[0].is_floating_point():
                torch._foreach_lerp_(averages, current, weight)
            else:  # a batch norm's number of batches
                torch._foreach_copy_(averages, current)

        super().__init__(multi_avg_fn=update)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write each checkpoint to a temporary file, sync it to disk and rename it.

    A process that is killed leaves the previous checkpoint intact. After the files of an epoch are
    written, those of the next ones wait as copies in memory until :data:`WRITE_SHARE` of the time
    allows a write; newer checkpoints of the same file replace older ones. If a checkpoint cannot be
    written, because the disk is full for instance, a warning is logged, training goes on, and the
    copy in memory is written as soon as possible.

    Attributes:
        unsaved: The checkpoints that are not on the disk, by file.
    """

    def __init__(self) -> None:
        self.unsaved: dict[Path, dict[str, Any]] = {}
        self._next_write = 0.0
        self._step = -1  # of the checkpoints that were written last

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, or keep a copy of it; log why it could not be written."""
        self.unsaved.pop(Path(path), None)  # "last" must follow the "best" that it names
        self.unsaved[Path(path)] = checkpoint
        step = checkpoint["global_step"]
        due = step == self._step or time.monotonic() >= self._next_write
        if due and (error := self.write_unsaved()):
            log.warning("%s is not saved (%s): the run goes on", printable(path), error.strerror)
        elif due:
            self._step = step
        if self.unsaved:  # a copy, because training changes the tensors
            self.unsaved[Path(path)] = copy.deepcopy(move_data_to_device(checkpoint, "cpu"))

    def write_unsaved(self, seconds: float = 0) -> OSError | None:
        """Write the checkpoints that are not on the disk, the oldest first.

        Args:
            seconds: Time to repeat failed attempts for.

        Returns:
            The last error, or ``None`` if all are written.
        """
        start = time.monotonic()
        while True:
            try:
                for path in list(self.unsaved):
                    path.parent.mkdir(exist_ok=True)  # a run folder that vanished stays away
                    write_checkpoint(path, self.unsaved[path])
                    del self.unsaved[path]
                now = time.monotonic()
                pause = (now - start) * (1 / WRITE_SHARE - 1)
                self._next_write = max(now, self._next_write) + pause
                return None
            except OSError as error:
                if time.monotonic() >= start + seconds:
                    return error
            time.sleep(0.5)


class CheckpointMetrics(L.Callback):
    """Save the metrics and the elapsed time in each checkpoint, after flushing the log.

    Attributes:
        metrics: Metrics of the epoch that the checkpoint ends with, by name.
        seconds_before: Seconds that a resumed run had taken up to its checkpoint.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.seconds_before = 0.0
        self._started = time.monotonic()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the epoch's metrics, and flush the log before the checkpoint is written."""
        self.metrics = epoch_metrics(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()  # Lightning took it before
        trainer.logger.experiment.flush()  # type: ignore[union-attr]

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics and the seconds, for the checkpoint."""
        seconds = self.seconds_before + time.monotonic() - self._started
        return {"metrics": self.metrics, "seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both from a checkpoint."""
        self.metrics = dict(state_dict["metrics"])
        self.seconds_before = float(state_dict["seconds"])


def epoch_metrics(trainer: L.Trainer) -> dict[str, float]:
    """Return the last epoch's metrics by name; empty if this process has trained no epoch."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name}


class TerminalProgress(L.Callback):
    """Show a progress bar over all steps, and print a line of metrics after each epoch."""

    def __init__(self) -> None:
        self._bar = progress_bar()
        self._task = self._bar.add_task("", total=None)
        self._start = 0.0

    def on_train_start(self, trainer: L.Trainer, *unused: Any) -> None:
        """Show the bar."""
        steps = trainer.estimated_stepping_batches
        self._show("training", None if steps == float("inf") else steps)

    def on_train_epoch_start(self, *unused: Any) -> None:
        """Start the clock of the epoch."""
        self._start = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, *unused: Any) -> None:
        """Move the bar."""
        self._bar.update(self._task, completed=trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the epoch's line: loss and accuracy, held-out loss and accuracy, seconds."""
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        module: Any = pl_module  # the values that Lightning logged may be of the epoch before
        loss, accuracy = module.train_loss.compute(), module.train_accuracy.compute()
        line = f"epoch {trainer.current_epoch + 1:>3}/{trainer.max_epochs}"
        line += f"  loss {loss:.4f}  accuracy {accuracy:6.1%}"
        if "val/acc" in logged:
            on_test = getattr(trainer.datamodule, "validation", "") == "test"  # type: ignore[attr-defined]
            line += f"  {'test set' if on_test else 'held out'}: loss {logged['val/loss']:.4f}"
            line += f"  accuracy {logged['val/acc']:6.1%}"
        self._bar.console.print(f"{line}  {time.monotonic() - self._start:.1f} s")

    def on_test_start(self, trainer: L.Trainer, *unused: Any) -> None:
        """Show the bar."""
        self._show("testing", sum(trainer.num_test_batches))

    def on_test_batch_end(self, *unused: Any) -> None:
        """Move the bar."""
        self._bar.advance(self._task)

    def hide(self, *unused: Any, **named: Any) -> None:
        """Remove the bar: training or the test has ended, or was interrupted."""
        self._bar.stop()

    on_train_end = on_test_end = on_exception = hide

    def _show(self, description: str, total: float | None) -> None:
        self._bar.update(self._task, description=description, total=total)
        self._bar.start()


def print_summary(model: L.LightningModule, depth: int = 3) -> None:
    """Print a table of layers: name, type, output shape, parameters, trained or frozen.

    Args:
        model: A module with an ``example_input_array``.
        depth: Deeper layers are counted with the layer of this depth that contains them.
    """
    rows = table("layer", "type", "output shape", "parameters", "", left=3)
    summary = summarize(model, max_depth=-1)
    columns = (summary.named_modules, summary.out_sizes, summary.param_nums)
    for (name, module), shape, count in zip(*columns, strict=True):
        level = name.count(".") + 1
        if shape == "?" or level > depth or (level < depth and list(module.children())):
            continue
        trained = any(parameter.requires_grad for parameter in module.parameters())
        parameters = (f"{count:,}", "trained" if trained else "frozen") if count else ()
        size = " x ".join(map(str, ["N", *shape[1:]]))
        rows.add_row(name, type(module).__name__, size, *parameters)
    console().print(rows, crop=False, no_wrap=True)
    total, trainable = summary.total_parameters, summary.trainable_parameters
    console().print(f"{total:,} parameters, {trainable:,} of them trained")
