"""Trained classifiers from files: safe, offline, with errors that say what the file is."""

from __future__ import annotations

import importlib
import inspect
import json
import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from horsehuman.errors import HorseHumanError, closest, first_line, printable
from horsehuman.models.base import Network, check_origin
from horsehuman.run_dir import write_atomic
from horsehuman.runtime import BACKBONE_FILE, BUNDLED, asset

#: What a slim checkpoint keeps of Lightning's: all that :func:`load_classifier` and
#: ``load_from_checkpoint`` need, and when it was.
INFERENCE_KEYS = (
    "pytorch-lightning_version",
    "epoch",
    "global_step",
    "state_dict",
    "hparams_name",
    "hyper_parameters",
    "horsehuman",
)

#: Of a folder for a model hub.
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"

# Modules that are trained, and where their networks are at home.
_HOMES = {
    "CNNClassifier": ("horsehuman.models.cnn", "CNN"),
    "InceptionClassifier": ("horsehuman.models.inception", "Inception"),
}

_NETWORK, _BACKBONE = "network.", "backbone."

#: Where a checkpoint says what it holds, and under which name its checksum stands there.
ORIGIN, CHECKSUM = "horsehuman", "checksum"


def load_classifier(source: str | Path = "inception") -> Network:
    """Load a trained classifier with all that belongs to it.

    No network is asked, and no code in the file is executed. ``inception`` alone reads a second
    file, the trunk in the package, so that no weight is stored twice.

    Args:
        source: ``inception`` or ``cnn``, which are in the package; a run's folder (its
            ``final.ckpt`` is meant); a checkpoint file; or what ``horsehuman card --folder`` made.

    Returns:
        The network with its answers, on the CPU, in eval mode.

    Raises:
        HorseHumanError: There is no such name, run or file, or it is not a classifier of ours.
    """
    path = find_checkpoint(source)
    checkpoint = read_classifier_file(path)
    try:
        home, name = _HOMES[check_origin(checkpoint)]
        kind: type[Network] = getattr(importlib.import_module(home), name)
        network = _rebuild(kind, checkpoint["hyper_parameters"], checkpoint["state_dict"])
    except HorseHumanError as error:
        raise HorseHumanError(f"{printable(path)}: {error}") from error
    except Exception as error:  # a damaged or foreign file may hold anything
        reason = first_line(error)
        raise HorseHumanError(
            f"{printable(path)} does not hold what its classifier needs ({reason}): train it again"
        ) from error
    return network.eval()


def _rebuild(
    kind: type[Network], settings: Mapping[str, Any], state: Mapping[str, Tensor]
) -> Network:
    """Build a network from what its module saved; what is about training is left aside."""
    known = inspect.signature(kind).parameters
    given = {name: value for name, value in settings.items() if name in known}
    tensors = {key.removeprefix(_NETWORK): tensor for key, tensor in state.items()}
    whole = any(key.startswith(_BACKBONE) for key in tensors)
    has_trunk = "weights" in known
    if has_trunk:  # whatever the file says: nothing else is read
        given["weights"] = "checkpoint" if whole else "box"
    else:
        with torch.device("meta"):  # nothing is allocated for what does not fit
            shapes = {key: tensor.shape for key, tensor in kind(**given).state_dict().items()}
        if shapes != {key: tensor.shape for key, tensor in tensors.items()}:
            raise HorseHumanError("its weights do not fit its settings: train it again")
    network = kind(**given)
    if has_trunk and not whole:
        own = network.state_dict()
        tensors |= {key: own[key] for key in own if key.startswith(_BACKBONE)}
    network.load_state_dict(tensors)
    return network


def find_checkpoint(source: str | Path) -> Path:
    """The file that a name, a run or a file name stands for.

    Raises:
        HorseHumanError: There is none.
    """
    if source in BUNDLED:
        return asset(f"{source}.ckpt")
    path = Path(source).expanduser()
    if not path.is_dir():
        if not path.is_file():
            near = closest(str(source), BUNDLED)
            raise HorseHumanError(
                f"--model {printable(path)}: there is no such run or file{near}: name a run, a "
                f"checkpoint, or one in the box ({' | '.join(BUNDLED)})"
            )
        return path
    if (path / WEIGHTS_FILE).is_file():
        return path / WEIGHTS_FILE
    final = path / "checkpoints" / "final.ckpt"
    if final.is_file():
        return final
    last = final.with_name("last.ckpt")
    if last.is_file():
        raise HorseHumanError(
            f"{printable(path)} has not finished: name its {printable(last)} instead"
        )
    raise HorseHumanError(f"{printable(path)} is no run: it has no checkpoints/final.ckpt")


def weight_files(source: str | Path) -> list[Path]:
    """The files that a classifier is read from: its checkpoint, and the trunk that is not in it."""
    own = find_checkpoint(source)
    return [own, asset(BACKBONE_FILE)] if source == "inception" else [own]


def read_classifier_file(path: Path) -> dict[str, Any]:
    """Read a checkpoint, or safetensors with the config beside them.

    Raises:
        HorseHumanError: See :func:`read_checkpoint`.
    """
    if path.suffix != ".safetensors":
        return read_checkpoint(path)
    try:
        config = json.loads((path.parent / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(path)
        whole = {
            "hyper_parameters": config["hyper_parameters"],
            "horsehuman": config["horsehuman"],
            "state_dict": dict(sorted(tensors.items())),
        }
        if not verify_checksum(whole):
            raise ValueError("its checksum is another")
        return whole
    except OSError as error:
        raise HorseHumanError(
            f"cannot read {printable(error.filename or path)}: {error.strerror or error}"
        ) from error
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise HorseHumanError(
            f"{printable(path)}, or {CONFIG_FILE} beside it, is damaged: copy both again"
        ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a file that ``torch.save`` wrote, executing nothing.

    Raises:
        HorseHumanError: It is something else, is cut off, or holds code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise HorseHumanError(
            f"cannot read {printable(path)}: {error.strerror or error}"
        ) from error
    if not start.startswith(b"PK"):
        raise HorseHumanError(f"{printable(path)} is no checkpoint: {_kind(start)}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise HorseHumanError(
            f"{printable(path)} holds more than weights and plain values; nothing in it was executed"
        ) from error
    except Exception as error:  # so may a damaged archive or pickle
        raise HorseHumanError(
            f"{printable(path)} is cut off or damaged: copy or train it again"
        ) from error
    if not isinstance(checkpoint, dict):
        raise HorseHumanError(f"{printable(path)}: this checkpoint was not written by horsehuman")
    if not verify_checksum(checkpoint):
        raise HorseHumanError(f"{printable(path)} has been damaged: copy or train it again")
    return checkpoint


def _kind(start: bytes) -> str:
    text = start.lstrip().lower()
    if not start:
        return "it is empty"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page; the download went wrong"
    if start.startswith(b"\x80"):
        return "it is a bare pickle, which is not executed"
    return "it is another kind of file"


def checksum(value: Any, crc: int = 0) -> int:
    """CRC-32 of tensors and plain values in dicts and lists, in their order."""
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


def add_checksum(checkpoint: dict[str, Any]) -> None:
    """Put its checksum into a checkpoint."""
    origin = {k: v for k, v in checkpoint.get(ORIGIN, {}).items() if k != CHECKSUM}
    checkpoint[ORIGIN] = {**origin, CHECKSUM: checksum({**checkpoint, ORIGIN: origin})}


def verify_checksum(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is as it was sealed; one that was not cannot be told."""
    origin = checkpoint.get(ORIGIN)
    if not isinstance(origin, Mapping) or CHECKSUM not in origin:
        return True
    bare = {k: v for k, v in origin.items() if k != CHECKSUM}
    return bool(checksum({**checkpoint, ORIGIN: bare}) == origin[CHECKSUM])


def strip_optimizer_state(source: Path, target: Path) -> None:
    """Keep of a full checkpoint what inference needs.

    Where weights are averaged, the full checkpoint's ``state_dict`` is the average already.

    Args:
        source: A checkpoint that Lightning wrote during training.
        target: Where the slim one goes; may be the same file.
    """
    full = torch.load(source, map_location="cpu", weights_only=True)
    kept = {key: full[key] for key in INFERENCE_KEYS if key in full}
    write_checkpoint(target, kept)


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint with its checksum, whole or not at all."""
    add_checksum(checkpoint)
    write_atomic(path, lambda file: torch.save(checkpoint, file))
