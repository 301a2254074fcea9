"""LPIPS and DISTS against lpips 0.1.4 and DISTS_pytorch 0.1.

Both need a torchvision that loads, which is rare beside a CPU build of torch. So what they gave is recorded
here, for weights that are drawn the same way everywhere; where they do load, they are run.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bokehflux.evaluation.perceptual import HEADS, WEIGHTS, Dists, HubPerceptual, Lpips

SIZES = ((64, 64), (31, 45), (97, 130))
RECORDED = {"Lpips": [0.0898043, 0.0911188, 0.0946338], "Dists": [0.0701362, 0.0837527, 0.0707247]}
"""By SIZES."""


def draw(network: nn.Module) -> nn.Module:
    """Convolutions that keep their inputs' size, and weights of both signs where they were learned."""
    for i, (name, value) in enumerate(sorted(network.state_dict().items())):
        drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        is_conv = name.startswith("features") and value.dim() == 4
        scale = math.sqrt(2 / value[0].numel()) if is_conv else 0.1
        value.copy_(scale * drawn if name.startswith("features") else drawn.abs())
    return network.eval()


def pictures(height: int, width: int) -> tuple[Tensor, Tensor]:
    """A pattern, and the same softened and noisy."""
    x, y = torch.arange(float(width)), torch.arange(float(height))[:, None]
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(9))
    a = torch.stack([(x / 5).sin() * (y / 7).cos(), (x / 3 + y / 4).sin(), (y / 2).cos() + 0 * x]) / 2 + 0.5
    return a[None], (0.7 * a + 0.2 * noise + 0.05)[None]


@pytest.mark.parametrize("network", [Lpips, Dists])
def test_they_give_what_the_published_code_gave(network: type[nn.Module]) -> None:
    ours = draw(network())
    with torch.no_grad():
        found = [float(ours(*pictures(*size))) for size in SIZES]
    assert found == pytest.approx(RECORDED[network.__name__], rel=1e-4)


def published(name: str, ours: nn.Module) -> nn.Module:
    """The published network with the weights of ours."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no torchvision that loads: {error}")
    state = ours.state_dict()
    if name == "Lpips":
        package = pytest.importorskip("lpips")
        other = package.LPIPS(net="alex", pnet_rand=True, verbose=False)
        convs = [part for part in other.net.modules() if isinstance(part, nn.Conv2d)]
        for i, lin in enumerate(other.lins):
            lin.model[1].weight.data.copy_(state[f"heads.{i}"])
    else:
        package = pytest.importorskip("DISTS_pytorch")
        plain = models.vgg16
        models.vgg16 = lambda pretrained: plain()
        try:
            other = package.DISTS(load_weights=False)
        finally:
            models.vgg16 = plain
        convs = [part for part in other.modules() if isinstance(part, nn.Conv2d)]
        other.alpha.data.copy_(state["alpha"])
        other.beta.data.copy_(state["beta"])
    mine = [part for part in ours.modules() if isinstance(part, nn.Conv2d)]
    for theirs, one in zip(convs, mine, strict=True):
        theirs.load_state_dict(one.state_dict())
    return other.eval()


@pytest.mark.parametrize("network", [Lpips, Dists])
def test_they_give_what_the_published_code_gives(network: type[nn.Module]) -> None:
    ours = draw(network())
    other = published(network.__name__, ours)
    for size in SIZES:
        a, b = pictures(*size)
        with torch.no_grad():
            want = other(a, b, normalize=True) if network is Lpips else other(a, b)
            assert float(ours(a, b)) == pytest.approx(float(want), rel=1e-4)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as torch.hub keeps it, with torchmetrics beside it: the published names, drawn weights."""
    learned = tmp_path / "torchmetrics" / "functional" / "image"
    (tmp_path / "checkpoints").mkdir()
    for figure, network in (("lpips", Lpips()), ("dists", Dists())):
        state = draw(network).state_dict()
        backbone = {name: value for name, value in state.items() if name.startswith("features")}
        heads = {name: value for name, value in state.items() if name not in backbone}
        if figure == "lpips":
            heads = {f"lin{i}.model.1.weight": heads[f"heads.{i}"] for i in range(5)}
        torch.save(
            backbone | {"classifier.1.weight": torch.ones(2)}, tmp_path / "checkpoints" / WEIGHTS[figure]
        )
        (learned / HEADS[figure]).parent.mkdir(parents=True)
        torch.save(heads, learned / HEADS[figure])
    (tmp_path / "torchmetrics" / "__init__.py").write_text("raise AssertionError('it is not to be run')")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_files_by_their_published_names_are_read(hub: Path) -> None:
    a, b = (torch.cat([one, one.flip(-1)]) for one in pictures(64, 64))
    found = HubPerceptual(hub)(a, b)
    with torch.no_grad():
        for figure, network in (("lpips", Lpips()), ("dists", Dists())):
            assert found[figure] == pytest.approx(float(draw(network)(a, b).mean()), rel=1e-5)
    assert HubPerceptual(hub)(a, a) == pytest.approx({"lpips": 0, "dists": 0}, abs=1e-5)
    (hub / "checkpoints" / WEIGHTS["dists"]).unlink()
    assert list(HubPerceptual(hub).networks) == ["lpips"]
    with pytest.raises(ValueError, match="LPIPS needs 31 x 31 pixels"):
        HubPerceptual(hub)(*pictures(64, 30))


def test_what_is_not_as_published_is_refused(hub: Path) -> None:
    file = hub / "checkpoints" / WEIGHTS["lpips"]
    weights = torch.load(file, weights_only=True)
    for content, said in (
        ({"weights": HubPerceptual}, "does not hold weights alone"),
        ([1, 2], "does not hold weights by name"),
        ({**weights, "features.0.weight": torch.ones(64, 3, 5, 5)}, "is not as published.*size mismatch"),
        ({name: weights[name] for name in list(weights)[1:]}, "is not as published.*Missing key"),
    ):
        torch.save(content, file)
        with pytest.raises(ValueError, match=f"(?s){said}"):
            HubPerceptual(hub)
    torch.save(weights, file)
    (hub / "torchmetrics" / "functional" / "image" / HEADS["dists"]).unlink()
    with pytest.raises(ValueError, match=r"weights\.pt"):
        HubPerceptual(hub)


def test_torchmetrics_is_asked_for_by_name(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install torchmetrics"):
        HubPerceptual(hub)
