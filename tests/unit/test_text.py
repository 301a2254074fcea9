"""Tokenizers, their training, their errors, and `TextEncoders`, without any oracle."""

from __future__ import annotations

import json
import logging
import math
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bokehflux import weights
from bokehflux.configs import CLIPConfig, T5Config
from bokehflux.models.clip import CLIPTextEncoder
from bokehflux.models.t5 import T5Encoder
from bokehflux.nano import captions
from bokehflux.nano.tokenizers import learn_merges, train_tokenizers
from bokehflux.text.clip_words import words
from bokehflux.text.encode import TextEncoders
from bokehflux.text.t5_pieces import AddedToken, SentencePieces
from bokehflux.text.tokenizers import CLIPTokenizer, T5Tokenizer, TokenizerError

CORPUS = [
    f"a {c} {t} in front of a {b}" for c in ("red", "blue") for t in ("cat", "vase") for b in ("wall", "hill")
]
LENGTH = 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_tokenizers(CORPUS, tmp_path, length=LENGTH, clip_vocab_size=560, t5_vocab_size=110)
    return tmp_path


@pytest.fixture
def clip(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_folder(folder / "tokenizer")


@pytest.fixture
def t5(folder: Path) -> T5Tokenizer:
    return T5Tokenizer.from_folder(folder / "tokenizer_2")


@pytest.fixture
def encoders(clip: CLIPTokenizer, t5: T5Tokenizer) -> TextEncoders:
    return TextEncoders(
        t5=T5Encoder(
            T5Config(vocab_size=t5.vocab_size, width=24, head_dim=8, mlp_size=32, num_layers=2, num_heads=3)
        ),
        clip=CLIPTextEncoder(
            CLIPConfig(
                vocab_size=clip.vocab_size,
                width=16,
                mlp_size=32,
                num_layers=2,
                num_heads=2,
                max_length=LENGTH,
                eos_token_id=clip.eos_id,
            )  # fmt: skip
        ),
        t5_tokenizer=t5,
        clip_tokenizer=clip,
        txt_length=17,
    )


def test_words_of_a_prompt() -> None:
    assert list(words("It's  A\x00 f/1.4 LENS,\n<|EndOfText|>")) == [
        "it", "'s", "a", "f", "/", "1", ".", "4", "lens", ",", "<|endoftext|>",
    ]  # fmt: skip
    assert list(words("日本\ufffd")) == ["æĹ¥", "æľ¬"]


def test_rows_are_framed_and_padded(clip: CLIPTokenizer, t5: T5Tokenizer) -> None:
    ids = clip(["a cat", ""])
    assert ids.shape == (2, LENGTH) and ids.dtype == torch.int64
    bos = clip.eos_id - 1
    assert ids[1].tolist() == [bos] + [clip.eos_id] * (LENGTH - 1)
    assert ids[0, 0] == bos and (ids[0] == clip.eos_id).int().argmax() == 3
    assert t5([""], 5).tolist() == [[t5.eos_id] + [t5.pad_id] * 4] == [[1, 0, 0, 0, 0]]


def test_a_long_prompt_is_cut_with_a_warning(
    clip: CLIPTokenizer, t5: T5Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    for tokenizer, name, exact in ((clip, "CLIP", 22), (t5, "T5", 23)):
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            fits = tokenizer(["cat " * exact])
            assert not caplog.records
            cut = tokenizer(["cat " * exact + "wall"])
        assert fits.tolist() == cut.tolist() and cut[0, -1] == tokenizer.eos_id
        (record,) = caplog.records
        assert f"{name} reads 24 of the 25 tokens" in record.getMessage()
        assert ("T5 has a larger limit" in record.getMessage()) == (name == "CLIP")


def test_bad_calls(clip: CLIPTokenizer, t5: T5Tokenizer) -> None:
    for tokenizer in (clip, t5):
        with pytest.raises(TypeError, match="list of prompts"):
            tokenizer("a cat")
        with pytest.raises(ValueError, match="at least 2 tokens, .* got 1"):
            tokenizer(["a cat"], 1)
        with pytest.raises(ValueError, match="at least 2 tokens, .* got 0"):
            tokenizer(["a cat"], 0)
    with pytest.raises(ValueError, match="valid Unicode"):
        t5(["a\ud800b"])


def remove(path: Path) -> None:
    path.unlink()


def scramble(path: Path) -> None:
    path.write_bytes(b'{"model": [\xff\x00')


def cut_in_half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("damage", [remove, scramble, cut_in_half])
@pytest.mark.parametrize(
    "file",
    [
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer_2/tokenizer.json",
        "tokenizer_2/tokenizer_config.json",
    ],
)
def test_a_damaged_file_is_one_clear_error(folder: Path, file: str, damage: Callable[[Path], None]) -> None:
    path = folder / file
    if file.endswith("merges.txt") and damage is cut_in_half:
        path.write_text("#version: 0.2\na b\nc")
    else:
        damage(path)
    load = T5Tokenizer.from_folder if path.parent.name == "tokenizer_2" else CLIPTokenizer.from_folder
    with pytest.raises(TokenizerError) as error:
        load(path.parent)
    assert path.name in str(error.value) and str(path.parent) in str(error.value)


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_files_that_contradict_each_other(folder: Path) -> None:
    config = folder / "tokenizer_2" / "tokenizer_config.json"
    kept = config.read_text()
    edit(config, added_tokens_decoder={"7": {"content": "</s>"}})
    with pytest.raises(TokenizerError, match="'</s>' the id 7, tokenizer.json gives 1"):
        T5Tokenizer.from_folder(config.parent)
    config.write_text(kept)
    edit(config, eos_token="a")
    with pytest.raises(TokenizerError, match="ends every prompt in 'a'"):
        T5Tokenizer.from_folder(config.parent)
    config = folder / "tokenizer" / "tokenizer_config.json"
    edit(config, pad_token="<none>")
    with pytest.raises(TokenizerError, match=r"\['<none>'\] have no id"):
        CLIPTokenizer.from_folder(config.parent)
    edit(config, model_max_length=int(1e30))
    with pytest.raises(TokenizerError, match="model_max_length"):
        CLIPTokenizer.from_folder(config.parent)
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\nq qqqq\n")
    edit(config, pad_token="!", model_max_length=8)
    with pytest.raises(TokenizerError, match="do not fit together"):
        CLIPTokenizer.from_folder(config.parent)


def test_most_frequent_pair_first_and_no_symbol_twice() -> None:
    seen = {("a", "b", "c"): 5, ("b", "c"): 3, ("a", "b"): 1, ("x", "y"): 1}
    merges, remaining = learn_merges(seen, 10)
    assert merges == [("b", "c"), ("a", "bc")]
    assert remaining == {"abc": 5, "bc": 3, "a": 1, "b": 1, "x": 1, "y": 1}
    assert learn_merges(seen, 1)[0] == [("b", "c")]
    # Equally frequent: the alphabetically first, whatever the order of the words.
    ties = {("p", "q"): 2, ("a", "z"): 2}
    assert learn_merges(ties, 1)[0] == learn_merges(dict(reversed(ties.items())), 1)[0] == [("a", "z")]


def test_trained_tokenizers_know_the_corpus_and_any_text(clip: CLIPTokenizer, t5: T5Tokenizer) -> None:
    assert clip.vocab_size <= 560 and t5.vocab_size <= 110
    assert clip.eos_id == clip.vocab_size - 1 and (t5.pad_id, t5.eos_id) == (0, 1)
    # Words seen often are one token each: start, six words, end; and six words, end.
    prompt = "a red cat in a wall"
    assert (clip([prompt]) != clip.pad_id).sum() == 7
    assert (t5([prompt]) != t5.pad_id).sum() == 7
    assert torch.equal(t5(["A  RED\ncat"]), t5(["a red cat"]))
    # Byte-level: no text is unknown to CLIP. T5 knows ASCII; the rest is unknown, id 2.
    assert clip.eos_id not in clip(["日 🙂 \u0ca0"])[0, 1:6]
    assert 2 not in t5(["Zebra #42 (f/1.4)?"]) and 2 in t5(["日"])


def test_a_small_vocabulary_names_the_words_it_lacks(
    t5: T5Tokenizer, encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert t5.unknown_words("A red CAT, in\nfront of (a) wall; 3 + 4!") == []
    assert t5.unknown_words("a red rhinoceros on Mars, Mars and a red-hot cats' café") == [
        "rhinoceros", "on", "Mars", "and", "red-hot", "cats", "café",
    ]  # fmt: skip
    assert encoders.unknown_words("日本 vase") == ["日本"]
    monkeypatch.setattr(t5, "vocab_size", 32_128)
    assert t5.unknown_words("a rhinoceros") == [], "FLUX reads any word"


def test_nano_knows_every_word_of_its_captions() -> None:
    t5 = T5Tokenizer.from_folder(Path(weights.__file__).parent / "nano" / "tokenizer_2")
    assert {word for caption in captions.corpus(2000) for word in t5.unknown_words(caption)} == set()
    assert t5.unknown_words("a rhinoceros on Mars") == ["rhinoceros", "Mars"]


def test_training_is_deterministic(tmp_path: Path) -> None:
    for name, corpus in (("first", CORPUS), ("second", reversed(CORPUS))):
        train_tokenizers(corpus, tmp_path / name, length=LENGTH, clip_vocab_size=560, t5_vocab_size=110)
    files = sorted(p.relative_to(tmp_path / "first") for p in (tmp_path / "first").rglob("*") if p.is_file())
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


@pytest.mark.parametrize("sizes", [{"clip_vocab_size": 513}, {"t5_vocab_size": 20}])
def test_a_vocabulary_must_hold_its_alphabet(tmp_path: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least"):
        train_tokenizers(CORPUS, tmp_path, length=LENGTH, **sizes)


def spiece_model(pieces: list[tuple[str, float, int]], model_type: int = 1) -> bytes:
    """A serialised sentencepiece model, written by hand."""

    def field(number: int, value: bytes) -> bytes:
        assert len(value) < 128
        return bytes([number << 3 | 2, len(value)]) + value

    def piece(text: str, score: float, kind: int) -> bytes:
        return field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind])

    return b"".join(field(1, piece(*p)) for p in pieces) + field(2, bytes([3 << 3, model_type]))


PIECES = [
    ("<pad>", 0, 3),
    ("</s>", 0, 3),
    ("<unk>", 0, 2),
    ("▁", -3, 1),
    ("a", -2, 1),
    ("▁a", -1, 1),
    ("b", -2, 1),
]


def sentence_pieces(
    *, legacy: bool, added: dict[int, AddedToken] | None = None, special: list[str] | None = None
) -> SentencePieces:
    return SentencePieces(
        spiece_model(PIECES),
        added=added or {},
        special=special or ["</s>", "<pad>", "<unk>"],
        unk="<unk>",
        extra_ids=2,
        legacy=legacy,
        add_prefix_space=True,
    )


def test_spiece_model() -> None:
    for legacy in (False, True):
        pieces = sentence_pieces(legacy=legacy)
        assert pieces.vocab_size == 9
        assert pieces.ids("ab  a z") == [5, 6, 5, 3, 2]
        assert pieces.ids("<extra_id_0>b <extra_id_1>") == ([8, 3, 6, 7] if legacy else [8, 6, 7])
        assert pieces.ended([5, 1], 1) == [5, 1] and pieces.ended([], 1) == [1]


def test_added_tokens_of_a_spiece_model() -> None:
    added = {9: AddedToken("<a>"), 10: AddedToken("<a><a>", lstrip=True)}
    pieces = sentence_pieces(legacy=True, added=added)
    assert pieces.vocab_size == 11
    assert pieces.ids("a <a> b") == [5, 9, 3, 6] and pieces.ids("a <a><a>b") == [5, 10, 3, 6]
    with pytest.raises(ValueError, match="its piece 4 is 'a', not '<z>'"):
        sentence_pieces(legacy=True, added={4: AddedToken("<z>")})
    with pytest.raises(ValueError, match="'<z>' has no id"):
        sentence_pieces(legacy=True, special=["<z>"])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("model", [b"", b"\xff" * 9, spiece_model(PIECES)[:-9], b"not a model"])
def test_a_bad_spiece_model_is_one_clear_error(folder: Path, model: bytes, legacy: bool) -> None:
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    edit(folder / "tokenizer_2" / "tokenizer_config.json", legacy=legacy)
    (folder / "tokenizer_2" / "spiece.model").write_bytes(model)
    with pytest.raises(TokenizerError, match="spiece.model cannot be used"):
        T5Tokenizer.from_folder(folder / "tokenizer_2")


def test_what_a_spiece_model_alone_cannot_honour(folder: Path) -> None:
    folder = folder / "tokenizer_2"
    (folder / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"expected tokenizer.json or spiece.model, found neither"):
        T5Tokenizer.from_folder(folder)
    (folder / "spiece.model").write_bytes(spiece_model(PIECES))
    assert T5Tokenizer.from_folder(folder)(["ab"], 5).tolist() == [[5, 6, 1, 0, 0]]
    edit(folder / "tokenizer_config.json", do_lower_case=True)
    with pytest.raises(TokenizerError, match="do_lower_case.* with a tokenizer.json only"):
        T5Tokenizer.from_folder(folder)


def test_encode(encoders: TextEncoders) -> None:
    prompts = ["a red cat", "a blue vase in front of a hill"]
    both = encoders.encode(prompts)
    assert both.txt.shape == (2, 17, 24) and both.pooled.shape == (2, 16)
    assert not both.txt.requires_grad
    for i, prompt in enumerate(prompts):
        alone = encoders.encode([prompt])
        torch.testing.assert_close(alone.txt[0], both.txt[i])
        torch.testing.assert_close(alone.pooled[0], both.pooled[i])
    assert not torch.equal(both.pooled[0], both.pooled[1])


@pytest.mark.parametrize("length", [0, 1])
def test_a_length_that_holds_no_prompt_is_refused(encoders: TextEncoders, length: int) -> None:
    with pytest.raises(ValueError, match=f"length must be at least 2 tokens, .* got {length}"):
        encoders.encode(["a cup"], length)
    assert encoders.encode(["a cup"], 2).txt.shape[1] == 2


def test_padding_reaches_t5_states_but_not_the_pooled_vector(encoders: TextEncoders) -> None:
    t5_ids, clip_ids = encoders.t5_tokenizer(["a cat"], 17), encoders.clip_tokenizer(["a cat"])
    end = int((clip_ids[0] == encoders.clip_tokenizer.eos_id).int().argmax())
    clip_ids_2, t5_ids_2 = clip_ids.clone(), t5_ids.clone()
    clip_ids_2[:, end + 1 :] = 5
    t5_ids_2[:, -1] = 5
    torch.testing.assert_close(encoders.clip(clip_ids), encoders.clip(clip_ids_2))
    assert not torch.allclose(encoders.t5(t5_ids)[:, 0], encoders.t5(t5_ids_2)[:, 0])


def test_encoders_learn(encoders: TextEncoders) -> None:
    """A few steps from scratch tell the prompts apart: initial weights are sane and gradients reach all."""
    t5_ids, clip_ids = encoders.t5_tokenizer(CORPUS, 17), encoders.clip_tokenizer(CORPUS)
    parameters = [*encoders.t5.parameters(), *encoders.clip.parameters()]
    optimizer = torch.optim.Adam(parameters, 3e-3)
    label = torch.tensor([c.startswith("a red") for c in CORPUS]).float()
    losses = []
    for _ in range(25):
        logits = encoders.t5(t5_ids).mean((1, 2)) * 5, encoders.clip(clip_ids)[:, 0]
        loss = sum(torch.nn.functional.binary_cross_entropy_with_logits(x, label) for x in logits)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 4 * math.log(2) and losses[-1] < 0.3 * losses[0]


def test_clip_refuses_what_it_has_no_positions_for(encoders: TextEncoders) -> None:
    with pytest.raises(ValueError, match="at most 24 tokens per prompt, got 25"):
        encoders.clip(torch.zeros(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="width 10 is not divisible by num_heads 3"):
        CLIPTextEncoder(CLIPConfig(vocab_size=9, width=10, mlp_size=8, num_layers=1, num_heads=3))


def test_built_on_meta_then_assigned_gives_the_same(encoders: TextEncoders) -> None:
    """Loaders build on the meta device: nothing may be computed by a constructor and lost there."""
    ids = torch.randint(90, (1, 11))
    for encoder in (encoders.t5, encoders.clip):
        with torch.device("meta"):
            empty = type(encoder)(encoder.config)
        empty.load_state_dict(encoder.state_dict(), strict=True, assign=True)
        assert torch.equal(empty(ids), encoder(ids))


def test_an_untrained_clip_adds_little_in_each_of_its_layers() -> None:
    """OpenAI's scale: what layers add to the stream is drawn smaller the more of them there are."""
    clip = CLIPTextEncoder(CLIPConfig(vocab_size=9, width=64, mlp_size=256, num_layers=8, num_heads=2))
    stds = {
        name: p.std().item() for name, p in clip.named_parameters() if name.endswith("weight") and p.ndim > 1
    }
    for name, scale in {
        "q_proj": 64**-0.5, "k_proj": 64**-0.5, "v_proj": 64**-0.5, "out_proj": (64 * 16) ** -0.5,
        "fc1": 128**-0.5, "fc2": (64 * 16) ** -0.5,
    }.items():  # fmt: skip
        found = [std for of, std in stds.items() if f".{name}." in of]
        assert len(found) == 8 and all(std == pytest.approx(scale, rel=0.1) for std in found), name


@pytest.mark.parametrize("lacks", ["</s>", "<pad>"])
def test_a_tokenizer_without_its_own_marks_is_refused(lacks: str) -> None:
    pieces = SimpleNamespace(vocab_size=9, token_to_id=lambda piece: None if piece == lacks else 1)
    with pytest.raises(ValueError, match="expected a tokenizer that knows '</s>' and '<pad>'"):
        T5Tokenizer(pieces=pieces, eos="</s>", pad="<pad>", length=4)  # type: ignore[arg-type]


def test_files_of_a_strange_size_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bokehflux.text.tokenizers.MAX_FILE_BYTES", 20)
    for kind, name in ((CLIPTokenizer, "tokenizer"), (T5Tokenizer, "tokenizer_2")):
        with pytest.raises(TokenizerError, match="a tokenizer file has at most 20: fetch it again"):
            kind.from_folder(folder / name)


def test_ctrl_c_is_no_damaged_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: object) -> None:
        raise SystemExit(3)

    monkeypatch.setattr("bokehflux.text.tokenizers._t5_pieces", pressed)
    with pytest.raises(SystemExit):
        T5Tokenizer.from_folder(folder / "tokenizer_2")
