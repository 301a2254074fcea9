"""BokehMe by itself: its networks' files, its radii, the knife edge of its mask, odd input."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from bokehflux.aperture import Disc, Donut, Polygon
from bokehflux.kernels.scatter.reference import Iris
from bokehflux.rendering import bokehme
from bokehflux.rendering.bokehme_networks import ARNet, IUNet, Networks, load_networks
from bokehflux.rendering.synthetic import GAMMA, add_bokeh, subject_defocus


@pytest.fixture
def networks() -> Networks:
    torch.manual_seed(0)
    return Networks(ARNet(8).eval(), IUNet(4).eval())


def test_published_sizes() -> None:
    assert sum(p.numel() for p in ARNet().parameters()) == 923_664
    assert sum(p.numel() for p in IUNet().parameters()) == 240_076


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files(networks: Networks, suffix: str, tmp_path: Path) -> None:
    paths = tmp_path / f"arnet{suffix}", tmp_path / f"iunet{suffix}"
    for network, path in zip(networks, paths, strict=True):
        if suffix == ".pth":
            torch.save({"model": network.state_dict(), "epoch": 3}, path)
        else:
            save_file(network.state_dict(), path)
    read = load_networks(*paths)
    for ours, theirs in zip(read, networks, strict=True):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b) and not a.requires_grad


def test_files_that_are_no_networks(networks: Networks, tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file(networks.iunet.state_dict(), good)
    bad = tmp_path / "bad.pth"

    class Hostile:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "was run",)

    for content, message in [
        (pickle.dumps({"model": Hostile()}, protocol=2), "expected a .pth or .safetensors file of tensors"),
        (b"nothing of the kind", "expected a .pth or .safetensors file of tensors"),
        (b"", "expected a .pth or .safetensors file of tensors"),
    ]:
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_networks(bad, good)
    assert not (tmp_path / "was run").exists()
    torch.save({"model": {"other": torch.zeros(1)}}, bad)
    with pytest.raises(
        ValueError, match="bad.pth: expected BokehMe's ARNet, found no tensor conv0.conv.weight"
    ):
        load_networks(bad, good)
    torch.save([torch.zeros(1)], bad)
    with pytest.raises(ValueError, match="bad.pth: expected BokehMe's ARNet, found a list"):
        load_networks(bad, good)
    with pytest.raises(ValueError, match="(?s)good.safetensors: expected BokehMe's ARNet: .*size mismatch"):
        load_networks(good, good)


@pytest.mark.parametrize(("largest", "edge_px"), [(3.0, 15), (5.2, 26), (2.6, 13), (3.8, 19), (4.2, 21)])
def test_the_masks_knife_edge(
    largest: float, edge_px: int, networks: Networks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ratio * dilated / 10 is 1, float32 decides, in the published order: by NumPy, step by step."""
    seen: list[Tensor] = []
    share = bokehme.sharp_share
    monkeypatch.setattr(bokehme, "sharp_share", lambda reach: seen.append(reach) or share(reach))
    defocus = torch.full((1, 40, 56), edge_px / 10 + 0.01)
    defocus[:, :, 40:] = -largest
    bokehme.render(torch.rand(1, 3, 40, 56), defocus, 2.2, networks)

    scale = float(defocus.abs().max())
    ratio = 2 / scale
    dilated = np.where(np.arange(56) < 40 + edge_px, edge_px, int(-10 * scale)).astype(np.float32)
    tenths = torch.from_numpy(dilated / np.float32(10)).expand(1, 1, 40, 56)
    small = F.interpolate(
        tenths, (int(ratio * 40), int(ratio * 56)), mode="bilinear", align_corners=True
    ).numpy()
    expected = np.float32(ratio) * small
    assert (expected[..., 0] - 1).max() < 1e-6, "on the edge"
    assert np.array_equal(seen[0].numpy() < 1, expected < 1)
    assert np.array_equal(seen[0].numpy() > -1, expected > -1)


def test_the_masks_blur() -> None:
    reach = torch.full((1, 1, 150, 90), 2.0)
    reach[..., :45] = 0
    share = bokehme.sharp_share(reach)
    assert share[0, 0, 70, 0] == pytest.approx(1) and share[0, 0, 70, -1] == 0
    # Radius round(0.005 * 240) = 1, sigma 0.8.
    side = math.exp(-1 / (2 * 0.64)) / (1 + 2 * math.exp(-1 / (2 * 0.64)))
    torch.testing.assert_close(share[0, 0, 70, 43:47], torch.tensor([1, 1 - side, side, 0]))


def test_radius_of_the_scatter() -> None:
    """A lone light on a picture of one radius: linear in the level."""
    levels, found = torch.tensor([4.0, 8.0, 16.0, 24.0]), []
    along = torch.arange(81.0) - 40
    for level in levels.tolist():
        photo = torch.zeros(1, 3, 81, 81)
        photo[:, :, 40, 40] = 1
        spot = bokehme.classical(photo, torch.full((1, 81, 81), level / 10), 2.2)[0, 0] ** 2.2
        found.append(math.sqrt(2 * float((spot * (along**2 + along[:, None] ** 2)).sum() / spot.sum())))
    radii = torch.tensor(found)
    slope = torch.corrcoef(torch.stack([levels, radii]))[0, 1] * radii.std() / levels.std()
    assert slope == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("height", "width", "largest"), [(9, 14, 6.1), (1, 1, 3.0), (7, 40, 40.0), (33, 47, 2.9), (64, 64, 0.0)]
)
def test_any_size(height: int, width: int, largest: float, networks: Networks) -> None:
    """Sizes at which the published code fails among them."""
    photo, defocus = torch.rand(2, 3, height, width), largest * (2 * torch.rand(2, height, width) - 1)
    out = bokehme.render(photo, defocus.clamp(-6, 6), 2.2, networks)
    for picture in out[:3]:
        assert picture.shape == photo.shape and picture.min() >= 0 and picture.max() <= 1
    assert (
        0 <= out.error_map.min() and out.error_map.max() <= 1 and out.error_map.shape == (2, 1, height, width)
    )
    alone = bokehme.render(photo[1:], defocus[1:].clamp(-6, 6), 2.2, networks)
    torch.testing.assert_close(alone.result, out.result[1:], atol=1e-5, rtol=0)


def test_unknown_defocus_is_sharp(networks: Networks) -> None:
    photo, defocus = torch.rand(1, 3, 20, 20), torch.rand(1, 20, 20)
    broken, mended = defocus.clone(), defocus.clone()
    broken[0, 3, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    mended[0, 3, :3] = 0
    for a, b in zip(*(bokehme.render(photo, d, 2.2, networks) for d in (broken, mended)), strict=True):
        assert torch.equal(a, b)


def test_apertures() -> None:
    assert bokehme.iris_of(Disc()) == Iris()
    assert bokehme.iris_of(Polygon(5)) == Iris(5, math.pi / 2)
    photo = torch.zeros(1, 3, 41, 41)
    photo[:, :, 20, 20] = 1
    for rotation in (0.0, 25.0):
        aperture = Polygon(3, rotation)
        spot = bokehme.classical(photo, torch.full((1, 41, 41), 1.4), 1.0, bokehme.iris_of(aperture))[0, 0]
        along = torch.arange(41.0) - 20
        exact = aperture.spread(along, along[:, None], torch.tensor(14.0), torch.tensor(1.0))
        assert torch.corrcoef(torch.stack([spot.flatten(), exact.flatten()]))[0, 1] > 0.95
    with pytest.raises(ValueError, match="BokehMe knows Disc and Polygon, got Donut"):
        bokehme.iris_of(Donut())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bokehme.classical(torch.zeros(3, 4, 4), torch.zeros(1, 4, 4), 2.2), r"got \[3, 4, 4\]"),
        (lambda: bokehme.classical(torch.zeros(1, 3, 4, 4), torch.zeros(4, 4), 2.2), r"and \[4, 4\]"),
        (
            lambda: bokehme.classical(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4), 0.5),
            "gamma: expected 1 ... 5",
        ),
        (lambda: subject_defocus(torch.ones(4, 4), torch.ones(4, 5) > 0, 3.0), "of one size"),
        (lambda: subject_defocus(torch.zeros(4, 4), torch.ones(4, 4) > 0, 3.0), "found no pixel"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def person_and_wall() -> tuple[Tensor, Tensor]:
    depth, mask = torch.full((30, 40), 20.0), torch.zeros(30, 40, dtype=torch.bool)
    depth[5:25, 12:26] = torch.linspace(1.8, 2.2, 14)
    mask[5:25, 12:26] = True
    return depth, mask


def test_a_person_and_a_wall() -> None:
    """Focus on the person, flattened; the wall as far out of focus as the level says. Not so as published."""
    depth, mask = person_and_wall()
    radius = 10 * subject_defocus(depth, mask, 20.0)
    assert radius[mask & (depth < 2.19)].abs().max() < 1e-4
    assert radius[~mask].mean() == pytest.approx(-20 * (1 / 2.2 - 1 / 20) / (1 / 1.8 - 1 / 20), abs=0.1)

    nearness = 1 / depth
    subject = nearness[mask]
    published_focus = (1 / torch.quantile(depth[mask], 0.96) - subject.min()) / (
        subject.max() - subject.min()
    )
    wall = (nearness[~mask] - nearness.min()) / (nearness.max() - nearness.min())
    assert (20 * (wall - published_focus)).abs().mean() < 2, "the published fault"


def test_add_bokeh(networks: Networks) -> None:
    depth, mask = person_and_wall()
    photo = torch.rand(3, 30, 40)
    blurred = add_bokeh(photo, depth, mask, 8.0, networks)
    scattered = add_bokeh(photo, depth, mask, 8.0, None)
    defocus = subject_defocus(depth, mask, 8.0)[None]
    assert torch.equal(blurred, bokehme.render(photo[None], defocus, GAMMA, networks).result[0])
    assert torch.equal(scattered, bokehme.classical(photo[None], defocus, GAMMA)[0].clamp(0, 1))
    assert not torch.equal(blurred, scattered)
