"""Tokenizers, and the format of a document.

    prompt = encode_prompt(load_encoding("out"), "What is 2+2?", "synth,cot")

A tokenizer is an Encoding: byte-level BPE, by tiktoken, with seven special tokens.
A document is `boq, condition tags, instruction, eoq | response, eoa`; the part before the bar is its prefix.
"""

import base64
import hashlib
import math
import os
import random
import re
import unicodedata
from contextlib import contextmanager
from functools import cached_property
from itertools import count
from pathlib import Path

from tqdm import tqdm

from common import check_types, errors_name_file, local_directory, one_line, read_json, replace_file

CONDITIONS = {"direct": "<|object_ref_start|>", "cot": "<|object_ref_end|>"}
CONDITIONS |= {"noisy": "<|quad_start|>", "synth": "<|quad_end|>"}
SPECIAL = {"boq": "<|im_start|>", "eoq": "<|im_end|>", "eoa": "<|box_end|>", **CONDITIONS}  # as in the published model
FILES = ("train.bin", "train.idx", "val.bin", "val.idx", "tokenizer.tiktoken")  # of a dataset
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # words, single digits, punctuation, space: no merge crosses
HRM_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
HRM_SPLIT += r"|\s+(?!\S)|\s+"  # of the published model, with the normalizer NFC


# ---- the document format ----
def token_dtype(vocab_size):
    return "uint16" if vocab_size <= 2**16 else "uint32"


def special_id(encoding, role):
    if SPECIAL[role] not in encoding.special_tokens:
        raise ValueError(f"the tokenizer {encoding.name} has no token for {role}: prepare the data anew")
    return encoding.special_tokens[SPECIAL[role]]


def condition_tags(condition):
    """The tags of "synth,cot": ["synth", "cot"]."""
    tags = [tag.strip() for tag in condition.split(",") if tag.strip()]
    if unknown := set(tags) - CONDITIONS.keys():
        raise ValueError(f"unknown condition '{min(unknown)}'; the conditions are {', '.join(CONDITIONS)}")
    return tags


def encode_prompt(encoding, instruction, condition=""):
    """The ids of a document's prefix. Text that spells a special token is plain text, never control."""
    tags = [special_id(encoding, tag) for tag in condition_tags(condition)]
    return [special_id(encoding, "boq"), *tags, *encoding.encode(instruction), special_id(encoding, "eoq")]


def encode_document(encoding, instruction, response, condition=""):
    """The ids of a document, and the length of its prefix."""
    prefix = encode_prompt(encoding, instruction, condition)
    return [*prefix, *encoding.encode(response), special_id(encoding, "eoa")], len(prefix)


def choose_condition(condition, directory):
    """The setting `condition` -> the condition of prompts: no tags for "none", and for "" what most training documents
    had, as meta.json or tokenizer_config.json tells; else "synth,cot"."""
    if condition:
        return "" if condition == "none" else ",".join(condition_tags(condition))
    path, found = Path(directory, "meta.json"), {"condition": "synth,cot"}
    if path.exists():
        counts = read_meta(directory)["splits"]["train"]["conditions"]
        found["condition"] = max(counts, key=counts.get, default="")
    elif (path := Path(directory, "tokenizer_config.json")).exists():
        found |= read_json(path)
    with errors_name_file(path, "does not tell the condition of prompts"):
        check_types(found, condition=str)
        return ",".join(condition_tags(found["condition"]))


# ---- text -> ids ----
BYTES = {bytes([i]): i for i in range(256)}
MAX_BLANKS = 2**19  # in a row; at a million of them tiktoken panics
KINDS = [*"a1 .Zzéßǅʰжאاि字한ᄒ٣½Ⅷ²_-'\"<|>$+€^🙂", "'s", "'LL", "\u0301", "\u200d", "\ue000", "\ufffd", "\U0010ffff"]
KINDS += [*"\0\a\b\t\n\v\f\r\x1b\x1f\x7f\x85\xa0\u1680\u2028\u3000\ufeff", "\r\n", "\n\n", "  ", "   ", "\u0378"]


class Encoding:
    """Text -> ids -> text, by byte-level BPE. `ranks` is {bytes: id}, and the lowest id is merged first; `pat_str` is
    the regex that splits text before; `normalizer` (None or "NFC") changes text before that; `special_tokens` is
    {text: id}. Raises ValueError if the parts make no tokenizer."""

    def __init__(self, name, ranks, pat_str, special_tokens, normalizer=None):
        if {*map(type, ranks.values()), *map(type, special_tokens.values())} != {int}:
            raise ValueError(f"{name} has an id that is no whole number")
        self.name, self.ranks, self.pat_str = name, ranks, pat_str
        self.special_tokens, self.normalizer = special_tokens, normalizer
        self.tokens = {i: token for token, i in ranks.items()}
        self.tokens |= {i: text.encode() for text, i in special_tokens.items()}
        self.n_vocab = max(self.tokens) + 1  # some ids below may have no token
        if len(self.tokens) < len(ranks) + len(special_tokens) or sum(len(token) == 1 for token in ranks) < 256:
            raise ValueError(f"{name} is no byte-level BPE: a byte has no token, or two tokens have the same id")
        if min(self.tokens) < 0 or self.n_vocab > 2**31:
            raise ValueError(f"{name} has ids below 0 or above {2**31 - 1}")
        if normalizer not in (None, "NFC"):
            raise ValueError(f"{name} has the normalizer {normalizer!r}; only NFC is supported")
        if len(pat_str) > 1024:  # one that is made to be slow takes 7 s
            raise ValueError(f"{name} has a regex of {len(pat_str):,} characters; at most 1,024 are supported")

    @cached_property
    def tiktoken(self):
        """tiktoken's Encoding, without special tokens."""
        import tiktoken

        try:
            return tiktoken.Encoding(self.name, pat_str=self.pat_str, mergeable_ranks=self.ranks, special_tokens={})
        except ValueError as e:
            raise ValueError(f"the regex {self.pat_str[:99]!r} cannot be used: {one_line(e)}") from None

    def normalize(self, text):
        return unicodedata.normalize(self.normalizer, text) if self.normalizer else text

    def encode(self, text):
        """The ids of a text. What spells a special token is plain text. Raises ValueError."""
        if too_blank(text):
            raise ValueError(f"{MAX_BLANKS:,} blanks in a row are too many for the tokenizer")
        with panics_blame(self.pat_str, text):
            return self.tiktoken.encode_ordinary(self.normalize(text)) if text else []

    encode_ordinary = encode  # as in tiktoken

    def decode(self, ids):
        return b"".join(map(self.decode_single_token_bytes, ids)).decode("utf-8", errors="replace")

    def decode_single_token_bytes(self, id):
        if id not in self.tokens:
            raise ValueError(f"the tokenizer {self.name} has no token with the id {id}")
        return self.tokens[id]

    def checked(self):
        """This Encoding. Raises ValueError if it changes text in any other way than its normalizer."""
        bpe = self.tiktoken  # raises if the regex is wrong
        # A match of no text makes Rust panic, and print that. This regex finds one: all text is left after the match.
        no_text = rf"(?=(?:{self.pat_str})(?<rest>[\s\S]*))(?=\k<rest>\z)[\s\S]"
        if type(bpe)("", pat_str=no_text, mergeable_ranks=BYTES, special_tokens={}).encode_ordinary("".join(KINDS)):
            raise ValueError(f"the regex {self.pat_str[:99]!r} matches where it takes no text")
        for text in (*KINDS, "".join(a + b for a in KINDS for b in KINDS), "".join(map(chr, range(0x800)))):
            if self.decode(self.encode(text)) != self.normalize(text):
                raise ValueError(f"the regex {self.pat_str[:99]!r} does not cover all text, such as {text[:20]!r}")
        return self


@contextmanager
def panics_blame(pat_str, text):
    """A panic of Rust inside becomes a ValueError: the regex fails on this text."""
    try:
        yield
    except BaseException as e:
        if type(e).__name__ != "PanicException":  # it is no Exception
            raise
        raise ValueError(f"the regex {pat_str[:99]!r} fails on {text[:20]!r}") from None


def too_blank(text):
    """Whether a run of white space may be longer than the regexes of tiktoken and rustbpe bear."""
    return len(text) >= MAX_BLANKS and re.search(rf"(?<!\s)\s{{{MAX_BLANKS}}}", text) is not None


def same_tokenizer(a, b):
    """Whether two Encodings give the same ids for every text."""
    first, second = ((e.ranks, e.special_tokens, portable(e.pat_str), e.normalizer) for e in (a, b))
    return first == second


# ---- making, saving and loading Encodings ----
MAX_CHARS = 2**14  # of a text that a tokenizer is trained on
MAX_TRAINING_CHARS = 2**29  # of all: rustbpe's counts of pairs of bytes, up to four per character, stay below 2^31
MAX_DISTINCT_BYTES = 2**25  # of words, each counted once: keeps memory below 4 GB and time below 10 minutes


def make_encoding(tokenizer, pat_str="", texts=None, normalizer=""):
    """The setting `tokenizer` -> an Encoding: "bytes" (every byte is a token), "train:4096" (a BPE of that many ids
    trained on texts), a directory, a hub id, a BPE file in tiktoken's format, or the name of one of tiktoken's.
    `pat_str` ("": ours, "hrm": the published one) and `normalizer` ("" or "NFC") are for a BPE of texts or a file."""
    split, normalizer = {"": SPLIT, "hrm": HRM_SPLIT}.get(pat_str, pat_str), normalizer or None
    if tokenizer == "bytes":
        encoding = Encoding("bytes", BYTES, r"[\s\S]", {})
    elif tokenizer.startswith("train:"):
        size, least = tokenizer.removeprefix("train:"), 256 + len(SPECIAL)
        if not size.isdecimal() or not least <= int(size) < 2**31:
            raise ValueError(f"tokenizer={tokenizer}: write train: and a vocabulary size from {least} to 2^31 - 1")
        base = Encoding(tokenizer, BYTES, split, {}, normalizer).checked()  # before the training, which takes a while
        encoding = Encoding(tokenizer, train_ranks(base, texts, int(size)), split, {}, normalizer)
    elif os.path.isdir(tokenizer) or (tokenizer.count("/") == 1 and not os.path.exists(tokenizer)):
        encoding = load_encoding(local_directory(tokenizer, "*.json"))
    elif os.path.exists(tokenizer):
        encoding = Encoding(Path(tokenizer).name, read_ranks(tokenizer), split, {}, normalizer)
    else:
        import tiktoken

        if tokenizer not in (known := tiktoken.list_encoding_names()):
            raise ValueError(f"tokenizer={tokenizer} is neither bytes, train:N, a file, nor {', '.join(known)}")
        try:
            base = tiktoken.get_encoding(tokenizer)
        except Exception as e:
            fault = "tiktoken must download its vocabulary once, and cannot"
            raise ValueError(f"tokenizer={tokenizer}: {fault}: {type(e).__name__}: {one_line(e)}") from None
        encoding = Encoding(tokenizer, base._mergeable_ranks, base._pat_str, base._special_tokens)
    return with_special_tokens(encoding).checked()


def with_special_tokens(encoding):
    """The Encoding with those of our special tokens that it lacks; they get the next ids."""
    missing = [text for text in SPECIAL.values() if text not in encoding.special_tokens]
    special_tokens = {**encoding.special_tokens, **dict(zip(missing, count(encoding.n_vocab)))}
    return Encoding(encoding.name, encoding.ranks, encoding.pat_str, special_tokens, encoding.normalizer)


def train_ranks(encoding, texts, vocab_size):
    """{bytes: rank} of a BPE trained on texts that `encoding` normalizes and splits. With the special tokens it has
    vocab_size ids, or fewer where the texts hold no more pairs. The same texts give the same ranks."""
    try:
        import rustbpe
    except ImportError:
        raise ValueError("to train a tokenizer, pip install rustbpe") from None
    bpe, progress = rustbpe.Tokenizer(), tqdm(texts, desc="training the tokenizer", unit=" texts")
    sample, size = training_sample(encoding, progress), vocab_size - len(SPECIAL)
    with progress, panics_blame(encoding.pat_str, "a text"):
        bpe.train_from_iterator(sample, size, buffer_size=1024, pattern=encoding.pat_str)
    return {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}


def training_sample(encoding, texts):
    """Yields the beginnings of texts, normalized, until they hold MAX_TRAINING_CHARS or MAX_DISTINCT_BYTES of words: it
    estimates the latter from one text in eight. rustbpe needs up to 80 bytes of memory for each of them."""
    rng, n_chars, words, n_bytes = random.Random(0), 0, set(), 0
    for text in texts:
        text = encoding.normalize(text[:MAX_CHARS])
        n_chars += len(text)
        if rng.random() < 1 / 8:
            new = {*re.findall(r"[^\W\d_]+|[^\w\s]+", text)} - words
            words |= new
            n_bytes += 8 * len("".join(new).encode())
        if n_chars > MAX_TRAINING_CHARS or n_bytes > MAX_DISTINCT_BYTES:
            return
        yield text


def read_ranks(path):
    """{bytes: rank} of a BPE file in tiktoken's format."""
    with errors_name_file(path, "is not a BPE file in tiktoken's format (base64 token, space, rank)"):
        pairs = [line.split() for line in Path(path).read_bytes().splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}


def save_encoding(encoding, directory):
    """Write the ranks to directory/tokenizer.tiktoken."""
    ranks = encoding.ranks
    lines = (base64.b64encode(token) + b" %d\n" % ranks[token] for token in sorted(ranks, key=ranks.get))
    replace_file(Path(directory, "tokenizer.tiktoken"), b"".join(lines))


def encoding_meta(encoding):
    """What meta.json says of an Encoding: all but its ranks."""
    rest = {key: getattr(encoding, key) for key in ("name", "pat_str", "special_tokens", "normalizer")}
    return {"vocab_size": encoding.n_vocab, "dtype": token_dtype(encoding.n_vocab), "tokenizer": rest}


def read_tokenizer(directory):
    """The Encoding of a dataset, a run, or a model in the Hugging Face layout. It needs no tiktoken yet."""
    directory = Path(directory)
    if not (directory / "meta.json").exists():
        path = directory / "tokenizer.json"
        with errors_name_file(path, "is no tokenizer of byte-level BPE for tiktoken"):
            return with_special_tokens(Encoding(directory.name, *hf_parts(read_json(path))))
    meta = read_meta(directory)
    check_file(directory, "tokenizer.tiktoken", meta)
    with errors_name_file(directory / "meta.json"):
        return read_encoding(directory, meta)


def read_encoding(directory, meta):
    """The Encoding of directory/tokenizer.tiktoken and encoding_meta()."""
    ranks, rest = read_ranks(Path(directory, "tokenizer.tiktoken")), meta["tokenizer"]
    encoding = Encoding(rest["name"], ranks, rest["pat_str"], rest["special_tokens"], rest.get("normalizer"))
    if encoding.n_vocab != meta["vocab_size"]:
        raise ValueError(f"vocab_size is {meta['vocab_size']}, and the tokenizer has {encoding.n_vocab} ids")
    return encoding


def load_encoding(name):
    """read_tokenizer() of a directory or a hub id, checked to work with tiktoken."""
    with errors_name_file(name, "has no tokenizer that works here"):
        return read_tokenizer(local_directory(name)).checked()


def read_meta(directory):
    """The content of a dataset's or a run's meta.json."""
    path = Path(directory, "meta.json")
    meta = read_json(path)
    with errors_name_file(path):
        check_types(meta, vocab_size=int, dtype=str, tokenizer=dict, splits=dict, prepare_args=dict, checksums=dict)
        check_types(meta["tokenizer"], name=str, pat_str=str, special_tokens=dict)
        for counts in meta["splits"]["train"], meta["splits"]["val"]:
            check_types(counts, documents=int, tokens=int, conditions=dict)
            check_types(counts["conditions"], **dict.fromkeys(counts["conditions"], int))
        whole = {"name": "", "group": "", "cap": 0, "repeat": 1, **meta["splits"]}  # as before there were mixtures
        for file in meta.setdefault("files", [whole]):
            check_types(file, name=str, group=str, cap=int, repeat=int, train=dict, val=dict)
            for counts in file["train"], file["val"]:
                check_types(counts, documents=int, tokens=int)
        for split in "train", "val":
            if sum(file[split]["documents"] for file in meta["files"]) != meta["splits"][split]["documents"]:
                raise ValueError(f"its files have not as many {split} documents as it has in all")
        if meta["dtype"] != token_dtype(meta["vocab_size"]):
            raise ValueError(f"dtype is {meta['dtype']} for {meta['vocab_size']} ids")
    return meta


def fingerprint(path):
    """A hash of a file's size and of 1,024 pieces of 64 KiB, spread evenly: quick for any size."""
    size, piece, n = path.stat().st_size, 2**16, 1024
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(n):
            file.seek(i * max((n - 1) * piece, size - piece) // (n - 1))  # all of 64 MiB
            digest.update(file.read(piece))
    return digest.hexdigest()[:16]


def check_file(directory, name, meta):
    """The fingerprint of a dataset's file. Raises ValueError if meta.json has another."""
    path, want = Path(directory, name), meta["checksums"].get(name)
    if (found := fingerprint(path)) != want:
        other = f"not the file that {path.with_name('meta.json')} describes"
        raise ValueError(f"{path} is damaged, or {other}: its checksum is {found}, not {want}")
    return found


# ---- tokenizer.json of the Hugging Face layout ----
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # built into their ByteLevel
POSSESSIVE = r"(\\p\{\w+\}|\\.|\[[^\]]*\]|[^\\])(\{\d+(?:,\d*)?\})\+"  # x{1,3}+, to others (x{1,3})+


def hf_parts(content):
    """A tokenizer.json's content -> (ranks, pat_str, special tokens, normalizer) of an Encoding that gives the same
    ids. Raises if tiktoken can make none."""
    model, added, normalizer = content["model"], content.get("added_tokens") or [], content.get("normalizer") or {}
    unlike_ours = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    if model.get("type", "BPE") != "BPE" or any(model.get(key) for key in unlike_ours):
        raise ValueError("only byte-level BPE is supported, without prefix, suffix or dropout")
    normalizers = [step["type"] for step in normalizer.get("normalizers", [normalizer] if normalizer else [])]
    if other := {*normalizers} - {"NFC"}:
        raise ValueError(f"a normalizer ({min(other)}) is not supported, only NFC")
    if any(token.get(flag) for token in added for flag in ("lstrip", "rstrip", "single_word")):
        raise ValueError("added tokens with lstrip, rstrip or single_word are not supported")
    steps = content.get("pre_tokenizer") or {}
    match steps.get("pretokenizers", [steps]):
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            pat_str = GPT2_SPLIT
        case [
            {"type": "Split", "pattern": {"Regex": str(pat_str)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            if re.search(POSSESSIVE, pat_str):
                raise ValueError(f"the regex {pat_str} has a repetition, then +, which tiktoken reads differently")
        case _:
            raise ValueError("text must be split by ByteLevel, or by one regex, Isolated, before ByteLevel")
    special = {token["content"]: token["id"] for token in added}
    to_byte = {character: b for b, character in byte_alphabet().items()}
    ranks = {bytes(to_byte[c] for c in text): i for text, i in model["vocab"].items() if text not in special}
    if sum(len(token) ** 2 for token in ranks) > 2**26:  # to check their merges takes that long
        raise ValueError(f"its tokens are too long: one has {max(map(len, ranks)):,} bytes")
    # tokenizer.json lists the pairs to merge; tiktoken merges any pair that makes a token, the lowest rank first.
    # The ids are the same if the list has the last merge of every token, in the order of their ranks.
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    place = {tuple(bytes(to_byte[c] for c in part) for part in pair): i for i, pair in enumerate(pairs)}
    if strange := {b"".join(pair) for pair in place} - ranks.keys():
        raise ValueError(f"its merges make {min(strange)!r}, which is no token")
    last = -1
    for token in sorted(ranks, key=ranks.get):
        if len(token) > 1:
            before, last = last, place.get(last_merge(token, ranks), -1)
            if last < 0:
                raise ValueError(f"its merges do not make the token {token!r} as tiktoken would")
            if last < before:
                raise ValueError("the ids do not rise in the order of the merges, which tiktoken needs")
    return ranks, pat_str, special, "NFC" if normalizers else None


def last_merge(token, ranks):
    """The two parts that tiktoken merges into a token last, or more parts if it cannot make it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        if pairs[i] >= ranks[token]:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def byte_alphabet():
    """{byte: character} in Hugging Face's files: visible Latin-1 as it is, the rest from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = (b for b in range(256) if b not in visible)
    return {b: chr(b) for b in visible} | {b: chr(0x100 + i) for i, b in enumerate(hidden)}


def portable(pat_str):
    """A regex of tiktoken's for others: with atomic groups for possessive repetitions."""
    return re.sub(POSSESSIVE, r"(?>\1\2)", pat_str)
