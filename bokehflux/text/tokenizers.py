"""Turn prompts into token ids, for CLIP and T5, with the tokenizer folders of a model snapshot.

Ids equal those of the published FLUX pipeline's classes in transformers 4.53: `CLIPTokenizer` (the Python
one, without `ftfy`) and `T5TokenizerFast`, or `T5Tokenizer` where `tokenizer.json` is missing. With `ftfy`
installed, transformers repairs mis-decoded text before CLIP sees it, so its ids depend on the machine. Ours
never do.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from torch import Tensor

from bokehflux.text.clip_words import END, START, words
from bokehflux.text.t5_pieces import AddedToken, FastPieces, Pieces, SentencePieces

log = logging.getLogger(__name__)

MAX_FILE_BYTES = 100_000_000
"""A larger tokenizer file is refused; T5's largest has 2.4 MB."""
SMALL_VOCAB = 1000
"""A T5 vocabulary up to this size holds the words of a few captions, not a language: nano's has 298 pieces,
FLUX's 32,128."""
MAX_ID = 10_000_000
"""Ids must be below this; T5's largest is 32,127, CLIP's 49,407."""


class TokenizerError(ValueError):
    """A tokenizer folder lacks a file, or a file in it cannot be used."""


class CLIPTokenizer:
    """Lower-case byte-level BPE: start token, prompt, end token, padding."""

    length: int
    """Tokens per prompt unless the caller gives another number."""
    vocab_size: int
    """How many rows an embedding of these ids needs."""
    eos_id: int
    pad_id: int

    def __init__(
        self,
        *,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        special: dict[str, str],
        added: dict[str, int],
        length: int,
    ) -> None:
        """special: the token of each role (bos, eos, unk, pad). added: ids that `vocab` may lack."""
        self.length = length
        self._ids = vocab | added
        self._bos_id, self.eos_id, self._unk_id, self.pad_id = (
            self._ids[special[role]] for role in ("bos_token", "eos_token", "unk_token", "pad_token")
        )
        # Searched for in the prompt as written, before it is cleaned. The longest first: one token may be the
        # beginning of another.
        literal = sorted({*special.values(), *added}, key=len, reverse=True)
        self._literal = re.compile("(" + "|".join(map(re.escape, literal)) + ")")
        self.vocab_size = 1 + max(self._ids.values())
        self._bpe = BPE(vocab=vocab, merges=merges, unk_token=special["unk_token"], end_of_word_suffix="</w>")

    @classmethod
    def from_folder(cls, folder: str | Path) -> CLIPTokenizer:
        """Read `vocab.json` and `merges.txt`, `tokenizer_config.json` and any `special_tokens_map.json`.

        transformers 5 writes a `tokenizer.json` in place of the first two.
        Raises TokenizerError for a missing or damaged file.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        fast = (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file()
        vocab, merges, listed = _read_fast(folder / "tokenizer.json") if fast else _read_slow(folder)
        special = _special_tokens(
            folder, config, bos_token=START, eos_token=END, unk_token=END, pad_token=END
        )
        added = listed | {token.content: i for i, token in _added_tokens(folder, config).items()}
        length = _length(folder, config)
        strange = [token_id for token_id in [*vocab.values(), *added.values()] if not _is_id(token_id)]
        if strange:
            raise TokenizerError(f"{folder}: ids must be numbers below {MAX_ID}, found {strange[0]!r:.80}")
        unknown = [token for token in special.values() if token not in vocab and token not in added]
        if unknown:
            raise TokenizerError(f"{folder}: special tokens {unknown} have no id in its vocabulary")
        try:
            return cls(vocab=vocab, merges=merges, special=special, added=added, length=length)
        except Exception as error:  # what `tokenizers` raises has no class of its own
            problem = f"vocabulary and merges do not fit together: {error}"
            raise TokenizerError(f"{folder}: {problem}; fetch them again") from error

    def __call__(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """B prompts -> ids [B, length], int64. A prompt that is too long is cut before its end token, with a
        warning. Raises TypeError for a string in place of a list."""
        contents = [self._content(prompt) for prompt in _checked(prompts)]
        length = self.length if length is None else length
        return _fit(contents, prompts, length, self._framed, self.pad_id, reader="CLIP")

    def _framed(self, content: list[int]) -> list[int]:
        return [self._bos_id, *content, self.eos_id]

    def _content(self, prompt: str) -> list[int]:
        ids: list[int] = []
        # re.split with a group: text at even places, the literal tokens between at odd places.
        for i, part in enumerate(self._literal.split(prompt)):
            if i % 2:
                ids.append(self._ids[part])
                continue
            for word in words(part):
                if word in (START, END):
                    ids.append(self._ids.get(word, self._unk_id))
                else:
                    ids.extend(token.id for token in self._bpe.tokenize(word))
        return ids


class T5Tokenizer:
    """Unigram pieces, end token, padding."""

    length: int
    """Tokens per prompt unless the caller gives another number."""
    vocab_size: int
    """How many rows an embedding of these ids needs."""
    eos_id: int
    pad_id: int

    def __init__(self, *, pieces: Pieces, eos: str, pad: str, length: int) -> None:
        eos_id, pad_id = pieces.token_to_id(eos), pieces.token_to_id(pad)
        if eos_id is None or pad_id is None:
            raise ValueError(f"expected a tokenizer that knows {eos!r} and {pad!r}")
        self.length = length
        self.eos_id, self.pad_id = eos_id, pad_id
        self.vocab_size = pieces.vocab_size
        self._pieces = pieces

    @classmethod
    def from_folder(cls, folder: str | Path) -> T5Tokenizer:
        """Read `tokenizer_config.json` and `tokenizer.json`, or else `spiece.model`.

        Raises TokenizerError for a missing or damaged file.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        special = _special_tokens(folder, config, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
        added, length = _added_tokens(folder, config), _length(folder, config)
        sources = [folder / name for name in ("tokenizer.json", "spiece.model") if (folder / name).is_file()]
        if not sources:
            raise TokenizerError(f"{folder}: expected tokenizer.json or spiece.model, found neither")
        _check_size(sources[0])
        try:
            pieces = _t5_pieces(sources[0], config, added, special)
            t5 = cls(pieces=pieces, eos=special["eos_token"], pad=special["pad_token"], length=length)
        except BaseException as error:  # what `tokenizers` raises has no class of its own
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise TokenizerError(f"{sources[0]} cannot be used, fetch it again: {error}") from error
        for token_id, token in added.items():
            found = pieces.token_to_id(token.content)
            if found != token_id:
                raise TokenizerError(
                    f"{folder}: tokenizer_config.json gives {token.content!r} the id {token_id}, "
                    f"{sources[0].name} gives {found}; they belong to different models"
                )
        return t5

    def __call__(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """B prompts -> ids [B, length], int64. A prompt that is too long is cut before its end token, with a
        warning. Raises TypeError for a string in place of a list, ValueError for half a surrogate pair."""
        contents = []
        for prompt in _checked(prompts):
            try:
                prompt.encode("utf-8")
            except UnicodeEncodeError as error:
                raise ValueError(f"a prompt must be valid Unicode, got {prompt!r}: {error}") from error
            contents.append(self._pieces.ids(prompt))
        length = self.length if length is None else length
        return _fit(contents, prompts, length, self._ended, self.pad_id, reader="T5")

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that the vocabulary lacks, each once; none for one larger than `SMALL_VOCAB`.

        A word of the training captions is one piece, and one more for each sign in it. Other words fall apart
        into more pieces.
        """
        if self.vocab_size > SMALL_VOCAB:
            return []
        words = [w for w in re.findall(r"\w+(?:[-'’]\w+)*", prompt) if any(map(str.isalpha, w))]
        whole = {w: len(re.findall(r"\w+|\W", w)) for w in words}
        return [w for w, num_pieces in whole.items() if len(self._pieces.ids(w)) != num_pieces]

    def _ended(self, content: list[int]) -> list[int]:
        return self._pieces.ended(content, self.eos_id)


def _checked(prompts: Sequence[str]) -> Sequence[str]:
    if isinstance(prompts, str):
        raise TypeError(f"expected a list of prompts, got the string {prompts!r:.80}: put it into a list")
    return prompts


def _fit(
    contents: list[list[int]],
    prompts: Sequence[str],
    length: int,
    framed: Callable[[list[int]], list[int]],
    pad_id: int,
    *,
    reader: str,
) -> Tensor:
    """Ids [B, length]: contents cut to fit, `framed` by start and end tokens, padded."""
    if length < 2:
        raise ValueError(f"length must be at least 2 tokens, the end token and one more, got {length}")
    ids = torch.full((len(contents), length), pad_id, dtype=torch.long)
    for i, (content, prompt) in enumerate(zip(contents, prompts, strict=True)):
        row = framed(content)
        if len(row) > length:
            note = "; T5 has a larger limit" if reader == "CLIP" else ""
            log.warning(
                "%s reads %d of the %d tokens of the prompt %.80r%s", reader, length, len(row), prompt, note
            )
            row = framed(content[: length - len(framed([]))])
        ids[i, : len(row)] = torch.tensor(row)
    return ids


def _t5_pieces(
    source: Path, config: dict[str, Any], added: dict[int, AddedToken], special: dict[str, str]
) -> Pieces:
    if source.name == "tokenizer.json":
        return FastPieces(Tokenizer.from_file(str(source)), special["eos_token"])
    refused = [key for key in ("do_lower_case", "split_special_tokens", "sp_model_kwargs") if config.get(key)]
    entries = config.get("added_tokens_decoder", {}).values()
    refused += ["single_word"] if any(entry.get("single_word") for entry in entries) else []
    if refused:
        raise ValueError(f"{refused} in tokenizer_config.json are supported with a tokenizer.json only")
    extra_ids = config.get("extra_ids", 100)
    if not _is_id(extra_ids):
        raise ValueError(f"extra_ids in tokenizer_config.json must be a whole number, got {extra_ids!r:.80}")
    listed = config.get("additional_special_tokens") or []
    return SentencePieces(
        source.read_bytes(),
        added=added,
        special=[*special.values(), *(x["content"] if isinstance(x, dict) else x for x in listed)],
        unk=special["unk_token"],
        extra_ids=extra_ids,
        # transformers takes a missing key for True.
        legacy=config.get("legacy") is not False,
        add_prefix_space=config.get("add_prefix_space", True),
    )


def _special_tokens(folder: Path, config: dict[str, Any], **defaults: str) -> dict[str, str]:
    """The token of each role in `defaults`, as the folder's files name it.

    As in transformers, `special_tokens_map.json` counts only in folders without `added_tokens_decoder`.
    """
    stated = dict(config)
    table = folder / "special_tokens_map.json"
    if "added_tokens_decoder" not in config and table.is_file():
        stated |= _read_json(table)
    tokens = {role: stated.get(role) or default for role, default in defaults.items()}
    special: dict[str, Any] = {
        role: t.get("content") if isinstance(t, dict) else t for role, t in tokens.items()
    }
    strange = [role for role, token in special.items() if not isinstance(token, str) or not token]
    if strange:
        raise TokenizerError(f"{folder}: {strange[0]} must be text, found {tokens[strange[0]]!r:.80}")
    return special


def _added_tokens(folder: Path, config: dict[str, Any]) -> dict[int, AddedToken]:
    """Tokens that `tokenizer_config.json` adds to the vocabulary, by id."""
    path = folder / "tokenizer_config.json"
    try:
        entries = {
            int(token_id): dict(entry) for token_id, entry in config.get("added_tokens_decoder", {}).items()
        }
        tokens = {
            token_id: AddedToken(entry["content"], bool(entry.get("lstrip")), bool(entry.get("rstrip")))
            for token_id, entry in entries.items()
        }
        if not all(_is_id(token_id) and isinstance(t.content, str) for token_id, t in tokens.items()):
            raise ValueError(f"expected ids below {MAX_ID} and contents that are text")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"{path}: bad added_tokens_decoder, fetch it again: {error!r}") from error
    return tokens


def _length(folder: Path, config: dict[str, Any]) -> int:
    length = config.get("model_max_length")
    # transformers writes "no limit" as 1e30: refused, since ids are padded to this length.
    if not isinstance(length, int) or not 2 <= length <= 1_000_000:
        path = folder / "tokenizer_config.json"
        raise TokenizerError(
            f"{path}: model_max_length must be a number of tokens from 2 to 1,000,000, found {length!r}"
        )
    return length


_Words = tuple[dict[str, int], list[tuple[str, str]], dict[str, int]]
"""Vocabulary, merges, and ids of tokens beside them."""


def _read_slow(folder: Path) -> _Words:
    return _read_json(folder / "vocab.json"), _read_merges(folder / "merges.txt"), {}


def _read_fast(path: Path) -> _Words:
    """From a `tokenizer.json`. How a prompt is cleaned and cut is CLIP's, whatever the file says of it."""
    content = _read_json(path)
    try:
        model = content["model"]
        kind, ending = model["type"], model["end_of_word_suffix"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        merges = [(first, second) for first, second in pairs]
        added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        vocab = dict(model["vocab"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"expected a vocabulary and merges of byte pairs ({error!r}); fetch it again"
        raise TokenizerError(f"{path}: {problem}") from error
    if (kind, ending) != ("BPE", "</w>"):
        problem = f"CLIP's is BPE with the ending '</w>', found {kind!r:.80} with {ending!r:.80}"
        raise TokenizerError(f"{path}: {problem}")
    return vocab, merges, added


def _read_merges(path: Path) -> list[tuple[str, str]]:
    merges = []
    for line in _read_text(path).strip().split("\n")[1:]:  # the first line is a version
        parts = line.split()
        if len(parts) != 2:
            raise TokenizerError(f"{path}: expected two parts on every line, found {line!r}; fetch it again")
        merges.append((parts[0], parts[1]))
    return merges


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_ID


def _check_size(path: Path) -> None:
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise TokenizerError(
            f"{path} has {size} bytes, but a tokenizer file has at most {MAX_FILE_BYTES}: fetch it again"
        )


def _read_text(path: Path) -> str:
    try:
        _check_size(path)
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise TokenizerError(f"{path} is missing; fetch the snapshot again") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8 text, fetch it again: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except TokenizerError:
        raise
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
        raise TokenizerError(f"{path} is not JSON, fetch it again: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
