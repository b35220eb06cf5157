from __future__ import annotations

import numpy as np
import pytest
import torch

cutouts = pytest.importorskip("cutouts", exc_type=ImportError)


def test_subject_probabilities_are_learned_from_rough_masks() -> None:
    torch.manual_seed(0)
    maps = torch.randn(20, 6, 5, 5)
    subject = torch.zeros(20, 5, 5, dtype=torch.bool)
    subject[:, 1:4, 2:4] = True
    maps[:, 0] += 20 * subject
    masks = [np.kron(s.numpy(), np.ones((30, 30))).astype(np.uint8) for s in subject]
    masks[0][:] = 0  # the other masks make up for one that failed
    probabilities = cutouts.subject_probabilities(maps, masks)
    assert (probabilities[0] > 0.5).tolist() == subject[0].tolist()
    assert cutouts.overlap(masks[1], probabilities[1]) > 0.9
    assert cutouts.overlap(masks[0], probabilities[0]) < 0.1


def test_grab_cut_keeps_a_subject_of_another_colour_and_drops_specks() -> None:
    image = np.full((150, 150, 3), 40, np.uint8)
    image[40:110, 50:100] = 200
    image[5:7, 5:7] = 200
    image += np.random.default_rng(0).integers(0, 20, image.shape, dtype=np.uint8)
    probabilities = np.zeros((17, 17), np.float32)
    probabilities[5:12, 6:11] = 1
    mask = cutouts.grab_cut(image, cutouts.WIDE(probabilities))
    expected = np.zeros((150, 150), np.uint8)
    expected[40:110, 50:100] = 1
    assert (mask == expected).mean() > 0.99


def test_reframing_keeps_the_subject_and_its_proportions() -> None:
    image = np.full((300, 300, 3), 255, np.uint8)
    image[100:160, 20:50] = 10
    reframed = cutouts.reframe(image, image[..., :1] < 128, np.array([0.0, 1.0, 0.0]))
    rows, columns = np.nonzero(reframed[..., 0] < 128)
    assert np.ptp(rows) + 1 == pytest.approx(150, abs=2)  # half of the image's side
    assert np.ptp(columns) + 1 == pytest.approx(75, abs=2)
    assert rows.max() == 299
    assert columns.min() == 0
