"""A prompt to the ids of its pieces, without end token: `tokenizer.json` or `spiece.model`, one class each.

Both only steer a library. Their ids are those of transformers' `T5TokenizerFast` and of its `T5Tokenizer`,
which differ around special tokens, runs of spaces and a prompt that ends in the end token.
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
    """What `T5Tokenizer` needs of a file."""

    vocab_size: int

    def token_to_id(self, token: str) -> int | None: ...

    def ids(self, prompt: str) -> list[int]: ...

    def ended(self, ids: list[int], eos_id: int) -> list[int]: ...


class FastPieces:
    """`tokenizer.json`, which brings its own rules for special tokens."""

    def __init__(self, tokenizer: Tokenizer, eos: str) -> None:
        """Raises ValueError when `tokenizer` does not end a prompt in `eos` and do nothing else to it."""
        # Cutting and padding are done by the caller, where a warning can be given.
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
    """A token that is found in the prompt as it is written. Fields as in `added_tokens_decoder`."""

    content: str
    lstrip: bool = False
    """Whether the white space before it is dropped."""
    rstrip: bool = False


class SentencePieces:
    """`spiece.model`, read by the `sentencepiece` package; special tokens are cut out of the prompt first."""

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
        """The last three are keys of `tokenizer_config.json`; `special` are tokens that `added` may lack.

        `extra_ids`: how many `<extra_id_i>` follow the pieces of the model, the last one first.
        `legacy`: True leaves the space that starts a text to sentencepiece, which puts one after every
        special token, too; False puts one before the prompt alone, and only if `add_prefix_space`.
        Raises ValueError when one of `special` has no id or `added` contradicts the model, and
        RuntimeError when the model is damaged.
        """
        # Imported here: most folders have a tokenizer.json.
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
                raise ValueError(f"special token {name!r} has no id")
            self._ids.setdefault(name, known_id)
            self._added.setdefault(name, AddedToken(name))
        self.vocab_size = 1 + max(len(self._model) - 1, *self._ids.values())
        # The longest comes first, as one token may start another.
        literal = sorted(self._added, key=len, reverse=True)
        self._literal = re.compile("(" + "|".join(map(re.escape, literal)) + ")")

    def token_to_id(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        piece_id: int = self._model.piece_to_id(token)  # the unknown piece's when there is none
        return piece_id if self._model.id_to_piece(piece_id) == token else None

    def ids(self, prompt: str) -> list[int]:
        if not self._legacy and prompt:
            prompt = (SPACE if self._add_prefix_space else "") + prompt.replace(SPACE, " ")
        pieces = self._pieces(prompt)
        if not self._legacy and pieces[:1] == [SPACE] and pieces[1:] and pieces[1] in self._added:
            del pieces[0]
        return [
            self._ids[piece] if piece in self._ids else self._model.piece_to_id(piece) for piece in pieces
        ]

    def ended(self, ids: list[int], eos_id: int) -> list[int]:
        return ids if ids[-1:] == [eos_id] else [*ids, eos_id]

    def _pieces(self, prompt: str) -> list[str]:
        # re.split with a group: even places are text, odd ones the special tokens between.
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
        # sentencepiece drops spaces at the start of a text, so something is put before them and taken off.
        return self._model.encode(self._unk + text, out_type=str)[self._unk_size :]
