"""Turn prompts into `Conditioning` with both tokenizers and both text encoders, as FLUX does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bokehflux.conditioning import Conditioning, onto
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.t5 import T5Encoder
from bokehflux.models.units import Network
from bokehflux.text.tokenizers import CLIPTokenizer, T5Tokenizer


@dataclass(frozen=True, kw_only=True)
class TextEncoders:
    """The text half of a model; both encoders read the same prompts."""

    t5: T5Encoder
    clip: CLIPTextEncoder
    t5_tokenizer: T5Tokenizer
    clip_tokenizer: CLIPTokenizer
    txt_length: int
    """How many T5 tokens a prompt is padded or cut to. CLIP's number comes from its tokenizer's files."""

    @property
    def networks(self) -> tuple[Network, ...]:
        return self.t5, self.clip

    def unknown_words(self, prompt: str) -> list[str]:
        """Words that a small vocabulary lacks: see `T5Tokenizer.unknown_words`."""
        return self.t5_tokenizer.unknown_words(prompt)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], txt_length: int | None = None) -> Conditioning:
        """B prompts -> `txt` [B, T, t5 width] and `pooled` [B, clip width], in the encoders' dtype.

        txt_length: T, the number of T5 tokens; None takes the model's own. Raises ValueError for a prompt
        that is not valid Unicode and for a T below 2, TypeError for a string in place of a list.
        """
        length = self.txt_length if txt_length is None else txt_length
        t5_ids = self.t5_tokenizer(prompts, length)  # [B, T]
        clip_ids = self.clip_tokenizer(prompts)  # [B, 77] for the published CLIP
        return Conditioning(
            txt=self.t5(onto(t5_ids, self.t5.shared.weight.device)),
            pooled=self.clip(onto(clip_ids, self.clip.text_model.final_layer_norm.weight.device)),
        )
