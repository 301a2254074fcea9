"""Where a run went wrong: the step and the layer that first produced something that is no number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bokehflux.models.mmdit import MMDiT
from bokehflux.sampling.samplers import Velocity, euler


class NonFiniteError(FloatingPointError):
    """NaN or infinity in a network's output; the message names step, layer and, if it holds any, weights."""


class _Stop(Exception):
    pass


@torch.inference_mode()
def explain_nonfinite(mmdit: MMDiT, velocity: Velocity, x: Tensor, sigmas: Tensor) -> NonFiniteError:
    """Repeat a run whose latents are not finite, watching every layer, and return the error to raise.

    Only called after the fact, so that a run that goes well pays for no check but its last one.
    """
    names = {module: name for name, module in mmdit.named_modules() if not list(module.children())}
    step_now = 0

    def watched(x: Tensor, sigma: Tensor, step: int) -> Tensor:
        nonlocal step_now
        step_now = step
        return velocity(x, sigma, step)

    def watch(module: nn.Module, _: Any, out: Any) -> None:
        if isinstance(out, Tensor) and not out.isfinite().all():
            raise _Stop(module)

    hooks = [module.register_forward_hook(watch) for module in names]
    try:
        euler(watched, x, sigmas)
    except _Stop as stop:
        name = names[stop.args[0]]
        # Parts of a fused projection run past the hooks, so the whole block is looked through.
        block = ".".join(name.split(".")[:2])
        suspects = mmdit.get_submodule(block).named_parameters(prefix=block)
        bad = [n for n, p in suspects if not p.float().isfinite().all()]
        cause = f": NaN or infinity in {', '.join(bad)}" if bad else ", from finite weights"
        return NonFiniteError(f"{name} returned NaN or infinity at step {step_now}{cause}")
    finally:
        for hook in hooks:
            hook.remove()
    return NonFiniteError("the latents hold NaN or infinity, but no layer does: the sampler overflowed")
