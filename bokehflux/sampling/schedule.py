"""The noise levels of a run: equal steps, shifted towards noise for larger images. Pure functions."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bokehflux.configs import ScheduleConfig


def shift_mu(config: ScheduleConfig, num_img_tokens: int) -> float:
    """The log of the time shift, linear in the number of image tokens (dev: 0.5 at 256, 1.15 at 4096)."""
    slope = (config.max_shift - config.base_shift) / (config.max_tokens - config.base_tokens)
    return num_img_tokens * slope + config.base_shift - slope * config.base_tokens


def sigmas(config: ScheduleConfig, num_steps: int, num_img_tokens: int) -> Tensor:
    """[num_steps + 1] float32 noise levels from 1 down to 0.

    sigma = s / (s + 1/t - 1) for t = 1 ... 1/num_steps, with s = e^mu (dynamic) or the fixed shift.
    Raises ValueError for fewer than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, got {num_steps}")
    # float32 numpy, in this order of operations: the published schedule, to the last bit.
    t: np.ndarray = np.linspace(1.0, 1 / num_steps, num_steps).astype(np.float32)
    if config.dynamic:
        s = math.exp(shift_mu(config, num_img_tokens))
        t = s / (s + (1 / t - 1))
    else:
        t = config.shift * t / (1 + (config.shift - 1) * t)
    return torch.cat([torch.from_numpy(t.astype(np.float32)), torch.zeros(1)])
