from __future__ import annotations

import numpy as np
import pytest
import torch

cutouts = pytest.importorskip("cutouts", exc_type=ImportError)


def test_places_of_figures_are_learned_from_rough_masks() -> None:
    torch.manual_seed(0)
    maps = torch.randn(20, 6, 5, 5)
    figure = torch.zeros(20, 5, 5, dtype=torch.bool)
    figure[:, 1:4, 2:4] = True
    maps[:, 0] += 20 * figure
    masks = [np.kron(f.numpy(), np.ones((30, 30))).astype(np.uint8) for f in figure]
    masks[0][:] = 0  # a mask that failed is mended by the others
    found = cutouts.places_of_figures(maps, masks)
    assert (found[0] > 0.5).tolist() == figure[0].tolist()
    assert cutouts.overlap(masks[1], found[1]) > 0.9 > 0.1 > cutouts.overlap(masks[0], found[0])


def test_grab_cut_keeps_a_figure_of_another_colour_and_drops_specks() -> None:
    picture = np.full((150, 150, 3), 40, np.uint8)
    picture[40:110, 50:100] = 200
    picture[5:7, 5:7] = 200
    picture += np.random.default_rng(0).integers(0, 20, picture.shape, dtype=np.uint8)
    places = np.zeros((17, 17), np.float32)
    places[5:12, 6:11] = 1
    mask = cutouts.grab_cut(picture, cutouts.AROUND(places))
    expected = np.zeros((150, 150), np.uint8)
    expected[40:110, 50:100] = 1
    assert (mask == expected).mean() > 0.99


def test_reframing_keeps_the_figure_and_its_proportions() -> None:
    picture = np.full((300, 300, 3), 255, np.uint8)
    picture[100:160, 20:50] = 10
    found = cutouts.reframe(picture, picture[..., :1] < 128, np.array([0.0, 1.0, 0.0]))
    rows, columns = np.nonzero(found[..., 0] < 128)
    assert np.ptp(rows) + 1 == pytest.approx(150, abs=2)  # half of the picture
    assert np.ptp(columns) + 1 == pytest.approx(75, abs=2)
    assert rows.max() == 299
    assert columns.min() == 0
