"""Find where a run went wrong: the step and the layer that first produced NaN or infinity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bokehflux.models.mmdit import MMDiT
from bokehflux.sampling.samplers import Velocity


class NonFiniteError(FloatingPointError):
    """A network returned NaN or infinity; the message names the step, the layer and any bad weights."""


class _Stop(Exception):
    pass


@torch.inference_mode()
def explain_nonfinite(
    mmdit: MMDiT, velocity: Velocity, sample: Callable[[Velocity], object]
) -> NonFiniteError:
    """Repeat a run whose latents are not finite, watch every layer, and return the error to raise.

    sample: the run, given the velocity that it follows. Called only after such a run: a run that goes well
    pays for one check, of its final latents.
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
        sample(watched)
    except _Stop as stop:
        name = names[stop.args[0]]
        # A fused projection multiplies by its weights without calling its layer, so no hook sees it: search
        # all parameters of the block. Modulations and the adapter's values were computed before the first
        # step: where the block's are finite, search the others.
        block = ".".join(name.split(".")[:2])
        bad = _not_finite(mmdit.get_submodule(block), block) or _not_finite(mmdit)
        cause = f": NaN or infinity in {', '.join(bad)}" if bad else ", from finite weights"
        return NonFiniteError(f"{name} returned NaN or infinity at step {step_now}{cause}")
    finally:
        for hook in hooks:
            hook.remove()
    return NonFiniteError(
        "the latents hold NaN or infinity, but no layer returned any: the sampler overflowed"
    )


def _not_finite(module: nn.Module, prefix: str = "") -> list[str]:
    """The names of parameters that hold NaN or infinity."""
    return [n for n, p in module.named_parameters(prefix=prefix) if not p.float().isfinite().all()]
