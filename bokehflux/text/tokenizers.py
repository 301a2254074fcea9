"""Prompts to token ids, for CLIP and T5, from the tokenizer folders of a model snapshot.

Ids equal those of transformers 4.53 `CLIPTokenizer` (its Python one, without `ftfy`) and `T5TokenizerFast`, the
classes that the published FLUX pipeline uses. `ftfy`, where installed, makes transformers repair mis-decoded
text before CLIP sees it; ids then depend on the machine, so this module never does it.
"""

from __future__ import annotations

import json
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers.models import BPE
from torch import Tensor

from bokehflux.text.sentencepiece import unigram_tokenizer

log = logging.getLogger(__name__)


class TokenizerError(ValueError):
    """A tokenizer folder lacks a file, or a file in it cannot be used."""


class CLIPTokenizer:
    """Lower-case byte-level BPE: `<|startoftext|>`, the prompt, `<|endoftext|>`, padding."""

    def __init__(
        self, vocab: dict[str, int], merges: list[tuple[str, str]], special: SpecialTokens, length: int
    ) -> None:
        self.length = length
        self._vocab = vocab | special.added
        self._unk_id = self._vocab[special.unk]
        self._bos_id = self._vocab[special.bos]
        self.eos_id = self._vocab[special.eos]
        self.pad_id = self._vocab[special.pad]
        # Longest first: of two tokens that start at the same character the longer one wins.
        literal = sorted({special.bos, special.eos, special.unk, special.pad, *special.added}, key=len, reverse=True)
        self._special = frozenset(literal)
        self._split_special = re.compile("(" + "|".join(map(re.escape, literal)) + ")")
        self._bpe = BPE(vocab=vocab, merges=merges, unk_token=special.unk, end_of_word_suffix="</w>")

    @classmethod
    def from_folder(cls, path: str | Path) -> CLIPTokenizer:
        """Read `vocab.json`, `merges.txt`, `tokenizer_config.json` and, if present, `special_tokens_map.json`.

        Raises TokenizerError when one is missing or does not make sense.
        """
        folder = Path(path)
        config = _read_json(folder / "tokenizer_config.json")
        vocab = _read_json(folder / "vocab.json")
        # The first line is a version comment; the bound is the number of merges of the published vocabulary.
        lines = _read(folder / "merges.txt").decode("utf-8", errors="replace").strip().split("\n")[1:48895]
        try:
            merges = [(left, right) for left, right in (line.split() for line in lines)]
            return cls(vocab, merges, SpecialTokens.read(folder, config), int(config["model_max_length"]))
        except (KeyError, TypeError, ValueError, AttributeError, Exception) as error:
            raise TokenizerError(f"{error}") from error

    def __call__(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        raise NotImplementedError
