"""A photograph as keys and values: what is stored, what is read, and that it can be learned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bokehflux.attention import Kept, OnReference, Plain, ReferenceKeys
from bokehflux.conditioning import Conditioning
from bokehflux.configs import ReferenceConfig
from bokehflux.models.adapter import BokehCondition, init_adapter
from bokehflux.models.embeddings import RopeTable, rope_table
from bokehflux.models.reference import ReferenceAdapter, reference_ids
from bokehflux.sampling.latents import LatentGrid, position_ids
from bokehflux.sampling.reference import read_reference
from bokehflux.training.batches import Draws
from bokehflux.training.loop import Step
from bokehflux.training.reference import Pairs, reference_loss
from bokehflux.weights.files.checkpoint import CheckpointError
from bokehflux.weights.load import load_network
from bokehflux.weights.networks import reference_for
from bokehflux.weights.save import save_network
from tests.tiny import MMDIT, TXT_LENGTH, tiny_mmdit

IDS = position_ids(LatentGrid(height_px=32, width_px=32), TXT_LENGTH)
CONFIG = ReferenceConfig(rank=4, width=8)


def ropes() -> tuple[RopeTable, RopeTable]:
    """Those of targets, then those of photographs."""
    ids = (IDS, reference_ids(IDS, TXT_LENGTH))
    return tuple(rope_table(i, MMDIT.axes_dim, MMDIT.theta) for i in ids)  # type: ignore[return-value]


def text(rows: int) -> Conditioning:
    seeded = torch.Generator().manual_seed(3)
    return Conditioning(
        txt=torch.randn(rows, TXT_LENGTH, MMDIT.txt_dim, generator=seeded),
        pooled=torch.randn(rows, MMDIT.pooled_dim, generator=seeded),
    )


def adapter(*, started: bool = False) -> ReferenceAdapter:
    torch.manual_seed(2)
    made = ReferenceAdapter(CONFIG, MMDIT)
    if started:
        init_adapter(made)
    return made


def read(made: ReferenceAdapter, photo: Tensor, level: float, rope: RopeTable) -> list[Kept]:
    rows = len(photo)
    keys = read_reference(
        tiny_mmdit(), made, photo, text(rows), BokehCondition.of([level] * rows), rope, torch.ones(rows)
    )
    return [keys[i] for i in range(MMDIT.num_blocks)]


def test_reference_tokens_stand_apart_and_text_does_not() -> None:
    apart = reference_ids(IDS, TXT_LENGTH)
    assert torch.equal(apart[:TXT_LENGTH], IDS[:TXT_LENGTH])
    assert torch.equal(apart[TXT_LENGTH:, 1:], IDS[TXT_LENGTH:, 1:])
    assert (apart[TXT_LENGTH:, 0] == 1).all() and (IDS[:, 0] == 0).all()


def test_what_is_stored_is_what_a_plain_row_computes() -> None:
    """At the start the adapter does nothing: keys and values are those of an ordinary row, image alone."""
    photo, (_, rope), seen = torch.randn(2, 4, 64), ropes(), {}
    mmdit = tiny_mmdit()
    for i, block in enumerate(mmdit.blocks):
        block.attention.register_forward_pre_hook(lambda _, args, i=i: seen.update({i: args[2:]}))
    shown = text(2)
    levels = BokehCondition.of([12.0, 12.0])
    mmdit(photo, shown.txt, shown.pooled, torch.zeros(2), torch.ones(2), rope, Plain(), levels)
    stored = read(adapter(started=True), photo, 12.0, rope)
    for i, kept in enumerate(stored):
        k, v = kept.k, kept.v
        assert k is not None and v is not None
        assert k.shape == v.shape == (2, 4, MMDIT.num_heads, MMDIT.head_dim)
        torch.testing.assert_close(k, seen[i][0][:, TXT_LENGTH:])
        torch.testing.assert_close(v, seen[i][1][:, TXT_LENGTH:])


@pytest.mark.parametrize("change", ["updates", "level", "place", "photo"])
def test_everything_about_a_photograph_shows_in_its_keys(change: str) -> None:
    photo, (other_place, rope) = torch.randn(1, 4, 64), ropes()
    before = read(adapter(started=True), photo, 0.0, rope)
    after = read(
        adapter(started=change != "updates"),
        photo + (change == "photo"),
        20.0 if change == "level" else 0.0,
        other_place if change == "place" else rope,
    )
    assert before[-1].k is not None and after[-1].k is not None
    assert not torch.allclose(before[-1].k, after[-1].k, atol=1e-4)


def test_a_target_reads_the_photograph_and_its_own_tokens() -> None:
    torch.manual_seed(4)
    mmdit, x, shown = tiny_mmdit(), torch.randn(2, 4, 64), text(2)

    def velocity(v: Tensor) -> Tensor:
        keys = ReferenceKeys()
        for i in range(MMDIT.num_blocks):
            keys[i] = Kept(torch.zeros_like(v), v)
        args = (shown.txt, shown.pooled, torch.full((2,), 0.5), torch.ones(2), ropes()[0])
        return mmdit(x, *args, OnReference(keys=keys), BokehCondition.of([0.0, 9.0]))

    v = torch.randn(1, 3, MMDIT.num_heads, MMDIT.head_dim)
    assert not torch.allclose(velocity(v), velocity(2 * v), atol=1e-4)
    both = velocity(v.repeat(1, 2, 1, 1)), velocity(v.repeat(2, 1, 1, 1))
    torch.testing.assert_close(both[1], velocity(v))  # one photograph for all rows, or one each
    assert not torch.allclose(both[0], velocity(v), atol=1e-4), "twice as many keys weigh more"


@dataclasses.dataclass
class TwoScenes:
    """Render 0 tells the scene, render 1 the level, too: only the photograph says what the target shows."""

    latent: Tensor = dataclasses.field(default_factory=lambda: torch.randn(2, 2, 4, 64))
    device = torch.device("cpu")
    num_scenes = num_renders = 2

    def latents(self, scene: Tensor, render: Tensor) -> Tensor:
        return self.latent[scene, render]

    def levels(self, scene: Tensor, render: Tensor) -> Tensor:
        return 20.0 * render

    def text(self, scene: Tensor, drop: Tensor, draws: Draws) -> Conditioning:
        return Conditioning(
            txt=torch.ones(len(scene), TXT_LENGTH, MMDIT.txt_dim),
            pooled=torch.ones(len(scene), MMDIT.pooled_dim),
        )

    def null_text(self) -> Conditioning:
        raise AssertionError("nothing is guided")


def test_the_adapter_learns_and_the_base_stays() -> None:
    mmdit, made = tiny_mmdit(), adapter(started=True)
    before = {name: t.clone() for name, t in mmdit.state_dict().items()}
    loss = reference_loss(mmdit, made, *ropes(), Pairs(caption_dropout=0.0), TwoScenes())
    optimizer = torch.optim.Adam(made.parameters(), 3e-2)

    def error(step: int, batch: int) -> Tensor:
        return loss(Step(step, 0.0, Draws.of_step(0, step, batch, torch.device("cpu"))))[0]

    start = float(error(100, 64).detach())
    for number in range(60):
        error(number, 16).backward()
        if not number:
            live = {n for n, p in made.named_parameters() if p.grad is not None}
            assert live == {n for n, _ in made.trainable()} and len(live) == 8 * MMDIT.num_blocks - 4
            assert all(p.grad.any() for n, p in made.trainable() if ".up." in n)
        optimizer.step()
        optimizer.zero_grad()
    assert float(error(100, 64).detach()) < 0.97 * start
    assert all(torch.equal(t, before[name]) for name, t in mmdit.state_dict().items())


@pytest.mark.parametrize(("sharp", "at_first"), [(0.0, 0.5), (0.5, 0.75), (1.0, 1.0)])
def test_photographs_are_the_sharpest_or_any(sharp: float, at_first: float) -> None:
    asked: list[Tensor] = []

    class Watched(TwoScenes):
        def latents(self, scene: Tensor, render: Tensor) -> Tensor:
            asked.append(render)
            return super().latents(scene, render)

    how = Pairs(sharp=sharp, targets=2)
    loss = reference_loss(tiny_mmdit(), adapter(), *ropes(), how, Watched())
    loss(Step(0, 0.0, Draws.of_step(0, 0, 400, torch.device("cpu"))))
    photos, targets = (asked[0].view(-1, 2) == 0).float().mean(0).tolist()
    assert photos == pytest.approx(at_first, abs=0 if sharp == 1 else 0.1)
    assert targets == pytest.approx(0.5, abs=0.1)


def test_its_file_is_read_back_and_only_by_its_model(tmp_path: Path) -> None:
    made, row = adapter(), reference_for(MMDIT)
    save_network(row, tmp_path, CONFIG, made.state_dict())
    again = load_network(row, tmp_path, dtype=torch.float32)
    assert again.config == CONFIG and not isinstance(again, nn.ModuleDict)
    assert all(torch.equal(t, made.state_dict()[name]) for name, t in again.state_dict().items())
    wider = dataclasses.replace(MMDIT, hidden_size=64, axes_dim=(8, 12, 12))
    with pytest.raises(CheckpointError, match="attn_hidden_dim"):
        load_network(reference_for(wider), tmp_path)
