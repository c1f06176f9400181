"""Mixtures: which documents an epoch has, and preparations that are large, killed, or of many sources."""

from configurator import run_config

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import ENV, ROOT
from test_data import texts_of, write_jsonl

import data
import mixture
from data import prepare
from loader import Loader, draw, read_index
from mixture import drawn, sample_texts
from tokenizer import read_meta


def rows(name, n):
    return [{"instruction": f"{name} {i}?", "response": "yes " * (i % 7 + 1), "condition": "direct"} for i in range(n)]


def write_parquet(path, rows):
    import pyarrow.parquet
    from pyarrow import Table

    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(Table.from_pylist(rows), path, row_group_size=50)


RULES = [
    {"files": "big__*", "cap": 40},
    {"files": "b*", "cap": 25},
    {"files": ("ten.jsonl", "none__*"), "repeat": 10},
    {"files": "strange.jsonl", "fields": {"instruction": "q", "response": "a"}, "condition": "synth,cot"},
]
SIZES = {"big__0.jsonl": 150, "deep/big__1.parquet": 130, "bees.jsonl": 60, "ten.jsonl": 3, "strange.jsonl": 20}
SIZES["unruled.jsonl"] = 33


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Six files in two formats; one has columns of its own, and no condition."""
    directory = tmp_path_factory.mktemp("corpus")
    for name, n in SIZES.items():
        some = rows(name, n)
        if name == "strange.jsonl":
            some = [{"q": row["instruction"], "a": row["response"]} for row in some]
        if name.endswith(".parquet"):
            write_parquet(directory / name, some)
        else:
            write_jsonl(directory / name, some)
    (directory / "dataset_infos.json").write_text("{}")
    return directory


def of_corpus(directory, corpus, **changes):
    return prepare(directory, **dict(source=str(corpus), split="", mixture=RULES, val_fraction=0.0) | changes)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ----------------------------------------------------------------------------------------------------
# what an epoch has


def test_an_epoch_has_what_the_rules_say_counted_in_the_bins(tmp_path, corpus):
    """Over three epochs: min(cap, size) times repeat documents of each file, none again before all of it was seen."""
    meta = of_corpus(tmp_path / "d", corpus)
    texts = texts_of(tmp_path / "d", "train")
    file_of = [next(name for name in SIZES if name in text) for text in texts]
    assert Counter(file_of) == SIZES and [file["name"] for file in meta["files"]] == sorted(SIZES)
    want = {"big__0.jsonl": 40, "deep/big__1.parquet": 40, "bees.jsonl": 25, "ten.jsonl": 30, "strange.jsonl": 20}
    want["unruled.jsonl"] = 33
    assert {file["name"]: drawn(file, "train") for file in meta["files"]} == want
    loader, seen, orders = Loader(tmp_path / "d", "train", 2, 64, epochs=3), Counter(), []
    for documents in (batch.documents for batch in loader):
        seen.update(documents)
    for epoch in range(3):
        orders.append(loader._permutation(epoch).tolist())
        assert Counter(file_of[d] for d in orders[-1]) == want
    assert seen == sum(map(Counter, orders), Counter()) and orders[0] != orders[1]
    for name in SIZES:
        times = [seen[d] for d in range(len(texts)) if file_of[d] == name]
        assert sum(times) == 3 * want[name] and max(times) - min(times) <= 1
    assert max(Counter(orders[0]).values()) == 10  # of ten.jsonl
    lengths = np.diff(read_index(tmp_path / "d", "train")[:, 0], prepend=0) - 1
    assert abs(loader.n_tokens - np.mean([lengths[order].sum() for order in orders])) < 40


@pytest.mark.parametrize("size, n", [(10, 3), (10, 10), (10, 25), (7, 20), (1, 1)])
def test_a_file_is_used_up_before_anything_of_it_comes_again(size, n):
    documents = np.arange(100, 100 + size, dtype=np.uint32)
    parts = [draw(documents, n, epoch, (5, 0)).tolist() for epoch in range(8)]
    assert all(len(part) == n for part in parts)
    flat = sum(parts, [])
    for end in range(n, len(flat) + 1, n):
        times = Counter(flat[:end])
        assert max(times.values()) - min(times[d] for d in documents.tolist()) <= 1
    assert parts == [draw(documents, n, epoch, (5, 0)).tolist() for epoch in range(8)]
    if size > n > 1:
        assert parts != [draw(documents, n, epoch, (5, 1)).tolist() for epoch in range(8)]


def test_a_changed_rule_is_another_plan(tmp_path, corpus):
    of_corpus(tmp_path / "d", corpus)
    state = next(Loader(tmp_path / "d", "train", 2, 64)).state
    next(Loader(tmp_path / "d", "train", 2, 64, state=state))
    path = tmp_path / "d" / "meta.json"
    path.write_text(path.read_text().replace('"cap": 40', '"cap": 39'))
    with pytest.raises(ValueError, match="is not the data that the run had"):
        Loader(tmp_path / "d", "train", 2, 64, state=state)


def test_validation_is_held_to_the_same_shares(tmp_path, corpus):
    """All that answer one instruction are in one split."""
    twice = rows("big", 2000) + rows("big", 2000)
    write_jsonl(tmp_path / "x.jsonl", twice)
    meta = prepare(tmp_path / "d", source=str(tmp_path / "x.jsonl"), mixture=[{"cap": 360}], val_fraction=0.1)
    train, val = (texts_of(tmp_path / "d", split) for split in ("train", "val"))
    assert not {*train} & {*val} and len(train) + len(val) == 4000 and 300 < len(val) < 500
    n = drawn(meta["files"][0], "val")
    assert n == -(-len(val) * 360 // len(train)) and len(Loader(tmp_path / "d", "val", 1, 64).order) == n


# ----------------------------------------------------------------------------------------------------
# rules and sources


NONE = 2


def to_pairs(row):
    """As a function in a config file: two of a row, one, or none."""
    if row["n"] == NONE:
        return None
    pair = {"instruction": f"{row['n']}?", "response": str(row["n"]), "condition": "cot"}
    return [pair, {**pair, "condition": "direct"}] if row["n"] == 1 else pair


def test_rules_with_sources_of_their_own(tmp_path, corpus):
    write_jsonl(tmp_path / "n.jsonl", [{"n": 1}, {"n": 2}, {"n": 3}, {"m": 4}])
    rules = [
        {"name": "twice", "source": str(tmp_path / "n.jsonl"), "rows": to_pairs, "skip_bad": True},
        {"source": str(corpus), "split": "", "files": "ten.jsonl", "repeat": 2},
        {"source": "problems"},
    ]
    meta = prepare(tmp_path / "d", mixture=rules, n_problems=5, n_val_problems=2, val_fraction=0.0)
    files = {file["name"]: file for file in meta["files"]}
    assert [*files] == ["twice/n.jsonl", f"{corpus}/ten.jsonl", "problems/train problems", "problems/val problems"]
    assert texts_of(tmp_path / "d", "train")[:3] == [
        "<|im_start|><|object_ref_end|>1?<|im_end|>1<|box_end|>",
        "<|im_start|><|object_ref_start|>1?<|im_end|>1<|box_end|>",
        "<|im_start|><|object_ref_end|>3?<|im_end|>3<|box_end|>",
    ]
    first = files["twice/n.jsonl"]["train"]
    assert (first["rows"], first["documents"], first["dropped"]) == (
        4,
        3,
        {"rows() fails": 1, "left out by rows()": 1},
    )
    assert [file["val"]["documents"] for file in files.values()] == [0, 0, 0, 2]
    source, named = meta["prepare_args"]["mixture"][0]["rows"]
    assert "def to_pairs(row):" in source and named["NONE"] == "2"


@pytest.mark.parametrize(
    "rules, sentence",
    [
        ([{"file": "x"}], "rule 0 of mixture is wrong: it has no 'file', only name, files, cap, "),
        ([{"cap": 5}, {"cap": "5"}], "rule 1 of mixture is wrong: cap cannot be '5'"),
        ([{"cap": -1}], "cap must be at least 0"),
        ([{"repeat": 0}], "repeat at least 1"),
        ([5], "it is 5, and no dict such as"),
        ([{"files": ["a", 5]}], "files cannot be of type list"),
        ([{"rows": "x"}], "rows cannot be 'x'"),
        ([{"files": "nothing*"}], "has no file, or none is left, for the rule nothing.* of mixture"),
        ([{"files": "b*"}, {"files": "bees*"}], "none is left, for the rule bees"),
        ([{"split": "test"}], "split is of a source, and it names none"),
        ([{"rows": partial(dict)}], "rows cannot be of type partial"),
        ([{"too_long": "ignore"}], "too_long must be truncate, drop or stop, not 'ignore'"),
        ([{"condition": "cto"}], "unknown condition 'cto'"),
        ([{"rows": lambda row: 5}], "line 1: rows.. gave: 5"),
        ([{"rows": lambda row: ["x"]}], "line 1: rows.. gave: 'x'"),
        ([{"rows": lambda row: {"x": 5}}], "line 1: no field 'instruction': the row's fields are 'x'"),
    ],
)
def test_a_bad_rule(tmp_path, corpus, rules, sentence):
    with pytest.raises(ValueError, match=sentence):
        of_corpus(tmp_path / "d", corpus, mixture=rules)


def test_a_repository_of_the_hub_is_read_where_it_was_downloaded(tmp_path, corpus, monkeypatch):
    import huggingface_hub

    def snapshot_download(name, repo_type, allow_patterns):
        assert (name, repo_type, allow_patterns) == ("who/corpus", "dataset", ("*.jsonl", "*.parquet"))
        return str(corpus)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    meta = of_corpus(tmp_path / "d", "who/corpus")
    assert {file["name"]: file["train"]["documents"] for file in meta["files"]} == SIZES


def test_the_example_of_raw_sources(tmp_path, monkeypatch):
    """config/math.py, with rows of the shapes that these datasets have."""
    import datasets

    solution = "So $x = \\boxed{\\frac{1}{2}}$, which is \\boxed{\\frac{2}{4}}."
    turns = [{"from": "user", "value": "Why?"}, {"from": "assistant", "value": "<think>Hm.\nHm?</think>\n\nBecause."}]
    shapes = {
        "openai/gsm8k": [{"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 4"}],
        "EleutherAI/hendrycks_math": [
            {"problem": "Half?", "solution": solution},
            {"problem": "No box?", "solution": "\\boxed 2"},
        ],
        "open-thoughts/OpenThoughts2-1M": [{"conversations": turns}, {"conversations": []}],
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split, streaming: shapes[name])
    settings = {k: v for k, v in run_config(ROOT / "config" / "math.py").items() if k in data.settings}
    meta = prepare(tmp_path / "d", **settings | {"tokenizer": "bytes", "val_fraction": 0.0})
    texts = texts_of(tmp_path / "d", "train")
    assert [text.partition("<|im_end|>")[2] for text in texts[:2]] == ["It is 4.\n#### 4<|box_end|>", "4<|box_end|>"]
    assert f"<|im_start|><|object_ref_end|>Half?<|im_end|>{solution}<|box_end|>" in texts
    assert "<|im_start|><|object_ref_start|>Half?<|im_end|>\\boxed{\\frac{2}{4}}<|box_end|>" in texts
    assert sum("No box?" in text for text in texts) == 7  # with its working alone
    assert texts[-1] == "<|im_start|><|quad_end|><|object_ref_end|>Why?<|im_end|>Because.<|box_end|>"
    assert meta["splits"]["train"]["dropped"] == {"rows() fails": 1}


def test_the_tokenizers_sample_takes_the_same_share_of_all_files(tmp_path, corpus):
    o = {**data.settings, "source": str(corpus), "split": "", "mixture": [{"files": "big__0*", "cap": 3}, RULES[3]]}
    parts = mixture.find_parts(SimpleNamespace(**o))
    texts = [*sample_texts(parts, 0)]
    counts = Counter(next(name for name in SIZES if name in text) for text in texts[::2])
    assert 29 <= counts["big__0.jsonl"] <= 31  # ten caps' worth
    assert all(counts[name] > 0.9 * n for name, n in SIZES.items() if "big__0" not in name)


# ----------------------------------------------------------------------------------------------------
# large, killed, and changed


def test_threads_and_processes_make_the_same(tmp_path, corpus, monkeypatch):
    of_corpus(tmp_path / "a", corpus, workers=1, val_fraction=0.2)
    monkeypatch.setattr(data, "SMALL", 0)
    of_corpus(tmp_path / "b", corpus, workers=3, val_fraction=0.2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    with pytest.raises(ValueError, match="line 1: rows.. fails: ZeroDivisionError"):
        of_corpus(tmp_path / "c", corpus, mixture=[{"rows": lambda row: 1 / 0}])


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import data
data.SAVE_EVERY = data.SMALL = 0
save, left = data.save, int(sys.argv[4])

def save_and_die(*args):
    global left
    save(*args)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

data.save = save_and_die
data.prepare(sys.argv[2], source=sys.argv[3], split="", tokenizer="train:300", val_fraction=0.1, workers=2)
"""


def test_a_killed_preparation_does_the_rest_and_makes_the_same(tmp_path):
    """Its workers end with it, and progress.json tells after which file it goes on."""
    for i in range(12):
        write_jsonl(tmp_path / f"{i}.jsonl", rows(f"file{i}", 2500))
    def start(place, die_at):
        command = [sys.executable, "-c", KILLED, ROOT, tmp_path / place, tmp_path, str(die_at)]
        return subprocess.run(command, env=ENV, capture_output=True, text=True)

    assert start("whole", 0).returncode == 0
    for die_at in 1, 2, 1, 3:
        assert start("d", die_at).returncode == -signal.SIGKILL
    said = start("d", 0)
    assert said.returncode == 0 and "going on after " in said.stdout, said.stderr
    whole, resumed = contents(tmp_path / "whole"), contents(tmp_path / "d")
    assert whole == resumed and not (tmp_path / "d.part").exists()
    deadline = time.time() + 60
    while subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True).stdout:
        assert time.time() < deadline, "a worker outlives its parent"
        time.sleep(0.1)


def test_a_changed_file_is_read_again_and_other_settings_begin_anew(tmp_path, corpus, monkeypatch, capsys):
    monkeypatch.setattr(data, "SAVE_EVERY", 0)
    files = [write_jsonl(tmp_path / f"{i}.jsonl", rows(i, 50)) for i in range(4)]
    bad = write_jsonl(tmp_path / "4.jsonl", [*rows(4, 50), "{"])
    for changes, sentence in (
        ({}, None),
        ({}, "going on after 3 of 5 files"),
        ({"seed": 2}, "holds what other settings made, and begins anew"),
        ({"seed": 2}, "1.jsonl has changed"),
        ({"seed": 2}, "going on after 3 of 5 files"),
    ):
        if sentence and "has changed" in sentence:
            write_jsonl(tmp_path / "1.jsonl", rows("new", 50))
        with pytest.raises(ValueError, match="4.jsonl, line 51: not a JSON object"):
            prepare(tmp_path / "d", source=str(tmp_path), split="", **changes)
        assert sentence is None or sentence in capsys.readouterr().out
        capsys.readouterr()
    os.remove(bad)
    prepare(tmp_path / "d", source=str(tmp_path), split="", seed=2)
    assert "going on after 3 of 4 files" in capsys.readouterr().out
    prepare(tmp_path / "again", source=str(tmp_path), split="", seed=2)
    assert contents(tmp_path / "d") == contents(tmp_path / "again") and len(files) == 4


def test_two_preparations_of_one_dataset_do_not_mix(tmp_path, corpus):
    (tmp_path / "d.part").mkdir()
    with open(tmp_path / "d.part" / "lock", "wb") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another data.py is preparing"):
            of_corpus(tmp_path / "d", corpus)


def test_rows_in_memory_are_few_however_they_are_nested(tmp_path):
    """A job is of few bytes, and of Parquet few rows are read at a time."""
    large = [{"turns": [{"value": "x" * 2**20}]}] * 20
    write_parquet(tmp_path / "x.parquet", [{"id": i, **row} for i, row in enumerate(large)])
    write_jsonl(tmp_path / "y.jsonl", large)
    o = SimpleNamespace(**data.settings | {"source": str(tmp_path), "split": ""})
    jobs = [*data.batches(mixture.find_parts(o), 0)]
    sizes = [len(items) for _, (_, _, items) in jobs if items]
    assert max(sizes) == 1 and sum(sizes) == 40 and min(size for size, (*_, items) in jobs if items) > 2**20


def test_the_report_adds_up(tmp_path, corpus):
    meta = of_corpus(tmp_path / "d", corpus, batch_size=10, max_iters=100, block_size=64)
    text = (tmp_path / "d" / "report.md").read_text()
    tables = [block.splitlines() for block in text.split("\n\n")[1:]]
    head = [cell.strip() for cell in tables[1][0].strip("|").split("|")]
    lines = {}
    for line in tables[1][2:]:
        name, *found = (cell.strip() for cell in line.strip("|").split("|"))
        lines[name] = dict(zip(head[1:], found))
    for file in meta["files"]:
        line, counts = lines[file["name"]], file["train"]
        assert [line[key] for key in ("rows", "documents", "tokens", "documents per epoch")] == [
            f"{n:,}" for n in (counts["rows"], counts["documents"], counts["tokens"], drawn(file, "train"))
        ]
    total = len(np.fromfile(tmp_path / "d" / "train.bin", np.uint16))
    assert lines["all"]["tokens"] == f"{total:,}" and len(read_index(tmp_path / "d", "train")) == sum(SIZES.values())
    assert "The run takes 64,000 tokens" in text and read_meta(tmp_path / "d") == json.loads(json.dumps(meta))
