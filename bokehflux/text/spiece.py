"""A sentencepiece unigram model (`spiece.model`) as a `Tokenizer`, for folders without `tokenizer.json`.

The file is a protocol buffer of which a few fields matter, so it is read here: the `sentencepiece` package
does not give out the character map, and treats runs of spaces and special tokens unlike `tokenizer.json`.
Field numbers: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_TYPE_NORMAL, _TYPE_UNKNOWN, _TYPE_CONTROL = 1, 2, 3
_TRAINER_MODEL_TYPE, _MODEL_UNIGRAM = 3, 1
_NORMALIZER_CHARSMAP = 2


def unigram_tokenizer(model: bytes, *, eos: str, num_extra_ids: int, legacy: bool) -> Tokenizer:
    """Tokenizer of the serialised `model`, with `num_extra_ids` sentinels `<extra_id_i>` after its pieces.

    `legacy` is the key of that name in `tokenizer_config.json`: True puts a space before every stretch of
    text between special tokens, False before the prompt only. Raises ValueError when `model` is no unigram.
    """
    pieces: list[tuple[str, float, int]] = []
    charsmap, model_type = b"", _MODEL_UNIGRAM
    try:
        for field, value in _fields(model):
            if field == _PIECES:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(_PIECE_SCORE, bytes(4)))[0]
                kind = piece.get(_PIECE_TYPE, _TYPE_NORMAL)
                pieces.append((piece[_PIECE_TEXT].decode("utf-8"), score, kind))
            elif field == _TRAINER:
                model_type = dict(_fields(value)).get(_TRAINER_MODEL_TYPE, _MODEL_UNIGRAM)
            elif field == _NORMALIZER:
                charsmap = dict(_fields(value)).get(_NORMALIZER_CHARSMAP, b"")
    except (IndexError, KeyError, AttributeError, TypeError, struct.error, UnicodeDecodeError) as error:
        raise ValueError("not a sentencepiece model, or a damaged one") from error
    unknown = [i for i, (_, _, kind) in enumerate(pieces) if kind == _TYPE_UNKNOWN]
    if model_type != _MODEL_UNIGRAM or len(unknown) != 1:
        raise ValueError(
            f"expected a unigram model (type {_MODEL_UNIGRAM}) with one unknown piece, "
            f"found type {model_type} with {len(unknown)}"
        )

    sentinels = [f"<extra_id_{i}>" for i in reversed(range(num_extra_ids))]
    scores = [(text, score) for text, score, _ in pieces] + [(text, 0.0) for text in sentinels]
    tokenizer = Tokenizer(Unigram(scores, unk_id=unknown[0], byte_fallback=False))
    special = [text for text, _, kind in pieces if kind in (_TYPE_UNKNOWN, _TYPE_CONTROL)] + sentinels
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    # T5's own: its character map, no spaces at the end, runs of spaces to one.
    steps = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    charmap_steps = [normalizers.Precompiled(charsmap)] if charsmap else []
    tokenizer.normalizer = normalizers.Sequence([*charmap_steps, *steps])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if legacy else "first")
    tokenizer.post_processor = append_token(eos, tokenizer.token_to_id(eos))
    return tokenizer


def append_token(token: str, token_id: int) -> processors.PostProcessor:
    """Every prompt ends in `token`."""
    return processors.TemplateProcessing(single=["$A", token], special_tokens=[(token, token_id)])


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a serialised message; varints as int, anything else as bytes."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def take(size: int) -> bytes:
        nonlocal position
        if position + size > len(message):
            raise IndexError("message ends inside a field")
        position += size
        return message[position - size : position]

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
        elif wire_type in (1, 5):
            yield number, take(8 if wire_type == 1 else 4)
        elif wire_type == 2:
            yield number, take(varint())
        else:
            raise IndexError(f"wire type {wire_type}")
