"""BokehMe and its use in training data against recorded outputs: 1e-4, and 1e-5 in linear light."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bokehflux.kernels.scatter.interface import dilate, scatter
from bokehflux.kernels.scatter.reference import Iris
from bokehflux.rendering import bokehme
from bokehflux.rendering.bokehme_networks import Networks, load_networks, resize
from bokehflux.rendering.synthetic import GAMMA, add_bokeh, subject_defocus
from tests.helpers import SHARED, needs_shared, shared

pytestmark = needs_shared
FOLDER = "golden/rendering"


def cases(name: str) -> list[str]:
    return [] if SHARED is None else list(described(name))


def described(name: str) -> dict:
    return json.loads(shared(f"{FOLDER}/{name}.json").read_text())


def recorded(name: str) -> dict[str, Tensor]:
    """Tensors of one case, pictures in 0 ... 1."""
    tensors = load_file(shared(f"{FOLDER}/{name}.safetensors"))
    return {
        key: t.float() / 255 if key == "image" and t.dtype == torch.uint8 else t for key, t in tensors.items()
    }


@pytest.fixture(scope="module")
def networks() -> Networks:
    return load_networks(*(shared(f"{FOLDER}/{name}_small.safetensors") for name in ("arnet", "iunet")))


@pytest.mark.parametrize("name", cases("scatter"))
def test_scatter(name: str) -> None:
    case, t = described("scatter")[name], recorded(f"scatter_{name}")
    iris = Iris(case.get("sides", 0), case.get("init_angle", math.pi / 2), case.get("donut", 0.0))
    image, defocus, gamma = t["image"][None], t["defocus"][None], case["gamma"]
    mean, weight = scatter(image**gamma, defocus * 10, iris)
    assert (mean[0] - t["scatter_linear"]).abs().max() <= 1e-5
    assert (weight[0] / t["weight"] - 1).abs().max() <= 1e-5
    assert (bokehme.classical(image, defocus, gamma, iris)[0] - t["scatter"]).abs().max() <= 1e-4
    assert torch.equal(dilate(defocus * 10)[0].trunc().int(), t["dilated"])


@pytest.mark.parametrize("case", range(3))
def test_networks(case: int, networks: Networks) -> None:
    t = {
        key[2:]: tensor[None] for key, tensor in recorded("nets_small").items() if key.startswith(f"{case}.")
    }
    gamma, defocus = float(t["gamma"]), t["defocus"][:, None]
    bokeh, error = networks.arnet(t["image"], defocus, gamma)
    assert (bokeh - t["arnet_bokeh"]).abs().max() <= 1e-4
    assert (error[:, 0] - t["arnet_error"]).abs().max() <= 1e-4
    refined = networks.iunet(t["image"], defocus.clamp(-1, 1), t["coarse"], gamma)
    assert (refined - t["iunet"]).abs().max() <= 1e-4


@pytest.mark.parametrize("name", [name for name in cases("blend") if name != "nets_small"])
def test_blend(name: str, networks: Networks) -> None:
    case, t = described("blend")[name], recorded(f"blend_{name}")
    given = t["image"][None], t["defocus"][None], case["gamma"], networks
    out = bokehme.render(*given)
    for key in ("result", "classical", "neural"):
        assert (getattr(out, key)[0] - t[key]).abs().max() <= 1e-4, key
    assert (out.error_map[0, 0] - t["error_map"]).abs().max() <= 1e-4
    assert torch.equal(dilate(t["defocus"][None] * 10)[0].trunc().short(), t["dilated"])
    if "result_original_rounding" in t:
        original = bokehme.render(*given, rounding=math.floor).result[0]
        assert (original - t["result_original_rounding"]).abs().max() <= 1e-4
        assert (original - out.result[0]).abs().max() > 0.1


def test_every_step_of_a_blend(networks: Networks) -> None:
    """What each call of a network was given, and its mask: two doublings, odd sizes."""
    case, t = described("blend")["odd"], recorded("blend_odd")
    calls, masks = [], []

    class Watched(torch.nn.Module):
        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            out = self.network(*args)
            calls.append((*args[:-1], out))
            return out

    with pytest.MonkeyPatch.context() as patch:
        share = bokehme.sharp_share
        patch.setattr(bokehme, "sharp_share", lambda reach: masks.append(share(reach)) or masks[-1])
        bokehme.render(t["image"][None], t["defocus"][None], case["gamma"], Networks(*map(Watched, networks)))
    image, defocus, (bokeh, _) = calls[0]
    assert (image[0] - t["arnet.image"]).abs().max() <= 1e-5
    assert (defocus[0, 0] - t["arnet.defocus"]).abs().max() <= 1e-5
    assert (bokeh[0] - t["arnet.bokeh"]).abs().max() <= 1e-4
    for i, (call, mask) in enumerate(zip(calls[1:], masks, strict=True)):
        names = ("image", "defocus", "coarse", "out")
        for name, value in zip((*names, "mask"), (*call, mask), strict=True):
            if (key := f"iunet{i}.{name}") in t:
                assert (value[0] - t[key]).abs().max() <= 1e-4, key


@pytest.mark.parametrize("name", cases("add_bokeh"))
def test_add_bokeh(name: str, networks: Networks) -> None:
    case, t = described("add_bokeh")[name], recorded(f"add_bokeh_{name}")
    mask, level = t["mask"] > 127, case["K"]
    defocus = subject_defocus(t["depth"], mask, level)
    assert (defocus - t["corrected_defocus"]).abs().max() <= 1e-5
    ours = [add_bokeh(t["image"], t["depth"], mask, level, given) for given in (None, networks)]
    assert (ours[0] - t["corrected_classical"]).abs().max() <= 1e-4
    assert (2 * ours[1] - 1 - t["corrected_result"]).abs().max() <= 1e-4
    same = bool((defocus - t["published_defocus"]).abs().max() <= 1e-5)
    assert same == case["published_equals_corrected"]


@pytest.mark.parametrize("name", [n for n in cases("add_bokeh") if described("add_bokeh")[n]["flattened"]])
def test_the_published_fault(name: str, networks: Networks) -> None:
    """A flat subject's focus, normalised by the subject's own extremes, gives what was published."""
    case, t = described("add_bokeh")[name], recorded(f"add_bokeh_{name}")
    depth, known = t["depth"], t["depth"].isfinite() & (t["depth"] > 1e-6)
    subject = (t["mask"] > 127) & known
    farthest = torch.quantile(depth[subject], 0.96)
    nearness = 1 / torch.where(known, depth, 1.0)
    low, high = nearness[subject].min(), nearness[subject].max()
    focus = ((1 / farthest - low) / (high - low + 1e-8)).clamp(0, 1)
    assert focus.item() == pytest.approx(case["published_focus"], abs=1e-5)
    low, high = nearness[known].min(), nearness[known].max()
    disparity = (nearness - low) / (high - low + 1e-8)
    disparity = torch.where(known, disparity, disparity[known].quantile(0.5))
    disparity = torch.where(subject & (depth <= farthest), focus, disparity)
    faulty = (case["K"] * (disparity - focus) / 10)[None]
    assert (faulty[0] - t["published_defocus"]).abs().max() <= 1e-5
    published = bokehme.render(t["image"][None], faulty, GAMMA, networks).result[0]
    assert (2 * published - 1 - t["published_result"]).abs().max() <= 1e-4


def test_resizes_align_corners() -> None:
    line = torch.arange(5.0).view(1, 1, 1, 5)
    torch.testing.assert_close(resize(line, (1, 9)).flatten(), torch.arange(9) / 2)
