"""Optimisers with moments that can be saved by name, and the learning rate's shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


class Optimizer:
    """Muon for hidden matrices, AdamW for everything else, one learning rate for both.

    matrices: the parameters that Muon updates, usually a network's `units().matrices`. Its update is scaled
    to the RMS of an AdamW update, so the two share a learning rate.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        lr: float,
        *,
        matrices: Iterable[Tensor] = (),
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.01,
    ) -> None:
        self.named = list(named)
        self.lr = lr
        chosen = {id(p) for p in matrices}
        of_muon = [p for _, p in named if id(p) in chosen]
        others = [p for _, p in named if id(p) not in chosen]
        self.parts: list[torch.optim.Optimizer] = []
        if others:
            fused = others[0].is_cuda
            self.parts.append(
                torch.optim.AdamW(others, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
            )
        if of_muon:
            self.parts.append(Muon(of_muon, lr=lr, weight_decay=weight_decay))
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in named}

    def step(self, lr_factor: float) -> None:
        """One update at lr * lr_factor, then clear the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * lr_factor
            part.step()
        self.clear()

    def clear(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, Tensor]:
        """Everything that a step adds to but the parameters: `exp_avg.<parameter>` and the like."""
        return {
            f"{kind}.{self._names[parameter]}": moment
            for part in self.parts
            for parameter, moments in part.state.items()
            for kind, moment in moments.items()
        }

    def moment_shapes(self) -> dict[str, tuple[int, ...]]:
        """What `moments` has after a step: those of AdamW appear with the first."""
        return {
            f"{kind}.{self._names[parameter]}": () if kind == "step" else tuple(parameter.shape)
            for part in self.parts
            for parameter in part.param_groups[0]["params"]
            for kind in MOMENTS[type(part)]
        }

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Take over the `moments` of another optimiser of the same parameters."""
        for part in self.parts:
            packed = part.state_dict()
            for i, parameter in enumerate(part.param_groups[0]["params"]):
                found = {kind: moments[f"{kind}.{self._names[parameter]}"] for kind in MOMENTS[type(part)]}
                # In the parameter's memory layout, which fused updates insist on.
                packed["state"][i] = {
                    kind: moment.clone() if kind == "step" else torch.empty_like(parameter).copy_(moment)
                    for kind, moment in found.items()
                }
            part.load_state_dict(packed)


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by five Newton-Schulz steps (Jordan et al. 2024), for matrices and filters.

    `torch.optim.Muon` does the same one matrix after the other, thousands of small kernels a step; here all
    matrices of one shape go through in one batched product. A filter [O, I, h, w] counts as an O x Ihw
    matrix.
    """

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
        for shape, same in self.shapes.items():
            gradients = [p.grad for p in same if p.grad is not None]
            momenta = [self.state[p]["momentum"] for p in same]
            torch._foreach_lerp_(momenta, gradients, 1 - self.MOMENTUM)
            ahead = torch._foreach_lerp(gradients, momenta, self.MOMENTUM)
            update = orthogonal(torch.stack([g.flatten(1) for g in ahead]), self.STEPS)
            update *= -lr * self.RMS * max(shape) ** 0.5
            torch._foreach_mul_(same, 1 - lr * decay)
            torch._foreach_add_(same, [u.view(p.shape) for u, p in zip(update, same, strict=True)])


MOMENTS: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    Muon: ("momentum",),
}
"""What each optimiser keeps of a parameter."""


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
