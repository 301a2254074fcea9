"""Find where a run went wrong: the step and the layer that first produced NaN or infinity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bokehflux.models.mmdit import MMDiT
from bokehflux.sampling.samplers import Velocity, euler


class NonFiniteError(FloatingPointError):
    """A network returned NaN or infinity; the message names the step, the layer and any bad weights."""


class _Stop(Exception):
    pass


@torch.inference_mode()
def explain_nonfinite(mmdit: MMDiT, velocity: Velocity, x: Tensor, sigmas: Tensor) -> NonFiniteError:
    """Repeat a run whose latents are not finite, watch every layer, and return the error to raise.

    Called only after such a run: a run that goes well pays for one check, of its final latents.
    """
    # Leaves only, so that the message names a layer and not the whole block.
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
        # A fused projection multiplies by its weights without calling its layer, so no hook sees it: search
        # all parameters of the block.
        block = ".".join(name.split(".")[:2])
        suspects = mmdit.get_submodule(block).named_parameters(prefix=block)
        bad = [n for n, p in suspects if not p.float().isfinite().all()]
        cause = f": NaN or infinity in {', '.join(bad)}" if bad else ", from finite weights"
        return NonFiniteError(f"{name} returned NaN or infinity at step {step_now}{cause}")
    finally:
        for hook in hooks:
            hook.remove()
    return NonFiniteError(
        "the latents hold NaN or infinity, but no layer returned any: the sampler overflowed"
    )
