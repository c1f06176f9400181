"""
Whatever a file or a command line holds: it works, or it ends with one sentence, within 20 s and 4 GB.

    pytest tests/test_fuzz.py -n 0 -s --fuzz=500     # so many cases of each kind; -s tells how many worked
"""

from configurator import SCRIPTS, configure, settings_of

import faulthandler
import json
import math
import os
import pickle
import re
import resource
import shutil
import struct
import time
import zipfile
from base64 import b64encode
from collections import Counter
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scripts import ROOT, TINY, run

from checkpoint import load_checkpoint
from common import errors_name_file
from data import prepare
from generate import load_for_inference
from hf import save_hf, save_hf_tokenizer
from loader import Loader, document, open_split
from model import HRM
from optim import AdamATan2
from tasks import heldout
from tokenizer import BYTES, FILES, check_file, encode_prompt, fingerprint, load_encoding, read_meta, special_id
from train import train_step

LOG = os.environ.get("FUZZ_LOG")
SECONDS, BYTES_OF_MEMORY = 20, 4 * 2**30
DATA, RUN, HF = Path("data/problems"), Path("out"), Path("hf")
SHARDED = HF / "model.safetensors.index.json"
TEXT = "Tom's 12  hellos,\r\n\té 한 e\u0301 🙂 hell<|im_start|>ll #### -3\n\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with a dataset, a run of two steps, and its export."""
    place = tmp_path_factory.mktemp("base")
    ranks = {**BYTES, **{token: 256 + i for i, token in enumerate((b"he", b"ll", b"hell", b" t", b"om", b"12"))}}
    encoded = (f"{b64encode(token).decode()} {i}\n" for token, i in ranks.items())
    (place / "x.tiktoken").write_text("".join(encoded))
    prepare(place / DATA, n_problems=20, n_val_problems=5, tokenizer=str(place / "x.tiktoken"))
    run(place, "train.py", *TINY, "--max_iters=2")
    save_hf(HRM.from_pretrained(place / RUN), place / HF)
    save_hf_tokenizer(load_encoding(place / RUN), place / HF)
    return place


# ----------------------------------------------------------------------------------------------------
# mutations

LARGE = {'"<deep>"': "[" * 10**5 + "]" * 10**5, '"<huge>"': "9" * 10**5, "<long>": "x" * 10**6, "<blank>": " " * 10**6}
LARGE["<twice>"] = ""  # so that a key is there twice
ODD = [None, True, False, 0, -1, 1, 2, 7, 255, 65535, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, -(2**63), 10**400]
ODD += [0.0, -0.0, 0.5, 1e-320, 1e-10, 1e38, 1e308, math.nan, math.inf, -math.inf, "", " ", "\0", "a", "é", "\ud800"]
ODD += ["<long>", "<blank>", "../x", "/dev/null", "NFC", "NFKC", "cot", "none", "(", "a*", r"\p{L}+", r"(a|a)*b"]
ODD += [[], {}, [[]], [{}], {"": None}, ["a", 1], "<deep>", "<huge>"]
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["cot", "train", "uint16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
odd = st.sampled_from(ODD) | values
edits = st.tuples(st.floats(0, 1), st.integers(0, 9), st.binary(max_size=9))  # where, how many bytes go, what comes


def spoiled(content, changes):
    for where, gone, new in changes:
        at = int(where * len(content))
        content = content[:at] + new + content[at + gone :]
    return content


def similar(value):
    """What a slip, or a stranger, would write for this."""
    match value:
        case bool() | None:
            return [not value, int(bool(value)), str(value)]
        case int() | float() if abs(value) < 2**64:
            return [value + 1, value - 1, -value, 2 * value, value * 1.5, float(value), str(value), [value]]
        case str():
            return [value[:-1], value[1:], 2 * value, value.upper(), value + " ", [value], {value: value}]
        case list():
            return [value[:-1], value[1:], 2 * value, value[::-1], [value], dict(enumerate(value))]
        case dict():
            reversed = dict(zip(value, [*value.values()][::-1]))
            return [{**value, "x": 1}, [*value], [*value.values()], reversed, {"x": value}]
        case torch.Tensor() if value.numel() < 2**20 and value.layout == torch.strided:
            kinds = torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64
            wrong = value.flatten().clone()
            wrong[:1] = math.inf if value.is_floating_point() else 1
            shapes = value[:-1], value[None], value.flatten(), value.t() if value.dim() == 2 else value, value[:0]
            views = value[:1].expand(value.shape), torch.zeros(()).expand(2**40), value.reshape(-1)[::2]
            others = value.tolist(), value.to_sparse(), value * 1e38
            return [*others, *map(value.to, kinds), wrong.view(value.shape), *shapes, *views]
    return []


def mutated(draw, content):
    """A copy of nested dicts and lists, with one to three changes."""
    box = [deepcopy(content)]
    for _ in range(draw(st.integers(1, 3))):
        node, key, odds = box, 0, 50  # against a change of the whole
        while isinstance(node[key], (dict, list)) and node[key] and draw(st.sampled_from(range(odds))):
            node = node[key]
            key, odds = draw(st.sampled_from([*node] if isinstance(node, dict) else range(len(node)))), 8
        like = similar(node[key])
        value = deepcopy(draw(st.sampled_from(like) if like and draw(st.integers(0, 2)) else odd))
        match draw(st.sampled_from(["replace", "replace", "replace", "replace", "drop", "twice", "rename", "swap"])):
            case "drop" if node is not box:
                del node[key]
            case "twice" if isinstance(node, dict):
                node[f"{key}<twice>"] = value
            case "rename" if isinstance(node, dict):
                node[draw(st.sampled_from([f"{key}x", str(key)[:-1], "", "x"]))] = node.pop(key)
            case "swap" if isinstance(node, dict):
                other = draw(st.sampled_from([*node]))
                node[key], node[other] = node[other], node[key]
            case _:
                node[key] = value
        if not box[0]:
            break
    return box[0]


def as_json(content):
    return enlarged(json.dumps(content, default=str)).encode()


def enlarged(text):
    for short, long in LARGE.items():
        text = text.replace(short, long)
    return text


def mutate_json(name):
    """Change a JSON file: its values, or now and then its bytes."""

    def mutate(place, draw):
        path = place / name
        content = path.read_bytes()
        if draw(st.integers(0, 5)):
            content = as_json(mutated(draw, json.loads(content)))
        else:
            content = spoiled(content, draw(st.lists(edits, min_size=1, max_size=3)))
        path.write_bytes(content)

    return mutate


def mutate_bytes(path, draw):
    path.write_bytes(spoiled(path.read_bytes(), draw(st.lists(edits, min_size=1, max_size=3))))


def mutate_safetensors(place, draw):
    path = place / HF / "model.safetensors"
    match draw(st.sampled_from(["bytes", "header", "header", "tensors", "tensors", "length"])):
        case "bytes":
            return mutate_bytes(path, draw)
        case "tensors":
            tensors = mutated(draw, load_file(path))
            if isinstance(tensors, dict):
                plain = {k: t for k, t in tensors.items() if isinstance(t, torch.Tensor) and t.layout == torch.strided}
                save_file({k: t.contiguous().clone() for k, t in plain.items() if t.numel() < 2**20}, path)
            return None
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, rest = content[8 : 8 + size], content[8 + size :]
    if draw(st.booleans()):
        header = mutated(draw, json.loads(header))
        if isinstance(header, dict) and draw(st.booleans()):
            for entry in header.values():
                if isinstance(entry, dict) and "dtype" in entry and draw(st.integers(0, 5)) == 0:
                    entry["dtype"] = draw(st.sampled_from(["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "X"]))
        header = as_json(header)
    size = draw(st.sampled_from([len(header)] * 8 + [0, 1, len(header) - 1, len(header) + 1, 2**31, 2**63, 2**64 - 1]))
    path.write_bytes(struct.pack("<Q", size) + header + rest)


def mutate_index(place, draw):
    """Split model.safetensors in two, and change the index or a part."""
    whole = place / HF / "model.safetensors"
    tensors, names = load_file(whole), ("a.safetensors", "b.safetensors")
    parts = {name: {} for name in names}
    for i, (key, tensor) in enumerate(tensors.items()):
        parts[names[i % 2]][key] = tensor
    whole.unlink()
    for name, part in parts.items():
        save_file(part, place / HF / name)
    index = {"metadata": {"total_size": 1}, "weight_map": {key: names[i % 2] for i, key in enumerate(tensors)}}
    (place / SHARDED).write_text(json.dumps(index))
    mutate_json(SHARDED)(place, draw)
    if draw(st.integers(0, 3)) == 0:
        shutil.copy(place / HF / names[0], place / HF / names[1])


def mutate_ckpt(place, draw):
    before = resumed(place)
    change_ckpt(place / RUN / "ckpt.pt", draw)
    return before


def change_ckpt(path, draw):
    how = draw(st.sampled_from(["bytes", "content", "content", "content", "entries", "entries", "pickle", "pickle"]))
    if how == "bytes":
        return mutate_bytes(path, draw)
    if how == "content":
        try:
            return torch.save(mutated(draw, torch.load(path, weights_only=True)), path)
        except (RecursionError, OverflowError, RuntimeError, TypeError):
            return None  # not even pickle can write that
    with zipfile.ZipFile(path) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    if how == "pickle":  # with a right checksum
        i = next(i for i, (name, _) in enumerate(entries) if name.endswith("data.pkl"))
        name, content = entries[i]
        for _ in range(draw(st.integers(1, 3))):
            at, old = draw(st.integers(0, len(content) - 1)), draw(st.integers(0, 4))
            new = draw(st.binary(max_size=4) | st.sampled_from([b"\x8a\x04\xff\xff\xff\x7f", b"}", b"]", b"h\0", b"."]))
            content = content[:at] + new + content[at + old :]
        entries[i] = name, content
    compressed = 0
    for _ in range(draw(st.integers(1, 3)) if how == "entries" else 0):
        i, j = (draw(st.integers(0, len(entries) - 1)) for _ in "ij")
        match draw(st.sampled_from(["compress", "double", "rename", "drop", "swap", "spoil", "grow", "upper"])):
            case "compress":
                compressed = zipfile.ZIP_DEFLATED
            case "double":
                entries.append(entries[i])
            case "rename":
                entries[i] = entries[j][0], entries[i][1]
            case "drop":
                del entries[i]
            case "swap":
                entries[i], entries[j] = (entries[i][0], entries[j][1]), (entries[j][0], entries[i][1])
            case "spoil":
                entries[i] = entries[i][0], spoiled(entries[i][1], draw(st.lists(edits, min_size=1, max_size=2)))
            case "grow":
                entries[i] = entries[i][0], entries[i][1] * 2
            case "upper":
                entries.append((entries[i][0].upper(), entries[j][1]))
        if not entries:
            break
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries:
            archive.writestr(name, content, compressed)
    if draw(st.integers(0, 3)) == 0:  # sizes and offsets of the directory at the end
        content = bytearray(path.read_bytes())
        starts = [found.start() for found in re.finditer(b"PK\1\2", content)] or [0]
        at = draw(st.sampled_from(starts)) + draw(st.sampled_from([10, 16, 20, 24, 28, 42]))
        content[at : at + 4] = struct.pack("<I", draw(st.sampled_from([0, 1, 8, 1000, 2**31, 2**32 - 1])))
        path.write_bytes(content)


def mutate_numbers(suffix, dtype):
    """Change numbers of a dataset's files, or their number; and then the checksum too, as a forger would."""

    def mutate(place, draw):
        path = place / DATA / f"{draw(st.sampled_from(['train', 'val']))}.{suffix}"
        numbers = np.fromfile(path, dtype)
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.integers(0, len(numbers) - 1))
            old, before, last = (int(numbers[i]) for i in (at, at - 1, -1))
            border = [0, 1, 2, 262, 268, 269, 270, most, least, most - 1, most // 2 + 1]
            border += [old + 1, old - 1, before, old * 2, last + 1]
            numbers[at] = np.uint64(draw(st.sampled_from(border)) % 2**64).astype(dtype)
        content = numbers.tobytes()
        match draw(st.sampled_from(["whole"] * 6 + ["cut", "cut", "more", "none", "twice"])):
            case "cut":
                content = content[: draw(st.integers(0, len(content)))]
            case "more":
                content += draw(st.binary(min_size=1, max_size=32))
            case "none":
                content = b""
            case "twice":
                content *= 2
        path.write_bytes(content)
        if draw(st.integers(0, 4)):
            meta = json.loads((place / DATA / "meta.json").read_text())
            meta["checksums"][path.name] = fingerprint(path)
            (place / DATA / "meta.json").write_text(json.dumps(meta))

    return mutate


texts = st.text(min_size=1) | st.sampled_from(["a", "\ud800", "\0", " ", "<long>", "<blank>", "é", "\r\n"])
cells = texts | odd
rows = st.fixed_dictionaries({"instruction": texts, "response": texts}, optional={"condition": cells, "x": cells})
rows |= st.fixed_dictionaries({}, optional=dict.fromkeys(("instruction", "response", "condition"), cells))


def mutate_jsonl(place, draw):
    lines = st.lists(rows | rows | odd | st.binary(), min_size=1, max_size=6)
    kind = draw(st.sampled_from(["jsonl", "jsonl", "json"]))
    lines = [line if isinstance(line, bytes) else as_json(line) for line in draw(lines)]
    start = draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\n \n"]))
    joined = b"[" + b",".join(lines) + b"]" if kind == "json" and draw(st.booleans()) else b"\n".join(lines)
    (place / f"x.{kind}").write_bytes(start + joined)
    return place / f"x.{kind}", draw(st.booleans())


def mutate_parquet(place, draw):
    import pyarrow
    import pyarrow.parquet

    n = draw(st.sampled_from(range(6)))
    kinds = [pyarrow.string(), pyarrow.large_string(), pyarrow.binary(), pyarrow.int64(), pyarrow.float64()]
    kinds += [pyarrow.null(), pyarrow.bool_(), pyarrow.decimal128(9, 2), pyarrow.timestamp("us")]
    kinds += [pyarrow.list_(pyarrow.string()), pyarrow.struct([("a", pyarrow.string())])]
    kinds += [pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]
    columns, more = [], st.sampled_from([[], ["condition"], ["condition", "x"], ["x"], ["x", "response"]])
    names = ["instruction", "response", *draw(more)]
    for name in names:
        kind = draw(st.sampled_from(kinds[:1] * 20 + kinds))
        text = texts.filter(lambda text: text.isascii() or "\ud800" not in text)
        tags = st.sampled_from(["cot", "direct", "synth,cot", "", None, "x"])
        try:
            one = tags if name == "condition" else text if draw(st.integers(0, 5)) else st.none() | text
            cells = [cell and enlarged(cell) for cell in draw(st.lists(one, min_size=n, max_size=n))]
            columns.append(pyarrow.array(cells, kind))
        except (pyarrow.ArrowException, TypeError, ValueError):
            columns.append(pyarrow.nulls(n, kind))
    path = place / "x.parquet"
    compression = draw(st.sampled_from(["snappy", "none", "zstd"]))
    pyarrow.parquet.write_table(pyarrow.table(columns, names), path, compression=compression)
    if draw(st.integers(0, 3)) == 0:
        mutate_bytes(path, draw)
    return path, draw(st.booleans())


# ----------------------------------------------------------------------------------------------------
# uses: each returns, or raises ValueError or OSError; what was read is then plausible


def use_model(directory):
    model, encoding, tags = load_for_inference(directory, device="cpu", dtype="float32")
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    use_encoding(encoding)
    prompt, stop = encode_prompt(encoding, TEXT, tags), special_id(encoding, "eoa")
    for options in {}, {"temperature": 1.0, "top_k": 9}, {"temperature": 0.3, "top_p": 0.9}:
        [ids] = model.generate([prompt], 2, stop_token=stop, seed=1, **options)
        assert encoding.tokens.keys() >= {*ids}
    return model


def use_encoding(encoding):
    assert encoding.decode(encoding.encode(TEXT)) == encoding.normalize(TEXT)


def use_hf(place):
    use_model(place / HF)


def use_tokenizer(place):
    """The ids are those of Hugging Face's tokenizers, if these read the file too."""
    from tokenizers import Tokenizer

    encoding = load_encoding(place / HF)
    use_encoding(encoding)
    content = (place / HF / "tokenizer.json").read_text()
    try:
        theirs = Tokenizer.from_str(content)
    except Exception:
        return use_hf(place)
    else:
        if not any(token.content and token.content in TEXT for token in theirs.get_added_tokens_decoder().values()):
            for text in TEXT, TEXT.replace("<|im_start|>", ""):
                if not any(token.content in text for token in theirs.get_added_tokens_decoder().values()):
                    assert theirs.encode(text, add_special_tokens=False).ids == encoding.encode(text)
    use_hf(place)


def resumed(place):
    """What train.py does with a checkpoint, up to the weights after one more step."""
    ckpt, _ = load_checkpoint(place / RUN)
    model = HRM.from_pretrained(place / RUN).train()
    optimizer = AdamATan2(model.parameters(), lr=1e-3, ema=0.9)
    with errors_name_file(place / RUN / "ckpt.pt"):
        model.load_state_dict(ckpt["model"])
        optimizer.load_state_dict(ckpt["optimizer"])
    loader = Loader(place / DATA, "train", 4, 256, 1337, state=ckpt["loader"])
    optimizer.param_groups[0] |= dict(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, ema=0.9)
    train_step(model, optimizer, next(loader), 5, 4)
    return ckpt, model.state_dict()


def use_ckpt(place, original, want):
    use_model(place / RUN)
    ckpt, weights = resumed(place)
    if pickle.dumps(as_lists(ckpt)) == pickle.dumps(as_lists(original)):
        assert all(torch.equal(weights[name], want[name]) for name in want)


def as_lists(content):
    """Nested content without tensors, to compare."""
    if isinstance(content, dict):
        return {key: as_lists(value) for key, value in content.items()}
    return content.numpy().tobytes() if isinstance(content, torch.Tensor) else content


def use_data(place):
    directory = place / DATA
    meta = read_meta(directory)
    for name in FILES:
        check_file(directory, name, meta)
    encoding = load_encoding(directory)
    use_encoding(encoding)
    for split in "train", "val":
        if meta["splits"][split]["documents"]:
            for batch in Loader(directory, split, 2, 256, epochs=1):
                assert 0 <= batch.idx.min() and batch.idx.max() < meta["vocab_size"] == encoding.n_vocab
                assert batch.targets.max() < meta["vocab_size"] and batch.n_targets == (batch.targets >= 0).sum()
    shutil.copy(directory / "meta.json", place / RUN)
    for question in heldout(place / RUN, 0):
        assert isinstance(encoding.decode(question.prompt), str) and isinstance(question.truth, str)


def use_rows(place, source, skip_bad):
    """Every row becomes the document that it says, or is told or counted."""
    options = dict(skip_bad=skip_bad, workers=1, block_size=99, val_fraction=0.0)
    meta = prepare(place / "data" / "new", source=str(source), **options)
    c = meta["splits"]["train"]
    if source.suffix == ".parquet":
        from pyarrow.parquet import read_table

        found = read_table(source).to_pylist()
    else:
        found = parsed(source)
    encoding, split = load_encoding(place / "data" / "new"), open_split(place / "data" / "new", "train")
    eoa, pairs = special_id(encoding, "eoa"), [(row.get("instruction"), row.get("response")) for row in found]
    assert c["documents"] + sum(c["dropped"].values()) >= len(found)
    for d in range(c["documents"]):
        ids, n_prefix = document(*split, d)
        prompt, answer = ([i for i in part if i < 256] for part in (ids[:n_prefix], ids[n_prefix:]))
        prompt, answer = bytes(prompt).decode(), bytes(answer).decode(errors="ignore")
        right = (prompt == i and r.startswith(answer) for i, r in pairs if isinstance(r, str))
        assert (prompt, answer) in pairs if ids[-1] == eoa else any(right)


def parsed(source):
    """The objects in a .jsonl or .json file."""
    content, found = source.read_bytes().removeprefix(b"\xef\xbb\xbf"), []
    for text in [content] if content.lstrip()[:1] == b"[" and source.suffix == ".json" else content.split(b"\n"):
        try:
            value = json.loads(text)
            found += value if isinstance(value, list) and source.suffix == ".json" else [value]
        except (ValueError, RecursionError):
            pass
    return [row for row in found if isinstance(row, dict)]


# ----------------------------------------------------------------------------------------------------
# command lines

DEFAULTS = {}
for script in SCRIPTS:
    found = {}
    for assignment in settings_of(ROOT / script).values():
        exec(assignment, found)
    found.pop("__builtins__")
    DEFAULTS[script] = found
names = st.sampled_from(list(DEFAULTS["train.py"])) | st.text()
python = st.lists(st.tuples(names, values.map(repr) | st.text()).map(" = ".join)).map("\n".join) | st.text()


def write_config(place, draw):
    content = draw(st.binary() | python.map(lambda text: text.encode(errors="replace")))
    (place / "c.py").write_bytes(content)
    some = st.tuples(names, values.map(repr) | st.text()).map("=".join).map("--".__add__) | st.text()
    return ([a for a in draw(st.lists(some | st.just(str(place / "c.py")))) if a not in ("-h", "--help")],)


def use_config(place, argv):
    defaults = DEFAULTS["train.py"]
    try:
        found = configure({"__file__": str(ROOT / "train.py"), "__doc__": "", **defaults}, argv)
    except SystemExit as e:
        assert isinstance(e.code, str) and e.code.strip()
        assert "\n" not in e.code or "\n" in "".join(argv)
        raise ValueError("a sentence") from None
    assert all(type(found[key]) is type(value) for key, value in defaults.items())


START = {  # the shortest run of a script
    "train.py": [*TINY, "--max_iters=1", "--out_dir=new", "--sample_prompts=1"],
    "data.py": ["--n_problems=9", "--n_val_problems=2", "--dataset=new", "--source=problems"],
    "sample.py": ["--max_new_tokens=2"],
    "eval.py": ["--max_new_tokens=2", "--limit=2"],
    "hf.py": [],
    "plot.py": [],
    "contamination.py": ["--tasks=problems", "--limit=2"],
}
# Large values of these ask for as much work or memory, and get it.
WORK = "max_iters epochs n_problems n_val_problems num_samples compile n_embd n_layer n_head H_cycles L_cycles".split()
WORDS = ["auto", "cpu", "cuda", "cuda:9", "cpu:0", "mps", "float16", "bfloat16", "flex", "sdpa", "resume", "out", "hf"]
WORDS += ["data/problems", ".", "..", "new", "a/b", "/dev/full", "/proc/x", "x" * 300, "x\ny", "\udcff", "%s", "~", "*"]
WORDS += ["FILE:x.tiktoken", "FILE:", "x.tiktoken", "train:300", "train:9", "heldout,gsm8k", "c.py", "out/log.jsonl"]


def mutate_command(place, draw):
    script = draw(st.sampled_from(list(START)))
    argv = list(START[script])
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(list(DEFAULTS[script])))
        default = DEFAULTS[script][name]
        some = [0, -1, 1, 2, 3, 0.5, math.nan, -(2**63)] if name in WORK else [*similar(default), *ODD, *WORDS]
        some = [value for value in some if type(value) is type(default)] * 9 + some
        value = str(draw(st.sampled_from(some))).replace("\0", "").replace("\ud800", "")[:999]
        form = draw(st.sampled_from(["--{}={}"] * 12 + ["--{}", "-{}={}", "--{}x={}", "{}={}", "{1}", "--{0}={1}={1}"]))
        argv.insert(draw(st.integers(0, len(argv))) if draw(st.booleans()) else len(argv), form.format(name, value))
    return script, *argv


def use_command(place, *argv):
    done = run(place, *argv, ok=None, PLOTS="1", SECONDS=str(SECONDS), MEMORY=str(BYTES_OF_MEMORY))
    said = done.stderr.replace("\r", "\n").splitlines() or [""]
    assert "Traceback" not in done.stdout + done.stderr and "panicked" not in done.stderr, done.stderr
    assert done.returncode in (0, 1), (done.returncode, done.stderr)
    if done.returncode:
        assert said[-1].strip(), done.stderr
        raise ValueError(said[-1])


def use_run_json(place):
    argv = ["--init_from=resume", "--max_iters=3", "--compile=False", "--device=cpu", "--epochs=0.0"]
    use_command(place, "train.py", *argv)
    heldout(place / RUN, 0)


KINDS = {  # how to change a copy of `base`, what is done with it, and its share of the cases
    "config": (mutate_json(HF / "config.json"), use_hf, 1),
    "tokenizer": (mutate_json(HF / "tokenizer.json"), use_tokenizer, 1),
    "tokenizer_config": (mutate_json(HF / "tokenizer_config.json"), use_hf, 1),
    "safetensors": (mutate_safetensors, use_hf, 1),
    "index": (mutate_index, use_hf, 1),
    "ckpt": (mutate_ckpt, use_ckpt, 1),
    "meta": (mutate_json(DATA / "meta.json"), use_data, 1),
    "idx": (mutate_numbers("idx", np.int64), use_data, 1),
    "bin": (mutate_numbers("bin", np.uint16), use_data, 1),
    "jsonl": (mutate_jsonl, use_rows, 1),
    "parquet": (mutate_parquet, use_rows, 1),
    "config file": (write_config, use_config, 1),
    "run.json": (mutate_json(RUN / "run.json"), use_run_json, 0.2),
    "command line": (mutate_command, use_command, 0.2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_fuzz(kind, base, tmp_path_factory, pytestconfig, monkeypatch):
    (mutate, use, share), counts, slowest = KINDS[kind], Counter(), [0]

    @settings(max_examples=math.ceil(share * pytestconfig.getoption("--fuzz")), phases=[Phase.generate])
    @given(st.data())
    def one(data):
        place = tmp_path_factory.mktemp("case") / "place"
        shutil.copytree(base, place)
        drawn = mutate(place, data.draw) or ()
        monkeypatch.chdir(place)
        before, clock = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
        try:
            use(place, *drawn)
            counts["work"] += 1
        except (ValueError, OSError) as e:  # anything else is a traceback to the user
            assert str(e).strip() and "\n" not in str(e), e
            if LOG:
                with open(LOG, "a", errors="backslashreplace") as file:
                    print(kind, "|", str(e)[:250].replace(str(place), "PLACE"), file=file)
            counts["end with a sentence"] += 1
        faulthandler.cancel_dump_traceback_later()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        slowest[0] = max(slowest[0], time.monotonic() - clock)
        assert slowest[0] < SECONDS and (peak == before or peak * 1024 < BYTES_OF_MEMORY)
        monkeypatch.chdir(base)
        shutil.rmtree(place.parent)

    one()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{kind}: {dict(counts)}, slowest {slowest[0]:.1f} s, peak memory {peak:.1f} GiB")
