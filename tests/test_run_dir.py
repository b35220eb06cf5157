from __future__ import annotations

import csv
from pathlib import Path

import pytest

from horsehuman.data.records import Record, write_splits
from horsehuman.errors import HorseHumanError
from horsehuman.run_dir import check_output_file, create_run_dir, link_latest, write_atomic


def test_run_dir_is_created_once(tmp_path: Path) -> None:
    create_run_dir(tmp_path / "run")
    with pytest.raises(
        HorseHumanError, match="holds a run already: run the command again, or name"
    ):
        create_run_dir(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(HorseHumanError, match=r"cannot write into .*hydra\.run\.dir"):
        create_run_dir(tmp_path / "file" / "run")


def test_latest_links_to_the_newest_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        link_latest(tmp_path / name)
        assert (tmp_path / "latest").resolve() == (tmp_path / name).resolve()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "latest"]
    (tmp_path / "sweep_c" / "0").mkdir(parents=True)
    link_latest(tmp_path / "sweep_c" / "0")
    assert (tmp_path / "latest").resolve() == (tmp_path / "sweep_c" / "0").resolve()


def test_latest_does_not_replace_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "latest").mkdir()
    (tmp_path / "run").mkdir()
    link_latest(tmp_path / "run")
    assert "latest is not updated" in caplog.text
    assert (tmp_path / "latest").is_dir()


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
        (tmp_path / "missing" / "x.csv", "there is no folder"),
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
