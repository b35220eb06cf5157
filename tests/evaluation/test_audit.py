from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from horsehuman.data.image_sets import ImageSet, find_image_set
from horsehuman.data.images import read_picture
from horsehuman.data.records import SUBJECT_PATTERN, Record
from horsehuman.evaluation.findings import Finding, audit, check_files, check_labels
from horsehuman.evaluation.near_duplicates import (
    cluster_near_duplicates,
    read_all_stats,
    read_stats,
)
from tests import commands

command = partial(commands.run, "audit")


def said(found: list[Finding], text: str) -> Finding:
    fitting = [finding for finding in found if text in finding.message]
    assert len(fitting) == 1, [finding.message for finding in found]
    return fitting[0]


def test_what_is_wrong_is_found(tree: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tree, tmp_path / "set")
    train = root / "train"
    first = train / "horses" / "horse01-0.webp"
    shutil.copy(first, train / "horses" / "copy.webp")
    shutil.copy(train / "horses" / "horse02-0.webp", train / "humans" / "torn.webp")
    shutil.copy(train / "humans" / "human01-00.webp", root / "test" / "humans" / "leak.webp")
    (train / "humans" / "broken.png").write_bytes(b"no picture")
    Image.fromarray(read_picture(first)).save(train / "horses" / "wrong.png", "JPEG", quality=90)
    Image.new("RGB", (20, 20), "red").save(train / "horses" / "small.png")
    found = audit(find_image_set(str(root)))
    assert said(found, "cannot be read").severity == "error"
    assert said(found, "not what their names say").pictures[0][0].path.name == "wrong.png"
    assert said(found, "at once, as copies").severity == "error"
    assert said(found, "in two splits, as copies").severity == "error"
    assert said(found, "more than once").severity == "warning"
    assert said(found, "smaller than 64").pictures[0][0].path.name == "small.png"
    assert said(found, "on the other side of a split").severity == "error"
    assert said(found, "splits differ in white edges").severity == "warning"
    order = [finding.severity for finding in found]
    assert order == sorted(order, key=["error", "warning", "note"].index)


def test_report_and_exit_codes(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(tree), "--group-pattern", SUBJECT_PATTERN]
    code, printed = command(*arguments, "--out", str(out), "--fail-on", "error")
    assert code == 0, printed
    assert command(*arguments, "--out", str(tmp_path / "w"), "--fail-on", "warning")[0] == 1
    found = json.loads((out / "audit.json").read_text())["findings"]
    assert any("white edges" in finding["what"] for finding in found)
    page = (out / "audit.html").read_text()
    assert page.count("<section") == len(found)
    assert "http" not in page.replace("http-equiv", "")
    code, printed = command(*arguments, "--out", str(out))
    assert (code, "holds a report already" in printed) == (1, True)
    assert "use never | error" in command("--fail-on", "always")[1]
    assert "nowhere is no folder" in command("--data", "nowhere")[1]


@pytest.fixture(scope="module")
def box() -> ImageSet:
    return find_image_set("box")


def test_a_jpeg_that_holds_a_second_picture_is_what_its_name_says(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    pictures = [Image.effect_noise((80, 80), 60).convert("RGB") for _ in range(2)]
    pictures[0].save(path, "MPO", save_all=True, append_images=pictures[1:])
    with Image.open(path) as image:
        assert image.format == "MPO"
    look, _ = read_stats(Record(path, 0, "a", "train"))
    assert look.kind == "JPEG"
    assert check_files([look]) == []


@pytest.mark.slow
def test_frames_of_a_figure_are_found_to_belong_together(box: ImageSet) -> None:
    looks, features, _ = read_all_stats(box.records)
    figure = np.array([f"{record.split}/{record.group}" for record in box.records])
    cosine = features @ features.T
    cosine.fill_diagonal_(-1)
    same = figure[cosine.argmax(1).numpy()] == figure
    names = np.unique(figure)
    mostly = sum(same[figure == name].mean() >= 0.5 for name in names)
    linked = Counter(cluster_near_duplicates(looks, features))
    print(f"{mostly} of {len(names)} figures: most frames have their nearest neighbour in it")
    print(f"{sum(n for n in linked.values() if n > 1)} frames have near-duplicates")
    assert len(names) == 78
    assert mostly >= 50
    found = audit(dataclasses.replace(box, grouped=False))
    missing = said(found, "no groups are named")
    assert missing.severity == "error"
    assert SUBJECT_PATTERN in missing.remedy


@pytest.mark.slow
def test_planted_wrong_labels_are_doubted(box: ImageSet) -> None:
    records = box.split("train").records
    looks, features, _ = read_all_stats(records)
    groups = [look.record.group for look in looks]
    planted, found, others, draws = len(records) // 50, 0, 0, 8
    for seed in range(draws):
        chosen = np.random.default_rng(seed).choice(len(records), planted, False)
        wrong = list(looks)
        for index in chosen:
            record = dataclasses.replace(records[index], label=1 - records[index].label)
            wrong[index] = dataclasses.replace(looks[index], record=record)
        (finding,) = check_labels(wrong, features, groups, box.class_names)
        doubted = {record.path for record in finding.pictures[0]}
        right = doubted & {records[index].path for index in chosen}
        found, others = found + len(right), others + len(doubted - right)
    print(f"{found / draws:.1f} of {planted} planted and {others / draws:.1f} others, on average")
    assert found / draws >= 0.9 * planted
    assert others / draws <= 0.1 * planted
