from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from horsehuman.data.image_sets import ImageSet, find_image_set
from horsehuman.data.images import read_picture
from horsehuman.data.records import SUBJECT_PATTERN, Record
from horsehuman.evaluation.findings import (
    Finding,
    audit,
    check_background,
    check_files,
    check_labels,
    cluster_near_duplicates,
    read_all_stats,
    read_stats,
)
from tests import commands

command = partial(commands.run, "audit")


def finding_with(findings: list[Finding], text: str) -> Finding:
    matches = [finding for finding in findings if text in finding.message]
    assert len(matches) == 1, [finding.message for finding in findings]
    return matches[0]


def test_every_problem_is_found(tree: Path, tmp_path: Path) -> None:
    root = shutil.copytree(tree, tmp_path / "set")
    train = root / "train"
    first = train / "horses" / "horse01-0.webp"
    shutil.copy(first, train / "horses" / "copy.webp")
    shutil.copy(train / "horses" / "horse02-0.webp", train / "humans" / "torn.webp")
    shutil.copy(train / "humans" / "human01-00.webp", root / "test" / "humans" / "leak.webp")
    (train / "humans" / "broken.png").write_bytes(b"no picture")
    Image.fromarray(read_picture(first)).save(train / "horses" / "wrong.png", "JPEG", quality=90)
    Image.new("RGB", (20, 20), "red").save(train / "horses" / "small.png")
    findings = audit(find_image_set(str(root)))
    assert finding_with(findings, "cannot be read").severity == "error"
    mismatch = finding_with(
        findings, "have a suffix that does not match their format (wrong.png is"
    )
    assert mismatch.rows[0][0].path.name == "wrong.png"
    assert (
        finding_with(findings, "have copies in both classes, horses and humans").severity == "error"
    )
    assert finding_with(findings, "have copies in more than one split").severity == "error"
    assert finding_with(findings, "have copies in the same class and split").severity == "warning"
    small = finding_with(findings, "have a side of less than 64 pixels")
    assert small.rows[0][0].path.name == "small.png"
    assert finding_with(findings, "have near-duplicates in another split").severity == "error"
    assert finding_with(findings, "splits differ in white edges").severity == "warning"
    order = [finding.severity for finding in findings]
    assert order == sorted(order, key=["error", "warning", "note"].index)


def test_report_and_exit_codes(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--data", str(tree), "--group-pattern", SUBJECT_PATTERN]
    code, printed = command(*arguments, "--out", str(out), "--fail-on", "error")
    assert code == 0, printed
    assert command(*arguments, "--out", str(tmp_path / "w"), "--fail-on", "warning")[0] == 1
    findings = json.loads((out / "audit.json").read_text())["findings"]
    assert any("white edges" in finding["what"] for finding in findings)
    page = (out / "audit.html").read_text()
    assert page.count("<section") == len(findings)
    assert "http" not in page.replace("http-equiv", "")
    code, printed = command(*arguments, "--out", str(out))
    assert (code, "holds a report already" in printed) == (1, True)
    assert "use never | error" in command("--fail-on", "always")[1]
    assert "nowhere is not a folder" in command("--data", "nowhere")[1]


@pytest.fixture(scope="module")
def bundled() -> ImageSet:
    return find_image_set("box")


def test_a_jpeg_with_a_second_image_has_a_matching_suffix(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    images = [Image.effect_noise((80, 80), 60).convert("RGB") for _ in range(2)]
    images[0].save(path, "MPO", save_all=True, append_images=images[1:])
    with Image.open(path) as image:
        assert image.format == "MPO"
    stats, _ = read_stats(Record(path, 0, "a", "train"))
    assert stats.file_format == "JPEG"
    assert list(check_files([stats])) == []


def test_clusters_are_chains_of_near_duplicates() -> None:
    count = 600  # more than are compared at a time
    generator = np.random.default_rng(0)
    hashes = generator.random((count, 64)) > 0.5
    for follower, leader in ((300, 2), (599, 300), (7, 599)):  # each 6 bits further
        hashes[follower] = hashes[leader]
        hashes[follower, 6 * (follower % 7) : 6 * (follower % 7) + 6] ^= True
    features = torch.eye(count)
    features[[11, 570]] = features[10].clone()
    clusters = cluster_near_duplicates(features, torch.from_numpy(hashes))
    together = [index for index in range(count) if clusters.count(clusters[index]) > 1]
    assert together == [2, 7, 10, 11, 300, 570, 599]
    assert len({clusters[index] for index in (2, 7, 300, 599)}) == 1
    assert len({clusters[index] for index in (10, 11, 570)}) == 1


@pytest.mark.parametrize("readable", [0, 1])
def test_hardly_any_readable_image(readable: int, tree: Path, tmp_path: Path) -> None:
    for label in ("horses", "humans"):
        (tmp_path / "set" / label).mkdir(parents=True)
        (tmp_path / "set" / label / "broken.png").write_bytes(b"no picture")
    if readable:
        shutil.copy(tree / "train" / "horses" / "horse01-0.webp", tmp_path / "set" / "horses")
    findings = audit(find_image_set(str(tmp_path / "set")))
    assert finding_with(findings, "2 files cannot be read").severity == "error"
    assert (len(findings) > 1) == bool(readable)


def test_backgrounds_are_compared_by_class_name(tree: Path) -> None:
    (image,), _, _ = read_all_stats(find_image_set(str(tree)).records[:1])
    white = dataclasses.replace(image, label=1, white_edge=1.0)
    black = dataclasses.replace(image, label=0, white_edge=0.0)
    (finding,) = check_background([white, black, black], ("horses", "humans"))
    assert finding.message == "classes differ in white edges: humans 1.00, horses 0.00"


def test_json_and_no_page(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["audit", "--data", str(tree), "--out", str(out), "--no-plot"]
    result = commands.CliRunner().invoke(commands.app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads((out / "audit.json").read_text())
    assert [path.name for path in out.iterdir()] == ["audit.json"]
    (out / "audit.html").write_text("of an earlier audit")
    code, printed = command(*arguments[1:], "--force")
    assert code == 0, printed
    assert "audit.json" in printed
    assert [path.name for path in out.iterdir()] == ["audit.json"]


@pytest.mark.slow
def test_frames_of_a_subject_are_nearest_neighbours(bundled: ImageSet) -> None:
    few = bundled.split("test")
    _, features, _ = read_all_stats(few.records)
    subjects = np.array([record.group for record in few.records])
    cosines = features @ features.T
    cosines.fill_diagonal_(-1)
    same = subjects[cosines.argmax(1).numpy()] == subjects
    assert same.mean() > 0.9
    assert len(cluster_near_duplicates(features)) == len(few.records)
    findings = audit(dataclasses.replace(few, grouped=False))
    missing = finding_with(findings, "no groups are defined")
    assert missing.severity == "error"
    assert SUBJECT_PATTERN in missing.remedy


@pytest.mark.slow
def test_flipped_labels_are_suspicious(bundled: ImageSet) -> None:
    records = bundled.split("train").records
    stats, features, _ = read_all_stats(records)
    groups = [image.group for image in stats]
    flipped, hits, false_alarms, draws = len(records) // 50, 0, 0, 8
    for seed in range(draws):
        chosen = np.random.default_rng(seed).choice(len(records), flipped, False)
        changed = list(stats)
        for index in chosen:
            changed[index] = dataclasses.replace(stats[index], label=1 - stats[index].label)
        (finding,) = check_labels(changed, features, groups, bundled.class_names)
        suspicious = {record.path for record in finding.rows[0]}
        right = suspicious & {records[index].path for index in chosen}
        hits, false_alarms = hits + len(right), false_alarms + len(suspicious - right)
    print(
        f"found {hits / draws:.1f} of {flipped} flipped labels, {false_alarms / draws:.1f} others"
    )
    assert hits / draws >= 0.9 * flipped
    assert false_alarms / draws <= 0.1 * flipped
