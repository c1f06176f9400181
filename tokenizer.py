"""
Text <-> ids, and the format of a document.

A document is `boq, condition tags, instruction, eoq | response, eoa`; its prefix is what stands
before the bar.

A tokenizer is byte-level BPE, kept as tokenizer.json, the Hugging Face format, and run by tiktoken.
So one function reads those of datasets, runs and models of the hub, and transformers reads ours.

    tokenizer = load_tokenizer("data/problems")
    ids = tokenizer.prompt("What is 2+2?", "synth,cot")
"""

import json
import re
import sys
import unicodedata
from functools import cached_property
from math import inf
from pathlib import Path

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
FLAGS = ("normalized", "single_word", "lstrip", "rstrip")  # of added tokens in tokenizer.json


class Tokenizer:
    """Byte-level BPE.

    ranks: {bytes: id}; of all neighbours that make a token, the two with the lowest id merge first.
    pattern: the regex that splits text before that. nfc: whether text is normalized before both.
    special: {text: id} of tokens that no text becomes, even where it spells them.
    added: {text: id} of tokens that are cut out of a text first: runs of blanks, <think>.
    """

    def __init__(self, ranks, pattern, special=(), added=(), nfc=False):
        self.ranks = ranks
        self.pattern = pattern
        self.special = dict(special)
        self.added = dict(added)
        self.nfc = nfc
        self.tokens = {i: token for token, i in ranks.items()}
        for text, i in {**self.special, **self.added}.items():
            self.tokens[i] = text.encode()
        n = max(self.tokens) + 1  # some ids below may have no token
        for text in SPECIAL.values():
            if text not in self.special:
                self.special[text] = n
                self.tokens[n] = text.encode()
                n += 1
        self.n_vocab = n
        self.id_of = {role: self.special[text] for role, text in SPECIAL.items()}

    @cached_property
    def bpe(self):
        import tiktoken  # not needed to decode, nor to train on prepared data

        # what stands between two matches is a piece, too, as in tokenizers; tiktoken drops it
        pattern = rf"{self.pattern}|(?:(?!{self.pattern})[\s\S])+"
        options = dict(pat_str=pattern, mergeable_ranks=self.ranks, special_tokens={})
        return tiktoken.Encoding("hrm", **options)

    def encode(self, text):
        """The ids of a text. A special token that it spells is plain text, never control."""
        text.encode()  # raises at half a surrogate pair, which tiktoken would replace
        if len(text) > 500_000 and re.search(r"(?<!\s)\s{500000}", text):
            raise ValueError("half a million blanks in a row are too many for tiktoken")
        parts = [text]
        if self.added:
            longer_first = sorted(map(re.escape, self.added), reverse=True)
            parts = re.split(f"({'|'.join(longer_first)})", text)
        ids = []
        for part in parts:
            if part in self.added:
                ids.append(self.added[part])
                continue
            if self.nfc:
                part = unicodedata.normalize("NFC", part)
            ids += self.bpe.encode_ordinary(part)
        return ids

    def decode(self, ids):
        return b"".join(self.tokens.get(i, b"") for i in ids).decode(errors="replace")

    def prompt(self, instruction, condition=""):
        """The ids of a document's prefix. condition: "" or "none", "cot", "synth,cot", ..."""
        ids = [self.id_of["boq"]]
        for tag in condition.replace(" ", "").split(","):
            if tag in CONDITIONS:
                ids.append(self.id_of[tag])
            elif tag not in ("", "none"):
                sys.exit(f"there is no condition '{tag}'; there are {', '.join(CONDITIONS)}")
        return [*ids, *self.encode(instruction), self.id_of["eoq"]]

    def document(self, instruction, response, condition=""):
        """(ids, length of the prefix)."""
        prefix = self.prompt(instruction, condition)
        return [*prefix, *self.encode(response), self.id_of["eoa"]], len(prefix)

    def save(self, directory, conditions=(), block_size=4096):
        """Write tokenizer.json and tokenizer_config.json. conditions: those of the training
        documents, the most frequent first; the first is the default of the chat template."""
        content = json.loads(TOKENIZER_JSON)
        content["normalizer"] = {"type": "NFC"} if self.nfc else None
        split = content["pre_tokenizer"]["pretokenizers"][0]
        split["pattern"]["Regex"] = re.sub(POSSESSIVE, r"(?>\1\2)", self.pattern)
        model = content["model"]
        model["vocab"] = {to_text(token): i for token, i in self.ranks.items()}
        model["merges"] = find_merges(self.ranks)
        for text, i in {**self.special, **self.added}.items():
            token = dict(id=i, content=text, special=text in self.special)
            content["added_tokens"].append({**token, **dict.fromkeys(FLAGS, False)})
            model["vocab"][text] = i
        default = conditions[0] if conditions else ""
        head = f"{{%- set special, conditions, default = {SPECIAL}, {CONDITIONS}, '{default}' -%}}"
        config = dict(
            tokenizer_class="PreTrainedTokenizerFast",
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
            model_max_length=block_size,
            padding_side="left",
            eos_token=SPECIAL["eoa"],
            pad_token=SPECIAL["boq"],  # never a target; were it eoa, collators would mask eoa
            chat_template=head + CHAT_TEMPLATE,
            conditions=list(conditions),
        )
        for name, value in ("tokenizer.json", content), ("tokenizer_config.json", config):
            text = json.dumps(value, ensure_ascii=False)
            Path(directory, name).write_text(text, encoding="utf-8")


# -----------------------------------------------------------------------------
# the Hugging Face format

# token_type_ids are 1 in the first text of a pair, the prefix, and 0 in the second, the response
TOKENIZER_JSON = """{
  "version": "1.0",
  "added_tokens": [],
  "normalizer": null,
  "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": false},
    {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}
  ]},
  "post_processor": {"type": "TemplateProcessing", "special_tokens": {},
    "single": [{"Sequence": {"id": "A", "type_id": 1}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 0}}]
  },
  "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
    "use_regex": false},
  "model": {"type": "BPE", "ignore_merges": true, "vocab": {}, "merges": []}
}"""

# Tokenizer.prompt() in Jinja; save() puts a line before it that sets special, conditions, default
CHAT_TEMPLATE = """
{%- if messages|length != 1 or messages[0].role != 'user' -%}
  {{- raise_exception('this model answers a single message of the user') -}}
{%- endif -%}
{{- special.boq -}}
{%- for tag in (condition if condition is defined else default).replace(' ', '').split(',') -%}
  {%- if tag in conditions -%}
    {{- special[tag] -}}
  {%- elif tag not in ('', 'none') -%}
    {{- raise_exception('there is no condition ' + tag + '; there are ' + conditions|join(', ')) -}}
  {%- endif -%}
{%- endfor -%}
{{- messages[0].content + special.eoq -}}
"""

# the regex that is built into ByteLevel
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# x{1,3}+ is (?>x{1,3}) to tiktoken, and (x{1,3})+ to tokenizers
POSSESSIVE = r"(\\p\{\w+\}|\\.|\[[^\]]*\]|[^\\])(\{\d+(?:,\d*)?\})\+"

# Bytes are written as visible characters: those of Latin-1, or from U+0100 on where it has none
HIDDEN = [*range(0x21), *range(0x7F, 0xA1), 0xAD]
SHOWN = range(0x100, 0x100 + len(HIDDEN))
TO_SHOWN = dict(zip(HIDDEN, SHOWN))
TO_HIDDEN = dict(zip(SHOWN, HIDDEN))


def to_text(token):
    return token.decode("latin-1").translate(TO_SHOWN)


def find_merges(ranks):
    """What tiktoken merges last into each token, such as "th e", in the order of ids."""
    merges = []
    for token in sorted(ranks, key=ranks.get):
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            made = [ranks.get(a + b, inf) for a, b in zip(parts, parts[1:])]
            i = made.index(min(made))
            if made[i] == inf:
                break  # nothing makes this token; tiktoken takes it where it is a whole piece
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join(map(to_text, parts)))
    return merges


def find_pattern(pre_tokenizer):
    """The regex that splits text, or None if tiktoken cannot split it in the same way."""
    match pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        case [
            {"type": "ByteLevel", "add_prefix_space": False, **rest},
        ] if rest.get("use_regex", True):
            return GPT2_PATTERN
        case [
            {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": regex}},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if not re.search(POSSESSIVE + r"|\\[wWbB]", regex):  # \w differs in tokenizers
            return regex


def load_tokenizer(directory):
    """The Tokenizer of a directory's tokenizer.json. Raises ValueError if tiktoken would not give
    the same ids as tokenizers."""
    path = Path(directory, "tokenizer.json")
    content = json.loads(path.read_bytes())
    model = content["model"]
    normalizer = content["normalizer"]
    pattern = find_pattern(content["pre_tokenizer"] or {})
    if "merges" not in model or not pattern or normalizer not in (None, {"type": "NFC"}):
        raise ValueError(f"{path}: only byte-level BPE with one regex, and NFC or not, can be read")

    special, added = {}, {}
    vocab = model["vocab"]
    for token in content["added_tokens"]:
        text = token["content"]
        vocab.pop(text, None)
        if token["special"] or text in SPECIAL.values():
            special[text] = token["id"]
            continue
        added[text] = token["id"]
        after_nfc = normalizer and token["normalized"] and not text.isspace()
        if after_nfc or any(token[flag] for flag in FLAGS[1:]):
            raise ValueError(f"{path}: the flags of the added token '{text}' are not supported")

    ranks = {text.translate(TO_HIDDEN).encode("latin-1"): i for text, i in vocab.items()}
    # tokenizers merges in the order of a list of pairs, tiktoken in that of the ids they make
    merges = find_merges(ranks)
    used = set(merges)
    listed = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    n_bytes = sum(len(token) == 1 for token in ranks)
    if [pair for pair in listed if pair in used] != merges:
        raise ValueError(f"{path}: tiktoken would merge differently: ids are not in merge order")
    if len(ranks) - n_bytes > len(merges) and not model.get("ignore_merges"):
        raise ValueError(f"{path}: tiktoken would use tokens that no merges make")
    if n_bytes < 243:  # 13 of the 256 are in no text
        raise ValueError(f"{path}: {256 - n_bytes} bytes have no token, so some text has no ids")
    return Tokenizer(ranks, pattern, special, added, nfc=bool(normalizer))


def get_tokenizer(name):
    """"bytes", the name of one of tiktoken's, or a run, directory or hub id with tokenizer.json."""
    if name == "bytes":
        return Tokenizer({bytes([b]): b for b in range(256)}, r"[\s\S]")
    directory = Path(name).expanduser()
    for path in [directory, *sorted(directory.glob("step-*"), reverse=True)]:  # or a run
        if Path(path, "tokenizer.json").exists():
            return load_tokenizer(path)
    import tiktoken

    names = tiktoken.list_encoding_names()
    if name in names:
        try:
            base = tiktoken.get_encoding(name)
        except OSError as error:
            sys.exit(f"tiktoken cannot download {name}: {type(error).__name__}")
        return Tokenizer(base._mergeable_ranks, base._pat_str, base._special_tokens)
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(name, allow_patterns="*.json")
    except (OSError, ValueError):
        known = ", ".join(names)
        sys.exit(f"there is no tokenizer '{name}'; take a directory, a hub id, bytes, {known}")
    return load_tokenizer(directory)


def known_conditions(directory):
    """Those of the training documents, the most frequent first; [] if nothing tells."""
    path = Path(directory, "tokenizer_config.json")
    return json.loads(path.read_bytes()).get("conditions", []) if path.exists() else []
