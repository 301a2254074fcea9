"""Cut a prompt into T5's pieces and look up their ids, from a `tokenizer.json` or a `spiece.model`.

One class for each file, both thin layers over a library. Their ids equal those of transformers'
`T5TokenizerFast` and `T5Tokenizer`, which differ around special tokens, runs of spaces, and a prompt that
ends in the end token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenizers import Tokenizer

SPACE = "▁"
"""How sentencepiece writes a space."""
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
"""`normalizer_spec {add_dummy_prefix: false}`. Serialised protocol buffers are merged by concatenation:
https://protobuf.dev/programming-guides/encoding/#last-one-wins"""


class Pieces(Protocol):
    """What `T5Tokenizer` needs of a tokenizer file."""

    vocab_size: int

    def token_to_id(self, token: str) -> int | None:
        """None: the vocabulary lacks the token."""

    def ids(self, prompt: str) -> list[int]:
        """The pieces of a prompt, without end token and of any number."""

    def ended(self, ids: list[int], eos_id: int) -> list[int]:
        """The same pieces with their end token."""


class FastPieces:
    """A `tokenizer.json`, which holds its own rules for special tokens."""

    def __init__(self, tokenizer: Tokenizer, eos: str) -> None:
        """Raises ValueError unless `tokenizer` adds `eos` to the end of a prompt and nothing else."""
        # The caller cuts and pads, since it can warn of a prompt that is too long.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        if tokenizer.encode("").ids != [tokenizer.token_to_id(eos)]:
            raise ValueError(f"expected a tokenizer that ends every prompt in {eos!r}")

    def token_to_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def ids(self, prompt: str) -> list[int]:
        return self._tokenizer.encode(prompt, add_special_tokens=False).ids

    def ended(self, ids: list[int], eos_id: int) -> list[int]:
        return [*ids, eos_id]


@dataclass(frozen=True)
class AddedToken:
    """A token that is searched for in the prompt as written. Fields as in `added_tokens_decoder`."""

    content: str
    lstrip: bool = False
    """Whether the white space before it is dropped."""
    rstrip: bool = False
    """Whether the white space after it is dropped."""


class SentencePieces:
    """A `spiece.model`, read by the package `sentencepiece`; special tokens are cut out beforehand."""

    def __init__(
        self,
        model: bytes,
        *,
        added: Mapping[int, AddedToken],
        special: Sequence[str],
        unk: str,
        extra_ids: int,
        legacy: bool,
        add_prefix_space: bool,
    ) -> None:
        """`extra_ids`, `legacy` and `add_prefix_space` are keys of `tokenizer_config.json`.

        `special`: tokens that `added` may lack. `extra_ids`: how many `<extra_id_i>` follow the model's
        pieces, the last one first. `legacy`: True lets sentencepiece add the space that starts a text, and it
        adds one after every special token as well; False adds one before the prompt alone, if
        `add_prefix_space`.
        Raises ValueError when one of `special` has no id or `added` contradicts the model, and
        RuntimeError when the model is damaged.
        """
        # Imported here, since most folders have a tokenizer.json and never need it.
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor()
        self._model.load_from_serialized_proto(model if legacy else model + _NO_DUMMY_PREFIX)
        self._legacy, self._add_prefix_space = legacy, add_prefix_space
        self._unk, self._unk_size = unk, len(self._model.encode(unk, out_type=str))

        for token_id, token in added.items():
            if token_id < len(self._model) and self._model.id_to_piece(token_id) != token.content:
                found = self._model.id_to_piece(token_id)
                raise ValueError(
                    f"its piece {token_id} is {found!r}, not {token.content!r} as the config says"
                )
        last = len(self._model) + extra_ids - 1
        by_id = {last - i: AddedToken(f"<extra_id_{i}>", lstrip=True, rstrip=True) for i in range(extra_ids)}
        by_id |= added
        self._added = {token.content: token for token in by_id.values()}
        self._ids = {token.content: token_id for token_id, token in by_id.items()}
        for name in special:
            known_id = self.token_to_id(name)
            if known_id is None:
                raise ValueError(f"special token {name!r} has no id in the model or in tokenizer_config.json")
            self._ids.setdefault(name, known_id)
            self._added.setdefault(name, AddedToken(name))
        self.vocab_size = 1 + max(len(self._model) - 1, *self._ids.values())
        # The longest first: one token may be the beginning of another.
        literal = sorted(self._added, key=len, reverse=True)
        self._literal = re.compile("(" + "|".join(map(re.escape, literal)) + ")")

    def token_to_id(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        piece_id: int = self._model.piece_to_id(token)  # the unknown piece's id for an unknown token
        return piece_id if self._model.id_to_piece(piece_id) == token else None

    def ids(self, prompt: str) -> list[int]:
        if not self._legacy and prompt:
            prompt = (SPACE if self._add_prefix_space else "") + prompt.replace(SPACE, " ")
        pieces = self._pieces(prompt)
        # A prompt that begins with a special token has no space in front of it.
        if not self._legacy and pieces[:1] == [SPACE] and pieces[1:] and pieces[1] in self._added:
            del pieces[0]
        return [
            self._ids[piece] if piece in self._ids else self._model.piece_to_id(piece) for piece in pieces
        ]

    def ended(self, ids: list[int], eos_id: int) -> list[int]:
        return ids if ids[-1:] == [eos_id] else [*ids, eos_id]

    def _pieces(self, prompt: str) -> list[str]:
        # re.split with a group: text at even places, the special tokens between at odd places.
        parts = self._literal.split(prompt)
        for i in range(1, len(parts), 2):
            token = self._added[parts[i]]
            if token.lstrip:
                parts[i - 1] = parts[i - 1].rstrip()
            if token.rstrip:
                parts[i + 1] = parts[i + 1].lstrip()
        pieces: list[str] = []
        for i, part in enumerate(parts):
            if i % 2:
                pieces.append(part)
            elif part:
                pieces.extend(self._encode(part))
        return pieces

    def _encode(self, text: str) -> list[str]:
        if self._legacy or not text.startswith((SPACE, " ")):
            return self._model.encode(text, out_type=str)
        # sentencepiece drops spaces at the start of a text: put a token before them, then drop its pieces.
        return self._model.encode(self._unk + text, out_type=str)[self._unk_size :]
