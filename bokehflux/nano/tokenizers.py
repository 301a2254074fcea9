"""Small CLIP and T5 tokenizers learned from captions, written in the layout of the official ones.

Both learn merges the same way: again and again the pair of neighbours seen most often becomes one symbol.
CLIP's tokenizer applies the merges; T5's picks the likeliest segmentation into the symbols (unigram), as its
format wants. The trainers of `tokenizers` are not used, their result differs from run to run, and the same
corpus must give the same files. transformers' `CLIPTokenizer` and `T5TokenizerFast` load the folders, too.
"""

from __future__ import annotations

import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from bokehflux.text.clip_words import BYTE_ALPHABET, END, START, words
from bokehflux.text.tokenizers import CLIPTokenizer, T5Tokenizer
from bokehflux.weights.files.write import replacing, write_json

CLIP_FOLDER, T5_FOLDER = "tokenizer", "tokenizer_2"
_PAD, _EOS, _UNK = "<pad>", "</s>", "<unk>"
_T5_WORD = re.compile(r"▁?\w+|▁?[^\w\s▁]|▁")
"""What merges stay inside of: a word or one sign, each with the space before it."""

Merge = tuple[str, str]


def train_tokenizers(
    corpus: Iterable[str],
    folder: str | Path,
    *,
    length: int,
    clip_vocab_size: int = 1024,
    t5_vocab_size: int = 512,
) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Learn both tokenizers from the captions in `corpus`, write them under `folder`, and return them.

    `tokenizer/` is CLIP's: any Unicode text has ids; the end token, the largest id, pads as well. Its encoder
    must be configured with `eos_token_id` = `eos_id`. `tokenizer_2/` is T5's: pad 0, end 1, unknown 2;
    lower-case; characters outside ASCII that the corpus lacks are unknown.
    `length`: tokens a prompt is padded to. The vocabulary sizes are upper bounds: learning stops when no pair
    is seen twice. Raises ValueError when a bound leaves no room for the alphabet.
    """
    captions = Counter(corpus)
    folder = Path(folder)
    _write_clip(captions, folder / CLIP_FOLDER, length, clip_vocab_size)
    _write_t5(captions, folder / T5_FOLDER, length, t5_vocab_size)
    return CLIPTokenizer.from_folder(folder / CLIP_FOLDER), T5Tokenizer.from_folder(folder / T5_FOLDER)


def learn_merges(seen: Mapping[tuple[str, ...], int], max_merges: int) -> tuple[list[Merge], Counter[str]]:
    """Merges in the order they apply, and how often each symbol remains once all are applied.

    `seen` counts words, each a tuple of symbols. A pair is merged while it is seen at least twice; of equally
    frequent pairs the alphabetically first wins. No two merges make the same symbol.
    """
    segmented = {word: list(word) for word in seen}
    symbols = {symbol for word in seen for symbol in word}
    merges: list[Merge] = []
    while len(merges) < max_merges:
        pairs: Counter[Merge] = Counter()
        for word, parts in segmented.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += seen[word]
        candidates = [pair for pair in pairs if pairs[pair] > 1 and "".join(pair) not in symbols]
        if not candidates:
            break
        merge = min(candidates, key=lambda pair: (-pairs[pair], pair))
        merges.append(merge)
        symbols.add("".join(merge))
        segmented = {word: _apply(merge, parts) for word, parts in segmented.items()}
    remaining: Counter[str] = Counter()
    for word, parts in segmented.items():
        for part in parts:
            remaining[part] += seen[word]
    return merges, remaining


def _apply(merge: Merge, parts: list[str]) -> list[str]:
    merged: list[str] = []
    i = 0
    while i < len(parts):
        hit = tuple(parts[i : i + 2]) == merge
        merged.append("".join(merge) if hit else parts[i])
        i += 2 if hit else 1
    return merged


def _write_clip(captions: Counter[str], folder: Path, length: int, vocab_size: int) -> None:
    alphabet = [byte + ending for ending in ("", "</w>") for byte in sorted(BYTE_ALPHABET.values())]
    room = _room(vocab_size, len(alphabet) + 2, "clip_vocab_size")
    seen: Counter[tuple[str, ...]] = Counter()
    for caption, count in captions.items():
        for word in words(caption):
            seen[(*word[:-1], word[-1] + "</w>")] += count
    merges, _ = learn_merges(seen, room)
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, *map("".join, merges), START, END])}

    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", vocab)
    _write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    write_json(folder / "special_tokens_map.json", special)
    config = {
        **special,
        "added_tokens_decoder": _added({token: vocab[token] for token in (START, END)}),
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": length,
        "tokenizer_class": "CLIPTokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)


def _write_t5(captions: Counter[str], folder: Path, length: int, vocab_size: int) -> None:
    normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Strip(),
        ]
    )
    seen: Counter[tuple[str, ...]] = Counter()
    for caption, count in captions.items():
        text = "▁" + normalizer.normalize_str(caption).replace(" ", "▁")
        for word in _T5_WORD.findall(text):
            seen[tuple(word)] += count
    ascii_signs = set(string.digits + string.ascii_lowercase + string.punctuation)
    alphabet = sorted({"▁"} | ascii_signs | {symbol for word in seen for symbol in word})
    special = {_PAD: 0, _EOS: 1, _UNK: 2}
    merges, remaining = learn_merges(seen, _room(vocab_size, len(special) + len(alphabet), "t5_vocab_size"))
    pieces = [*alphabet, *map("".join, merges)]
    # One is added so that symbols which only ever occur inside larger ones keep a chance.
    total = remaining.total() + len(pieces)
    scores = [(piece, math.log((remaining[piece] + 1) / total)) for piece in pieces]

    tokenizer = Tokenizer(Unigram([*((token, 0.0) for token in special), *scores], unk_id=special[_UNK]))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", _EOS], special_tokens=[(_EOS, special[_EOS])]
    )
    roles = {"eos_token": _EOS, "pad_token": _PAD, "unk_token": _UNK}
    folder.mkdir(parents=True, exist_ok=True)
    _write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_json(folder / "special_tokens_map.json", roles)
    config = {
        **roles,
        "added_tokens_decoder": _added(special),
        "extra_ids": 0,
        "legacy": False,
        "model_max_length": length,
        "tokenizer_class": "T5Tokenizer",
    }
    write_json(folder / "tokenizer_config.json", config)


def _room(vocab_size: int, alphabet: int, argument: str) -> int:
    if vocab_size < alphabet:
        raise ValueError(
            f"{argument} must be at least {alphabet}, its alphabet and special tokens, got {vocab_size}"
        )
    return vocab_size - alphabet


def _added(ids: Mapping[str, int]) -> dict[str, dict[str, str | bool]]:
    """`added_tokens_decoder` of `tokenizer_config.json`: tokens found in a prompt as they are written."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(i): {"content": token, **flags} for token, i in ids.items()}


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
