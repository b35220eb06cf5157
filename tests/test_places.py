from __future__ import annotations

from pathlib import Path

import pytest

from horsehuman import HorseHumanError
from horsehuman.run_dir import check_output_file


@pytest.mark.parametrize("force", [False, True])
def test_what_cannot_be_a_file_is_refused_before_any_work(tmp_path: Path, force: bool) -> None:
    for path, why in (
        (tmp_path, "is a folder or a device"),
        (Path("/dev/null"), "is a folder or a device"),
        (tmp_path / "missing" / "x.csv", "there is no folder"),
    ):
        with pytest.raises(HorseHumanError, match=why):
            check_output_file(path, force=force)


def test_a_file_is_replaced_when_that_is_wished(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    check_output_file(path, force=False)
    path.touch()
    check_output_file(path, force=True)
    with pytest.raises(HorseHumanError, match="is there already: name another, or add --force"):
        check_output_file(path, force=False)
