"""Token ids against transformers' tokenizers: the real folders, a small trained pair, and any text at all.

The ids are those of transformers 4, with which the models were published. transformers 5 reads odd text in
other ways (control characters, ideographs, capitals, a folder's own rules) and has no SentencePiece: it is
compared on Latin text, and on the folders that it saves.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from transformers import CLIPTokenizer as OracleCLIP
from transformers import T5Tokenizer as OracleSlowT5Base
from transformers import T5TokenizerFast as OracleT5
from transformers.models.clip import tokenization_clip

from bokehflux.nano.tokenizers import train_tokenizers
from bokehflux.text.tokenizers import CLIPTokenizer, T5Tokenizer
from tests.helpers import needs_shared, shared

SNAPSHOT = "flux1-dev-snapshot"
BasicTokenizer = getattr(tokenization_clip, "BasicTokenizer", None)
PUBLISHED = BasicTokenizer is not None
"""Whether this is transformers 4."""
needs_published = pytest.mark.skipif(not PUBLISHED, reason="transformers 5 reads odd text in another way")
# The slow T5 oracle says so of a prompt that ends in </s>, and does what we do.
pytestmark = pytest.mark.filterwarnings("ignore:This sequence already has </s>")

# What tokenizers stumble over: literal special tokens (whole, odd case, cut by a control character), English
# endings, spaces of all kinds, marks that combine, expand or vanish in lower case, several scripts, emoji.
FRAGMENTS = [
    "<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "<|endof\x00text|>", "<|start", "</s>",
    "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>", "<extra_id_100>", "▁", "'s", "'LL", "'ſ", "'",
    " ", "   ", "\n", "\t", "\u00a0", "\u2028", "\u3000", "\u200b", "\ufeff", "\u200d", "\ufffd", "é",
    "e\u0301", "\u0345", "α\u0345", "İ", "ΑΣ", "ß", "ﬁ", "①", "½", "Ⅷ", "x²", "日本語", "漢字", "\uf900",
    "한국어", "ก็ตาม", "हिन्दी", "עברית", "العربية", "👩‍👩‍👧", "🏳️‍🌈", "a photo of a cat", "f/1.4", "don't",
    "1234", "!!!", "...", "\U0010ffff", "\U000e0001",
]  # fmt: skip


def is_read(char: str) -> bool:
    """Whether this transformers reads a character as the published one does."""
    return (
        PUBLISHED
        or (char.isprintable() and char < "\u0250" and char not in "\u0130\u017f")
        or char in "–—…‘’“”€"
    )


if not PUBLISHED:
    FRAGMENTS = [one for one in FRAGMENTS if all(map(is_read, one)) and "<" not in one and one != "'LL"]
CHARACTERS = (
    st.characters(exclude_categories=["Cs"])
    if PUBLISHED
    else st.characters(max_codepoint=0x24F).filter(is_read)
)

prompts = st.one_of(
    st.text(CHARACTERS, max_size=60),
    st.lists(st.sampled_from(FRAGMENTS) | CHARACTERS, max_size=25).map("".join),
    st.lists(st.sampled_from(FRAGMENTS), max_size=25).map(" ".join),
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    colors, things = ("red", "blue", "pale green"), ("cat", "vase", "wooden table", "dog's bone")
    corpus = [f"a photo of a {c} {t}, the {d} behind it" for c in colors for t in things for d in things]
    train_tokenizers(corpus, folder, length=48, clip_vocab_size=600, t5_vocab_size=120)
    return folder


@pytest.fixture(
    scope="session",
    params=[pytest.param("official", marks=needs_shared), pytest.param("trained", marks=needs_published)],
)
def folder(request: pytest.FixtureRequest) -> Path:
    if request.param == "trained":
        return request.getfixturevalue("trained")
    return shared(SNAPSHOT)


def oracle_clip(folder: Path) -> OracleCLIP:
    """transformers' tokenizer as it is where `ftfy` is not installed, even where it is."""
    oracle = OracleCLIP.from_pretrained(folder)
    if BasicTokenizer is not None:
        oracle.fix_text, oracle.nlp = None, BasicTokenizer(strip_accents=False, do_split_on_punc=False)
    return oracle


@pytest.fixture(scope="session")
def clip(folder: Path) -> tuple[CLIPTokenizer, OracleCLIP]:
    return CLIPTokenizer.from_folder(folder / "tokenizer"), oracle_clip(folder / "tokenizer")


@pytest.fixture(scope="session")
def t5(folder: Path) -> tuple[T5Tokenizer, OracleT5]:
    return T5Tokenizer.from_folder(folder / "tokenizer_2"), OracleT5.from_pretrained(folder / "tokenizer_2")


def assert_same_ids(ours, oracle, prompt: str, length: int | None = None) -> None:
    length_given = oracle.model_max_length if length is None else length
    expected = oracle(
        [prompt], padding="max_length", max_length=length_given, truncation=True, return_tensors="pt"
    ).input_ids
    assert ours([prompt], length).tolist() == expected.tolist(), f"{prompt[:200]!r}"


@settings(max_examples=300)
@given(prompt=prompts)
@example("")
@example(" ".join(FRAGMENTS))
@example("".join(FRAGMENTS))
def test_clip(clip, prompt: str) -> None:
    assert_same_ids(*clip, prompt)


@settings(max_examples=300)
@given(prompt=prompts)
@example("")
@example(" ".join(FRAGMENTS))
@example("".join(FRAGMENTS))
def test_t5(t5, prompt: str) -> None:
    assert_same_ids(*t5, prompt)


# From 3 on: with no room for content transformers logs an error and does not cut at all.
@pytest.mark.parametrize("length", [3, 16, 75, 76, 77, 78, 512])
@pytest.mark.parametrize(
    "prompt", ["", "cat " * 74, "cat " * 75, "cat " * 76, "a wooden vase, " * 600, "x" * 5000]
)
def test_lengths(clip, t5, prompt: str, length: int) -> None:
    assert_same_ids(*clip, prompt, length)
    assert_same_ids(*t5, prompt, length)


def test_every_character_below_u3000(clip, t5) -> None:
    for start in range(0, 0x3000, 0x80):
        # Between letters and a digit, so that a wrong class of character shows.
        chars = filter(is_read, map(chr, range(start, start + 0x80)))
        prompt = " ".join(f"a{char}b{char}1" for char in chars)
        assert_same_ids(*clip, prompt, 1500)
        assert_same_ids(*t5, prompt, 1500)


@needs_published
def test_lone_surrogates_vanish_in_clip(clip) -> None:
    assert_same_ids(*clip, "a\ud800b")


def test_special_tokens_of_old_folders(trained: Path, tmp_path: Path) -> None:
    """Without `added_tokens_decoder` the special tokens come from `special_tokens_map.json`."""
    folder = shutil.copytree(trained / "tokenizer", tmp_path / "tokenizer")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("added_tokens_decoder", "pad_token"):
        del config[key]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = json.loads((folder / "special_tokens_map.json").read_text())
    special["pad_token"] = "!"
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    ours, oracle = CLIPTokenizer.from_folder(folder), oracle_clip(folder)
    assert ours.pad_id == oracle.pad_token_id != ours.eos_id
    for prompt in ("", "a cat!", "! a", "!!"):
        assert_same_ids(ours, oracle, prompt)


@needs_shared
@pytest.mark.parametrize("name", ["flux1-dev-snapshot", "golden/snapshot"])
def test_special_ids(name: str) -> None:
    clip, t5 = (
        CLIPTokenizer.from_folder(shared(name) / "tokenizer"),
        T5Tokenizer.from_folder(shared(name) / "tokenizer_2"),
    )
    assert (clip.length, clip.eos_id, clip.pad_id, clip.vocab_size) == (77, 49407, 49407, 49408)
    assert (t5.length, t5.eos_id, t5.pad_id, t5.vocab_size) == (512, 1, 0, 32100)


class OracleSlowT5(OracleSlowT5Base):
    """transformers' own merges one field into the model by `protobuf`, which sentencepiece does not need."""

    def get_spm_processor(self, from_slow: bool = False) -> SentencePieceProcessor:
        processor = SentencePieceProcessor()
        model = Path(self.vocab_file).read_bytes()
        # normalizer_spec { add_dummy_prefix: false }; serialised messages merge by concatenation.
        processor.LoadFromSerializedProto(model if self.legacy else model + bytes([3 << 3 | 2, 2, 3 << 3, 0]))
        return processor


# What tokenizer_config.json of spiece.model folders says: FLUX's own, the older T5's, and other flags.
SPIECE_CONFIGS: dict[str, dict[str, object]] = {
    "official": {},
    "legacy": {"legacy": True},
    "legacy absent": {"legacy": None},
    "no prefix": {"add_prefix_space": False},
    "no added tokens": {"added_tokens_decoder": None, "additional_special_tokens": None},
    "legacy, no added tokens": {"added_tokens_decoder": None, "extra_ids": 100, "legacy": True},
    "keeps spaces": {"added_tokens_decoder": None},
    "keeps spaces, legacy": {"added_tokens_decoder": None, "legacy": True},
}
# normalizer_spec { remove_extra_whitespaces: false }: FLUX's model hides what happens to spaces at an end.
KEEP_SPACES = bytes([3 << 3 | 2, 2, 4 << 3, 0])


@pytest.fixture(scope="module", params=SPIECE_CONFIGS)
def from_spiece(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[T5Tokenizer, OracleSlowT5]:
    """Both made from the same spiece.model, which is all that there is."""
    official, folder = shared(SNAPSHOT) / "tokenizer_2", tmp_path_factory.mktemp("spiece")
    model = (official / "spiece.model").read_bytes()
    (folder / "spiece.model").write_bytes(model + KEEP_SPACES * request.param.startswith("keeps spaces"))
    config = json.loads((official / "tokenizer_config.json").read_text()) | SPIECE_CONFIGS[request.param]
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return T5Tokenizer.from_folder(folder), OracleSlowT5.from_pretrained(folder)


@needs_published
@needs_shared
@settings(max_examples=100, deadline=None)
@given(prompt=prompts)
@example("")
@example(" ")
@example(" ".join(FRAGMENTS))
@example("".join(FRAGMENTS))
@example("  <extra_id_0>  a  </s>  b   <extra_id_1>")
@example("▁ ▁a▁</s>")
@example("a▁<extra_id_0>▁b")
@example("漢<unk> 漢")
def test_spiece_model_alone(from_spiece, prompt: str) -> None:
    assert_same_ids(*from_spiece, prompt)


@needs_published
@needs_shared
@settings(max_examples=60, deadline=None)
@given(prompt=prompts, length=st.integers(3, 12))
@example("a </s> b", 3)
@example("</s>" * 20, 4)
def test_spiece_model_cuts(from_spiece, prompt: str, length: int) -> None:
    assert_same_ids(*from_spiece, prompt, length)


@needs_published
@needs_shared
def test_spiece_model_on_long_prompts_and_every_character(from_spiece) -> None:
    for prompt in ("cat " * 511, "cat " * 512, "a wooden vase, " * 600, "x" * 5000, "<extra_id_7> " * 700):
        assert_same_ids(*from_spiece, prompt)
    for start in range(0, 0x3000, 0x80):
        chars = filter(is_read, map(chr, range(start, start + 0x80)))
        prompt = " ".join(f"a{char}b{char}1" for char in chars)
        assert_same_ids(*from_spiece, prompt, 1500)


@needs_shared
def test_spiece_model_ids_are_those_of_tokenizer_json(tmp_path: Path) -> None:
    """On plain prompts nothing depends on which of the two files a folder has."""
    official = shared(SNAPSHOT) / "tokenizer_2"
    for name in ("spiece.model", "tokenizer_config.json"):
        shutil.copy(official / name, tmp_path)
    ours, fast = T5Tokenizer.from_folder(tmp_path), T5Tokenizer.from_folder(official)
    assert (ours.length, ours.eos_id, ours.pad_id, ours.vocab_size) == (512, 1, 0, 32100)
    plain = ["a photo of a cat, f/1.4", "", "Don't  stop\n now", "日本語 x²", "a wooden vase, " * 300]
    assert ours(plain).equal(fast(plain))


@needs_shared
def test_folders_that_transformers_saves(tmp_path: Path) -> None:
    """transformers 5 writes a tokenizer.json and nothing else that holds a vocabulary."""
    official = shared(SNAPSHOT)
    oracles = {"tokenizer": OracleCLIP, "tokenizer_2": OracleT5}
    for (name, oracle), cls in zip(oracles.items(), (CLIPTokenizer, T5Tokenizer), strict=True):
        oracle.from_pretrained(official / name).save_pretrained(tmp_path / name)
        saved = {path.name for path in (tmp_path / name).iterdir()}
        assert PUBLISHED or saved == {"tokenizer.json", "tokenizer_config.json"}
        again, ours = oracle.from_pretrained(tmp_path / name), cls.from_folder(tmp_path / name)
        known = cls.from_folder(official / name)
        assert (ours.length, ours.eos_id, ours.pad_id) == (known.length, known.eos_id, known.pad_id)
        for prompt in ("", "a photo of a cat, f/1.4", "Don't  stop\n now", "a wooden vase, " * 300, "½ x² é"):
            assert_same_ids(ours, again, prompt)
            assert ours([prompt]).equal(known([prompt]))
