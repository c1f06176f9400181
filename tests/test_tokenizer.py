"""Tokenizers: ours, those of others, and what cannot be one; with `tokenizers` as the independent judge."""

import json
import random
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripts import ENV, ROOT

import tokenizer as tokenizer_py
from data import prepare
from hf import encoding_to_hf, save_hf_tokenizer, write_json
from sources import word_problems
from tokenizer import (
    BYTES,
    HRM_SPLIT,
    SPECIAL,
    SPLIT,
    Encoding,
    choose_condition,
    encode_prompt,
    load_encoding,
    make_encoding,
    portable,
    read_tokenizer,
    same_tokenizer,
)

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
        assert encoding.encode_ordinary(text) == encoding.encode(text) == list(text.encode())


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
    assert again.special_tokens == encoding.special_tokens == from_file.special_tokens


def trained(texts, size=600, **options):
    """The ranks of a tokenizer that is trained on texts."""
    pytest.importorskip("rustbpe")
    return make_encoding(f"train:{size}", texts=texts, **options).ranks


def test_the_same_texts_give_the_same_tokenizer():
    """Whatever the number of threads, and the seed of Python's hashes."""
    pytest.importorskip("rustbpe")
    code = "import hashlib; from sources import *; from tokenizer import *; rows = word_problems('train', 3000, 0)\n"
    code += "e = make_encoding('train:400', 'hrm', (row['instruction'] for row in rows), 'NFC')\n"
    code += "print(e.n_vocab, hashlib.sha256(repr(e.ranks).encode()).hexdigest())"
    env = {**ENV, "PYTHONPATH": str(ROOT)}
    threads = [{**env, "RAYON_NUM_THREADS": n, "PYTHONHASHSEED": n} for n in "13"]
    first, second = (subprocess.check_output([sys.executable, "-c", code], env=e, stderr=-3) for e in threads)
    assert first == second and first.startswith(b"400 ")


def test_a_tokenizer_is_trained_on_the_beginnings_of_texts(monkeypatch):
    texts = [text + "the end " * 50 for text in CORPUS for _ in range(3)]
    monkeypatch.setattr(tokenizer_py, "MAX_CHARS", 40)
    assert trained(texts) == trained([text[:40] for text in texts]) != trained(CORPUS)


def test_training_reads_no_more_than_it_may(monkeypatch):
    """So many characters, or so many bytes of different words; as many equal ones as there are."""

    def n_read(texts):
        texts = iter(texts)
        trained(text for text in texts)
        return 3000 - len([*texts])

    words = [f"{a}{b}{c}" for a in "abcdefghijklmno" for b in "éèàùâêîôûç" for c in "klmnopqrstuvwxyzKLMN"]
    monkeypatch.setattr(tokenizer_py, "MAX_DISTINCT_BYTES", 4000)
    assert 700 < n_read(words) < 1500  # of 4 bytes each
    assert n_read(["again and again"] * 3000) == 3000
    monkeypatch.setattr(tokenizer_py, "MAX_TRAINING_CHARS", 1500)
    assert n_read(["again and again"] * 3000) == 101


def test_a_tokenizer_with_the_published_split_and_normalizer(tmp_path, tokenizers):
    """It learns from composed text, and is theirs in their format."""
    texts = [*CORPUS, *[unicodedata.normalize("NFD", UNICODE)] * 20]
    options = dict(pat_str="hrm", normalizer="NFC")
    assert trained(texts, **options) == trained([unicodedata.normalize("NFC", text) for text in texts], **options)
    assert trained(texts, **options) != trained(texts, pat_str="hrm")
    encoding = make_encoding("train:600", texts=texts, **options)
    assert (encoding.pat_str, encoding.normalizer, encoding.n_vocab) == (PUBLISHED_SPLIT, "NFC", 600)
    save_hf_tokenizer(encoding, tmp_path)
    same_ids(encoding, tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), [*texts, UNICODE])
    assert same_tokenizer(load_encoding(tmp_path), encoding)
    with pytest.raises(ValueError, match="normalizer 'NFKC'; only NFC"):
        make_encoding("train:600", texts=texts, normalizer="NFKC")


@given(st.text(), st.binary())
def test_any_text_and_any_bytes_come_back(text, some):
    for split in SPLIT, HRM_SPLIT:
        encoding = Encoding("pairs", {**BYTES, b"th": 256, b" th": 257, b"\xc3\xa9": 258, b"\r\n": 259}, split, {})
        assert encoding.decode(encoding.encode(text)) == text
    assert b"".join(encoding.decode_single_token_bytes(encoding.ranks[bytes([i])]) for i in some) == some


def test_a_regex_that_fails_in_training_is_an_error():
    with pytest.raises(ValueError, match="the regex .* fails on 'a text'"):
        trained(["ab" * 9999], pat_str=r"(?:a|b|ab)+(?=c)|[\s\S]")


@pytest.mark.parametrize("wrong", ["train:12", "train:x", "no_such_encoding"])
def test_unknown_tokenizers_are_refused(wrong):
    with pytest.raises(ValueError, match="tokenizer="):
        make_encoding(wrong)


# ----------------------------------------------------------------------------------------------------
# tokenizer.json


def same_ids(encoding, tokenizer, texts=HARD):
    """Of the special tokens, and on every text, where they are spelled in plain text."""
    for text, i in encoding.special_tokens.items():
        assert tokenizer.token_to_id(text) == i and tokenizer.encode(text, add_special_tokens=False).ids == [i]
    tokenizer.encode_special_tokens = True
    for text in texts:
        assert encoding.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(encoding.encode(text), skip_special_tokens=False) == encoding.normalize(text)
    tokenizer.encode_special_tokens = False


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
        same_ids(encoding, tokenizer)


def split_by(regex):
    """Their step that splits text by a regex, then the one that makes bytes of it."""
    split, byte_level = encoding_to_hf(make_encoding("bytes"))["pre_tokenizer"]["pretokenizers"]
    return {"type": "Sequence", "pretokenizers": [{**split, "pattern": {"Regex": regex}}, byte_level]}


# As in REFERENCE.md: the split, and the special tokens, of which the model's directory has some more.
PUBLISHED_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
PUBLISHED_SPLIT += r"|\s+(?!\S)|\s+"
PUBLISHED_SPECIAL = ["<|PAD|>", "<|direct|>", "<|cot|>", "<|noisy|>", "<|synth|>", "<|endoftext|>", *SPECIAL.values()]
UNICODE = "Ångström naïve café Việt Nam 한국어 각 がぎぐ ἄνθρωπος ñ ö ệ \u2126 \u212b \u0958 ﬁ ½"
UNICODE = unicodedata.normalize("NFD", UNICODE) + UNICODE


def published_tokenizer(tokenizers, path, vocab_size, texts):
    """A tokenizer by the published recipe, saved at `path`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PUBLISHED_SPLIT), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    options = dict(initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), special_tokens=PUBLISHED_SPECIAL)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, **options)
    tokenizer.train_from_iterator([*CORPUS, *texts], trainer)
    tokenizer.save(str(path))
    return tokenizer


def random_texts(n):
    """Texts of letters, Hangul in syllables and in jamo, marks, digits, blanks, CRLF, and special tokens."""
    rng = random.Random(0)
    parts = [*PUBLISHED_SPECIAL, *UNICODE.split(), "'LL", "don't", "\r\n", "\r\n\r\n", "    "]
    parts += "   \t\n\r\u00a0\u2028aé字'’-_<|>12½🙂\x00\x7f\u0301\u0323\u0345\u094d\u3099\u200d"
    ranges = (0x20, 0x7F), (0xA0, 0x250), (0x300, 0x370), (0x1100, 0x1200), (0xAC00, 0xD7A4), (0x3040, 0x3100)
    ranges += (0x900, 0x980), (0x1E00, 0x2000), (0x1F300, 0x1F700), (0xF900, 0xFA00), (0xE000, 0xE010)
    for _ in range(n):
        text = (rng.choice(parts) if rng.random() < 0.6 else chr(rng.randrange(*rng.choice(ranges))) for _ in range(40))
        yield "".join(text)


def test_a_tokenizer_by_the_published_recipe(tmp_path, tokenizers):
    """The same ids from their file, from a dataset that was made with it, and there and back."""
    texts = [*HARD, UNICODE, unicodedata.normalize("NFC", UNICODE), *random_texts(2000)]
    assigned = unicodedata.ucd_3_2_0.category  # their NFC does not know marks that came with Unicode 10 and later
    texts = ["".join(c for c in text if assigned(c) != "Cn") for text in texts]
    theirs = published_tokenizer(tokenizers, tmp_path / "tokenizer.json", 2000, texts[:400])
    ours = load_encoding(tmp_path)
    assert ours.n_vocab == 2000 and ours.special_tokens == {text: i for i, text in enumerate(PUBLISHED_SPECIAL)}
    same_ids(ours, theirs, texts)
    prepare(tmp_path / "d", n_problems=10, n_val_problems=1, tokenizer=str(tmp_path))
    assert same_tokenizer(load_encoding(tmp_path / "d"), ours)
    composed = theirs.normalizer.normalize_str(UNICODE)
    assert encode_prompt(ours, UNICODE) == encode_prompt(ours, composed) and composed != UNICODE
    (tmp_path / "out").mkdir()
    save_hf_tokenizer(ours, tmp_path / "out")
    same_ids(ours, tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")), texts)
    assert same_tokenizer(load_encoding(tmp_path / "out"), ours)
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    del meta["tokenizer"]["normalizer"]  # as in a dataset from before there were any
    write_json(tmp_path / "d" / "meta.json", meta)
    plain = load_encoding(tmp_path / "d")
    assert not same_tokenizer(plain, ours) and plain.decode(plain.encode(UNICODE)) == UNICODE


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"normalizer": {"type": "NFKC"}}, r"a normalizer \(NFKC\) is not supported, only NFC"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}}, "Lowercase"),
        ({"normalizer": {"type": "Sequence", "normalizers": 3}}, "no tokenizer of byte-level BPE"),
        ({"normalizer": "NFC"}, "no tokenizer of byte-level BPE"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "must be split by"),
        ({"model": {"type": "Unigram", "vocab": {}, "merges": []}}, "only byte-level BPE"),
        ({"model": 3}, "no tokenizer of byte-level BPE"),
        ({"model": {"type": "BPE", "vocab": None, "merges": []}}, "no tokenizer of byte-level BPE"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, "must be split by"),
        ({"added_tokens": [{"id": 256, "content": "<x>", "lstrip": True}]}, "lstrip"),
        ({"added_tokens": [{"id": 7, "content": "<x>"}]}, "same id"),
        ({"added_tokens": [{"id": 300, "content": "<x>"}, {"id": 300, "content": "<y>"}]}, "same id"),
        ({"added_tokens": [{"id": -1, "content": "<x>"}]}, "ids below 0"),
        ({"added_tokens": [{"id": 2**31, "content": "<x>"}]}, "above 2147483647"),
        ({"added_tokens": [{"id": True, "content": "<x>"}]}, "no whole number"),
        ({"added_tokens": [{"id": 300, "content": 3}]}, "no tokenizer of byte-level BPE"),
        ({"added_tokens": [{"content": "<x>"}]}, "no tokenizer of byte-level BPE"),
        ({"pre_tokenizer": split_by(r"\p{L}+")}, r"regex '\\\\p{L}\+' does not cover all text, such as '1'"),
        ({"pre_tokenizer": split_by(r"\S+|[ \n]")}, "does not cover all text"),
        ({"pre_tokenizer": split_by("x*")}, "regex 'x.' matches where it takes no text"),
        ({"pre_tokenizer": split_by("(")}, "regex '.' cannot be used"),
        ({"pre_tokenizer": split_by("(" * 3000 + ")" * 3000)}, "a regex of 6,000 characters"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path, change, sentence, capfd):
    file = encoding_to_hf(Encoding("bytes", BYTES, r"[\s\S]", {}))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**file, **change}))
    with pytest.raises(ValueError, match=sentence) as e:
        load_encoding(tmp_path)
    assert str(tmp_path) in str(e.value) and "panicked" not in capfd.readouterr().err


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


def test_a_token_that_two_pairs_make_has_the_rank_of_its_last_merge(tmp_path, tokenizers):
    """tiktoken makes abc of ab and c, since ab has the lowest id; where the list has that pair counts."""
    path, file = tmp_path / "tokenizer.json", hand_made([("a", "b"), ("a", "bc"), ("c", "d"), ("b", "c"), ("ab", "c")])
    path.write_text(json.dumps(file))
    tokenizer, encoding = tokenizers.Tokenizer.from_file(str(path)), load_encoding(tmp_path)
    for text in "abcd", "abc", "bcd":
        assert encoding.encode(text) == tokenizer.encode(text).ids
    file["model"]["vocab"]["abc"] = 301
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match="do not rise in the order of the merges"):
        load_encoding(tmp_path)


def test_possessive_repetitions_survive_the_export(tmp_path, tokenizers):
    """As in cl100k_base, whose \\p{N}{1,3}+ other regex engines read as a repetition of groups."""
    ranks = {**{bytes([i]): i for i in range(256)}, b"12": 256, b"34": 257, b"123": 258, b"1234": 259, b"456": 260}
    encoding = Encoding("numbers", ranks, r"\p{N}{1,3}+| ?\p{L}++|[^\p{N}\p{L}]", {})
    save_hf_tokenizer(encoding, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in "1234", "12345678", "½²34 abc 1", "99999":
        assert encoding.encode_ordinary(text) == tokenizer.encode(text).ids
    assert portable(encoding.pat_str) == r"(?>\p{N}{1,3})| ?\p{L}++|[^\p{N}\p{L}]"


def test_a_token_too_long_to_check_is_refused_at_once(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(hand_made([("a", "b")], ["ab" * 10000])))
    with pytest.raises(ValueError, match="tokens are too long: one has 20,000 bytes"):
        load_encoding(tmp_path)


@pytest.mark.parametrize("condition", [3, None, ["cot"], "drect"])
def test_a_condition_that_is_none_names_its_file(tmp_path, condition):
    write_json(tmp_path / "tokenizer_config.json", {"condition": condition})
    with pytest.raises(ValueError, match="tokenizer_config.json does not tell the condition of prompts: .*condition"):
        choose_condition("", tmp_path)


@pytest.mark.parametrize("special", [{"x": "300"}, {"x": 7}, {"x": 262, "y": 262}, {"x": -1}, {"x": 10**40}])
def test_special_tokens_that_cannot_be_name_their_file(problems_dir, tmp_path, special):
    for name in "meta.json", "tokenizer.tiktoken":
        (tmp_path / name).write_bytes((problems_dir / name).read_bytes())
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta["tokenizer"]["special_tokens"] = special
    write_json(tmp_path / "meta.json", meta)
    with pytest.raises(ValueError, match="meta.json is damaged"):
        read_tokenizer(tmp_path)


def test_a_text_that_tiktoken_cannot_split_is_a_bad_row(tmp_path, capfd):
    """It stops a preparation with its line, or is dropped; so it is in training a tokenizer. Rust prints no panic."""
    pytest.importorskip("rustbpe")
    rows = [dict(instruction=text, response="b") for text in ("a", "a" + " " * 1_200_000, "c " * 600_000)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = dict(source=str(tmp_path / "x.jsonl"), tokenizer="train:300", val_fraction=0.0, block_size=2**21)
    with pytest.raises(ValueError, match="x.jsonl, line 2: .* blanks in a row .*; --skip_bad=True"):
        prepare(tmp_path / "d", **options)
    counts = prepare(tmp_path / "d", **options, skip_bad=True)["splits"]["train"]
    assert counts["documents"] == 2 and sum(counts["dropped"].values()) == 1
    assert "panicked" not in capfd.readouterr().err


def test_a_panic_of_rust_is_an_error():
    encoding = Encoding("greedy", BYTES, r"(?:a|b)+(?=c)|[\s\S]", {}).checked()
    with pytest.raises(ValueError, match="the regex .* fails on 'abab"):
        encoding.encode("ab" * 600_000)
    assert encoding.encode("ab") == [97, 98]


def test_tiktoken_without_a_network_names_the_tokenizer(monkeypatch):
    tiktoken = pytest.importorskip("tiktoken")

    def offline(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="tokenizer=gpt2: tiktoken must download its vocabulary once, and cannot: .*$"):
        make_encoding("gpt2")
