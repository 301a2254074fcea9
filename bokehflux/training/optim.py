"""Optimisers with moments that can be saved by name, and the learning rate's shape."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


class Optimizer:
    """Muon for hidden matrices, AdamW for everything else, one learning rate for both.

    matrices: the parameters that Muon updates, usually a network's `units().matrices`. Its update is scaled
    to the RMS of an AdamW update, so the two share a learning rate.
    prodigy: in AdamW's place, Prodigy (Mishchenko and Defazio 2023), which finds the learning rate itself;
    `lr` is then a factor of it, usually 1. Raises ValueError where it is not installed, and for sharded
    parameters, of which it would find another rate on every process.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        lr: float,
        *,
        matrices: Iterable[Tensor] = (),
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
        prodigy: bool = False,
    ) -> None:
        self.named = list(named)
        self.lr = lr
        chosen = {id(p) for p in matrices}
        of_muon = [p for _, p in named if id(p) in chosen]
        others = [p for _, p in named if id(p) not in chosen]
        self.parts: list[torch.optim.Optimizer] = []
        if others and prodigy:
            self.parts.append(_prodigy(others, lr, betas, weight_decay))
        elif others:
            self.parts.append(
                torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
            )
        if of_muon:
            self.parts.append(Muon(of_muon, lr=lr, weight_decay=weight_decay))
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in named}

    def step(self, lr_factor: float, refused: Tensor | None = None) -> None:
        """One update at lr * lr_factor, then clear the gradients.

        refused: a scalar on the parameters' device; at 1 nothing but the gradients changes, at 0 it counts
        as None. The host reads it for Prodigy only, which reads of its own every step.
        """
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * lr_factor
            if type(part).__name__ != "Prodigy":
                part.found_inf = refused  # type: ignore[attr-defined]  # AdamW calls it so
                part.step()
            elif refused is None or not refused:
                part.step()
            part.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, Tensor]:
        """Everything that a step adds to but the parameters: `exp_avg.<parameter>` and the like."""
        found = {
            f"{kind}.{self._names[parameter]}": torch.as_tensor(moment).expand(_shape(kind, parameter))
            for part in self.parts
            for parameter, moments in part.state.items()
            for kind, moment in moments.items()
        }
        for part in self.parts:
            for kind in _of_group(part):
                found[kind] = torch.tensor(part.param_groups[0][kind], dtype=torch.float64)
        return found

    def moment_shapes(self) -> dict[str, tuple[int, ...]]:
        """What `moments` has after a step: those of AdamW appear with the first."""
        shapes = {
            f"{kind}.{self._names[parameter]}": _shape(kind, parameter)
            for part in self.parts
            for parameter in part.param_groups[0]["params"]
            for kind in MOMENTS[type(part).__name__]
        }
        return shapes | {kind: () for part in self.parts for kind in _of_group(part)}

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Take over the `moments` of another optimiser of the same parameters."""
        for part in self.parts:
            packed = part.state_dict()
            for i, parameter in enumerate(part.param_groups[0]["params"]):
                kinds = MOMENTS[type(part).__name__]
                found = {kind: moments[f"{kind}.{self._names[parameter]}"] for kind in kinds}
                # In the parameter's memory layout, which fused updates insist on.
                packed["state"][i] = {
                    kind: moment.clone() if kind in FLAT else torch.empty_like(parameter).copy_(moment)
                    for kind, moment in found.items()
                }
            for kind in _of_group(part):
                packed["param_groups"][0][kind] = moments[kind].item()
            part.load_state_dict(packed)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by five Newton-Schulz steps (Jordan et al. 2024), for matrices and filters.

    `torch.optim.Muon` does the same one matrix after the other, thousands of small kernels a step; here all
    matrices of one shape go through in one batched product. A filter [O, I, h, w] counts as an O x Ihw
    matrix.
    """

    found_inf: Tensor | None = None
    """At 1 a step changes nothing, as with `torch.optim.AdamW`."""
    MOMENTUM = 0.95
    STEPS = ((3.4445, -4.7750, 2.0315),) * 5
    RMS = 0.2
    """Root mean square of an AdamW update, to which updates are scaled (Liu et al. 2025)."""

    def __init__(self, params: Sequence[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.shapes: dict[tuple[int, int], list[Tensor]] = {}
        for p in params:
            self.shapes.setdefault((p.shape[0], p[0].numel()), []).append(p)
            self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        share = 1.0 if self.found_inf is None else 1 - self.found_inf
        for shape, same in self.shapes.items():
            kept = [self.state[p]["momentum"] for p in same]
            momenta = torch.stack([m.flatten(1) for m in kept])
            gradients = torch.stack([p.grad.flatten(1) for p in same if p.grad is not None])
            if self.found_inf is not None:
                # Momenta that move towards themselves stay where they are.
                gradients = torch.where(self.found_inf.bool(), momenta, gradients)
            momenta.lerp_(gradients, 1 - self.MOMENTUM)
            torch._foreach_copy_(kept, [m.view(p.shape) for m, p in zip(momenta, same, strict=True)])
            update = orthogonal(gradients.lerp(momenta, self.MOMENTUM), self.STEPS)
            update *= -lr * self.RMS * max(shape) ** 0.5 * share
            torch._foreach_mul_(same, 1 - lr * decay * share)
            torch._foreach_add_(same, [u.view(p.shape) for u, p in zip(update, same, strict=True)])


MOMENTS: dict[str, tuple[str, ...]] = {
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Muon": ("momentum",),
    "Prodigy": ("step", "exp_avg", "exp_avg_sq", "s", "p0"),
}
"""What each optimiser keeps of a parameter."""
FLAT = ("step", "s", "p0")
"""Moments of another shape than their parameter's."""


def _of_group(part: torch.optim.Optimizer) -> tuple[str, ...]:
    """Numbers that an optimiser keeps of all its parameters together."""
    return ("d", "d_max", "d_numerator", "k") if type(part).__name__ == "Prodigy" else ()


def _shape(kind: str, parameter: Tensor) -> tuple[int, ...]:
    if kind in FLAT:
        return () if kind == "step" else (parameter.numel(),)
    return tuple(parameter.shape)


def prodigy_class() -> Callable[..., torch.optim.Optimizer]:
    """The optimiser of Mishchenko and Defazio. Raises ValueError where it is not installed."""
    try:
        from prodigyopt import Prodigy
    except ImportError:
        raise ValueError(
            "optimizer = \"prodigy\" needs the package prodigyopt: pip install 'bokehflux[prodigy]'"
        ) from None
    return Prodigy


def _prodigy(
    parameters: Sequence[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    from torch.distributed.tensor import DTensor

    make = prodigy_class()
    if any(isinstance(p, DTensor) for p in parameters):
        raise ValueError("Prodigy takes no sharded parameters: use AdamW")
    with contextlib.redirect_stdout(None):  # it announces weight decay there
        return make(
            parameters, lr=lr, betas=betas, weight_decay=weight_decay,
            use_bias_correction=True, safeguard_warmup=True,
        )  # fmt: skip


def orthogonal(x: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """[n, a, b] -> float32 matrices with the same singular vectors and singular values near 1."""
    tall = x.shape[1] > x.shape[2]
    # bfloat16 is enough for an update, and what the matrix units are fastest at; a CPU is not.
    x = x.to(torch.bfloat16) if x.is_cuda else x
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in steps:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).float()


def trapezoid(done: float, *, warmup: float = 0.03, decay: float = 0.5, floor: float = 0.02) -> float:
    """Learning-rate factor when a share `done` of the run is over.

    Linear warm-up over the first share, flat, linear decay to `floor` over the last.
    """
    return max(floor, min(1.0, done / warmup, (1 - done) / decay))


def cosine(done: float, *, warmup: float) -> float:
    """Learning-rate factor: linear warm-up over the first share, beginning at 0, then half a cosine to 0."""
    return done / warmup if done < warmup else 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))
