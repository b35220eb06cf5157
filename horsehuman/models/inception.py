"""The transfer-learning network: a frozen Inception-v3 backbone and a trainable head."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from horsehuman.data.transforms import check_images, resize
from horsehuman.errors import (
    HorseHumanError,
    check_choice,
    check_flag,
    check_number,
    check_widths,
    is_out_of_memory,
    printable,
)
from horsehuman.models.base import Network, Normalize, Pool, dense_layers, initialise, to_plain
from horsehuman.models.feature_cache import FeatureCache, cache_key
from horsehuman.runtime import BACKBONE_FILE, asset, cache_dir, lacks_bf16

#: Value of ``weights`` in a checkpoint: the weights are in the checkpoint, nothing else is read.
CHECKPOINT = "checkpoint"

#: Images that are embedded at a time. A larger batch is no faster on a CPU, and each image
#: in a batch takes some 20 MB of memory.
BATCH_SIZE = 8

#: Rows and columns of the grid of regions in which *both* looks for each class, and the number of
#: regions that decide. Chosen on composites of held-out subjects, see docs/neither.md.
GRID, STRONGEST = 6, 2

#: Layers after which the backbone can be cut, in the order of timm's feature levels (Szegedy et al.
#: 2016, names as in torchvision).
CUTS = ("Conv2d_2b_3x3", "Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c")

# Prefixes of all parameter names of the full Inception-v3; keys with these prefixes after the cut
# are ignored.
_FULL_MODEL_PREFIXES = ("Conv2d_", "Mixed_", "AuxLogits.", "fc.")

log = logging.getLogger(__name__)


class Inception(Network):
    """Frozen Inception-v3 at several scales, average of the pooled features, and a head.

    Args:
        image_size: Height and width in pixels of the canonical image, 8 to 4096.
        scales: Sizes in pixels, 75 to 2048, at which the backbone embeds the canonical image. The
            features are averaged over the scales, so that they depend less on a subject's size.
        weights: ``box`` (the bundled backbone), a timm tag such as ``tv_in1k``, a safetensors
            file, or ``random``. Every checkpoint contains the weights: it stores ``checkpoint``
            here and is loaded without the original source.
        cut: Last layer of the backbone, one of :data:`CUTS`.
        pool: Kind of :class:`~horsehuman.models.base.Pool`: ``avg``, ``max``, ``avgmax`` or
            ``flatten``.
        hidden: Widths of dense layers before the last one.
        dropout: Probability of dropping an input of the last dense layer, in [0, 1).
        initialisation: Of the head, ``torch`` or ``keras``; see
            :func:`~horsehuman.models.base.initialise`.
        mean: Mean of each channel, on the scale 0 to 1; ``None`` for what the weights expect.
        std: Standard deviation of each channel, on the scale 0 to 1; ``None`` for what the
            weights expect.
        class_names: Names of class 0 and class 1.
        threshold: Smallest probability of class 1, in (0, 1), at which an image is of class 1.
        temperature: See :meth:`~horsehuman.models.base.Network.calibrate`, above 0.
        confidence_threshold: Probability of the predicted class, in [0.5, 1), below which a
            prediction is unsure.
        neither: Whether the network has the linear output ``neither``; see
            :func:`~horsehuman.models.calibration.fit_neither`.
        both_threshold: Threshold of *both* on the outputs of the linear layer ``presence``, see
            :meth:`both_score`; ``None`` for a network without this layer.

    Attributes:
        width: Number of features F.
        weights_source: The given ``weights``; a checkpoint stores it as a record only.

    Raises:
        HorseHumanError: If a value is of the wrong type or out of range, or the weights cannot be
            read.
    """

    heat_layer = "backbone"  # its output, the maps that are pooled
    batch_size = BATCH_SIZE

    def __init__(
        self,
        image_size: int = 300,
        scales: Sequence[int] = (224, 299),
        weights: str = "box",
        cut: str = "Mixed_6e",
        pool: str = "avg",
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        initialisation: str = "torch",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_names: Sequence[str] = ("horses", "humans"),
        threshold: float = 0.5,
        temperature: float = 1.0,
        confidence_threshold: float = 0.5,
        neither: bool = False,
        both_threshold: float | None = None,
    ) -> None:
        # The arguments by name: no other local variables than the excluded ones exist yet.
        super().__init__({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        check_widths("model.scales", scales, at_least=1, bounds=(75, 2048))
        if pool == "flatten" and len(scales) > 1:
            raise HorseHumanError(
                f"model.pool=flatten takes one scale: shorten model.scales={scales}"
            )
        pretrained = read_pretrained(weights)
        mean = pretrained.mean if mean is None else mean
        std = pretrained.std if std is None else std
        self.weights_source = pretrained.source
        self.backbone = FrozenBackbone(cut, pretrained)
        self.normalize = nn.ModuleList(Normalize(s, mean, std) for s in scales)
        self.settings.update(weights=CHECKPOINT, mean=to_plain(mean), std=to_plain(std))
        self.pool = Pool(pool)
        self._sides: list[int] = []  # of the maps of each scale, see forward_frozen
        size = scales[0]
        if pool == "flatten":
            size = self.backbone(torch.zeros(1, 3, size, size)).shape[2]
        self.width = self.pool.width(self.backbone.width, size)
        *before, last = dense_layers(self.width, [*hidden, 1])
        self.head = nn.Sequential(*before, nn.Dropout(dropout), last)
        initialise(self.head, initialisation)
        self._add_outputs(neither, both_threshold)
        self.to(memory_format=torch.channels_last)

    def _add_outputs(self, neither: bool, both_threshold: float | None) -> None:
        """Add the layers ``neither`` and ``presence``, whose weights are loaded later."""
        check_flag("model.neither", neither)
        if neither:
            self.neither = nn.Linear(self.width, 1).requires_grad_(False)
        if both_threshold is not None:
            check_number("model.both_threshold", both_threshold, float, at_least=-100)
            self.presence = nn.Linear(self.backbone.width, 2).requires_grad_(False)

    @property
    def has_weights(self) -> bool:
        """Whether the backbone has weights: pretrained, random, or loaded from a checkpoint."""
        return not bool(next(self.backbone.parameters()).isnan().any())

    def compute_dtype(self, device: torch.device | None = None) -> torch.dtype:
        """Return the data type in which the backbone computes with its ``precision``.

        Args:
            device: Device of the computation; by default that of the network.
        """
        kind = (device or self.device).type
        if self.precision == "float32":
            return torch.float32
        if kind == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has_bf16 = kind == "cpu" and not lacks_bf16()
        return torch.bfloat16 if has_bf16 else torch.float32

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Compute the feature maps of the backbone at each scale, without gradients.

        Args:
            images: uint8 of shape ``(N, 3, H, W)``.

        Returns:
            One float32 tensor ``(N, C, H', W')`` for each scale.
        """
        return self._compute(self.backbone, self._inputs(images))

    def _inputs(self, images: Tensor) -> list[Tensor]:
        """Resize and normalise images for each scale."""
        images = resize(images, self.image_size)
        return [normalize(images) for normalize in self.normalize]

    def _compute(self, layers: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Apply layers of the backbone to each of its inputs, in the chosen precision."""
        dtype = self.compute_dtype()
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            return [layers(x).float() for x in inputs]

    @torch.no_grad()
    def forward_frozen(self, images: Tensor, blocks: int) -> Tensor:
        """Compute the inputs of the last blocks of the backbone, in batches.

        Args:
            images: uint8 of shape ``(N, 3, H, W)``.
            blocks: Number of the last blocks, at least 1.

        Returns:
            float16 ``(N, L, C)`` on the CPU, the positions of the feature maps of all scales, row
            by row.
        """
        layers, parts = self.backbone.split(blocks)[0], []
        for batch in torch.split(images.to(self.device), BATCH_SIZE):
            maps = self._compute(layers, self._inputs(batch))
            parts.append(torch.cat([m.flatten(2) for m in maps], 2).transpose(1, 2).half().cpu())
        self._sides = [m.shape[-1] for m in maps]
        return torch.cat(parts)

    def forward_last(self, maps: Tensor, blocks: int) -> Tensor:
        """Compute features ``(N, F)`` of what :meth:`forward_frozen` returned, with gradients."""
        parts = zip(torch.split(maps, [s**2 for s in self._sides], 1), self._sides, strict=True)
        inputs = [p.float().reshape(len(p), s, s, -1).movedim(3, 1) for p, s in parts]
        return self.pool_features(self._compute(self.backbone.split(blocks)[1], inputs))

    def embed(self, images: Tensor) -> Tensor:
        """Compute features ``(N, F)``, float32, of uint8 images ``(N, 3, H, W)``, in batches."""
        check_images(images)
        batches = torch.split(images, BATCH_SIZE)
        return torch.cat([self.pool_features(self.forward_features(batch)) for batch in batches])

    def neither_score(self, features: Tensor) -> Tensor:
        """Compute the logit of *neither*; see :meth:`Network.neither_score`."""
        if not self.settings["neither"]:
            return super().neither_score(features)
        logits: Tensor = self.neither(features)
        return logits.squeeze(1)

    def both_score(self, maps: Sequence[Tensor]) -> Tensor:
        """Compute the logit of *both*; see :meth:`Network.both_score`.

        The score is the smaller of the two logits of :func:`presence_logits`, minus the threshold.
        """
        threshold = self.settings["both_threshold"]
        if threshold is None:
            return super().both_score(maps)
        return presence_logits(self.presence(average_regions(maps))).amin(1) - float(threshold)

    def feature_cache(self) -> FeatureCache:
        """Return a cache that embeds on the model's device and returns features on the CPU.

        The file name is a hash of everything but the image that affects the features: weights,
        cut, preprocessing, pooling, kind of device, precision and version of torch.
        """
        names = ("image_size", "scales", "cut", "pool", "mean", "std")
        computation = [self.device.type, self.compute_dtype(), torch.__version__]
        key = cache_key(self.backbone, [*(self.settings[name] for name in names), *computation])

        def embed(images: Tensor) -> Tensor:
            return self.embed(images.to(self.device)).float().cpu()

        return FeatureCache(embed, cache_dir() / "features" / f"{key}.sqlite")


def warn_without_bf16(network: Inception) -> None:
    """Log that a network with the precision bfloat16 computes in float32, if it does."""
    if network.compute_dtype() == torch.float32:
        kind = "CPU" if network.device.type == "cpu" else "device"
        log.warning("precision=bfloat16: this %s has no instructions for it: float32", kind)


def average_regions(maps: Sequence[Tensor]) -> Tensor:
    """Average feature maps over the regions of a grid, and over scales.

    Args:
        maps: Feature maps at each scale, ``(N, C, H, W)``.

    Returns:
        Features ``(N, R, C)`` of R = :data:`GRID` squared regions, row by row.
    """
    grids = [functional.adaptive_avg_pool2d(m, GRID).flatten(2) for m in maps]
    return torch.stack(grids).mean(0).transpose(1, 2)


def presence_logits(logits: Tensor) -> Tensor:
    """Average the logits of the :data:`STRONGEST` regions in which a class is most visible.

    This is multiple-instance learning with an average of the largest instances: an image shows a
    class if some of its regions do (Dietterich et al. 1997). A region that resembles both classes,
    such as the body of a rearing horse, counts for neither of them.

    Args:
        logits: Logits of each region and class, ``(N, R, 2)``.

    Returns:
        Logits ``(N, 2)``: whether each class is visible anywhere.
    """
    exclusive = logits - functional.softplus(logits.flip(2))
    return exclusive.topk(STRONGEST, dim=1).values.mean(1)


class FrozenBackbone(nn.Module):
    """timm's ``inception_v3`` up to a cut, without gradients.

    Batch norms are folded into the convolutions. The output therefore does not depend on training
    or eval mode, and training changes nothing in it.

    Args:
        cut: Last layer, one of :data:`CUTS`.
        weights: The weights to load. If their source is ``checkpoint``, the parameters are NaN
            until a checkpoint is loaded.

    Attributes:
        width: Output channels C.
        trunk: timm's model up to the cut. State dicts contain this name.

    Raises:
        HorseHumanError: If there is no such cut, or the weights do not match the architecture.
    """

    def __init__(self, cut: str, weights: "PretrainedWeights") -> None:
        super().__init__()
        import timm  # Not above: it imports torchvision, which takes seconds.

        check_choice("model.cut", cut, CUTS)
        level = CUTS.index(cut)
        # Random initialisation takes a second: skip it for weights that are replaced.
        with torch.device("cpu" if weights.source == "random" else "meta"):
            trunk: Any = timm.create_model("inception_v3", features_only=True, out_indices=(level,))
        self.width = int(trunk.feature_info.channels()[0])
        if weights.source not in ("random", CHECKPOINT):
            load_pretrained(trunk, weights, cut)
        for block in trunk.eval().modules():
            # timm's `bn` is batch norm + ReLU; the norm is folded into `conv`, the ReLU keeps the
            # name `bn`.
            if hasattr(block, "bn"):
                block.conv = fuse_conv_bn_eval(block.conv, block.bn)
                block.bn = nn.ReLU(inplace=True)
        if weights.source == CHECKPOINT:
            nan = {key: torch.full(t.shape, float("nan")) for key, t in trunk.state_dict().items()}
            trunk.load_state_dict(nan, assign=True)
        # The mode has no effect here, but Lightning warns of modules in eval mode.
        self.trunk: nn.Module = trunk.train().requires_grad_(False)

    def split(self, blocks: int) -> tuple[nn.Sequential, nn.Sequential]:
        """Return the layers before the last blocks, and these blocks, at least one."""
        layers = list(self.trunk.children())
        return nn.Sequential(*layers[:-blocks]), nn.Sequential(*layers[-blocks:])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, 3, S, S)`` to ``(N, C, H, W)``; 299 px to 768 x 17 x 17 at ``Mixed_6e``."""
        maps: Tensor = self.trunk(x)[-1]
        return maps


class PretrainedWeights(NamedTuple):
    """Weights of an Inception-v3, and the mean and std of the images that they expect.

    Mean and std default to 0.5, as Google's weights expect.

    Attributes:
        source: Name of the weights as the user gave it.
        tensors: Tensors by timm's parameter names; empty for ``random`` and ``checkpoint``.
        mean: Mean of each channel, on the scale 0 to 1.
        std: Standard deviation of each channel, on the scale 0 to 1.
    """

    source: str
    tensors: Mapping[str, Tensor]
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)


def bundled_backbone() -> Path:
    """Return the file of the bundled backbone (see ``assets/ASSETS.md``)."""
    return asset(BACKBONE_FILE)


def read_pretrained(source: str) -> PretrainedWeights:
    """Read weights from the package, a file, or timm's hub or cache.

    Args:
        source: ``box`` (the bundled backbone), a timm tag of ``inception_v3``, or a safetensors
            file. A file is assumed to expect the preprocessing of Google's weights (mean and std
            0.5). ``random`` and ``checkpoint`` stand for no weights.

    Returns:
        The weights, with the mean and std that they expect.

    Raises:
        HorseHumanError: If there is no such source, or it cannot be read.
    """
    if source in ("random", CHECKPOINT):
        return PretrainedWeights(source, {})
    path = bundled_backbone() if source == "box" else Path(str(source)).expanduser()
    if path.suffix == ".safetensors":
        if source != "box":
            assumed = "assuming that it is intact, and mean and std 0.5"
            log.info("model.weights=%s: no digest to verify it: %s", printable(source), assumed)
        try:
            return PretrainedWeights(source, safetensors.torch.load_file(path))
        except (OSError, SafetensorError) as error:
            raise HorseHumanError(f"model.weights={printable(path)}: {error}") from error
    import timm

    tags = [name.partition(".")[2] for name in timm.list_pretrained("inception_v3.*")]
    check_choice("model.weights", source, ["box", "random", "FILE.safetensors", *tags])
    log.info("model.weights=%s: loading from timm's cache or hub", source)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        model: Any = timm.create_model(f"inception_v3.{source}", pretrained=True)
    except Exception as error:  # The hub's clients raise errors without a common base class.
        if is_out_of_memory(error):
            raise
        kind, fix = type(error).__name__, "if offline, use box or a safetensors file"
        raise HorseHumanError(f"cannot load model.weights={source} ({kind}): {fix}") from error
    config = model.pretrained_cfg
    return PretrainedWeights(source, model.state_dict(), config["mean"], config["std"])


def load_pretrained(network: nn.Module, weights: PretrainedWeights, cut: str) -> None:
    """Load weights into a backbone, and require that all keys and shapes match.

    Layers after the cut, ``fc`` and ``AuxLogits`` are ignored.

    Args:
        network: timm's ``inception_v3`` up to the cut.
        weights: The weights, which become float32.
        cut: Last layer of the network, one of :data:`CUTS`.

    Raises:
        HorseHumanError: If a key is missing, unknown, or of another shape.
    """
    before_cut = tuple(f"{name}." for name, _ in network.named_children())
    tensors = {
        key: tensor
        for key, tensor in weights.tensors.items()
        if key.startswith(before_cut) or not key.startswith(_FULL_MODEL_PREFIXES)
    }
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        faults = shorten(str(error).partition("\n")[2], 200)
        reason = f"does not match inception_v3 up to {cut}: {faults}; use others, or set model.cut"
        raise HorseHumanError(f"model.weights={weights.source} {reason}") from error
    network.float()
