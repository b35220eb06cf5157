from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from horsehuman.data.records import Record, write_splits
from horsehuman.errors import HorseHumanError
from horsehuman.run_dir import (
    ReportOptions,
    check_output_file,
    create_run_dir,
    link_latest,
    write_atomic,
)


def test_run_dir_is_created_once(tmp_path: Path) -> None:
    create_run_dir(tmp_path / "run")
    with pytest.raises(HorseHumanError, match=r"holds a run already: name another folder with"):
        create_run_dir(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(HorseHumanError, match=r"cannot write into .*hydra\.run\.dir"):
        create_run_dir(tmp_path / "file" / "run")


def test_latest_links_to_the_newest_run(tmp_path: Path) -> None:
    model = tmp_path / "outputs" / "cnn"
    for name in ("a", "b"):
        (model / name).mkdir(parents=True)
        link_latest(model / name)
        assert (model / "latest").resolve() == (model / name).resolve()
    assert sorted(path.name for path in model.iterdir()) == ["a", "b", "latest"]
    (model / "sweep_c" / "0").mkdir(parents=True)
    link_latest(model / "sweep_c" / "0")
    assert (model / "latest").resolve() == (model / "sweep_c" / "0").resolve()


def test_a_run_elsewhere_leaves_no_link(tmp_path: Path) -> None:
    (tmp_path / "mine" / "run").mkdir(parents=True)
    link_latest(tmp_path / "mine" / "run")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["run"]


def test_latest_does_not_replace_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "outputs" / "cnn" / "latest").mkdir(parents=True)
    (tmp_path / "run").mkdir(parents=True)
    link_latest(tmp_path / "outputs" / "cnn" / "run")
    assert "latest is not updated" in caplog.text
    assert (tmp_path / "outputs" / "cnn" / "latest").is_dir()


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, lambda file: file.write(b"old"))

    def fail(file: object) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_splits_csv_keeps_unusual_names(tmp_path: Path) -> None:
    names = ["a,b.png", 'quo"te.png', "new\nline.png", "馬.png", "\udcff.png"]
    records = [Record(tmp_path / "h" / name, 1, name, "train") for name in names]
    write_splits(tmp_path, tmp_path, records, ["horses", "humans"])
    with (tmp_path / "splits.csv").open(newline="", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [row["picture"] for row in rows] == [f"h/{name}" for name in names]
    assert rows[0] == {
        "picture": "h/a,b.png",
        "label": "humans",
        "group": "a,b.png",
        "split": "train",
    }


@pytest.mark.parametrize("force", [False, True])
def test_invalid_output_files_are_refused(tmp_path: Path, force: bool) -> None:
    for path, reason in (
        (tmp_path, "is a folder or a device"),
        (Path("/dev/null"), "is a folder or a device"),
        (tmp_path / "missing" / "x.csv", "the folder does not exist"),
    ):
        with pytest.raises(HorseHumanError, match=reason):
            check_output_file(path, force=force)


def test_existing_output_file_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    check_output_file(path, force=False)
    path.touch()
    check_output_file(path, force=True)
    with pytest.raises(HorseHumanError, match="exists already: name another file, or add --force"):
        check_output_file(path, force=False)


def test_report_folders_are_not_overwritten(tmp_path: Path) -> None:
    folder = ReportOptions(tmp_path / "report").create_dir(Path("unused"), ["a.json"])
    (folder / "a.json").touch()
    with pytest.raises(HorseHumanError, match=r"report holds a report already: add --force, or"):
        ReportOptions(folder).create_dir(Path("unused"), ["a.json"])
    assert ReportOptions(folder, force=True).create_dir(Path("unused"), ["a.json"]) == folder
    with pytest.raises(
        HorseHumanError, match=r"cannot write into .*a\.json: .* name another folder"
    ):
        ReportOptions(folder / "a.json").create_dir(Path("unused"), ["b.json"])
    (folder / "splits.csv").touch()
    with pytest.raises(HorseHumanError, match="is a run's folder: name another one"):
        ReportOptions(folder, force=True).create_dir(Path("unused"), ["a.json"])


def test_a_file_is_synced_to_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced, sync = tmp_path / "file", [], os.fsync

    def recorded(descriptor: int) -> None:
        sync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", recorded)
    write_atomic(path, lambda file: file.write(b"content"))
    assert synced == [(path.stat().st_ino, len(b"content"), False)]
