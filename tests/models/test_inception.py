from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import pytest
import safetensors.torch
import timm
import torch

from horsehuman import HorseHumanDataModule, HorseHumanError, InceptionClassifier
from horsehuman.data.datamodule import FIGURE
from horsehuman.models.inception import FrozenBackbone
from horsehuman.models.weights import box_trunk, load_trunk, read_trunk

SMALL = 96


@pytest.fixture(scope="module")
def box() -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(box_trunk())


def data_of(tree: Path, **options: object) -> HorseHumanDataModule:
    given = {"source": "folder", "root": str(tree), "group_pattern": FIGURE, "batch_size": 8}
    return HorseHumanDataModule(image_size=SMALL, **{**given, **options})  # type: ignore[arg-type]


def fit(model: L.LightningModule, data: HorseHumanDataModule, epochs: int = 2) -> L.Trainer:
    trainer = L.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    return trainer


def test_maps_are_those_of_timm(box: dict[str, torch.Tensor]) -> None:
    reference = timm.create_model("inception_v3", features_only=True, out_indices=(3,)).eval()
    reference.load_state_dict(box)
    model = InceptionClassifier()
    pictures = torch.randint(0, 256, (1, 3, 300, 300), dtype=torch.uint8)
    with torch.no_grad():
        expected = reference(pictures / 127.5 - 1)[-1]
    found = model.maps(pictures)
    assert found.shape == (1, 768, 17, 17)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.embed(pictures), found.mean((2, 3)))


@pytest.mark.parametrize("tag", ["tf_in1k", "tv_in1k"])
def test_preprocessing_is_what_timm_says_of_the_weights(tag: str) -> None:
    config = timm.get_pretrained_cfg(f"inception_v3.{tag}")
    assert config is not None
    trunk = read_trunk("box")
    assert (trunk.mean, trunk.std) == (tuple(config.mean), tuple(config.std))
    model = InceptionClassifier(weights="random")
    assert model.hparams["mean"] == list(config.mean)
    white = torch.full((1, 3, 300, 300), 255, dtype=torch.uint8)
    assert model.preprocess(white).unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("Mixed_6e.branch1x1.conv.weight"), "1 keys missing"),
        (lambda t: t.update({"layer4.0.conv1.weight": torch.zeros(1)}), "1 keys unknown"),
        (
            lambda t: t.update({"Mixed_5b.branch1x1.conv.weight": torch.zeros(1)}),
            "1 keys of another shape",
        ),
    ],
)
def test_weights_are_loaded_strictly(
    box: dict[str, torch.Tensor], tmp_path: Path, change: object, reason: str
) -> None:
    tensors = dict(box)
    change(tensors)  # type: ignore[operator]
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(HorseHumanError, match=reason):
        InceptionClassifier(weights=str(path))


def test_layers_behind_the_cut_are_left_aside_by_name(
    box: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    behind = {"fc.weight": torch.zeros(2), "AuxLogits.fc.bias": torch.zeros(1)}
    behind["Mixed_7a.branch3x3.0.conv.weight"] = torch.zeros(1)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({**box, **behind}, path)
    assert InceptionClassifier(weights=str(path)).hparams["cut"] == "Mixed_6e"
    backbone = FrozenBackbone("Mixed_5d")
    load_trunk(backbone.trunk, read_trunk("box"), "Mixed_5d")
    kernel = "Mixed_5d.branch1x1.conv.weight"
    assert torch.equal(backbone.trunk.state_dict()[kernel], box[kernel].float())
    with pytest.raises(HorseHumanError, match=r"up to Mixed_7c.*missing.*Mixed_7a"):
        InceptionClassifier(cut="Mixed_7c")


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("nope", "is not known"),
        ("nope.safetensors", "cannot be read as safetensors"),
        ("tv_in2k", "did you mean tv_in1k"),
    ],
)
def test_weights_that_are_not_there(weights: str, reason: str) -> None:
    with pytest.raises(HorseHumanError, match=reason):
        InceptionClassifier(weights=weights)


def test_training_leaves_the_backbone_bit_identical_and_changes_the_head(tree: Path) -> None:
    model = InceptionClassifier(image_size=SMALL, weights="random", cache_features=False)
    before = copy.deepcopy(model.state_dict())
    fit(model, data_of(tree, augment={"flip": True}))
    after = model.state_dict()
    assert any("running_mean" in name for name in after)
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert model.train().backbone.trunk.training is False
    assert not any(module.training for module in model.backbone.modules())


def test_features_computed_once_are_the_features_on_the_fly(tree: Path) -> None:
    heads = []
    for cached in (True, False):
        L.seed_everything(1, verbose=False)
        model = InceptionClassifier(image_size=SMALL, cache_features=cached)
        trainer = fit(model, data_of(tree))
        heads.append((model.head.state_dict(), dict(trainer.callback_metrics)))
    (first, metrics), (second, others) = heads
    for name, value in first.items():
        # other batches give convolutions other sums: the last bits of a feature may differ
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-5)
    assert metrics["val/acc"] == others["val/acc"]
    assert metrics["train/acc"] == others["train/acc"]


def test_notebook_head_to_the_parameter() -> None:
    with torch.device("meta"):
        head = torch.nn.Sequential(
            torch.nn.Linear(221_952, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1)
        )
    expected = sum(p.numel() for p in head.parameters())
    model = InceptionClassifier(
        weights="random", pool="flatten", hidden=[1024], dropout=0.2, initialisation="keras"
    )
    assert sum(p.numel() for p in model.head.parameters()) == expected == 227_280_897
    kinds = [type(layer).__name__ for layer in model.head]
    assert kinds == ["Linear", "ReLU", "Dropout", "Linear"]


@pytest.mark.parametrize("size", [0, 74, "big"])
def test_pictures_too_small(size: object) -> None:
    with pytest.raises(HorseHumanError, match="image_size"):
        InceptionClassifier(image_size=size)  # type: ignore[arg-type]
