from __future__ import annotations

import copy
from pathlib import Path

import lightning as L
import pytest
import safetensors.torch
import timm
import torch

from horsehuman import HorseHumanDataModule, HorseHumanError, InceptionClassifier, load_classifier
from horsehuman.data.records import SUBJECT_PATTERN
from horsehuman.data.transforms import resize
from horsehuman.models.inception import (
    FrozenBackbone,
    Inception,
    PretrainedWeights,
    bundled_backbone,
    read_pretrained,
)
from tests.models.test_checkpoint import save

SMALL = 96

PICTURES = torch.randint(0, 256, (2, 3, 90, 90), generator=torch.Generator().manual_seed(0)).byte()


@pytest.fixture(scope="module")
def bundled() -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(bundled_backbone())


def data_of(tree: Path, **options: object) -> HorseHumanDataModule:
    arguments = {
        "source": "folder",
        "root": str(tree),
        "group_pattern": SUBJECT_PATTERN,
        "batch_size": 8,
    }
    return HorseHumanDataModule(image_size=SMALL, **{**arguments, **options})  # type: ignore[arg-type]


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


@pytest.mark.slow
def test_feature_maps_equal_those_of_timm(bundled: dict[str, torch.Tensor]) -> None:
    reference = timm.create_model("inception_v3", features_only=True, out_indices=(3,)).eval()
    reference.load_state_dict(bundled)
    network = Inception()
    images = torch.randint(0, 256, (1, 3, 310, 290), dtype=torch.uint8)
    small, large = network.forward_features(images)
    for size, maps in ((224, small), (299, large)):
        with torch.no_grad():
            scaled = resize(resize(images, 300), size)
            expected = reference(scaled / 127.5 - 1)[-1]
        torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4)
    assert (small.shape, large.shape) == ((1, 768, 12, 12), (1, 768, 17, 17))
    expected = (small.mean((2, 3)) + large.mean((2, 3))) / 2
    torch.testing.assert_close(network.embed(images), expected)


def test_training_needs_weights(tree: Path) -> None:
    model = InceptionClassifier(weights="checkpoint", scales=[SMALL])
    with pytest.raises(HorseHumanError, match=r"model\.weights=checkpoint names no weights"):
        fit(model, data_of(tree))


@pytest.mark.slow
def test_real_batch_norms_are_folded_in() -> None:
    """Batch norms of the bundled weights are identities, so this test draws others."""
    torch.manual_seed(0)
    reference = timm.create_model("inception_v3", features_only=True, out_indices=(3,)).eval()
    for module in reference.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.normal_(module.bias)
    weights = PretrainedWeights("drawn here", reference.state_dict())
    inputs = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        expected = reference(inputs)[-1]
    maps = FrozenBackbone("Mixed_6e", weights)(inputs)
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))


@pytest.mark.parametrize("tag", ["tf_in1k", "tv_in1k"])
def test_preprocessing_equals_that_of_timm_for_the_weights(tag: str) -> None:
    config = timm.get_pretrained_cfg(f"inception_v3.{tag}")
    assert config is not None
    weights = read_pretrained("box")
    assert (weights.mean, weights.std) == (tuple(config.mean), tuple(config.std))
    network = Inception(weights="random")
    assert network.settings["mean"] == list(config.mean)
    white = torch.full((1, 3, 300, 300), 255, dtype=torch.uint8)
    for preprocess in network.normalize:
        assert preprocess(white).unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda t: t.pop("Mixed_6e.branch1x1.conv.weight"),
            r'up to Mixed_6e: Missing key\(s\) .*"Mixed_6e\.branch1x1\.conv\.weight"\.; use',
        ),
        (
            lambda t: t.update({"layer4.0.conv1.weight": torch.zeros(1)}),
            r'up to Mixed_6e: Unexpected key\(s\) .*"layer4\.0\.conv1\.weight"\.; use others',
        ),
        (
            lambda t: t.update({"Mixed_5b.branch1x1.conv.weight": torch.zeros(1)}),
            r"up to Mixed_6e: size mismatch for Mixed_5b\.branch1x1\.conv\.weight: .*model\.cut$",
        ),
    ],
)
def test_weights_are_loaded_strictly(
    bundled: dict[str, torch.Tensor], tmp_path: Path, change: object, reason: str
) -> None:
    tensors = dict(bundled)
    change(tensors)  # type: ignore[operator]
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(HorseHumanError, match=reason) as raised:
        InceptionClassifier(weights=str(path))
    assert len(str(raised.value)) < 500


@pytest.mark.slow
def test_layers_after_the_cut_are_ignored(bundled: dict[str, torch.Tensor], tmp_path: Path) -> None:
    ignored = {"fc.weight": torch.zeros(2), "AuxLogits.fc.bias": torch.zeros(1)}
    ignored["Mixed_7a.branch3x3.0.conv.weight"] = torch.zeros(1)
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({**bundled, **ignored}, path)
    assert InceptionClassifier(weights=str(path)).hparams["cut"] == "Mixed_6e"
    backbone = FrozenBackbone("Mixed_5d", read_pretrained("box"))
    kernel = "Mixed_5d.branch1x1.conv.weight"
    torch.testing.assert_close(backbone.trunk.state_dict()[kernel], bundled[kernel].float())
    with pytest.raises(HorseHumanError, match=r"up to Mixed_7c: Missing .*Mixed_7a.*\[\.\.\.\]"):
        InceptionClassifier(cut="Mixed_7c")


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("nope", "is not known"),
        ("nope.safetensors", r"model\.weights=nope\.safetensors: No such file or directory"),
        ("tv_in2k", "did you mean tv_in1k"),
    ],
)
def test_unknown_weights_are_refused(weights: str, reason: str) -> None:
    with pytest.raises(HorseHumanError, match=reason):
        InceptionClassifier(weights=weights)


def test_training_leaves_the_backbone_bit_identical_and_changes_the_head(tree: Path) -> None:
    model = InceptionClassifier(
        image_size=SMALL, scales=[SMALL], weights="random", cache_features=False
    )
    before = copy.deepcopy(model.state_dict())
    fit(model, data_of(tree, augment={"flip": True}))
    after = model.state_dict()
    assert {name.split(".")[1] for name in after} == {"backbone", "head"}
    for name, value in after.items():
        assert torch.equal(value, before[name]) == name.startswith("network.backbone."), name
    backbone = model.network.backbone
    assert not any(p.requires_grad for p in backbone.parameters())
    assert {type(m).__name__ for m in backbone.modules() if not list(m.children())} == {
        "Conv2d",
        "MaxPool2d",
        "ReLU",
    }  # No layer depends on training or eval mode.


@pytest.mark.slow
def test_cached_features_train_the_head_like_features_on_the_fly(tree: Path) -> None:
    heads = []
    for cached in (True, False):
        L.seed_everything(1, verbose=False)
        model = InceptionClassifier(image_size=SMALL, scales=[80, 96], cache_features=cached)
        trainer = fit(model, data_of(tree))
        heads.append((model.network.head.state_dict(), dict(trainer.callback_metrics)))
    (cached_head, cached_metrics), (head, metrics) = heads
    for name, value in cached_head.items():
        # The last bits of a feature depend on the other images of its batch.
        torch.testing.assert_close(value, head[name], rtol=1e-4, atol=1e-5)
    assert cached_metrics["val/acc"] == metrics["val/acc"]
    assert cached_metrics["train/acc"] == metrics["train/acc"]


@pytest.mark.parametrize("flags", ["avx2 fma", "avx512_bf16"])
def test_bfloat16_is_a_choice_of_the_computation(
    flags: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("horsehuman.runtime.cpu_flags", lambda: frozenset(flags.split()))
    has_bf16 = "bf16" in flags
    module = InceptionClassifier(image_size=SMALL, scales=[SMALL])
    path = save(module, tmp_path / "model.ckpt")
    expected = load_classifier(path)
    for precision in ("auto", "bfloat16"):
        network = load_classifier(path, precision)
        assert network.compute_dtype() == (torch.bfloat16 if has_bf16 else torch.float32)
        features, known = (n.embed(PICTURES) for n in (network, expected))
        assert features.dtype == torch.float32
        assert torch.equal(features, known) != has_bf16
        torch.testing.assert_close(features, known, rtol=0.1, atol=0.05)
        assert (network.feature_cache().path == expected.feature_cache().path) != has_bf16
        assert network.settings == expected.settings
        weights = network.state_dict()
        assert all(torch.equal(t, weights[name]) for name, t in expected.state_dict().items())
    assert caplog.text.count("this CPU has no instructions for it") == (not has_bf16)
    with pytest.raises(HorseHumanError, match="precision='fp8' is not known"):
        load_classifier(path, "fp8")


@pytest.mark.slow
def test_notebook_head_has_its_layers_and_parameters() -> None:
    with torch.device("meta"):
        head = torch.nn.Sequential(
            torch.nn.Linear(221_952, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1)
        )
    expected = sum(p.numel() for p in head.parameters())
    network = Inception(
        scales=[300],
        weights="random",
        pool="flatten",
        hidden=[1024],
        dropout=0.2,
        initialisation="keras",
    )
    assert sum(p.numel() for p in network.head.parameters()) == expected == 227_280_897
    kinds = [type(layer).__name__ for layer in network.head]
    assert kinds == ["Linear", "ReLU", "Dropout", "Linear"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"image_size": 0}, "model.image_size=0"),
        ({"image_size": "big"}, "model.image_size='big'"),
        ({"scales": []}, r"model.scales=\[\] does not work: give a list of 1 to 64 whole"),
        ({"scales": None}, "model.scales=None"),
        ({"scales": 224}, "model.scales=224"),
        ({"scales": [74]}, "model.scales=74"),
        ({"scales": [100000]}, "model.scales=100000"),
        ({"scales": [224.5]}, "model.scales=224.5"),
        ({"scales": [224, 299], "pool": "flatten"}, r"one scale: shorten model.scales=\["),
    ],
)
def test_invalid_values_are_refused(arguments: dict, reason: str) -> None:
    with pytest.raises(HorseHumanError, match=reason):
        InceptionClassifier(**{"weights": "random", **arguments})


def test_checkpoints_with_the_removed_option_views_load(tmp_path: Path) -> None:
    """Version 0.1 saved it."""
    model = InceptionClassifier(image_size=80, scales=[75], weights="random")
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(model)
    path = tmp_path / "old.ckpt"
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    saved["hyper_parameters"]["views"] = 3
    torch.save(saved, path)
    loaded = InceptionClassifier.load_from_checkpoint(path, map_location="cpu")
    assert torch.equal(loaded.network.head[-1].weight, model.network.head[-1].weight)
    assert load_classifier(path).settings["scales"] == [75]
