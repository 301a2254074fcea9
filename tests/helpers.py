"""What tests share: where the shared data lies, random configs, and the tolerance rule for low precision."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import strategies as st
from torch import Tensor

from bokehflux.configs import VAEConfig

_CANDIDATE = Path(__file__).resolve().parents[2] / "shared"

SHARED: Path | None = _CANDIDATE if _CANDIDATE.is_dir() else None
"""Golden outputs and manifests, beside the checkout; None where there are none."""

needs_shared = pytest.mark.skipif(SHARED is None, reason=f"no shared data at {_CANDIDATE}")


def shared(path: str) -> Path:
    """File or folder `path` of the shared data, for tests marked `needs_shared`."""
    assert SHARED is not None, "mark this test with needs_shared"
    return SHARED / path


# At least eight values in every group: the deviation of fewer is at times near zero, and dividing by it makes
# any two implementations differ.
vae_configs = st.builds(
    VAEConfig,
    channels=st.lists(st.sampled_from((8, 16, 24)), min_size=1, max_size=4).map(tuple),
    layers_per_block=st.integers(1, 2),
    latent_channels=st.integers(2, 6),
    norm_groups=st.sampled_from((1, 2, 4)),
    scale=st.floats(0.2, 2.0),
    shift=st.floats(-1.0, 1.0),
)


def max_error(x: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in float32. NaN counts as infinite."""
    error = (x.float() - exact.float()).abs().max().item()
    return error if error == error else float("inf")


def assert_within_2x(ours: Tensor, oracle: Tensor, exact: Tensor, atol: float = 1e-6) -> None:
    """Our largest error against `exact` is at most twice the oracle's.

    `ours` and `oracle` were computed in the same low precision, `exact` in float32 or better from the same
    inputs. `atol` only covers an oracle that happens to be exact; it is not a knob.
    """
    assert ours.shape == exact.shape == oracle.shape, f"{ours.shape}, {oracle.shape}, {exact.shape}"
    error, limit = max_error(ours, exact), 2 * max_error(oracle, exact) + atol
    assert error <= limit, f"our error {error:.3e} exceeds {limit:.3e}, twice the oracle's"
