"""
What is wrong with an input is told in one sentence, and nothing is written.

    pytest tests/test_bad_input.py -n 0 -s -k sentence         # prints the table of sentences
"""

import hashlib
import json
import math
import os
import shutil
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scripts import TINY, run
from test_fuzz import resumed

from checkpoint import RunFiles
from tokenizer import fingerprint


@pytest.fixture(scope="module")
def trained(tmp_path_factory, problems_dir):
    """A directory with data/problems and a run of one step in out/."""
    place = tmp_path_factory.mktemp("trained")
    shutil.copytree(problems_dir, place / "data" / "problems")
    run(place, "train.py", *TINY, "--max_iters=1")
    return place


def damage(path, change, seal=False):
    """Replace a file's bytes by change(bytes); with `seal`, its checksum in meta.json too, as a forger would."""
    path.write_bytes(change(path.read_bytes()))
    if seal:
        meta = json.loads((path.parent / "meta.json").read_text())
        meta["checksums"][path.name] = fingerprint(path)
        (path.parent / "meta.json").write_text(json.dumps(meta))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def line(content):
    """A case: data.py on a file whose third line is this."""

    def make(place):
        good = b'{"instruction": "a", "response": "b"}\n'
        place.joinpath("x.jsonl").write_bytes(good + b"\n" + content + b"\n" + good)

    return "data.py --source=x.jsonl --dataset=x --too_long=stop", make


def damaged(name, change, seal=False):
    """damage() of a file, for a case."""
    return lambda place: damage(place / name, change, seal)


def nobody_may_write(place):
    (place / "closed").mkdir(mode=0o555)
    if os.geteuid() == 0:  # whom no mode keeps out
        (place / "closed").rmdir()
        (place / "closed").symlink_to("/proc/sys")


def other_shape(place):
    run(place, "train.py", *TINY, "--max_iters=1", "--out_dir=wide", "--n_embd=64")
    shutil.copy(place / "wide" / "ckpt.pt", place / "out" / "ckpt.pt")


def other_tokenizer(place):
    """A train.bin of the same number of ids, written with another tokenizer."""
    shutil.copytree(place / "data" / "problems", place / "data" / "mixed")
    bin = place / "data" / "mixed" / "train.bin"
    damage(bin, lambda b: bytes((x + 1) % 200 if i % 2 == 0 else 0 for i, x in enumerate(b)))


TRAIN = "train.py " + " ".join(TINY) + " --max_iters=1"
MIXED = f"{TRAIN} --out_dir=new --dataset=problems"
IN_BIN, IN_META, IN_IDX = (f"data/problems/{name}" for name in ("train.bin", "meta.json", "train.idx"))
CASES = {  # name: (command, what to do to the directory before, what the sentence must say)
    "malformed JSON": (*line(b'{"instruction": "a", "resp'), "x.jsonl, line 3: not a JSON object"),
    "JSON that is no object": (*line(b'["a", "b"]'), "x.jsonl, line 3: not a JSON object"),
    "deep JSON": (*line(b"[" * 100000), "x.jsonl, line 3: not a JSON object"),
    "wrong type": (*line(b'{"instruction": 3, "response": "b"}'), "line 3: no text in the field 'instruction'"),
    "missing field": (*line(b'{"instruction": "a"}'), "x.jsonl, line 3: no field 'response': the row's fields are"),
    "empty instruction": (*line(b'{"instruction": " ", "response": "b"}'), "x.jsonl, line 3: empty instruction"),
    "empty response": (*line(b'{"instruction": "a", "response": ""}'), "x.jsonl, line 3: empty response"),
    "unknown condition": (
        *line(b'{"instruction": "a", "response": "b", "condition": ["cot"]}'),
        "x.jsonl, line 3: unknown condition: ['cot']",
    ),
    "invalid UTF-8": (*line(b'{"instruction": "\xff", "response": "b"}'), "x.jsonl, line 3: not UTF-8"),
    "half a surrogate pair": (
        *line(b'{"instruction": "\\ud800", "response": "b"}'),
        "line 3: half a surrogate pair in",
    ),
    "NUL byte": (*line(b'{"instruction": "\0", "response": "b"}'), "x.jsonl, line 3: a NUL byte"),
    "NUL character": (*line(b'{"instruction": "a", "response": "\\u0000"}'), "line 3: a NUL character in"),
    "line of 50 MB": (
        *line(b'{"instruction": "a", "response": "' + b"x" * 50_000_000 + b'"}'),
        "x.jsonl, line 3: longer than 16,777,216 bytes",
    ),
    "over-long document": (
        *line(b'{"instruction": "a", "response": "' + b"x" * 2000 + b'"}'),
        "x.jsonl, line 3: 2004 tokens, longer than block_size = 1024",
    ),
    "ids beyond the vocabulary": (
        MIXED,
        damaged(IN_BIN, lambda b: b"\xff\xff" * (len(b) // 2), seal=True),
        "has the id 65535, beyond the vocabulary of 263",
    ),
    "truncated bin": (MIXED, damaged(IN_BIN, lambda b: b[:-100]), "train.bin is damaged"),
    "truncated bin, forged": (MIXED, damaged(IN_BIN, lambda b: b[:-100], seal=True), "train.bin is damaged: it has"),
    "damaged index": (
        MIXED,
        damaged(IN_IDX, lambda b: b[:8] + b"\xff\xff" + b[10:], seal=True),
        "train.idx is damaged: document 0 cannot be from 0 to",
    ),
    "bin of another tokenizer": (
        f"{TRAIN} --out_dir=new --dataset=mixed",
        other_tokenizer,
        "not the file that data/mixed",
    ),
    "meta.json lies about the vocabulary": (MIXED, lambda place: edit(place / IN_META, vocab_size=300), "300"),
    "meta.json lies about the dtype": (MIXED, lambda place: edit(place / IN_META, dtype="uint32"), "dtype is uint32"),
    "meta.json is not JSON": (MIXED, damaged(IN_META, lambda b: b[:99]), "meta.json is damaged"),
    "meta.json lacks a key": (MIXED, damaged(IN_META, lambda b: b"{}"), "meta.json is damaged: it lacks"),
    "unknown setting": (f"{TRAIN} --stesp=3", None, "there is no setting 'stesp'"),
    "typo in a config file": (
        "train.py c.py",
        lambda place: (place / "c.py").write_text("max_itres = 3\n"),
        "c.py: there is no setting 'max_itres'; did you mean 'max_iters'?",
    ),
    "out_dir without rights": (f"{TRAIN} --out_dir=closed/out", nobody_may_write, "closed/out"),
    "unknown task": ("eval.py --tasks=gsm9k", None, "there is no task 'gsm9k': --tasks names"),
    "checkpoint of another architecture": (f"{TRAIN} --init_from=resume", other_shape, "holds another model"),
    "checkpoint whose weights are not its configuration's": (
        "sample.py",
        lambda place: lie(place / "out" / "ckpt.pt"),
        "ckpt.pt is damaged: ",
    ),
    "damaged checkpoint": ("sample.py", damaged("out/ckpt.pt", lambda b: b[:9000]), "damaged"),
    "out_dir that holds another run": (TRAIN, None, "out holds another run already"),
    "out_dir that holds a dataset": (f"{TRAIN} --out_dir=data/problems", None, "data/problems holds"),
    "dataset's name taken by something else": (
        "data.py --dataset=mine --source=problems",
        lambda place: (place / "data" / "mine").mkdir(),
        "data/mine exists and is no prepared dataset",
    ),
    "dataset's name taken by a run": (
        "data.py --dataset=run --source=problems",
        lambda place: shutil.copytree(place / "out", place / "data" / "run"),
        "data/run exists and holds what data.py did not write (ckpt.pt, log.jsonl, ",
    ),
    "argument that is no value": (TRAIN + " --max_iters={[]:1}", None, "max_iters must be a whole number"),
    "argument beyond all numbers": (TRAIN + " --ema=1" + "0" * 400, None, "ema must be a number"),
    "model beyond all memory": (f"{TRAIN} --out_dir=new --n_embd=1099511627776", None, "n_embd of a model must"),
    "export over a run": ("hf.py --export_dir=out", None, "out holds a run or a dataset (ckpt.pt, run.json"),
    "tokenizer without all bytes": (
        "data.py --dataset=x --source=problems --tokenizer=x.tiktoken",
        lambda place: (place / "x.tiktoken").write_text("YQ== 0\nYg== 0\n"),
        "x.tiktoken is no byte-level BPE",
    ),
    "prompt that is no text": (
        "sample.py --prompt=FILE:p.txt",
        lambda place: (place / "p.txt").write_bytes(b"\xff\xfe"),
        "p.txt",
    ),
}


CASES |= {  # settings that cannot be
    command: (command, None, sentence)
    for command, sentence in (
        (f"{TRAIN} --out_dir=new --dataset=nowhere", "there is no data/nowhere/meta.json"),
        (f"{TRAIN} --out_dir=new --init_from=resume", "there is no checkpoint new/ckpt.pt"),
        (f"{TRAIN} --out_dir=new --init_from=nowhere", "there is no directory nowhere"),
        (f"{TRAIN} --out_dir=new --n_layer=3", "n_layer (3) must be even"),
        (f"{TRAIN} --out_dir=new --bp_max=9", "bp_min (2) and bp_max (9) must rise"),
        (f"{TRAIN} --out_dir=new --block_size=8", "no document of the train split fits"),
        (f"{TRAIN} --out_dir=new --batch_size=9999999", "9999999 rows of 256 tokens is too large: at most 134,217,728"),
        (f"{TRAIN} --mcq=token", "there is no setting 'mcq'; another script has it"),
        (f"{TRAIN} -seed=1", "did you mean --seed=1?"),
        (f"{TRAIN} --dtype=float16", "dtype must be"),
        (f"{TRAIN} --device=gpu", "device gpu is not available"),
        (f"{TRAIN} --device=cpu:x", "device cpu:x is not available"),
        (f"{TRAIN} --attention=fast", "attention must be"),
        (f"{TRAIN} --log_interval=0", "log_interval must be at least 1"),
        (f"{TRAIN} --ema=1.5", "ema must be at least 0 and less than 1"),
        (f"{TRAIN} --eval_iters=-1", "eval_iters must be at least 0"),
        (f"{TRAIN} --out_dir=", "must be names"),
        ("data.py --dataset=../out", "dataset is the name of a directory in data/, not a path: '../out'"),
        ("data.py --workers=-1", "workers must be at least 0, not -1"),
        ("data.py --dataset=mien", "--source tells what data/mien is made of"),
        ("data.py --tokenizer=train:99999999999999999999", "a vocabulary size from 263 to 2^31 - 1"),
        ("data.py --condition=drect", "unknown condition 'drect'"),
        ("data.py --dataset=x --source=data", "named after the split 'train'"),
        ("data.py --dataset=x --source=nowhere.jsonl", "there is no file nowhere.jsonl"),
        ("sample.py --out_dir=nowhere", "there is no directory nowhere"),
        ("sample.py --jsonl=nowhere.txt --save=new.jsonl", "nowhere.txt: No such file"),
        ("sample.py --guidance=101.0", "guidance must be from -100 to 100, not 101.0"),
        ("sample.py --guidance=0.5 --H_cycles=1", "guidance compares the last two H-steps, and with H_cycles=1 there"),
        ("sample.py --L_cycles=-1", "L_cycles of a model must be 1 to"),
        ("eval.py --tasks=problems --H_cycles=9999", "blocks follow each other in this model, and 10,000 may"),
        ("sample.py --kl_threshold=-1.0 --H_cycles=3", "kl_threshold must be at least 0, not -1.0"),
        ("eval.py --kl_threshold=0.1", "saves those that follow: H_cycles must be 3 or more"),
        ("eval.py --sweep=guidance", "--sweep is one of guidance, H_cycles, L_cycles, kl_threshold, then ="),
        ("eval.py --sweep=depth=1,2", "--sweep is one of guidance, H_cycles, L_cycles, kl_threshold, then ="),
        ("eval.py --sweep=H_cycles=1,,2", "such as guidance=-0.5,0,0.5, and not H_cycles=1,,2"),
        ("eval.py --out_dir=nowhere", "there is no directory nowhere"),
    )
}


def lie(path):
    ckpt = torch.load(path, weights_only=True)
    ckpt["config"]["n_embd"] = 64
    torch.save(ckpt, path)


def tree(place):
    """{path: content} of everything under a directory."""
    files = (path for path in place.rglob("*") if not path.is_symlink())
    return {path: hashlib.sha256(path.read_bytes()).digest() if path.is_file() else None for path in files}


@pytest.fixture(scope="module")
def outcomes(trained, tmp_path_factory):
    """{name: (process, files before, files after)} of all cases, run two at a time."""

    def outcome(name):
        start, spoil, _ = CASES[name]
        place = tmp_path_factory.mktemp("case") / "place"
        shutil.copytree(trained, place)
        if spoil:
            spoil(place)
        before = tree(place)
        done = run(place, *start.split(), ok=None)
        return done, before, tree(place)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(outcome, CASES)))


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_with_a_sentence(name, outcomes):
    must_say, (done, before, after) = CASES[name][2], outcomes[name]
    said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("preparing data/")]
    print(f"{name} | {' '.join(said)} | {done.returncode}")
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
    assert len(said) == 1 and must_say in said[0], done.stderr
    assert before.items() <= after.items()
    assert len(after) == len(before) or name == "ids beyond the vocabulary"  # found when their turn comes


# ----------------------------------------------------------------------------------------------------
# checkpoints


def zipped(path, compressed=(), **changes):
    """Write a checkpoint's entries anew, and those of `changes`."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    entries |= {f"archive/{name}": content for name, content in changes.items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED)


def larger(path):
    """Let an entry claim more bytes than the file has."""
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(content)


def changed(change):
    """A case: the content of a checkpoint, changed in place."""

    def make(path):
        ckpt = torch.load(path, weights_only=True)
        change(ckpt)
        torch.save(ckpt, path)

    return make


BOMB = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x0a\x85R."  # a pickle of 40 GiB
CHECKPOINTS = {  # what to do to ckpt.pt: what the sentence must say
    "compressed": (lambda path: zipped(path, ["archive/data/0"]), "it has compressed or overlapping"),
    "larger than the file": (lambda path: larger(path), "it has compressed or overlapping"),
    "twice": (lambda path: zipped(path, **{"DATA.pkl": b"."}), "it has compressed or overlapping"),
    "bomb": (lambda path: zipped(path, **{"data.pkl": BOMB}), "builtins bytearray, which train.py never writes"),
    "large pickle": (lambda path: zipped(path, **{"data.pkl": b"(" * 2_000_000}), "more than 1,048,576 bytes"),
    "other optimizer": (changed(lambda ckpt: ckpt["optimizer"]["state"].update({99: {}})), "is of other weights"),
    "odd setting": (changed(lambda ckpt: ckpt["settings"].update(seed=torch.zeros(2))), "the setting seed is no plain"),
    "NaN": (changed(lambda ckpt: ckpt["model"]["H.0.o_proj"].view(-1)[7].fill_(math.nan)), "H.0.o_proj holds NaN"),
    "infinity": (changed(lambda ckpt: ckpt["optimizer"]["state"][0]["ema"][0].fill_(math.inf)), "embed holds NaN or i"),
    "integers": (changed(lambda ckpt: ckpt["model"].update(embed=ckpt["model"]["embed"].int())), "IntStorage"),
    "shared": (
        changed(lambda ckpt: ckpt["model"].update(embed=torch.zeros(1, 1).expand(263, 32))),
        "its tensors share memory",
    ),
    "other model": (changed(lambda ckpt: ckpt["config"].update(norm="none")), "ckpt.pt is of a model that cannot be"),
    "other setting": (changed(lambda ckpt: ckpt["config"].update(dropout=0.1)), "has a setting dropout, which the"),
    "cursor": (changed(lambda ckpt: ckpt["loader"].update(cursor=10**9)), "the loader's state is damaged: .*no such"),
    "count": (changed(lambda ckpt: ckpt.update(iter=-1)), "iter is -1"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_train_never_writes(name, trained, tmp_path):
    (tmp_path / "data").symlink_to(trained / "data")
    shutil.copytree(trained / "out", tmp_path / "out")
    change, sentence = CHECKPOINTS[name]
    change(tmp_path / "out" / "ckpt.pt")
    with pytest.raises(ValueError, match=sentence) as error:
        resumed(tmp_path)
    assert "damaged" in str(error.value) or name in ("other setting", "other model")


def test_only_what_was_loaded_becomes_the_checkpoint(trained, tmp_path):
    """And not a damaged file beside it, of the same step."""
    shutil.copytree(trained / "out", tmp_path / "out")
    content = (tmp_path / "out" / "ckpt.pt").read_bytes()
    for names in ("ckpt.pt", "ckpt-00000001.pt"), ("ckpt-00000001.pt", "ckpt.pt"):
        for name, text in zip(names, (content, b"junk")):
            (tmp_path / "out" / name).write_bytes(text)
        files = RunFiles(tmp_path / "out")
        files.load("resume")
        files.claim(trained / "data" / "problems", {}, "scratch")
        os.close(files.lock_handle)
        assert (tmp_path / "out" / "ckpt.pt").read_bytes() == content
