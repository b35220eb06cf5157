"""Commands and runs that are given files that mean harm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from horsehuman import HorseHumanError
from horsehuman.training.run import resume_run
from tests.commands import run
from tests.hostile import Case


def commands(folder: Path) -> Iterator[Case]:
    """What the others are about, given to the commands; and names of every kind."""
    picture = folder / "good.png"
    Image.effect_noise((40, 30), 60).convert("RGB").save(picture)
    names = ["-rf.png", "$(touch canary).png", "[bold]x.png", "a\nb.png", "\u202egnp.x"]
    names += [
        "=cmd|' C calc'!A0.png",
        "x" * 240 + ".png",
        "\udcff.png",
        "{0}%s.png",
        "\U0001f40e.png",
    ]
    named = folder / "names"
    for label in ("a", "b"):
        (named / label).mkdir(parents=True)
        for name in names:
            (named / label / name).write_bytes(picture.read_bytes())
    calls = [
        ("predict", folder / "bomb.bmp"),
        ("predict", folder / "PNG-0.png", "--format", "csv"),
        ("predict", named, "--recursive", "--model", "cnn"),
        ("predict", named, "--recursive", "--model", "cnn", "--format", "csv"),
        ("predict", picture, "--model", folder / "torch0.ckpt"),
        ("predict", picture, "--model", folder / "0.onnx"),
        ("predict", picture, "--model", folder / "upload1"),
        ("predict", picture, "--model", folder / "bomb.zip"),
        ("predict", "http://127.0.0.1:9/x.png"),
        ("predict", "/dev/zero"),
        ("explain", folder / "bomb.bmp", "--out", folder / "explained"),
        ("evaluate", "--model", "cnn", "--data", folder / "run2", "--out", folder / "r2"),
        ("evaluate", "--model", "cnn", "--data", named, "--out", folder / "named-report"),
        ("evaluate", "--model", folder / "changed3.ckpt"),
        ("compare", folder / "run0", folder / "run1"),
        ("data", "--data", folder / "run9"),
        ("data", "--data", folder / "loop", "--out", folder / "sheets"),
        ("audit", "--data", folder / "loop", "--out", folder / "audit"),
        ("export", "--model", folder / "pickle1.ckpt", "--out", folder / "x.onnx"),
        ("card", "--model", folder / "legacy2.ckpt"),
    ]
    for arguments in calls:
        yield f"horsehuman {arguments}", lambda arguments=arguments: _called(*map(str, arguments))


def _called(*arguments: str) -> None:
    code, text = run(*arguments)
    if code:
        raise HorseHumanError((text.strip().splitlines() or [""])[-1])


def few_pictures(folder: Path) -> Path:
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for number in range(6):
            Image.effect_noise((9, 9), 60).save(folder / label / f"{number}.png")
    return folder


def trainings(folder: Path, canary: Path) -> Iterator[Case]:
    """Runs of others that are to be gone on with, and options that lead elsewhere."""
    few = few_pictures(folder / "few")
    whole = {
        "seed": 0, "test": False, "ema": None, "early_stopping": None, "resume": None,
        "model": {"_target_": "horsehuman.CNNClassifier", "image_size": 32, "channels": [2]},
        "data": {"_target_": "horsehuman.HorseHumanDataModule", "source": "folder",
                 "root": str(few), "batch_size": 4, "validation": "held_out"},
        "trainer": {"max_epochs": 1, "accumulate_grad_batches": 1, "limit_train_batches": 1.0,
                    "log_every_n_steps": 1, "devices": 1},
    }  # fmt: skip
    command = {"_target_": "subprocess.Popen", "args": f"touch {canary}", "shell": True}
    through = {**command, "_target_": "horsehuman.training.resume.subprocess.Popen"}
    changes: list[dict[str, Any]] = [
        {},  # it can be gone on with
        {"model": command},
        {"model": through},
        {"data": {**through, "batch_size": 4, "validation": "held_out"}},
        {"model": {"_target_": "horsehuman.load_classifier"}},
        {"model": {"_target_": ["horsehuman.CNNClassifier"]}},
        {"data": {**command, "batch_size": 4, "validation": "held_out"}},
        {"model": {"_target_": "antigravity.x"}},
        {"model": {"_target_": "horsehuman.os.system"}},
        {"model": {}},
        {"model": {**whole["model"], "image_size": "${oc.env:HOME}"}},
        {"model": {**whole["model"], "channels": [10**9]}},
        {"data": {**whole["data"], "root": "${oc.env:HOME}"}},
        {"data": {**whole["data"], "root": "/dev/null"}},
        {"data": {**whole["data"], "root": str(folder / "loop"), "group_pattern": "("}},
        {"trainer": {**whole["trainer"], "max_epochs": 10**12, "logger": "x"}},
        {"trainer": {**whole["trainer"], "devices": 10**6}},
        {"trainer": {**whole["trainer"], "strategy": "os.system", "devices": 2}},
        {"trainer": []},
        {"seed": -1},
    ]
    for number, change in enumerate(changes):
        run_folder = folder / f"resumed{number}"
        (run_folder / "checkpoints").mkdir(parents=True)
        (run_folder / "config.yaml").write_text(json.dumps({**whole, **change}))
        yield f"run {change}", lambda run_folder=run_folder: resume_run(run_folder)


def aliases(folder: Path) -> Iterator[Case]:
    """Runs whose configs grow when they are read, or hold themselves."""
    lists = [f"a{k + 1}: &a{k + 1} [" + ", ".join([f"*a{k}"] * 9) + "]" for k in range(9)]
    texts = ["\n".join(["a0: &a0 [x]", *lists])]
    texts += ["model: &m {_target_: x, again: *m}\ndata: {}\n"]
    for number, text in enumerate(texts):
        run_folder = folder / f"aliases{number}"
        run_folder.mkdir()
        (run_folder / "config.yaml").write_text(text)
        yield f"config {text[:20]!r}", lambda run_folder=run_folder: resume_run(run_folder)
