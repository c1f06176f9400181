"""Tokenizers: ours, those of others, and what cannot be one; with `tokenizers` as the independent judge."""

import json

import pytest

from data import prepare
from hf import encoding_to_hf, save_hf_tokenizer
from sources import word_problems
from tokenizer import SPECIAL, SPLIT, build_encoding, load_encoding, make_encoding, portable, same_tokenizer

CORPUS = [f"{row['instruction']} {row['response']}" for row in word_problems("train", 500, 0)] + [
    "def f(x):\n    return x ** 2  # naïve café\n" * 3,
    "数学は楽しい。1234567 + 89 = ?\t\r\n\n   indented",
]
HARD = [
    "",
    "naïve café — 数学 🙂",
    "a\tb\r\n  c   ",
    "\x00\x7f",
    *CORPUS[::50],
    "".join(map(chr, range(0x3000))),
    "🙂👩‍👩‍👧 é é ﷽ 𝔘𝔫𝔦",
    " \n \t  \r\n\u00a0\u3000 x",
    "It's 'LL we'd I'm 12,345.67 ½ ²",
    "<|im_start|><|object_ref_end|>2+2?<|im_end|>4<|box_end|><|nothing|>",
]


@pytest.fixture
def tokenizers():
    return pytest.importorskip("tokenizers")


def test_byte_tokenizer_round_trips_every_text():
    encoding = make_encoding("bytes")
    assert encoding.n_vocab == 256 + len(SPECIAL)
    for text in HARD:
        assert encoding.encode_ordinary(text) == list(text.encode())


def test_trained_tokenizer_round_trips_and_has_the_size_asked_for(tmp_path):
    pytest.importorskip("rustbpe")
    encoding = make_encoding("train:300", texts=CORPUS)
    assert encoding.n_vocab == 300
    prepare(tmp_path / "d", n_problems=300, n_val_problems=1, tokenizer="train:300")
    again, from_file = load_encoding(tmp_path / "d"), make_encoding(str(tmp_path / "d" / "tokenizer.tiktoken"))
    for text in HARD:
        assert encoding.decode(encoding.encode_ordinary(text)) == text
        assert again.decode(again.encode_ordinary(text)) == text
        assert again.encode_ordinary(text) == from_file.encode_ordinary(text)
    assert again._special_tokens == encoding._special_tokens == from_file._special_tokens


@pytest.mark.parametrize("wrong", ["train:12", "train:x", "no_such_encoding"])
def test_unknown_tokenizers_are_refused(wrong):
    with pytest.raises(ValueError, match="tokenizer="):
        make_encoding(wrong)


# ----------------------------------------------------------------------------------------------------
# tokenizer.json


def same_ids(encoding, tokenizer):
    """On every hard text, with special tokens read as such and not."""
    for text in HARD:
        theirs = tokenizer.encode(text, add_special_tokens=False).ids
        assert encoding.encode(text, allowed_special="all") == theirs, text
    tokenizer.encode_special_tokens = True
    for text in HARD:
        assert encoding.encode_ordinary(text) == tokenizer.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(encoding.encode_ordinary(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("spec", ["bytes", "train:1000"])
def test_our_tokenizers_in_their_format(tmp_path, tokenizers, spec):
    if spec.startswith("train"):
        pytest.importorskip("rustbpe")
    encoding = make_encoding(spec, texts=CORPUS)
    save_hf_tokenizer(encoding, tmp_path)
    same_ids(encoding, tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    assert same_tokenizer(load_encoding(tmp_path), encoding)  # and back


@pytest.mark.parametrize("split", ["gpt2", "ours", "special tokens first"])
def test_their_tokenizers_in_our_format(tmp_path, tokenizers, split):
    """Loaded from their file, and from a dataset that was made with it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split != "ours")
    tokenizer.pre_tokenizer = byte_level
    if split == "ours":
        by_regex = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated")
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([by_regex, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    first = list(SPECIAL.values()) if split == "special tokens first" else []
    options = dict(initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), special_tokens=first)
    tokenizer.train_from_iterator(CORPUS, tokenizers.trainers.BpeTrainer(vocab_size=1000, **options))
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    (tmp_path / "theirs").mkdir()
    tokenizer.save(str(tmp_path / "theirs" / "tokenizer.json"))
    prepare(tmp_path / "d", n_problems=10, n_val_problems=1, tokenizer=str(tmp_path / "theirs"))
    for directory in "theirs", "d":
        encoding = load_encoding(tmp_path / directory)
        assert encoding.n_vocab == tokenizer.get_vocab_size()
        tokenizer.encode_special_tokens = False
        same_ids(encoding, tokenizer)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"normalizer": {"type": "NFC"}}, r"a normalizer \(NFC\)"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "must be split by"),
        ({"model": {"type": "Unigram", "vocab": {}, "merges": []}}, "only byte-level BPE"),
        ({"model": 3}, "no tokenizer of byte-level BPE"),
        ({"model": {"type": "BPE", "vocab": None, "merges": []}}, "no tokenizer of byte-level BPE"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, "must be split by"),
        ({"added_tokens": [{"id": 256, "content": "<x>", "lstrip": True}]}, "lstrip"),
        ({"added_tokens": [{"id": 7, "content": "<x>"}]}, "same id"),
        ({"added_tokens": [{"content": "<x>"}]}, "no tokenizer of byte-level BPE"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path, change, sentence):
    file = encoding_to_hf(make_encoding("bytes"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**file, **change}))
    with pytest.raises(ValueError, match=sentence):
        load_encoding(tmp_path)


def hand_made(merges, extra=()):
    """A tokenizer.json of the bytes, then the tokens that merges make, then extra ones without a merge."""
    file = encoding_to_hf(make_encoding("bytes"))
    file["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for i, token in enumerate([a + b for a, b in merges] + list(extra)):
        file["model"]["vocab"][token] = 300 + i
    file["model"].update(merges=[list(pair) for pair in merges], ignore_merges=False)
    return file


@pytest.mark.parametrize(
    "merges, extra", [([("b", "c"), ("a", "b"), ("ab", "c")], ()), ([], ["hello"]), ([("a", "b")], ["abab"])]
)
def test_merges_that_tiktoken_would_make_otherwise_are_refused(tmp_path, tokenizers, merges, extra):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(hand_made(merges, extra)))
    with pytest.raises(ValueError, match="do not make the token"):
        load_encoding(tmp_path)
    path.write_text(json.dumps(hand_made([("a", "b"), ("ab", "c"), ("abc", "ab")])))
    tokenizer, encoding = tokenizers.Tokenizer.from_file(str(path)), load_encoding(tmp_path)
    for text in "abc", "abcab", "aabcabcab", "bcabab":
        assert encoding.encode_ordinary(text) == tokenizer.encode(text).ids


def test_possessive_repetitions_survive_the_export(tmp_path, tokenizers):
    """As in cl100k_base, whose \\p{N}{1,3}+ other regex engines read as a repetition of groups."""
    ranks = {**{bytes([i]): i for i in range(256)}, b"12": 256, b"34": 257, b"123": 258, b"1234": 259, b"456": 260}
    encoding = build_encoding("numbers", ranks, r"\p{N}{1,3}+| ?\p{L}++|[^\p{N}\p{L}]")
    save_hf_tokenizer(encoding, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in "1234", "12345678", "½²34 abc 1", "99999":
        assert encoding.encode_ordinary(text) == tokenizer.encode(text).ids
    assert portable(encoding._pat_str) == r"(?>\p{N}{1,3})| ?\p{L}++|[^\p{N}\p{L}]"
