"""A prompt as CLIP reads it: cleaned, cut into words, each spelled in the byte alphabet of the vocabulary.

The rules are those of OpenAI's tokenizer as transformers runs it without `ftfy`: control characters vanish,
ideographs stand alone, text is composed (NFC) and lower-cased. Python's `unicodedata` tells letters from
other signs.
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
    # Printable bytes stand for themselves. The others take the characters from U+0100 on, in order.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_ALPHABET = _spell_bytes()
"""The character that stands for each byte, as in GPT-2's vocabulary."""


def words(text: str) -> Iterator[str]:
    """The words of `text` in order: markers, English endings, runs of letters, single digits, other signs.

    Each word is spelled in the byte alphabet. The markers are ASCII and look the same in it.
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
    # By hand, since Python's `re` has no classes for letters and numbers of all scripts.
    kinds = [_kind(char) for char in chunk]
    start = 0
    while start < len(chunk):
        literal = _LITERAL.match(chunk, start)
        if literal is not None:
            end = literal.end()
        else:
            end = start + 1
            # Each digit is a word; letters and other signs form runs.
            while kinds[start] != "N" and end < len(chunk) and kinds[end] == kinds[start]:
                end += 1
        if literal is not None or kinds[start]:
            yield chunk[start:end]
        start = end


def _kind(char: str) -> str:
    """L: letter, N: number, S: any other sign, "": the one character that never belongs to a word."""
    if char == _YPOGEGRAMMENI:
        return ""
    category = unicodedata.category(char)[0]
    return category if category in "LN" else "S"
