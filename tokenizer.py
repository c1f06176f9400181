"""Tokenizers, and the format of a document.

    prompt = encode_prompt(load_encoding("out"), "What is 2+2?", "synth,cot")

A tokenizer is a tiktoken Encoding with seven special tokens.
A document is `boq, condition tags, instruction, eoq | response, eoa`; the part before the bar is its prefix.
"""

import base64
import hashlib
import math
import os
import re
from itertools import count, islice
from pathlib import Path

from tqdm import tqdm

from common import check_types, errors_name_file, local_directory, read_json, replace_file

CONDITIONS = {"direct": "<|object_ref_start|>", "cot": "<|object_ref_end|>"}
CONDITIONS |= {"noisy": "<|quad_start|>", "synth": "<|quad_end|>"}
SPECIAL = {"boq": "<|im_start|>", "eoq": "<|im_end|>", "eoa": "<|box_end|>", **CONDITIONS}  # as in the published model
FILES = ("train.bin", "train.idx", "val.bin", "val.idx", "tokenizer.tiktoken")  # of a dataset
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # words, single digits, punctuation, space: no merge crosses


# ---- the document format ----
def token_dtype(vocab_size):
    return "uint16" if vocab_size <= 2**16 else "uint32"


def special_id(encoding, role):
    if SPECIAL[role] not in encoding._special_tokens:
        raise ValueError(f"the tokenizer {encoding.name} has no token for {role}: prepare the data anew")
    return encoding._special_tokens[SPECIAL[role]]


def condition_tags(condition):
    """The tags of "synth,cot": ["synth", "cot"]."""
    tags = [tag.strip() for tag in condition.split(",") if tag.strip()]
    if unknown := set(tags) - CONDITIONS.keys():
        raise ValueError(f"unknown condition '{min(unknown)}'; the conditions are {', '.join(CONDITIONS)}")
    return tags


def encode_prompt(encoding, instruction, condition=""):
    """The ids of a document's prefix. Text that spells a special token is plain text, never control."""
    tags = [special_id(encoding, tag) for tag in condition_tags(condition)]
    ids = encoding.encode_ordinary(instruction)
    return [special_id(encoding, "boq"), *tags, *ids, special_id(encoding, "eoq")]


def encode_document(encoding, instruction, response, condition=""):
    """The ids of a document, and the length of its prefix."""
    prefix = encode_prompt(encoding, instruction, condition)
    return [*prefix, *encoding.encode_ordinary(response), special_id(encoding, "eoa")], len(prefix)


def choose_condition(condition, directory):
    """The setting `condition` -> the condition of prompts: no tags for "none", and for "" what most training documents
    had, as meta.json or tokenizer_config.json tells; else "synth,cot"."""
    if condition:
        return "" if condition == "none" else ",".join(condition_tags(condition))
    if Path(directory, "meta.json").exists():
        counts = read_meta(directory)["splits"]["train"]["conditions"]
        return max(counts, key=counts.get)
    path = Path(directory, "tokenizer_config.json")
    return read_json(path).get("condition", "synth,cot") if path.exists() else "synth,cot"


# ---- making, saving and loading Encodings ----
def make_encoding(tokenizer, pat_str="", texts=None):
    """The setting `tokenizer` -> an Encoding: "bytes" (every byte is a token), "train:4096" (a BPE of that many ids
    trained on texts), a directory, a hub id, a BPE file in tiktoken's format, or the name of one of tiktoken's."""
    if tokenizer == "bytes":
        return build_encoding("bytes", {bytes([i]): i for i in range(256)}, r"[\s\S]")
    if tokenizer.startswith("train:"):
        size, least = tokenizer.removeprefix("train:"), 256 + len(SPECIAL)
        if not size.isdecimal() or int(size) < least:
            raise ValueError(f"tokenizer={tokenizer}: write train: and a vocabulary size of at least {least}")
        return build_encoding(tokenizer, train_ranks(texts, int(size), pat_str or SPLIT), pat_str or SPLIT)
    if os.path.isdir(tokenizer) or (tokenizer.count("/") == 1 and not os.path.exists(tokenizer)):
        return build_encoding(*read_tokenizer(local_directory(tokenizer, "*.json")))
    if os.path.exists(tokenizer):
        return build_encoding(Path(tokenizer).name, read_ranks(tokenizer), pat_str or SPLIT)
    import tiktoken

    known = tiktoken.list_encoding_names()
    if tokenizer not in known:
        raise ValueError(f"tokenizer={tokenizer} is neither bytes, train:N, a file, nor {', '.join(known)}")
    base = tiktoken.get_encoding(tokenizer)
    return build_encoding(tokenizer, base._mergeable_ranks, base._pat_str, base._special_tokens)


def build_encoding(name, ranks, pat_str, special=(), add_special=True):
    """A tiktoken Encoding of these byte ranks; add_special appends those of our special tokens that it lacks."""
    import tiktoken

    special = dict(special)
    ids, taken = {*ranks.values()}, {*special.values()}
    if sum(len(token) == 1 for token in ranks) < 256 or len(ids - taken) < len(ranks):
        raise ValueError(f"{name} is no byte-level BPE: a byte has no token, or two tokens have the same id")
    most = max(ids | taken)
    if min(ids | taken) < 0 or most >= 2**31:
        raise ValueError(f"{name} has ids below 0 or above {2**31 - 1}")
    if add_special:
        special |= zip([text for text in SPECIAL.values() if text not in special], count(most + 1))
    return tiktoken.Encoding(name, pat_str=pat_str, mergeable_ranks=ranks, special_tokens=special)


def train_ranks(texts, vocab_size, pat_str):
    """{bytes: rank} of a BPE trained on the first million texts; with the special tokens it has vocab_size ids."""
    try:
        import rustbpe
    except ImportError:
        raise ValueError("to train a tokenizer, pip install rustbpe") from None
    bpe, progress = rustbpe.Tokenizer(), tqdm(texts, desc="training the tokenizer", unit=" texts")
    bpe.train_from_iterator(islice(progress, 10**6), vocab_size - len(SPECIAL), pattern=pat_str)
    return {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}


def read_ranks(path):
    """{bytes: rank} of a BPE file in tiktoken's format."""
    with errors_name_file(path, "is not a BPE file in tiktoken's format (base64 token, space, rank)"):
        pairs = [line.split() for line in Path(path).read_bytes().splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}


def same_tokenizer(a, b):
    """Whether two Encodings give the same ids for every text."""
    first, second = ((e._mergeable_ranks, e._special_tokens, portable(e._pat_str)) for e in (a, b))
    return first == second


def save_encoding(encoding, directory):
    """Write the ranks to directory/tokenizer.tiktoken. Returns the rest, for meta.json."""
    ranks = encoding._mergeable_ranks
    lines = (base64.b64encode(token) + b" %d\n" % ranks[token] for token in sorted(ranks, key=ranks.get))
    replace_file(Path(directory, "tokenizer.tiktoken"), b"".join(lines))
    rest = {"name": encoding.name, "pat_str": encoding._pat_str, "special_tokens": encoding._special_tokens}
    return {"vocab_size": encoding.n_vocab, "dtype": token_dtype(encoding.n_vocab), "tokenizer": rest}


def read_tokenizer(directory):
    """(name, ranks, pat_str, special tokens) of a dataset, a run, or a model in the Hugging Face layout."""
    directory = Path(directory)
    if not (directory / "meta.json").exists():
        path = directory / "tokenizer.json"
        with errors_name_file(path, "is no tokenizer of byte-level BPE for tiktoken"):
            return directory.name, *hf_parts(read_json(path))
    meta = read_meta(directory)
    check_file(directory, "tokenizer.tiktoken", meta)
    ranks, rest = read_ranks(directory / "tokenizer.tiktoken"), meta["tokenizer"]
    with errors_name_file(directory / "meta.json"):
        n_ids = 1 + max(*ranks.values(), *rest["special_tokens"].values())
        if n_ids != meta["vocab_size"]:
            raise ValueError(f"vocab_size is {meta['vocab_size']}, and the tokenizer has {n_ids} ids")
    return rest["name"], ranks, rest["pat_str"], rest["special_tokens"]


def load_encoding(directory):
    """The Encoding of a dataset, a run, or a model in the Hugging Face layout."""
    with errors_name_file(directory, "has no tokenizer that works here"):
        return build_encoding(*read_tokenizer(directory), add_special=not Path(directory, "meta.json").exists())


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
    """A tokenizer.json's content -> (ranks, pat_str, special tokens) of an Encoding that gives the same ids.
    Raises if tiktoken can make none."""
    model, added = content["model"], content.get("added_tokens") or []
    unlike_ours = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    if model.get("type", "BPE") != "BPE" or any(model.get(key) for key in unlike_ours):
        raise ValueError("only byte-level BPE is supported, without prefix, suffix or dropout")
    if content.get("normalizer"):
        raise ValueError(f"a normalizer ({content['normalizer'].get('type')}) is not supported")
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
    # tokenizer.json lists the pairs to merge; tiktoken merges any pair that makes a token, the lowest rank first.
    # The ids are the same if the ranks rise along the list and it has the last merge of every token.
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    merges = [tuple(bytes(to_byte[c] for c in part) for part in pair) for pair in pairs]
    made = [ranks[token] for token in dict.fromkeys(map(b"".join, merges))]
    if made != sorted(made):
        raise ValueError("the ids do not rise in the order of the merges, which tiktoken needs")
    merges = set(merges)
    for token in ranks:
        if len(token) > 1 and last_merge(token, ranks) not in merges:
            raise ValueError(f"its merges do not make the token {token!r} as tiktoken would")
    return ranks, pat_str, special


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
