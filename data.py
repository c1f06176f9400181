"""
Instruction/response pairs -> tokens -> memory-mapped bins, and the loader that packs them into rows.

    python data.py                                   # the embedded word problems -> data/problems
    python data.py config/gsm8k.py                   # GSM8K from the Hugging Face hub -> data/gsm8k
    python data.py --dataset=mine --source=pairs.jsonl --tokenizer=gpt2

A document is `boq, condition tags, instruction, eoq | response, eoa`; the part before the bar is its prefix.
data/<dataset>/ holds, per split, <split>.bin (the ids of all documents back to back, uint16 or uint32) and <split>.idx
(two int64 per document: where it ends in the bin, and the length of its prefix), then meta.json and tokenizer.tiktoken.
"""

import base64
import hashlib
import json
import os
import random
import re
import shutil
import sys
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from model import HRM, IGNORE, blamed_on, check_kinds, local_directory, read_json, reason, replace_file

# ----------------------------------------------------------------------------------------------------
# tokenizers: tiktoken Encodings with seven special tokens

SPECIAL = {  # as in the published model
    "boq": "<|im_start|>",
    "eoq": "<|im_end|>",
    "eoa": "<|box_end|>",
    "direct": "<|object_ref_start|>",
    "cot": "<|object_ref_end|>",
    "noisy": "<|quad_start|>",
    "synth": "<|quad_end|>",
}
CONDITIONS = ("direct", "cot", "noisy", "synth")
LONGEST = 2**24  # bytes of a line and characters of a text; what is longer is taken for an accident
TRAIN_CHARACTERS = 10**9  # of a source that a BPE is trained on; more would change little and fill the memory
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # words, single digits, punctuation, space: no merge crosses


def build_encoding(name, ranks, pat_str, special=None):
    """A tiktoken Encoding of these byte ranks, with our special tokens after the last id where it lacks them."""
    import tiktoken

    special = dict(special or {})
    free = max([*ranks.values(), *special.values()]) + 1
    for text in SPECIAL.values():
        if text not in special:
            special[text] = free
            free += 1
    return tiktoken.Encoding(name, pat_str=pat_str, mergeable_ranks=ranks, special_tokens=special)


def read_ranks(path):
    """{bytes: rank} from a BPE file in tiktoken's format: a line is a base64 token and its rank."""
    try:
        pairs = [line.split() for line in Path(path).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise ValueError(f"{path} is not a BPE file in tiktoken's format (base64 token, space, rank)") from None
    if sum(len(token) == 1 for token in ranks) < 256 or {*ranks.values()} != {*range(len(pairs))}:
        raise ValueError(f"{path} is no byte-level BPE: bytes are missing, or its ranks are not 0, 1, 2 and so on")
    return ranks


def first_characters(texts, n):
    """Texts up to n characters in all."""
    for text in texts:
        if n <= 0:
            break
        n -= len(text)
        yield text


def train_ranks(texts, vocab_size, pat_str):
    """{bytes: rank} of a byte-level BPE trained on texts, so that with the special tokens it has vocab_size ids."""
    try:
        import rustbpe
    except ImportError:
        raise ValueError("to train a tokenizer, pip install rustbpe") from None
    tokenizer = rustbpe.Tokenizer()
    progress = tqdm(first_characters(texts, TRAIN_CHARACTERS), desc="training the tokenizer", unit=" texts")
    tokenizer.train_from_iterator(progress, vocab_size - len(SPECIAL), pattern=pat_str)
    return {bytes(token): rank for token, rank in tokenizer.get_mergeable_ranks()}


def make_encoding(tokenizer, pat_str="", texts=None):
    """
    An Encoding from a setting: "bytes" (every byte is a token), "train:4096" (a BPE of that many ids, trained on
    texts), a directory with one (a dataset's, a run's, a Hugging Face model's), a hub id, a BPE file in tiktoken's
    format, or the name of a tiktoken encoding.
    """
    if tokenizer == "bytes":
        return build_encoding("bytes", {bytes([i]): i for i in range(256)}, r"[\s\S]")
    if tokenizer.startswith("train:"):
        size = tokenizer.removeprefix("train:")
        if not size.isdecimal() or int(size) < 256 + len(SPECIAL):
            raise ValueError(
                f"tokenizer={tokenizer}: write train: and a vocabulary size of at least {256 + len(SPECIAL)}"
            )
        pat_str = pat_str or SPLIT
        return build_encoding(tokenizer, train_ranks(texts, int(size), pat_str), pat_str)
    if Path(tokenizer).is_dir() or (tokenizer.count("/") == 1 and not os.path.exists(tokenizer)):
        return load_encoding(local_directory(tokenizer, "*.json"))
    if os.path.exists(tokenizer):
        return build_encoding(Path(tokenizer).stem, read_ranks(tokenizer), pat_str or SPLIT)
    import tiktoken

    if tokenizer not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise ValueError(f"tokenizer={tokenizer} is neither 'bytes', 'train:N', a file, nor one of tiktoken's: {known}")
    known = tiktoken.get_encoding(tokenizer)
    return build_encoding(tokenizer, known._mergeable_ranks, known._pat_str, known._special_tokens)


def save_encoding(encoding, directory):
    """Write the ranks to directory/tokenizer.tiktoken; returns the rest, for meta.json."""
    ranks = sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks)
    replace_file(Path(directory, "tokenizer.tiktoken"), b"".join(lines))
    return {"name": encoding.name, "pat_str": encoding._pat_str, "special_tokens": encoding._special_tokens}


def load_encoding(directory):
    """
    The Encoding of a dataset or a training run (meta.json and tokenizer.tiktoken), or of a model in the Hugging Face
    layout (tokenizer.json).
    """
    if not Path(directory, "meta.json").exists():
        if not Path(directory, "tokenizer.json").exists():
            raise FileNotFoundError(f"{directory} has neither meta.json nor tokenizer.json")
        return encoding_from_hf(Path(directory, "tokenizer.json"))
    meta = read_meta(directory)
    check_file(directory, "tokenizer.tiktoken", meta)
    kind, ranks = meta["tokenizer"], read_ranks(Path(directory, "tokenizer.tiktoken"))
    with blamed_on(Path(directory, "meta.json")):
        encoding = build_encoding(kind["name"], ranks, kind["pat_str"], kind["special_tokens"])
        if encoding.n_vocab != meta["vocab_size"]:
            raise ValueError(f"vocab_size is {meta['vocab_size']}, and the tokenizer has {encoding.n_vocab} ids")
    return encoding


def same_tokenizer(a, b):
    """Whether two Encodings are made alike, and so give the same ids for every text."""
    parts = [(e._mergeable_ranks, e._special_tokens, portable(e._pat_str)) for e in (a, b)]
    return parts[0] == parts[1]


def read_meta(directory):
    """The content of a dataset's or a run's meta.json. Raises FileNotFoundError, or ValueError if it is damaged."""
    path = Path(directory, "meta.json")
    meta = read_json(path)
    with blamed_on(path):
        check_kinds(meta, vocab_size=int, dtype=str, tokenizer=dict, splits=dict, made=dict, checksums=dict)
        check_kinds(meta["tokenizer"], name=str, pat_str=str, special_tokens=dict)
        for split in ("train", "val"):
            check_kinds(meta["splits"][split], documents=int, tokens=int, conditions=dict)
        if meta["dtype"] != token_dtype(meta["vocab_size"]).name:
            raise ValueError(f"dtype is {meta['dtype']} for {meta['vocab_size']} ids")
    return meta


def fingerprint(path):
    """
    A hash of a file's size and of 1,024 pieces of 64 KiB spread evenly over it: all of a file of up to 64 MiB, and
    quick for any.
    """
    size, piece, n = path.stat().st_size, 2**16, 1024
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for i in range(n):
            file.seek(i * max((n - 1) * piece, size - piece) // (n - 1))
            digest.update(file.read(piece))
    return digest.hexdigest()[:16]


FILES = ("train.bin", "train.idx", "val.bin", "val.idx", "tokenizer.tiktoken")  # of a dataset, besides meta.json


def check_file(directory, name, meta):
    """The fingerprint of a file of a dataset. Raises unless it is the one that meta.json was written with."""
    path = Path(directory, name)
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: prepare the dataset with data.py")
    found, want = fingerprint(path), meta["checksums"].get(name)
    if found != want:
        raise ValueError(
            f"{path} is damaged, or not the file that {Path(directory, 'meta.json')} describes: "
            f"its checksum is {found}, not {want}"
        )
    return found


def choose_condition(condition, directory):
    """The setting `condition`: itself, no tags for "none", and for "" the usual condition of a directory's model."""
    return {"": usual_condition(directory), "none": ""}.get(condition, condition)


def usual_condition(directory):
    """
    The condition that most documents of a directory's dataset or model had in training, which prompts are best given
    too; where that is not known, "synth,cot", as in the paper's evaluation.
    """
    if Path(directory, "meta.json").exists():
        counts = read_meta(directory)["splits"]["train"]["conditions"]
        with blamed_on(Path(directory, "meta.json")):
            return max(counts, key=counts.get)
    path = Path(directory, "tokenizer_config.json")
    return read_json(path).get("condition", "synth,cot") if path.exists() else "synth,cot"


# ----------------------------------------------------------------------------------------------------
# tokenizers of the Hugging Face layout: byte-level BPE in tokenizer.json

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # built into their ByteLevel


def byte_alphabet():
    """{byte: character}, the alphabet of byte-level BPE files: visible Latin-1 as it is, the rest from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = (b for b in range(256) if b not in visible)
    return {b: chr(b) for b in visible} | {b: chr(0x100 + i) for i, b in enumerate(hidden)}


POSSESSIVE = r"(\\p\{\w+\}|\\.|\[[^\]]*\]|[^\\])(\{\d+(?:,\d*)?\})\+"  # as x{1,3}+ is in tiktoken


def encoding_from_hf(path):
    """
    An Encoding that gives the same ids as a tokenizer.json. Raises ValueError, which names what stands in the way,
    unless that is a byte-level BPE which does nothing else to a text and makes the merges that tiktoken would make.
    """
    try:
        return build_encoding(Path(path).parent.name, *hf_parts(read_json(path)))
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is no tokenizer of byte-level BPE: {type(e).__name__} {e}") from None
    except ValueError as e:
        raise ValueError(str(e) if str(path) in str(e) else f"{path}: {e}") from None


def hf_parts(file):
    """(ranks, pat_str, special tokens) of a tokenizer.json's content; raises as encoding_from_hf() says."""
    model, steps = file["model"], file.get("pre_tokenizer") or {}
    not_bpe = model.get("type", "BPE") != "BPE" or model.get("byte_fallback")
    if not_bpe or any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout")):
        raise ValueError("only byte-level BPE is supported, without prefix, suffix or dropout")
    if file.get("normalizer"):
        raise ValueError(f"a normalizer ({file['normalizer'].get('type')}) is not supported")
    *splits, last = (steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]) or [{}]
    uses_regex = last.get("use_regex", True)
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(splits) + uses_regex != 1:
        raise ValueError("text must be split by ByteLevel, or by one Split and then ByteLevel without regex")
    pat_str = GPT2_SPLIT
    if splits:
        pat_str = splits[0].get("pattern", {}).get("Regex")
        if splits[0].get("behavior") != "Isolated" or splits[0].get("invert") or not pat_str:
            raise ValueError("the text must be split by a regex, Isolated and not inverted")
        if re.search(POSSESSIVE, pat_str):
            raise ValueError(f"the regex {pat_str} means another thing to tiktoken: it has a repetition followed by +")
    added = file.get("added_tokens") or []
    if any(token.get(flag) for token in added for flag in ("lstrip", "rstrip", "single_word")):
        raise ValueError("added tokens with lstrip, rstrip or single_word are not supported")
    special = {token["content"]: token["id"] for token in added}
    to_byte = {character: b for b, character in byte_alphabet().items()}
    ranks = {bytes(to_byte[c] for c in text): i for text, i in model["vocab"].items() if text not in special}
    if len({*ranks.values(), *special.values()}) < len(ranks) + len(added) or sum(len(t) == 1 for t in ranks) < 256:
        raise ValueError("two tokens have the same id, or some bytes have no token")
    merges = {}  # token: the pairs that make it
    for pair in model["merges"]:
        a, b = (bytes(to_byte[c] for c in half) for half in (pair.split(" ") if isinstance(pair, str) else pair))
        merges.setdefault(a + b, set()).add((a, b))
    if [ranks[token] for token in merges] != sorted(ranks[token] for token in merges):
        raise ValueError("the ids do not rise in the order of the merges, which tiktoken needs")
    for token in ranks:
        if len(token) > 1 and last_merge(token, ranks) not in merges.get(token, ()):
            raise ValueError(f"its merges do not make the token {token!r} as tiktoken would")
    return ranks, pat_str, special


def last_merge(token, ranks):
    """The two parts that tiktoken merges into a token last, or more parts if it cannot make it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, len(ranks) + 10**9) for a, b in zip(parts, parts[1:])]
        i = pairs.index(min(pairs))
        if pairs[i] >= ranks[token]:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def portable(pat_str):
    """A regex of tiktoken's as others read it too: possessive repetitions written as atomic groups."""
    return re.sub(POSSESSIVE, r"(?>\1\2)", pat_str)


def encoding_to_hf(encoding):
    """The content of a tokenizer.json that gives the same ids as an Encoding."""
    alphabet, ranks = byte_alphabet(), encoding._mergeable_ranks
    text = {token: "".join(alphabet[b] for b in token) for token in sorted(ranks, key=ranks.get)}
    # tiktoken merges any two neighbours that together are a token, lowest rank first: every such pair is a merge.
    cuts = ((token[:i], token[i:]) for token in text for i in range(1, len(token)))
    merges = [[text[a], text[b]] for a, b in cuts if a in ranks and b in ranks]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    split = {
        "type": "Split",
        "pattern": {"Regex": portable(encoding._pat_str)},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    prefix = {"Sequence": {"id": "A", "type_id": 1}}  # token_type_ids 1 mark the prefix, which is what a user encodes
    template = {"type": "TemplateProcessing", "single": [prefix], "pair": [prefix, prefix], "special_tokens": {}}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    bpe |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    bpe |= {"ignore_merges": True}  # as in tiktoken, a piece that is a token is not merged up from its bytes
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": content, **flags} for content, i in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": template,
        "decoder": byte_level,
        "model": {**bpe, "vocab": {t: ranks[token] for token, t in text.items()}, "merges": merges},
    }


def chat_template(condition):
    """A Jinja template of make_prefix(), for a single user message; `condition` is the default of its argument."""
    tags = "{" + ", ".join(f"'{tag}': '{SPECIAL[tag]}'" for tag in CONDITIONS) + "}"
    return (
        f"{{%- set tags = {tags} -%}}"
        "{%- if messages|length != 1 or messages[0]['role'] != 'user' -%}"
        "{{- raise_exception('this model answers a single user message') -}}{%- endif -%}"
        f"{{{{- '{SPECIAL['boq']}' -}}}}"
        f"{{%- for tag in (condition if condition is defined else '{condition}').split(',') if tag.strip() -%}}"
        "{%- if tag.strip() not in tags -%}{{- raise_exception('unknown condition ' + tag) -}}{%- endif -%}"
        "{{- tags[tag.strip()] -}}{%- endfor -%}"
        f"{{{{- messages[0]['content'] + '{SPECIAL['eoq']}' -}}}}"
    )


def save_hf_tokenizer(encoding, directory, condition="", block_size=4096):
    """Write tokenizer.json and tokenizer_config.json, for transformers and all that reads them."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        "eos_token": SPECIAL["eoa"],
        "pad_token": SPECIAL["eoa"],
        "padding_side": "left",
        "model_max_length": block_size,
        "condition": condition,  # ours: usual_condition() reads it
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(condition),
    }
    Path(directory, "chat_template.jinja").unlink(missing_ok=True)  # one of another model would be preferred
    for name, content in ("tokenizer.json", encoding_to_hf(encoding)), ("tokenizer_config.json", config):
        Path(directory, name).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------
# the document format


def special_id(encoding, role):
    return encoding._special_tokens[SPECIAL[role]]


def condition_tags(condition):
    """The tags of a condition such as "cot" or "synth,cot", in the order written; none for ""."""
    tags = [tag.strip() for tag in condition.split(",") if tag.strip()]
    for tag in tags:
        if tag not in CONDITIONS:
            raise ValueError(f"unknown condition '{tag}'; the conditions are {', '.join(CONDITIONS)}")
    return tags


def make_prefix(encoding, condition, instruction_ids):
    """The part of a document that the model is given: training, sampling and evaluation all build it here."""
    start, end = special_id(encoding, "boq"), special_id(encoding, "eoq")
    tags = (special_id(encoding, tag) for tag in condition_tags(condition))
    return [start, *tags, *instruction_ids, end]


def encode_prompt(encoding, instruction, condition=""):
    """Text -> ids of a prefix. Text that spells a special token is plain text here, never control."""
    return make_prefix(encoding, condition, encoding.encode_ordinary(instruction))


def load_for_inference(source, average, device, dtype):
    """A model of a directory or hub id, ready to generate in a torch dtype, and its Encoding."""
    source = local_directory(source)
    model, encoding = HRM.from_pretrained(source, average).to(device, dtype).eval(), load_encoding(source)
    if encoding.n_vocab > model.config.vocab_size:
        raise ValueError(f"{source}: the tokenizer has {encoding.n_vocab} ids and the model {model.config.vocab_size}")
    model.compute_dtype, model.usable_ids = dtype, encoding.n_vocab
    return model, encoding


# ----------------------------------------------------------------------------------------------------
# an embedded source: word problems

NAMES = "Tom Anna Ben Mia Sam Lucy Omar Kate Leo Nina Max Ella Raj Zoe Hugo Ivy Paul Rosa Finn Mei".split()
THINGS = "apples books coins pens cards shells stamps eggs cakes balls stars nuts plums kites rings".split()
PROBLEMS = [  # the text, and its steps: a step takes two of the numbers a, b, c or, as x, the result of the step before
    ("{n} has {a} {t} and buys {b} more. How many {t} does {n} have now?", "a+b"),
    ("{n} has {a} {t}. {m} has {b}. How many {t} do they have together?", "a+b"),
    ("{n} had {a} {t} and gave {m} {b}. How many {t} are left?", "a-b"),
    ("There are {a} {t}. {n} takes {b} of them. How many are left?", "a-b"),
    ("{n} has {a} bags with {b} {t} in each. How many {t} is that?", "a*b"),
    ("A box holds {b} {t}. How many {t} are in {a} boxes?", "a*b"),
    ("{n} shares {a} {t} among {b} friends. How many does each get?", "a/b"),
    ("{n} puts {a} {t} into bags of {b}. How many bags is that?", "a/b"),
    ("{n} has {a} {t}, buys {b} and then eats {c}. How many {t} are left?", "a+b x-c"),
    ("{n} had {a} {t}, lost {b} and found {c}. How many {t} does {n} have now?", "a-b x+c"),
    ("{n} has {a} bags of {b} {t} and {c} more. How many {t} is that?", "a*b x+c"),
    ("{n} buys {a} packs of {b} {t} and gives {m} {c}. How many {t} are left?", "a*b x-c"),
    ("{n} shares {a} {t} among {b} boxes and adds {c} to one. How many are in it?", "a/b x+c"),
    ("{n} has {a} {t} and {m} {b}. They share them among {c} friends. How many does each get?", "a+b x/c"),
]
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


def draw_numbers(rng, steps, split):
    """Numbers a, b, c for a problem's steps, with every result a whole number above 0, and the steps worked out."""
    while True:
        number = {"a": rng.randint(2, 20), "b": rng.randint(2, 20), "c": rng.randint(2, 10)}
        if "*" in steps:
            number["a"], number["b"] = rng.randint(2, 10), rng.randint(2, 10)
        if "/" in steps:
            divisor = "b" if "a/b" in steps else "c"
            number[divisor] = rng.randint(2, 10)
            whole = number[divisor] * rng.randint(2, 10)
            number["a"] = whole - number["b"] if divisor == "c" else whole
        combination = f"{steps}: {' '.join(str(number[key]) for key in 'abc' if key in steps)}"
        working, least = [], number["a"] - 1
        for left, operation, right in steps.split():
            result = OPERATIONS[operation](number[left], number[right])
            working.append(f"{number[left]}{operation}{number[right]}={result}")
            number["x"], least = result, min(least, result)
        if least > 0 and (zlib.crc32(combination.encode()) % 10 == 0) == (split == "val"):
            return number, working


def word_problems(split, n, seed):
    """
    n grade-school word problems, as {"instruction", "response", "condition"}; the response works the steps out and
    ends in "#### answer". Of the combinations of numbers, for each sequence of operations, one in ten is kept for the
    "val" split, whatever the seed: no "val" problem has the numbers of a "train" problem with the same operations.
    """
    rng = random.Random(f"{split} {seed}")
    for _ in range(n):
        text, steps = rng.choice(PROBLEMS)
        number, working = draw_numbers(rng, steps, split)
        name, other = rng.sample(NAMES, 2)
        instruction = text.format(n=name, m=other, t=rng.choice(THINGS), **number)
        yield {"instruction": instruction, "response": "\n".join([*working, f"#### {number['x']}"]), "condition": "cot"}


# ----------------------------------------------------------------------------------------------------
# other sources: the hub, and local files


def read_rows(source, config="", split="train"):
    """
    Rows of a source, as (where, dict) with `where` for messages. The source is a .jsonl, .json or .parquet file, a
    directory with files named after the split, or a dataset on the Hugging Face hub. A line that is not a JSON object
    yields (where, text) that says why not.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in (".jsonl", ".json", ".parquet"):
        raise ValueError(f"{path} is neither .jsonl, .json nor .parquet")
    if path.is_dir() and not any(f.suffix in (".jsonl", ".json", ".parquet") for f in path.rglob(f"*{split}*")):
        raise FileNotFoundError(f"there is no .jsonl, .json or .parquet file named after the split '{split}' in {path}")
    files = sorted(path.glob(f"{split}*.jsonl")) if path.is_dir() else [path] if path.suffix == ".jsonl" else []
    if path.suffix in (".jsonl", ".json", ".parquet") and not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    if files:  # read here and not by datasets, so that a bad line is known by its number
        for file in files:
            yield from read_lines(file)
        return
    try:
        import datasets
    except ImportError:
        raise ValueError(f"to read {source}, pip install datasets") from None
    try:
        if path.is_file():
            rows = datasets.load_dataset(path.suffix[1:], data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(source, None if path.exists() else config or None, split=split)
    except Exception as e:
        raise ValueError(f"cannot load the dataset {source}, split {split}: {type(e).__name__}: {reason(e)}") from None
    for number, row in enumerate(rows):
        yield f"{source} {split}, row {number}", row


def read_lines(file):
    """read_rows() of a .jsonl file."""
    with open(file, "rb") as lines:
        number = 0
        while line := lines.readline(LONGEST + 1):
            number += 1
            where = f"{file}, line {number}"
            if len(line) > LONGEST:
                while line and not line.endswith(b"\n"):
                    line = lines.readline(LONGEST)
                yield where, f"longer than {LONGEST:,} bytes"
            elif b"\0" in line:
                yield where, "a NUL byte"
            elif not line.isspace():
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                    yield where, row if isinstance(row, dict) else "not a JSON object"
                except UnicodeDecodeError:
                    yield where, "not UTF-8"
                except (ValueError, RecursionError):
                    yield where, "not a JSON object"


def to_pair(row, fields, condition="", answer="", strip_annotations=False):
    """
    A source's row -> (instruction, response, condition), or a text that says what is wrong with it. `answer` is for
    GSM8K's form, a working that ends in "#### N": "cot" keeps all of it, "direct" only N; each also sets the condition.
    """
    if isinstance(row, str):
        return row
    pair = [row.get(fields[key]) for key in ("instruction", "response")]
    for key, text in zip(("instruction", "response"), pair):
        if not isinstance(text, str):
            return f"no text in the field '{fields[key]}'"
        if not text.strip():
            return f"empty {key}"
        if len(text) > LONGEST:
            return f"{key} longer than {LONGEST:,} characters"
        if "\0" in text:
            return f"a NUL character in the {key}"
        if not is_unicode(text):
            return f"half a surrogate pair in the {key}"
    instruction, response = pair
    if strip_annotations:
        response = re.sub(r"<<[^<>]*>>", "", response)
    if answer and "####" not in response:
        return "no #### answer"
    if answer == "direct":
        response = response.rpartition("####")[2].strip()
    condition = row.get(fields.get("condition")) or condition or answer
    try:
        condition_tags(condition)
    except (ValueError, AttributeError):
        return f"unknown condition {condition!r}"
    return instruction, response, condition


def is_unicode(text):
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:  # "\\ud800" in JSON
        return False


# ----------------------------------------------------------------------------------------------------
# preparing a dataset


class SplitWriter:
    """Writes one split's bin and index, and counts what goes in and what does not."""

    def __init__(self, directory, split, encoding, block_size, too_long):
        self.bin, self.idx = (open(Path(directory, f"{split}.{kind}"), "wb") for kind in ("bin", "idx"))
        self.encoding, self.block_size, self.too_long = encoding, block_size, too_long
        self.dtype = token_dtype(encoding.n_vocab)
        self.tokens, self.index, self.end = [], [], 0  # what is not yet written, and where the bin will end
        self.counts = {"documents": 0, "tokens": 0, "prefix_tokens": 0, "conditions": {}, "truncated": 0, "dropped": {}}

    def drop(self, why):
        self.counts["dropped"][why] = self.counts["dropped"].get(why, 0) + 1

    def add(self, where, condition, instruction_ids, response_ids):
        prefix = make_prefix(self.encoding, condition, instruction_ids)
        document = [*prefix, *response_ids, special_id(self.encoding, "eoa")]
        most = self.block_size + 1  # the last token of a document is never input
        if len(document) > most:
            if self.too_long == "stop":
                raise ValueError(f"{where}: {len(document)} tokens, longer than block_size = {self.block_size}")
            if self.too_long == "drop" or len(prefix) >= most:
                self.drop("too long" if len(prefix) < most else "instruction too long")
                return
            document = document[:most]  # no eoa: the model is not to learn to stop where we cut
            self.counts["truncated"] += 1
        self.tokens += document
        self.end += len(document)
        self.index.append((self.end, len(prefix)))
        self.counts["documents"] += 1
        self.counts["tokens"] = self.end
        self.counts["prefix_tokens"] += len(prefix)
        self.counts["conditions"][condition] = self.counts["conditions"].get(condition, 0) + 1

    def write(self):
        self.bin.write(np.array(self.tokens, dtype=self.dtype).tobytes())
        self.idx.write(np.array(self.index, dtype=np.int64).tobytes())
        self.tokens, self.index = [], []

    def close(self):
        for file in self.bin, self.idx:
            file.flush()
            os.fsync(file.fileno())
            file.close()


def token_dtype(vocab_size):
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def read_index(directory, split):
    """(n, 2) int64: where each document ends in the bin, and the length of its prefix."""
    path = Path(directory, f"{split}.idx")
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: prepare the dataset with data.py")
    if path.stat().st_size % 16:
        raise ValueError(f"{path} is damaged: its {path.stat().st_size} bytes are not two int64 per document")
    return np.memmap(path, dtype="<i8", mode="r").reshape(-1, 2) if path.stat().st_size else np.zeros((0, 2), np.int64)


def batched(items, n):
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == n:
            yield batch
            batch = []
    yield batch


def encoded(batches, encoding, threads):
    """
    Batches of (split, where, pair), each with an iterator over the ids of its instructions and responses in turn.
    Threads encode while further batches are read; tiktoken's own, a job per text, take more than twice as long.
    """

    def encode(batch):
        pairs = (pair for _, _, pair in batch if isinstance(pair, tuple))
        return [
            encoding.encode_ordinary(text) for instruction, response, _ in pairs for text in (instruction, response)
        ]

    jobs = deque()
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches:
            jobs.append((batch, pool.submit(encode, batch)))
            if len(jobs) > 2 * threads:
                batch, job = jobs.popleft()
                yield batch, iter(job.result())
        for batch, job in jobs:
            yield batch, iter(job.result())


def prepare(
    directory,
    source="problems",
    source_config="",
    split="train",
    val_split="",
    val_fraction=0.01,
    fields=None,
    condition="",
    answer="",
    strip_annotations=False,
    skip_bad=False,
    n_problems=40000,
    n_val_problems=1000,
    tokenizer="bytes",
    pat_str="",
    block_size=1024,
    too_long="truncate",
    threads=0,
    seed=1337,
):
    """
    Make a dataset from a source; the settings are those listed at the end of this file. It is written beside
    `directory` and renamed when complete, so that what stands there is never half made.
    Returns meta.json's content. Raises ValueError or OSError, in one sentence that names the row, on bad input.
    """
    directory, part = Path(directory), Path(f"{directory}.part-{os.getpid()}")
    if directory.exists() and not (directory / "meta.json").exists():
        raise ValueError(f"{directory} exists and is no prepared dataset; choose another name with --dataset")
    if too_long not in ("truncate", "drop", "stop"):
        raise ValueError(f"too_long must be truncate, drop or stop, not '{too_long}'")
    if answer not in ("", "cot", "direct"):
        raise ValueError(f"answer must be cot, direct or empty, not '{answer}'")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is a share below 1, not {val_fraction}")
    condition_tags(condition)
    if set(fields or ()) - {"instruction", "response", "condition"}:
        raise ValueError(f"fields names a source's instruction, response and condition, and nothing else: {fields}")
    made = {k: v for k, v in locals().items() if k not in ("directory", "part", "threads")}
    fields = {"instruction": "instruction", "response": "response", "condition": "condition", **(fields or {})}

    def rows():
        """(split, where, row) of the whole source."""
        if source == "problems":
            for name, n in ("train", n_problems), ("val", n_val_problems):
                yield from ((name, f"{name} problem {i}", row) for i, row in enumerate(word_problems(name, n, seed)))
        elif val_split:
            for name, of in ("train", split), ("val", val_split):
                yield from ((name, where, row) for where, row in read_rows(source, source_config, of))
        else:
            rng = random.Random(seed)
            for where, row in read_rows(source, source_config, split):
                yield "val" if rng.random() < val_fraction else "train", where, row

    def pairs():
        """(split, where, pair), or for a bad row that is to be skipped, (split, where, text)."""
        for name, where, row in rows():
            pair = to_pair(row, fields, condition, answer, strip_annotations)
            if isinstance(pair, str) and not skip_bad:
                raise ValueError(f"{where}: {pair}; --skip_bad=True leaves such rows out")
            yield name, where, pair

    texts = (text for name, _, pair in pairs() if name == "train" and isinstance(pair, tuple) for text in pair[:2])
    encoding = make_encoding(tokenizer, pat_str, texts)
    threads = threads or os.cpu_count()
    old = Path(f"{part}-old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        writers = {name: SplitWriter(part, name, encoding, block_size, too_long) for name in ("train", "val")}
        with tqdm(desc=f"preparing {directory}", unit=" documents") as bar:
            for batch, ids in encoded(batched(pairs(), 500), encoding, threads):
                for name, where, pair in batch:
                    if isinstance(pair, str):
                        writers[name].drop(pair)
                    else:
                        writers[name].add(where, pair[2], next(ids), next(ids))
                for writer in writers.values():
                    writer.write()
                bar.update(len(batch))
        for name, writer in writers.items():
            writer.close()
            lengths = np.diff(read_index(part, name)[:, 0], prepend=0)
            points = {"min": 0, "p10": 10, "p50": 50, "p90": 90, "p99": 99, "max": 100}
            found = {k: int(np.percentile(lengths, p)) for k, p in points.items()} if len(lengths) else {}
            writer.counts["length"] = found
        if not writers["train"].counts["documents"]:
            dropped = "; ".join(f"{n:,} rows: {why}" for why, n in writers["train"].counts["dropped"].items())
            raise ValueError(f"{source} holds no document to train on" + (f" ({dropped})" if dropped else ""))
        meta = {
            "vocab_size": encoding.n_vocab,
            "dtype": token_dtype(encoding.n_vocab).name,
            "tokenizer": save_encoding(encoding, part),
            "checksums": {name: fingerprint(part / name) for name in FILES},
            "splits": {name: writer.counts for name, writer in writers.items()},
            "made": made,
        }
        replace_file(part / "meta.json", json.dumps(meta, indent=1).encode())
        if directory.exists():
            directory.rename(old)
        part.rename(directory)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise
    return meta


def report(directory, meta):
    """What went into a dataset, as text."""
    name = meta["tokenizer"]["name"]
    lines = [f"{directory}: tokenizer {name}, {meta['vocab_size']:,} ids, stored as {meta['dtype']}"]
    for split, c in meta["splits"].items():
        response = c["tokens"] - c["prefix_tokens"]
        share = f" ({c['prefix_tokens']:,} prefix, {response:,} response)"
        lines.append(f"  {split}: {c['documents']:,} documents, {c['tokens']:,} tokens{share}")
        if c["length"]:
            lines.append("    tokens per document: " + ", ".join(f"{k} {v:,}" for k, v in c["length"].items()))
        lines.append(
            "    conditions: " + (", ".join(f"{k or 'none'} {v:,}" for k, v in c["conditions"].items()) or "none")
        )
        dropped = ", ".join(f"{v:,} ({k})" for k, v in c["dropped"].items()) or "0"
        lines.append(f"    truncated: {c['truncated']:,}; dropped: {dropped}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------
# the packing loader


class Batch(NamedTuple):
    """One rank's rows of a step, each (rows, T), and three facts of the whole step, all ranks included."""

    idx: torch.Tensor  # int64 tokens, 0 in padding
    targets: torch.Tensor  # int64, IGNORE in prefixes and padding
    doc: torch.Tensor  # int64 number of the document within its row, -1 in padding
    prefix: torch.Tensor  # bool
    n_targets: int
    n_tokens: int
    documents: list  # their numbers in the split


class Loader:
    """
    Iterates over steps of `rows` rows of `block_size` tokens, packed from whole documents.

    An epoch is a seeded permutation of the documents. A step's rows are filled from a pool of the next documents of the
    permutation; what is left in the pool waits for the next step, so every document is seen exactly once per epoch.
    The plan depends on seed, rows and block_size only: rank r takes its share of the same rows. `epochs` limits the
    passes (the last step may then hold padding); without, the stream has no end and epochs overlap by a few documents.
    `state` (plain values, for checkpoints) is that after the last step taken.
    Raises ValueError, in one sentence, on files or a state that do not fit together.
    """

    SPARE = 128  # documents to choose from beyond those a step can hold

    def __init__(self, directory, split, rows, block_size, seed=0, rank=0, world_size=1, epochs=None, state=None):
        meta = read_meta(directory)
        if rows < world_size:
            raise ValueError(f"a step of {rows} rows is too small for {world_size} ranks: each needs at least one")
        index = read_index(directory, split)
        self.ends, self.prefixes = index[:, 0], index[:, 1]
        self.starts = np.concatenate(([0], self.ends[:-1])).astype(np.int64)
        lengths = self.ends - self.starts - 1  # input tokens: all of a document but its last
        sound = (1 <= self.prefixes) & (self.prefixes <= lengths)
        if not sound.all():
            d = int(sound.argmin())
            here = f"from {self.starts[d]} to {self.ends[d]}, prefix {self.prefixes[d]}"
            raise ValueError(f"{Path(directory, split)}.idx is damaged: document {d} cannot be {here}")
        self.lengths = lengths.astype(np.int32)
        self.fitting = np.flatnonzero(lengths <= block_size)  # all, unless prepared for a larger block_size
        self.left_out = len(lengths) - len(self.fitting)
        if not len(self.fitting):
            raise ValueError(
                f"{directory}: no document of the {split} split fits into block_size = {block_size} tokens"
            )
        self.vocab_size, self.bin = meta["vocab_size"], Path(directory, f"{split}.bin")
        size, want = self.bin.stat().st_size, int(self.ends[-1]) * np.dtype(meta["dtype"]).itemsize
        if size != want:
            raise ValueError(f"{self.bin} is damaged: it has {size:,} bytes, not {want:,}")
        self.tokens = np.memmap(self.bin, dtype=meta["dtype"], mode="r")
        self.n_rows, self.block_size, self.seed, self.epochs = rows, block_size, seed, epochs
        self.mine = slice(rank, None, world_size)
        checksum = str(meta["checksums"].get(self.bin.name))
        self.plan = {"seed": seed, "documents": len(self.fitting), "checksum": checksum}
        self.state = state or {"epoch": 0, "cursor": 0, "waiting": [], **self.plan}
        with blamed_on("the loader's state"):
            check_kinds(self.state, epoch=int, cursor=int, waiting=list, seed=int, documents=int, checksum=str)
        for key, value in self.plan.items():
            if self.state[key] != value:
                raise ValueError(
                    f"{directory} gives another plan than the run had: {key} {value}, not {self.state[key]}"
                )
        with blamed_on("the loader's state"):
            if not all(0 <= d < len(lengths) for d in self.state["waiting"]):
                raise ValueError("it has documents that the split has not")
            if self.state["epoch"] < 0 or not 0 <= self.state["cursor"] < len(self.fitting):
                raise ValueError(f"epoch {self.state['epoch']}, cursor {self.state['cursor']}")
        self.order = self._permutation(self.state["epoch"])

    def _permutation(self, epoch):
        return np.random.default_rng((self.seed, epoch)).permutation(self.fitting)

    def _pool(self):
        """
        The documents a step may take, oldest first, as (pool, epoch, cursor): those that waited, then the next of the
        permutation, to what the rows hold and about SPARE documents more.
        """
        epoch, cursor, waiting = (self.state[key] for key in ("epoch", "cursor", "waiting"))
        pool = [np.array(waiting, dtype=np.int64)]
        want = self.n_rows * self.block_size + self.SPARE * self.lengths[self.fitting[:100000]].mean()
        tokens = self.lengths[pool[0]].sum()
        while tokens < want and (self.epochs is None or epoch < self.epochs):
            pool.append(self.order[cursor : cursor + 64])
            tokens += self.lengths[pool[-1]].sum()
            cursor += len(pool[-1])
            if cursor == len(self.order):
                epoch, cursor = epoch + 1, 0
                self.order = self._permutation(epoch)
        return np.concatenate(pool), epoch, cursor

    def _plan(self):
        """The step's rows, each a list of documents; moves the state on. Raises StopIteration after the last epoch."""
        pool, epoch, cursor = self._pool()
        if not len(pool):
            raise StopIteration
        lengths, free = self.lengths[pool], np.ones(len(pool), dtype=bool)
        rows = []
        for _ in range(self.n_rows):
            row, room = [], self.block_size
            while True:
                near = np.flatnonzero(free)[: self.SPARE]  # the oldest; the very oldest always opens a row
                near = near[lengths[near] <= room]
                if not len(near):
                    break
                if not row or room - lengths[near[0]] >= 2 * lengths[near].mean():
                    chosen = near[:1]
                else:  # little room is left: close it with the one or two documents that fill it best
                    chosen = best_fit(near, lengths[near], room)
                free[chosen] = False
                row.extend(chosen)
                room -= lengths[chosen].sum()
            rows.append(pool[row])
        self.state = {"epoch": epoch, "cursor": cursor, "waiting": pool[free].tolist(), **self.plan}
        return rows

    def __iter__(self):
        return self

    def __next__(self):
        rows = self._plan()
        documents = np.concatenate(rows)
        n_tokens = int(self.lengths[documents].sum())
        n_targets = n_tokens + len(documents) - int(self.prefixes[documents].sum())
        rows = rows[self.mine]
        shape = (len(rows), self.block_size)
        idx, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE, np.int64)
        doc, prefix = np.full(shape, -1, np.int64), np.zeros(shape, bool)
        for r, row in enumerate(rows):
            start = 0
            for number, d in enumerate(row):
                document = self.tokens[self.starts[d] : self.ends[d]]
                end, response = start + len(document) - 1, start + self.prefixes[d]
                idx[r, start:end] = document[:-1]
                targets[r, response - 1 : end] = document[self.prefixes[d] :]  # eoq predicts the response's first token
                doc[r, start:end] = number
                prefix[r, start:response] = True
                start = end
        largest = max(idx.max(), targets.max())
        if largest >= self.vocab_size:
            d = next(d for row in rows for d in row if self.tokens[self.starts[d] : self.ends[d]].max() == largest)
            raise ValueError(
                f"{self.bin}: document {d} has the id {largest}, beyond the vocabulary of {self.vocab_size}"
            )
        parts = (torch.from_numpy(a) for a in (idx, targets, doc, prefix))
        return Batch(*parts, n_targets, n_tokens, documents.tolist())


class Prefetch:
    """
    Takes batches from a Loader in a thread, so that the next are ready, with `pin` in pinned memory, before they are
    asked for. `state` is that after the last batch taken, and an error of the Loader comes in its turn.
    """

    def __init__(self, loader, pin=False, depth=2):
        self.state, self.queue = loader.state, Queue(depth)
        Thread(target=self._fill, args=(loader, pin), daemon=True).start()

    def _fill(self, loader, pin):
        try:
            for batch in loader:
                if pin:
                    batch = batch._replace(**{name: getattr(batch, name).pin_memory() for name in batch._fields[:4]})
                self.queue.put((batch, loader.state))
            self.queue.put((StopIteration(), loader.state))
        except Exception as e:
            self.queue.put((e, loader.state))

    def __iter__(self):
        return self

    def __next__(self):
        batch, state = self.queue.get()
        if isinstance(batch, Exception):
            self.queue.put((batch, state))  # for the next to ask
            raise batch
        self.state = state
        return batch


def best_fit(items, lengths, room):
    """The one or two of `items` whose lengths come nearest to room without exceeding it. Each alone must fit."""
    order = np.argsort(lengths, kind="stable")
    items, lengths = items[order], lengths[order]
    longest = len(items) - 1
    partner = np.minimum(np.searchsorted(lengths, room - lengths, side="right") - 1, np.arange(len(items)) - 1)
    total = np.where(partner >= 0, lengths + lengths[partner], 0)
    best = int(total.argmax())
    if total[best] > lengths[longest]:
        return items[[best, partner[best]]]
    return items[[longest]]


# ----------------------------------------------------------------------------------------------------
# the script

if __name__ == "__main__":
    from configurator import configure

    dataset = "problems"  # the name of what is made: data/<dataset>
    source = "problems"  # embedded word problems; or a hub id, a .jsonl, .json or .parquet file, or a directory
    source_config = ""  # the hub dataset's configuration
    split = "train"  # of the source
    val_split = ""  # of the source; "": val_fraction of the documents of split
    val_fraction = 0.01  # drawn at random by seed
    fields = {"instruction": "instruction", "response": "response", "condition": "condition"}  # names in the source
    condition = ""  # of rows that have none: direct, cot, synth, noisy, or several, as synth,cot
    answer = ""  # responses end in "#### N": "cot" keeps the working, "direct" only N; both become the condition
    strip_annotations = False  # drop <<48/2=24>> from responses
    skip_bad = False  # leave malformed and empty rows out and count them; otherwise the first one stops
    n_problems = 40000  # how many word problems to make for training
    n_val_problems = 1000  # and for validation
    tokenizer = "bytes"  # or train:4096, a tiktoken encoding, a BPE file in its format, a model's directory or hub id
    pat_str = ""  # how text is split before a BPE file's or a trained BPE's merges; "": words, digits, punctuation
    block_size = 1024  # context: a document may have one token more
    too_long = "truncate"  # longer documents; or "drop" (as always if the instruction alone is longer), or "stop"
    threads = 0  # of the tokenizer; 0: one per core
    seed = 1337
    settings = configure(globals())
    directory = Path("data") / settings.pop("dataset")
    try:
        print(report(directory, prepare(directory, **settings)))
    except (ValueError, OSError) as e:
        sys.exit(f"data.py: {reason(e)}")
    except KeyboardInterrupt:
        sys.exit(f"data.py: interrupted; {directory} is as it was")
