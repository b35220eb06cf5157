"""Runs of two processes on this machine, connected over loopback."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
import train as script

from horsehuman import HorseHumanDataModule, load_classifier
from horsehuman.data import datasets
from horsehuman.data.records import SUBJECT_PATTERN
from horsehuman.distributed import (
    all_gather,
    broadcast,
    gather_sharded,
    process_group,
    rank,
    sync_buffers,
)
from horsehuman.models.feature_cache import FeatureCache
from horsehuman.models.inception import Inception
from tests.commands import train_script_error
from tests.conftest import small_cnn, small_data
from tests.training.test_resume import (
    CLOCK,
    INCEPTION,
    check_alike,
    printed_by,
    scalars,
    start,
)

TWO = ["trainer=ddp", "trainer.max_epochs=3"]

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start two processes on this machine, as docs/use.md does."""
    command = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "PYTHONPATH": "scripts"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def images_of_rank(tree: Path) -> dict[str, list[list[int]]]:
    """Return the indices of the images in each batch of this rank, by loader."""
    data = HorseHumanDataModule(
        image_size=8, source="folder", root=str(tree), group_pattern=SUBJECT_PATTERN, batch_size=4
    )
    data.setup()
    data._labels = torch.arange(
        len(data.records), dtype=torch.float32
    )  # so that they can be distinguished
    loaders = {
        "train": data.train_dataloader(),
        "validation": data.val_dataloader(),
        "test": data.test_dataloader(),
    }
    return {
        name: [labels.int().tolist() for _, labels in loader] for name, loader in loaders.items()
    }


def check_rank(tree: Path, out: Path) -> None:
    """Check the collectives on this rank, and write the images of all ranks to a file."""
    with process_group():
        assert broadcast(rank()) == 0
        assert all_gather(rank()) == [0, 1]
        everything = torch.arange(15).reshape(5, 3)
        assert torch.equal(gather_sharded(everything[rank() :: 2]), everything)
        norm = torch.nn.BatchNorm1d(2)
        norm.running_mean.fill_(rank())
        sync_buffers(norm)
        assert norm.running_mean.tolist() == [0, 0]
        seen = all_gather(images_of_rank(tree))
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(seen))


def listening_addresses() -> set[str]:
    """Return the addresses at which this process listens, from the tables of Linux."""
    links = [path for path in Path("/proc/self/fd").iterdir() if path.exists()]
    descriptors = [str(path.readlink()) for path in links]
    rows = [
        line.split()
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]
    ]
    return {row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in descriptors}


def print_listening_addresses() -> None:
    """Print the addresses at which a rank listens, on a machine that is named after another one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:
        try:
            route.connect(("203.0.113.1", 9))  # sends nothing
        except OSError:
            return
        if ctypes.CDLL(None).unshare(0x04000000):  # CLONE_NEWUTS: a name of its own
            return
        socket.sethostname(route.getsockname()[0])
    with process_group():
        print("listens at", *listening_addresses())


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() > 0, reason="root renames a machine")
def test_ranks_of_one_machine_listen_on_loopback_only() -> None:
    process = torchrun(Path(__file__).parents[2], "-m", __name__)
    text = printed_by(process)
    assert process.returncode == 0, text
    lines = [line.split()[2:] for line in text.splitlines() if line.startswith("listens at")]
    if not lines:
        pytest.skip("the machine has no network, or may not be renamed")
    assert len(lines) == 2
    for addresses in lines:
        assert addresses
        assert all(address.startswith("0100007F:") for address in addresses)


@pytest.mark.slow
def test_two_processes_share_the_pictures(tree: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    process = torchrun(root, "-m", __name__, str(tree), str(tmp_path / "images.json"))
    text = printed_by(process)
    assert process.returncode == 0, text
    first, second = json.loads((tmp_path / "images.json").read_text())
    alone = images_of_rank(tree)
    for split in ("validation", "test"):
        both = Counter(chain(*first[split], *second[split]))
        assert both == Counter(chain(*alone[split]))
        assert set(both.values()) == {1}
    for a, b, batch in zip(first["train"], second["train"], alone["train"], strict=True):
        assert len(a) == len(b)
        assert sorted(a + b) == sorted(batch)


def test_images_that_cannot_be_shared_evenly_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "world_size", lambda: 4)
    seen: Counter[int] = Counter()
    for number in range(4):
        monkeypatch.setattr(datasets, "rank", lambda number=number: number)
        sampler = datasets.EpochSampler(10, 12, 0, lambda: 0)
        order = list(sampler)
        assert len(order) == len(sampler) == 3
        seen.update(order)
    assert sorted(seen) == list(range(10))
    assert sum(seen.values()) - 10 == 2  # fewer than there are processes
    for number in range(4):
        monkeypatch.setattr(datasets, "rank", lambda number=number: number)
        assert len(list(datasets.EpochSampler(15, 8, 0, lambda: 0))) == 2  # one complete batch


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["trainer=ddp", "seed=0,1", "-m"], 2, "-m does not go with trainer=ddp"),
        (["trainer=ddp"], 1, "torchrun --standalone --nproc-per-node 2 "),
        (["trainer=ddp"], 1, "scripts/train.py model=cnn trainer=ddp"),
        (
            ["trainer=ddp", "trainer.num_nodes=2"],
            1,
            "torchrun --nnodes 2 --node-rank N --master-addr HOST",
        ),
        (["trainer.devices=2"], 1, "add trainer=ddp"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str],
    code: int,
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exit_code, error = train_script_error(monkeypatch, capsys, tmp_path, "model=cnn", *arguments)
    assert exit_code == code
    assert text in error
    assert not list(tmp_path.rglob("outputs/*/*"))


@pytest.mark.slow
def test_an_error_of_all_processes_is_one_line(tmp_path: Path) -> None:
    process = torchrun(tmp_path, script.__file__, "model=cnn", "trainer=ddp", "data.batch_size=33")
    lines = printed_by(process).splitlines()
    assert process.returncode == 1
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1
    assert "a multiple of 2, such as 34" in errors[0]
    assert not list(tmp_path.rglob("outputs/*/*"))


def on_two_machines(
    folders: list[Path], commands: list[list[str]], environment: dict[str, str]
) -> tuple[list[int], list[str]]:
    """Run torchrun in two folders, as on two machines, and return exit codes and outputs."""
    nodes = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1"]
    nodes.append(f"--master-port={free_port()}")
    options = ["trainer.devices=1", "trainer.num_nodes=2"]
    machines = [
        subprocess.Popen(
            [*nodes, f"--node-rank={number}", *commands[number], *options],
            cwd=folders[number],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    printed = [machine.communicate(timeout=300)[0] for machine in machines]
    return [machine.returncode for machine in machines], printed


@pytest.mark.slow
def test_machines_that_do_not_share_the_folder_end_before_the_first_epoch(
    tree: Path, tmp_path: Path
) -> None:
    folders = [tmp_path, tmp_path / "other"]
    folders[1].mkdir()
    commands = [[script.__file__, *small_cnn(tree, *TWO), "hydra.run.dir=run"] for _ in range(2)]
    codes, printed = on_two_machines(folders, commands, {**os.environ, "PYTHONPATH": "scripts"})
    assert codes == [1, 1]
    assert all("error: run: machines need the same options and folder" in x for x in printed), (
        printed
    )
    assert "epoch " not in printed[0]


@pytest.mark.slow
def test_two_processes_train_as_one_does(tree: Path, tmp_path: Path) -> None:
    options = [*INCEPTION, *small_data(tree), *TWO, "data.split_seed=1"]
    one = start(tmp_path, *options, "trainer=default", "hydra.run.dir=one")
    printed_by(one)
    environment = {**os.environ, "HORSEHUMAN_CACHE": str(tmp_path / "cache")}
    root = Path(__file__).parents[2]
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{root / 'scripts'}"
    command = ["-m", __name__, "train", *options]
    codes, printed = on_two_machines([tmp_path, tmp_path], [command, command], environment)
    assert codes == [0, 0], printed
    assert "epoch" not in printed[1]  # torchrun itself may print
    runs = sorted(
        p.parent for p in (tmp_path / "outputs").rglob("metrics.json") if "latest" not in p.parts
    )
    assert len(runs) == 1
    assert len(list(runs[0].parent.iterdir())) == 2  # the run and latest
    assert [path.name for path in runs[0].glob("skipped*")] == []
    check_same_run(tmp_path / "one", runs[0])
    counts = [int(path.read_text()) for path in tmp_path.glob("embedded-*")]
    assert len(counts) == 2
    assert sum(counts) == 28  # each picture by one of the processes


def check_same_run(one: Path, two: Path) -> None:
    """Check that two runs are equal up to the rounding of sums in another order."""
    first, second = (json.loads((run / "metrics.json").read_text()) for run in (one, two))
    assert first["test/pictures"] == second["test/pictures"] == 4
    assert second == pytest.approx(first | {name: second[name] for name in CLOCK}, abs=1e-4)
    weights = [load_classifier(run).state_dict() for run in (one, two)]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-4), name
    logs = scalars(one), scalars(two)
    assert logs[0].keys() == logs[1].keys()
    for tag in logs[0]:
        assert [step for step, _ in logs[0][tag]] == [step for step, _ in logs[1][tag]]


def children(process: subprocess.Popen[str]) -> list[int]:
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not path.is_file():
        pytest.skip("/proc does not list the children of a process")
    return [int(number) for number in path.read_text().split()]


@pytest.mark.slow
def test_a_killed_process_ends_the_run_which_is_resumed_to_the_bit(
    tree: Path, tmp_path: Path
) -> None:
    options = [script.__file__, *small_cnn(tree, *TWO, "trainer.max_epochs=20")]
    uninterrupted = torchrun(tmp_path, *options, "hydra.run.dir=uninterrupted")
    text = printed_by(uninterrupted)
    assert uninterrupted.returncode == 0, text
    process = torchrun(tmp_path, *options, "hydra.run.dir=run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    while not last.is_file() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(children(process)[1], signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert load_classifier(last)
    (error,) = [line for line in printed.splitlines() if "go on with" in line]
    assert error.endswith(
        "go on with torchrun --standalone --nproc-per-node 2 scripts/train.py resume=run"
    )
    resumed = torchrun(tmp_path, script.__file__, "resume=run")
    text = printed_by(resumed)
    assert resumed.returncode == 0, text
    check_alike(tmp_path / "uninterrupted", tmp_path / "run")
    assert not (tmp_path / "outputs").exists()


def train_and_count(options: list[str]) -> int:
    """Run scripts/train.py, and write the number of pictures whose features were computed."""
    count = 0

    def feature_cache(network: Inception) -> FeatureCache:
        cache = original(network)
        embed = cache.embed

        def counted(images: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += len(images)
            return embed(images)

        cache.embed = counted
        return cache

    original, Inception.feature_cache = Inception.feature_cache, feature_cache
    sys.argv[1:] = options
    code = script.run()
    Path(f"embedded-{os.environ['RANK']}").write_text(str(count))
    return code


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        sys.exit(train_and_count(sys.argv[2:]))
    if len(sys.argv) > 1:
        check_rank(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        print_listening_addresses()
