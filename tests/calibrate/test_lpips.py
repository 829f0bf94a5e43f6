from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from latentrt.calibrate.lpips import open_lpips
from latentrt.calibrate.picture_metrics import PictureMetric
from latentrt.runtime.errors import ArtifactError, UsageError
from latentrt.runtime.image import Pictures

# Where the authors' five slices of torchvision's AlexNet.features end, and the names of their convolutions.
SLICES = {"slice1.0": (0, 2), "slice2.3": (2, 5), "slice3.6": (5, 8), "slice4.8": (8, 10), "slice5.10": (10, 12)}


def alexnet() -> nn.Sequential:
    """The layers of torchvision's AlexNet.features, with random weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    ).eval()


def heads() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.rand(1, channels, 1, 1) for channels in (64, 192, 384, 256, 256)]


def state() -> dict[str, torch.Tensor]:
    network = alexnet()
    found = {f"lin{index}.model.1.weight": head for index, head in enumerate(heads())}
    for name in SLICES:
        layer = network[int(name.rpartition(".")[2])]
        assert isinstance(layer, nn.Conv2d)
        assert layer.bias is not None
        found |= {f"net.{name}.weight": layer.weight.detach(), f"net.{name}.bias": layer.bias.detach()}
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    save_file(state(), path)
    return path


@pytest.fixture(scope="module")
def lpips(weights: Path) -> PictureMetric:
    return open_lpips(weights)


def pictures(seed: int, count: int = 2) -> Pictures:
    return np.random.default_rng(seed).integers(0, 256, (count, 64, 72, 3), dtype=np.uint8)


def expected(one: Pictures, other: Pictures) -> float:
    """Equation 1 of the paper, from the layers as torchvision runs them."""
    network, total = alexnet(), 0.0
    features = []
    for picture in (one, other):
        # Zhang et al. scale [-1, 1] by ImageNet's statistics, which are of [0, 1].
        values = (picture / 127.5 - 1 - np.array([-0.030, -0.088, -0.188])) / np.array([0.458, 0.448, 0.450])
        tensor = torch.tensor(values.transpose(2, 0, 1)[None], dtype=torch.float32)
        own = []
        with torch.no_grad():
            for first, last in SLICES.values():
                tensor = network[first:last](tensor)
                own.append(tensor.double().numpy()[0])
        features.append(own)
    for a, b, head in zip(*features, heads(), strict=True):
        a, b = (each / np.maximum(np.sqrt((each**2).sum(0)), 1e-12) for each in (a, b))
        total += float((head.double().numpy()[0] * (a - b) ** 2).sum(0).mean())
    return total


def test_the_distance_is_that_of_the_paper(lpips: PictureMetric) -> None:
    one, other = pictures(1), pictures(2)
    np.testing.assert_allclose(lpips(one, other), [expected(one[0], other[0]), expected(one[1], other[1])], rtol=1e-4)


def test_equal_pictures_have_no_distance(lpips: PictureMetric) -> None:
    one = pictures(3)
    assert lpips(one, one).tolist() == [0.0, 0.0]
    np.testing.assert_allclose(lpips(one, pictures(4)), lpips(pictures(4), one), rtol=1e-6)


def test_other_arrays_are_refused(lpips: PictureMetric) -> None:
    with pytest.raises(UsageError, match="expected two uint8 arrays"):
        lpips(pictures(1), pictures(1, count=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop("lin3.model.1.weight"), "expected lin3.model.1.weight of (1, 256, 1, 1), got nothing"),
        (lambda held: held.update({"net.slice1.0.bias": torch.zeros(3)}), "of (64,), got (3,)"),
    ],
)
def test_other_weights_are_refused(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    held = state()
    change(held)
    save_file(held, tmp_path / "other.safetensors")
    with pytest.raises(ArtifactError) as caught:
        open_lpips(tmp_path / "other.safetensors")
    assert message in str(caught.value)


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"pickled")
    for name in ("a.pth", "none.safetensors"):
        with pytest.raises(ArtifactError, match="expected a safetensors file with LPIPS's weights"):
            open_lpips(tmp_path / name)
