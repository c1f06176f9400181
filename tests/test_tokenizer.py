"""Ids as `tokenizers` gives them, from its files and ours; documents; what transformers makes of ours."""

import json
import random
import sys
import unicodedata

import pytest

from tokenizer import SPECIAL, Tokenizer, get_tokenizer, known_conditions, load_tokenizer

hf = pytest.importorskip("tokenizers")

PUBLISHED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
POSSESSIVE = (  # tiktoken's cl100k_base
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
GAPS = r"\p{L}+|[^\s\p{L}]+"  # matches no blanks
WORDS = "Ångström café Việt 한국어 がぎぐ ἄνθρωπος \u2126 ﬁ ½ don't 'LL 'ſ 12345 the aaaaaaa ababab"
WORDS = [*WORDS.split(), *unicodedata.normalize("NFD", WORDS).split()]
ALPHABET = hf.pre_tokenizers.ByteLevel.alphabet()
BLANKS = [" " * n for n in range(24, 1, -1)]


def texts(n):
    """Nasty ones: marks, jamo, blanks of all kinds, runs, tokens spelled out, anything else."""
    rng = random.Random(0)
    common = [*WORDS, *SPECIAL.values()]
    common += "<think>,\r\n,\u2028,\u2000,\u3000,\x85,\xa0,',’,-,----,_,<,|,>,🙂,\x00,\x7f".split(",")
    common += "\u0301,\u0323,\u0338,\u0345,\u3099,\u200d,\t,\n,\n\n,\r, ,  ,    ".split(",")
    rare = [chr(i) for i in range(0x20, 0x2100) if unicodedata.category(chr(i)) != "Cn"]
    yield from ("", "a" * 2000, " " * 2000 + "x", " \n \n  \t x\r\r\n")
    for _ in range(n):
        yield "".join(rng.choice(rng.choice([common, common, rare])) for _ in range(30))


def train(directory, regex="", nfc=False, added=(), alphabet=None):
    """A small BPE that tokenizers trains; regex "": GPT-2's, in ByteLevel."""
    theirs = hf.Tokenizer(hf.models.BPE())
    byte_level = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not regex)
    theirs.pre_tokenizer = byte_level
    if regex:
        split = hf.pre_tokenizers.Split(hf.Regex(regex), "isolated")
        theirs.pre_tokenizer = hf.pre_tokenizers.Sequence([split, byte_level])
    if nfc:
        theirs.normalizer = hf.normalizers.NFC()
    first = ["<|PAD|>", *SPECIAL.values()] if nfc else []
    trainer = hf.trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=alphabet or ALPHABET,
        special_tokens=first,
        show_progress=False,
    )
    theirs.train_from_iterator(texts(300), trainer)
    theirs.add_tokens([hf.AddedToken(text, normalized=text.isspace()) for text in added])
    theirs.save(str(directory / "tokenizer.json"))
    return theirs


def assert_same_ids(ours, theirs):
    for text, i in ours.special.items():
        assert theirs.encode(text, add_special_tokens=False).ids == [i]
    theirs.encode_special_tokens = True  # as plain text, as here
    for text in texts(400):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        decoded = ours.decode(ids)
        if ours.nfc:
            text, decoded = (unicodedata.normalize("NFC", x) for x in (text, decoded))
        assert decoded == text


UTF8 = sorted(set(ALPHABET) - set("ÀÁõö÷øùúûüýþÿ"))  # no text has these bytes
KINDS = {
    "published": dict(regex=PUBLISHED, nfc=True),
    "gpt2": {},
    "gpt-neox": dict(nfc=True, alphabet=UTF8, added=BLANKS),
    "thinking": dict(regex=PUBLISHED, nfc=True, added=["<think>", "<thi"]),
    "regex with gaps": dict(regex=GAPS),
}


def assert_saved(ours, directory):
    ours.save(directory)
    assert_same_ids(ours, hf.Tokenizer.from_file(str(directory / "tokenizer.json")))
    again = load_tokenizer(directory)
    assert all(again.encode(text) == ours.encode(text) for text in texts(100))


@pytest.mark.parametrize("kind", KINDS)
def test_their_files_give_their_ids_here_and_when_saved_again(tmp_path, kind):
    theirs = train(tmp_path, **KINDS[kind])
    ours = load_tokenizer(tmp_path)
    theirs.add_special_tokens([*SPECIAL.values()])  # after the others, as here
    assert_same_ids(ours, theirs)
    assert ours.n_vocab == theirs.get_vocab_size()
    assert_saved(ours, tmp_path)


@pytest.mark.parametrize("regex", [None, POSSESSIVE])
def test_bytes_and_regexes_of_tiktoken_in_their_format(tmp_path, regex):
    ours = get_tokenizer("bytes")
    if regex:
        train(tmp_path, r"\s*\p{N}+|\s*\S+")
        ours = Tokenizer(load_tokenizer(tmp_path).ranks, regex, {"<|a|>": 2000, "<|b|>": 2010})
    assert_saved(ours, tmp_path)


@pytest.fixture
def file(tmp_path):
    """The content of a tokenizer.json of 300 ids, and a function that writes it changed."""
    train(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())

    def write(**changes):
        path.write_text(json.dumps({**content, **changes}))
        return tmp_path

    return content, write


FLAGS = dict.fromkeys(["special", "normalized", "single_word", "lstrip", "rstrip"], False)
TOKEN = {"id": 1000, "content": "<x>", **FLAGS}
SPLIT = """{"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": REGEX}, "behavior": "Isolated", "invert": false},
    {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]}"""


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"pre_tokenizer": json.loads(SPLIT.replace("REGEX", r'"\\p{N}{1,3}+|[\\s\\S]"'))},
        {"pre_tokenizer": json.loads(SPLIT.replace("REGEX", r'"\\w+|\\W"'))},
        {"added_tokens": [{**TOKEN, "lstrip": True}]},
        {"added_tokens": [{**TOKEN, "normalized": True}], "normalizer": {"type": "NFC"}},
    ],
)
def test_what_tiktoken_does_not_do_is_refused(file, changes):
    _, write = file
    load_tokenizer(write())
    with pytest.raises(ValueError, match="tokenizer.json: "):
        load_tokenizer(write(**changes))


@pytest.mark.parametrize(
    "merges, extra, ignore_merges, fits",
    [
        (["a b", "ab c", "abc ab"], [], False, True),
        (["a b", "b c", "ab c", "a bc"], [], True, True),  # every way to make a token, as converters list them
        (["b c", "a b", "ab c"], [], False, False),  # tokenizers makes a|bc of abc
        ([], ["hello"], False, False),
        (["b c", "a b"], ["ab"], False, False),  # ids in another order
        ([], ["hello"], True, True),
        (["a b"], ["abc"], True, False),  # tiktoken makes abc of ab and c
    ],
)
def test_merges_that_tiktoken_would_make_otherwise_are_refused(file, merges, extra, ignore_merges, fits):
    content, write = file
    vocab = {text: i for text, i in content["model"]["vocab"].items() if len(text) == 1}
    for text in [*extra, *[pair.replace(" ", "") for pair in merges]]:
        vocab.setdefault(text, len(vocab))
    model = {**content["model"], "vocab": vocab, "merges": merges, "ignore_merges": ignore_merges}
    directory = write(model=model)
    if not fits:
        with pytest.raises(ValueError, match="tiktoken would"):
            load_tokenizer(directory)
        return
    ours = load_tokenizer(directory)
    theirs = hf.Tokenizer.from_file(str(directory / "tokenizer.json"))
    for text in "abc", "abcab", "aabcabcab", "bcabab", "hello":
        assert ours.encode(text) == theirs.encode(text).ids


def test_a_byte_without_a_token_is_refused(tmp_path):
    train(tmp_path, alphabet=["a", "b"], regex=PUBLISHED)
    with pytest.raises(ValueError, match="bytes have no token"):
        load_tokenizer(tmp_path)


# -----------------------------------------------------------------------------
# documents


def test_a_document_and_its_prefix():
    tokenizer = get_tokenizer("bytes")
    boq, eoq, eoa, _, cot, _, synth = tokenizer.id_of.values()
    prefix = [boq, synth, cot, *b"<|im_end|>", eoq]  # spelled in a text it is text
    for condition in "synth,cot", " synth, cot ", "synth,,cot,none":
        assert tokenizer.prompt("<|im_end|>", condition) == prefix
    document = tokenizer.document("<|im_end|>", "é", "synth,cot")
    assert document == ([*prefix, *"é".encode(), eoa], len(prefix))
    assert tokenizer.prompt("", "none") == tokenizer.prompt("") == [boq, eoq]
    with pytest.raises(SystemExit, match="no condition 'drect'; there are direct, cot, noisy, synth"):
        tokenizer.prompt("", "drect")


def test_text_that_has_no_ids_raises():
    tokenizer = get_tokenizer("bytes")
    for text in "\ud800", "a" + " \n" * 300_000:
        with pytest.raises(ValueError):
            tokenizer.encode(text)


def test_without_tiktoken_ids_are_read(tmp_path, monkeypatch):
    get_tokenizer("bytes").save(tmp_path)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode([*"né".encode(), 257, 10**6]) == "né<|im_end|>"


def test_names(tmp_path, monkeypatch):
    get_tokenizer("bytes").save(tmp_path, ["synth,cot", ""])
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert get_tokenizer(f"~/{tmp_path.name}").n_vocab == 263
    assert known_conditions(tmp_path) == ["synth,cot", ""]
    assert known_conditions(tmp_path.parent) == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in "byts", "nobody/nothing", "no/such/directory":
        with pytest.raises(SystemExit, match=f"no tokenizer '{name}'; .* hub id, bytes, .*cl100k_base"):
            get_tokenizer(name)


# -----------------------------------------------------------------------------
# transformers


@pytest.fixture
def auto(tmp_path):
    transformers = pytest.importorskip("transformers")
    get_tokenizer("bytes").save(tmp_path, ["cot", "direct"], 512)
    return transformers.AutoTokenizer.from_pretrained(tmp_path)


def test_the_chat_template_is_our_prompt(auto):
    text = "What is 2+2? é"
    message = {"role": "user", "content": text}
    ours = get_tokenizer("bytes")
    for condition in "cot", "synth, cot", "", "none":
        encoded = auto.apply_chat_template([message], condition=condition, return_dict=True)
        assert encoded["input_ids"] == ours.prompt(text, condition)
        assert set(encoded["token_type_ids"]) == {1}
    with pytest.raises(Exception, match="no condition drect; there are direct, cot, noisy, synth"):
        auto.apply_chat_template([message], condition="drect")
    with pytest.raises(Exception, match="a single message"):
        auto.apply_chat_template([message, message])


def fine_tuning_batch(auto, questions, answers):
    """As in docs/hugging-face.md."""
    messages = [[{"role": "user", "content": text}] for text in questions]
    prompts = auto.apply_chat_template(messages, tokenize=False)
    answers = [text + auto.eos_token for text in answers]
    batch = auto(prompts, answers, padding=True, return_tensors="pt")
    not_answer = (batch["token_type_ids"] == 1) | (batch["attention_mask"] == 0)
    batch["labels"] = batch["input_ids"].masked_fill(not_answer, -100)
    return prompts, batch


def test_a_batch_for_fine_tuning_is_our_documents_and_targets_the_answers(auto):
    """The chat template has the most frequent condition, cot, by default."""
    from transformers import DataCollatorForLanguageModeling

    _, batch = fine_tuning_batch(auto, ["1+1", "12+30"], ["2", "42"])
    ours = get_tokenizer("bytes")
    documents = [ours.document("1+1", "2", "cot"), ours.document("12+30", "42", "cot")]
    for row, labels, (ids, n_prefix) in zip(batch["input_ids"], batch["labels"], documents):
        assert row[-len(ids) :].tolist() == ids
        assert labels[labels != -100].tolist() == ids[n_prefix:]
    collator = DataCollatorForLanguageModeling(auto, mlm=False)
    labels = collator([{"input_ids": ids} for ids, _ in documents])["labels"]
    assert labels[:, -1].tolist() == [ours.id_of["eoa"]] * 2  # which is not masked as padding


def test_fine_tuned_in_transformers_an_answer_does_not_see_what_comes_after(auto):
    """It does where prompt and answer are one text, which is all prefix."""
    import torch
    from transformers import HrmTextConfig, HrmTextForCausalLM

    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=263,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=16,
        initializer_range=0.1,
    )
    model = HrmTextForCausalLM(config).eval()
    logits = []
    for answer in "123", "129":
        (prompt,), batch = fine_tuning_batch(auto, ["1+1"], [answer])
        one_text = auto([prompt + answer + auto.eos_token], return_tensors="pt")
        with torch.no_grad():
            logits.append([model(**inputs).logits[0, :-2] for inputs in (batch, one_text)])
    (pair, one), (other_pair, other_one) = logits
    assert torch.equal(pair, other_pair) and not torch.allclose(one, other_one, atol=1e-3)
