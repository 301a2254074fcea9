"""CLIP's view of a prompt: cleaned, cut into words, each spelled in the byte alphabet of the vocabulary.

Follows OpenAI's tokenizer as transformers runs it without `ftfy`: control characters vanish, ideographs stand
alone, text is composed (NFC) and lower-cased. Only the standard library decides what a letter is.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

START = "<|startoftext|>"
END = "<|endoftext|>"

_LITERAL = re.compile(rf"{re.escape(START)}|{re.escape(END)}|'(?:s|t|re|ve|m|ll|d)", re.IGNORECASE)
_IDEOGRAPHS = (
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0x2F800, 0x2FA1F),
)  # fmt: skip
_YPOGEGRAMMENI = "\u0345"
"""A mark whose capital is a letter: the published, case-insensitive pattern drops it wherever it stands."""


def _spell_bytes() -> dict[int, str]:
    # Bytes that print stand for themselves, the others for the characters from U+0100 on, in order.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_ALPHABET = _spell_bytes()
"""The character that stands for each byte."""


def words(text: str) -> Iterator[str]:
    """Words of `text` in order: markers, English endings, runs of letters, single digits, other signs.

    Each comes in the byte alphabet; the markers, all ASCII, look the same in it.
    """
    for chunk in _clean(text).split():
        for word in _split(chunk.lower()):
            yield "".join(BYTE_ALPHABET[byte] for byte in word.encode("utf-8"))


def _clean(text: str) -> str:
    kept = []
    for char in text:
        category = unicodedata.category(char)
        if char in "\t\n\r" or category == "Zs":
            kept.append(" ")
        elif category[0] == "C" or char == "\N{REPLACEMENT CHARACTER}":
            continue
        elif any(first <= ord(char) <= last for first, last in _IDEOGRAPHS):
            kept.append(f" {char} ")
        else:
            kept.append(char)
    return unicodedata.normalize("NFC", "".join(kept))


def _split(chunk: str) -> Iterator[str]:
    kinds = [_kind(char) for char in chunk]
    start = 0
    while start < len(chunk):
        literal = _LITERAL.match(chunk, start)
        if literal is not None:
            end = literal.end()
        else:
            end = start + 1
            # A digit is a word of its own; letters and other signs run on.
            while kinds[start] != "N" and end < len(chunk) and kinds[end] == kinds[start]:
                end += 1
        if literal is not None or kinds[start]:
            yield chunk[start:end]
        start = end


def _kind(char: str) -> str:
    """L letter, N number, S any other sign, "" for the one character that is never part of a word."""
    if char == _YPOGEGRAMMENI:
        return ""
    category = unicodedata.category(char)[0]
    return category if category in "LN" else "S"
