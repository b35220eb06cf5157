"""Find, load and write checkpoints of classifiers, offline and without executing code.

A checkpoint is a file that ``torch.save`` wrote, or :data:`WEIGHTS_FILE` with :data:`CONFIG_FILE`
beside it. Both contain a CRC-32 of all tensors and values.
"""

import hashlib
import inspect
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from horsehuman.errors import (
    HorseHumanError,
    check_choice,
    closest,
    is_out_of_memory,
    os_errors,
    printable,
)
from horsehuman.models.base import PRECISIONS, Network, check_origin, upgrade_settings
from horsehuman.models.cnn import CNN
from horsehuman.models.inception import CHECKPOINT, Inception, warn_without_bf16
from horsehuman.run_dir import read_json, write_atomic
from horsehuman.runtime import ASSETS, BACKBONE_FILE, BUNDLED, asset

# Keys of every Lightning checkpoint: version of Lightning, epoch and step, and the weights.
_LIGHTNING_KEYS = ("pytorch-lightning_version", "epoch", "global_step", "state_dict")

#: Keys of a checkpoint that inference needs: everything that :func:`load_classifier` and
#: ``load_from_checkpoint`` read, and the epoch and step at which it was written.
INFERENCE_KEYS = (*_LIGHTNING_KEYS, "hparams_name", "hyper_parameters", "horsehuman")

#: Names of the two files of a classifier in a model hub folder.
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

#: Class names of LightningModules, as checkpoints store them, and their networks.
NETWORKS: dict[str, type[Network]] = {"CNNClassifier": CNN, "InceptionClassifier": Inception}


def load_classifier(source: str | Path = "inception", precision: str = "float32") -> Network:
    """Load a trained classifier with its weights and decision settings.

    The function does not access the internet and does not execute code from the file. Only the
    bundled ``inception`` reads a second file, the bundled backbone, so that the package stores
    no weight twice.

    Args:
        source: A bundled classifier (``inception`` or ``cnn``), a run folder (its ``final.ckpt``
            is read), a checkpoint file, or a folder that ``horsehuman card --folder`` wrote.
        precision: Precision of a frozen backbone: ``float32``, ``bfloat16``, or ``auto``, which is
            ``bfloat16`` where the device has instructions for it. Without them ``bfloat16``
            computes in float32 and logs this.

    Returns:
        The network on the CPU, in eval mode.

    Raises:
        HorseHumanError: If the source does not exist or is not a classifier of this package, or
            there is no such precision.

    Example:
        >>> import torch
        >>> from horsehuman import load_classifier
        >>> classifier = load_classifier("cnn")
        >>> classifier.class_names
        ('horses', 'humans')
        >>> classifier(torch.zeros(2, 3, 300, 200, dtype=torch.uint8)).shape  # logits
        torch.Size([2])
    """
    check_choice("precision", precision, PRECISIONS)
    path = find_checkpoint(source)
    checkpoint = read_classifier_file(path)
    try:
        network = _build_network(checkpoint)
    except HorseHumanError as error:
        raise HorseHumanError(f"cannot load {printable(path)}: {error}") from error
    network.precision = precision
    if precision == "bfloat16" and isinstance(network, Inception):
        warn_without_bf16(network)
    return network.float().to(memory_format=torch.channels_last).eval()


def _build_network(checkpoint: Mapping[str, Any]) -> Network:
    """Build a network from a checkpoint's settings and state dict.

    Args:
        checkpoint: The loaded checkpoint. Training settings in its ``hyper_parameters`` are
            ignored. If its ``state_dict`` lacks the backbone, the network gets the bundled one.

    Returns:
        The network on the CPU.

    Raises:
        HorseHumanError: If the origin or a setting is invalid, or the weights do not match the
            settings.
    """
    kind = NETWORKS.get(check_origin(checkpoint))
    state: Any = checkpoint.get("state_dict")
    settings: Any = checkpoint.get("hyper_parameters")
    mismatch = HorseHumanError("its weights and settings do not match: train it again")
    if kind is None or not _is_mapping(settings, object) or not _is_mapping(state, Tensor):
        raise mismatch
    if any(t.layout != torch.strided or t.device.type != "cpu" for t in state.values()):
        raise mismatch
    tensors = {key.removeprefix("network."): tensor for key, tensor in state.items()}
    tensors.pop("class_means", None)  # of format 2
    has_backbone = any(key.startswith("backbone.") for key in tensors)
    # The file's own `weights` must not make it read another file or the internet.
    settings = upgrade_settings(settings) | {"weights": CHECKPOINT if has_backbone else "box"}
    parameters = inspect.signature(kind).parameters
    with torch.device("meta"):  # Settings that do not match the weights must not allocate memory.
        network = kind(**{name: settings[name] for name in settings if name in parameters})
    if isinstance(network, Inception) and not has_backbone:
        tensors |= network.backbone.state_dict(prefix="backbone.")
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise mismatch from error
    return network


def _is_mapping(value: object, kind: type) -> bool:
    """Return whether a value is a mapping of strings to values of a type."""
    return isinstance(value, Mapping) and all(
        isinstance(key, str) and isinstance(item, kind) for key, item in value.items()
    )


def find_checkpoint(source: str | Path) -> Path:
    """Return the checkpoint file of a bundled name, a run folder, a hub folder or a file name.

    Args:
        source: See :func:`load_classifier`.

    Raises:
        HorseHumanError: If there is no such file, or a folder contains no final checkpoint.
    """
    if source in BUNDLED:
        return asset(f"{source}.ckpt")
    path = Path(source).expanduser()
    for file in (path, path / WEIGHTS_FILE, path / "checkpoints" / "final.ckpt"):
        if file.is_file():
            return file
    name = printable(path)
    if path.is_dir():
        fix = "name a finished run, or its checkpoints/last.ckpt"
        raise HorseHumanError(f"{name} has no checkpoints/final.ckpt: {fix}")
    fix = f"{closest(str(source), BUNDLED)}: give a run, a checkpoint or {' or '.join(BUNDLED)}"
    raise HorseHumanError(f"--model {name}: no such run or file{fix}")


def weight_files(source: str | Path) -> list[Path]:
    """Return all files that a classifier is read from: its checkpoint, and a separate backbone.

    Args:
        source: See :func:`load_classifier`.

    Raises:
        HorseHumanError: See :func:`find_checkpoint`.
    """
    checkpoint = find_checkpoint(source)
    return [checkpoint, ASSETS / BACKBONE_FILE] if source == "inception" else [checkpoint]


def read_classifier_file(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or a safetensors file and the config beside it.

    Args:
        path: The file. If its suffix is ``.safetensors``, :data:`CONFIG_FILE` in the same folder
            is read, too.

    Returns:
        The checkpoint. If the file is safetensors, it has the keys ``hyper_parameters``,
        ``horsehuman`` and ``state_dict``; otherwise see :func:`read_checkpoint`.

    Raises:
        HorseHumanError: If a file cannot be read or is damaged; see :func:`read_checkpoint`.
    """
    if path.suffix != ".safetensors":
        return read_checkpoint(path)
    config = read_json(path.with_name(CONFIG_FILE))
    with os_errors("read", path):
        content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    with suppress(KeyError, SafetensorError):
        checkpoint = hub_checkpoint(config, safetensors.torch.load(content))
        # Folders of earlier versions have the checksum only.
        if config.get("sha256", digest) == digest and verify_checksum(checkpoint):
            return checkpoint
    raise HorseHumanError(f"{printable(path)} or its {CONFIG_FILE} is unusable: copy both again")


def hub_checkpoint(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Combine the contents of the two files of a model hub folder into a checkpoint.

    Args:
        config: Content of :data:`CONFIG_FILE`: ``hyper_parameters`` and ``horsehuman``.
        tensors: Content of :data:`WEIGHTS_FILE`, the state dict. It is sorted, because the order
            in such a file is undefined and the checksum depends on it. The tensors are copied:
            those of a file have odd addresses, with which the last bits of a result may differ.
    """
    plain = {key: config[key] for key in ("hyper_parameters", "horsehuman")}
    copies = {k: t.clone(memory_format=torch.contiguous_format) for k, t in sorted(tensors.items())}
    return {**plain, "state_dict": copies}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file that ``torch.save`` wrote, without executing code from it.

    Args:
        path: The file.

    Returns:
        The checkpoint with its tensors on the CPU. Its keys are not checked.

    Raises:
        HorseHumanError: If the file cannot be read, is of another kind, is damaged, or contains
            anything but tensors and plain values.
    """
    with os_errors("read", path), path.open("rb") as file:
        start = file.read(16)
    if not start.startswith(b"PK"):
        reason = f"is not a checkpoint: it starts with {start!r}"
        fix = "only predict takes ONNX files" if path.suffix == ".onnx" else "name another"
        raise HorseHumanError(f"{printable(path)} {reason}: {fix}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(checkpoint, dict) and verify_checksum(checkpoint):
            return checkpoint
    except Exception as error:  # A damaged archive or pickle may raise or contain anything.
        if is_out_of_memory(error):
            raise
    reason = "is damaged, or holds more than weights and plain values; nothing in it was executed"
    raise HorseHumanError(f"{printable(path)} {reason}: copy or train it again")


def strip_optimizer_state(source: Path, target: Path) -> None:
    """Copy the :data:`INFERENCE_KEYS` of a training checkpoint to a smaller one.

    If training averages the weights, ``state_dict`` already contains the average.

    Args:
        source: A checkpoint that Lightning wrote during training.
        target: The smaller checkpoint to write; may be the same file.
    """
    checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    write_checkpoint(target, {key: checkpoint[key] for key in INFERENCE_KEYS if key in checkpoint})


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint with its checksum atomically: completely or not at all.

    Args:
        path: The file to write; an existing one is replaced.
        checkpoint: Tensors and plain values. The checksum is added in place.
    """
    add_checksum(checkpoint)
    write_atomic(path, lambda file: torch.save(checkpoint, file))


def add_checksum(checkpoint: dict[str, Any]) -> None:
    """Compute a checkpoint's checksum and store it in the checkpoint's metadata, in place."""
    metadata = {k: v for k, v in checkpoint.get("horsehuman", {}).items() if k != "checksum"}
    value = checksum({**checkpoint, "horsehuman": metadata})
    checkpoint["horsehuman"] = {**metadata, "checksum": value}


def verify_checksum(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether the checksum matches; checkpoints without one pass."""
    metadata, expected = checkpoint.get("horsehuman"), dict(checkpoint)
    if not isinstance(metadata, Mapping) or "checksum" not in metadata:
        return True
    add_checksum(expected)
    return bool(metadata["checksum"] == expected["horsehuman"]["checksum"])


def checksum(value: Any, crc: int = 0) -> int:
    """Compute the CRC-32 of tensors and plain values in dicts and lists.

    Args:
        value: Tensors are covered with dtype, shape and values in row-major order, whatever their
            memory format. The order of dicts and lists matters.
        crc: CRC-32 of everything before ``value``.
    """
    if isinstance(value, Tensor):
        crc = zlib.crc32(f"{value.dtype} {tuple(value.shape)}".encode(), crc)
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return zlib.crc32(flat.numpy().data, crc)
    if isinstance(value, Mapping):
        for key, item in value.items():
            crc = checksum(item, zlib.crc32(repr(key).encode(errors="replace"), crc))
        return crc
    if isinstance(value, list | tuple):
        for item in value:
            crc = checksum(item, zlib.crc32(b",", crc))
        return crc
    return zlib.crc32(repr(value).encode(errors="replace"), crc)
