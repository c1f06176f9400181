"""From pairs to rows: sources, documents, what is refused, and the packing plan."""

import json
import os
import signal
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from scripts import ROOT, TINY, run

import data
from data import prepare
from loader import Loader, open_split, prefetch, read_index
from model import IGNORE
from sources import word_problems
from tokenizer import encode_prompt, load_encoding, make_encoding, read_meta
from workers import in_order

ROWS = [{"instruction": f"What is {i} plus {i}?", "response": f"{2 * i} é"} for i in range(300)]


def write_jsonl(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def texts_of(directory, split):
    """The documents of a split, decoded."""
    encoding, meta = load_encoding(directory), read_meta(directory)
    tokens = np.fromfile(directory / f"{split}.bin", dtype=meta["dtype"])
    ends = read_index(directory, split)[:, 0]
    return [encoding.decode(d.tolist()) for d in np.split(tokens, ends)[:-1]]


# ----------------------------------------------------------------------------------------------------
# documents and sources


def test_document_format(tmp_path):
    """boq, tags in the order written, instruction, eoq | response, eoa. Text that spells special tokens is text."""
    rows = [{"instruction": "2<|im_end|>?", "response": "<|box_end|>4", "condition": "synth,cot"}]
    prepare(tmp_path / "d", source=write_jsonl(tmp_path / "a.jsonl", rows), val_fraction=0.0)
    tokens = np.fromfile(tmp_path / "d" / "train.bin", dtype=np.uint16).tolist()
    boq, eoq, eoa, direct, cot, noisy, synth = range(256, 263)
    want = [boq, synth, cot, *b"2<|im_end|>?", eoq, *b"<|box_end|>4", eoa]
    assert tokens == want
    assert read_index(tmp_path / "d", "train").tolist() == [[len(want), want.index(eoq) + 1]]
    assert encode_prompt(make_encoding("bytes"), "2<|im_end|>?", "synth,cot") == want[: want.index(eoq) + 1]
    batch = next(Loader(tmp_path / "d", "train", 1, 64, epochs=1))
    n, p = len(want), want.index(eoq) + 1
    assert batch.idx[0, : n - 1].tolist() == want[:-1]
    assert batch.targets[0].tolist() == [IGNORE] * (p - 1) + want[p:] + [IGNORE] * (64 - n + 1)
    assert batch.prefix[0].tolist() == [i < p for i in range(64)]
    assert batch.doc[0].tolist() == [0] * (n - 1) + [-1] * (64 - n + 1)
    assert (batch.n_targets, batch.n_tokens) == (n - p, n - 1)


def test_word_problems_are_right_and_validation_numbers_are_new():
    seen = {"train": set(), "val": set()}
    for split, combinations in seen.items():
        for row in word_problems(split, 3000, seed=0):
            *working, last = row["response"].split("\n")
            numbers = {c for c in "".join(ch if ch.isdigit() else " " for ch in row["instruction"]).split()}
            for step in working:
                left, _, right = step.partition("=")
                assert eval(left) == int(right) > 0
            assert last == f"#### {int(right)}"
            operations = "".join(ch for step in working for ch in step.partition("=")[0] if ch in "+-*/")
            combinations.add((operations, tuple(sorted(numbers)), tuple(working)))
    assert not seen["train"] & seen["val"] and len(seen["val"]) > 300
    assert len({c[0] for c in seen["val"]}) == len({c[0] for c in seen["train"]}) > 8
    again = list(word_problems("val", 20, seed=0))
    assert again == list(word_problems("val", 20, seed=0)) != list(word_problems("val", 20, seed=1))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "directory"])
def test_local_sources(tmp_path, kind):
    rows = [{"q": row["instruction"], "a": row["response"]} for row in ROWS]
    if kind == "jsonl":
        source = write_jsonl(tmp_path / "x.jsonl", rows)
    elif kind == "json":
        source = str(tmp_path / "x.json")
        (tmp_path / "x.json").write_text(json.dumps(rows))
    elif kind == "parquet":
        import pyarrow.parquet
        from pyarrow import Table

        source = str(tmp_path / "x.parquet")
        pyarrow.parquet.write_table(Table.from_pylist(rows), source)
    else:
        source = str(tmp_path)
        write_jsonl(tmp_path / "train.jsonl", rows[:200])
        write_jsonl(tmp_path / "test.jsonl", rows[200:])
    fields, val_split = {"instruction": "q", "response": "a"}, "test" if kind == "directory" else ""
    meta = prepare(tmp_path / "d", source=source, fields=fields, val_split=val_split, val_fraction=0.2)
    train, val = texts_of(tmp_path / "d", "train"), texts_of(tmp_path / "d", "val")
    want = [f"<|im_start|>{r['q']}<|im_end|>{r['a']}<|box_end|>" for r in rows]
    assert sorted(train + val) == sorted(want) and val
    assert meta["splits"]["train"]["documents"] == len(train)
    if kind == "directory":
        assert (train, val) == (want[:200], want[200:])


def test_gsm8k_answers(tmp_path):
    answer = "He has 48/2 = <<48/2=24>>24 left.\n#### 24"
    source = write_jsonl(tmp_path / "x.jsonl", [{"question": "How many?", "answer": answer}])
    fields = {"instruction": "question", "response": "answer"}
    for kind, tag, response in (
        ("cot", "<|object_ref_end|>", answer.replace("<<48/2=24>>", "")),
        ("direct", "<|object_ref_start|>", "24"),
    ):
        prepare(tmp_path / kind, source=source, fields=fields, answer=kind, strip_annotations=True, val_fraction=0.0)
        assert texts_of(tmp_path / kind, "train") == [f"<|im_start|>{tag}How many?<|im_end|>{response}<|box_end|>"]


BAD = [
    ("{not json", "not a JSON object"),
    ("[1, 2]", "not a JSON object"),
    ('{"instruction": "a"}', "no field 'response'"),
    ('{"instruction": "a", "response": null}', "no text in the field 'response'"),
    ('{"instruction": 3, "response": "b"}', "no text in the field 'instruction'"),
    ('{"instruction": "  ", "response": "b"}', "empty instruction"),
    ('{"instruction": "a", "response": ""}', "empty response"),
    ('{"instruction": "a", "response": "b", "condition": "cto"}', "unknown condition"),
    ('{"instruction": "a", "response": "b", "condition": ["c"]}', "unknown condition"),
]


def test_bad_rows_are_skipped_and_counted_on_request(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [*ROWS[:2], *(line for line, _ in BAD)])
    meta = prepare(tmp_path / "d", source=source, skip_bad=True, val_fraction=0.0)
    assert meta["splits"]["train"]["documents"] == 2
    assert meta["splits"]["train"]["dropped"] == dict(Counter(why for _, why in BAD))
    assert "2 (not a JSON object)" in data.report("d", meta)


def test_long_documents_are_truncated_or_dropped_and_counted(tmp_path):
    rows = [
        {"instruction": "i" * 10, "response": "r" * 17},  # boq, eoq and eoa make 30: just fits 29 inputs
        {"instruction": "i" * 10, "response": "R" * 18},
        {"instruction": "i" * 50, "response": "r"},
    ]
    source = write_jsonl(tmp_path / "x.jsonl", rows)
    meta = prepare(tmp_path / "t", source=source, block_size=29, val_fraction=0.0)
    assert texts_of(tmp_path / "t", "train")[1] == f"<|im_start|>{'i' * 10}<|im_end|>{'R' * 18}"  # no eoa
    assert meta["splits"]["train"]["truncated"] == 1
    assert meta["splits"]["train"]["dropped"] == {"instruction too long": 1}
    meta = prepare(tmp_path / "d", source=source, block_size=29, too_long="drop", val_fraction=0.0)
    assert len(texts_of(tmp_path / "d", "train")) == 1
    assert meta["splits"]["train"]["dropped"] == {"too long": 1, "instruction too long": 1}


def test_a_dataset_is_replaced_whole_and_other_directories_are_left_alone(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", ROWS)
    prepare(tmp_path / "d", source=good)
    before = texts_of(tmp_path / "d", "train")
    with pytest.raises(ValueError):
        prepare(tmp_path / "d", source=write_jsonl(tmp_path / "bad.jsonl", [*ROWS, "{"]))
    assert texts_of(tmp_path / "d", "train") == before
    prepare(tmp_path / "d", source=write_jsonl(tmp_path / "less.jsonl", ROWS[:10]), val_fraction=0.0)
    assert len(texts_of(tmp_path / "d", "train")) == 10
    for name in "ckpt.pt", "ckpt-00000100.pt", "run.json", "notes.txt":
        (tmp_path / "d" / name).touch()
        with pytest.raises(ValueError, match=f"holds what data.py did not write .{name}.; choose"):
            prepare(tmp_path / "d", source=good)
        (tmp_path / "d" / name).unlink()
    (tmp_path / "d" / "train.idx").unlink()
    with pytest.raises(ValueError, match="no prepared dataset"):
        prepare(tmp_path / "d", source=good)


def test_a_dataset_whose_replacement_was_killed_between_its_two_renames_is_there(workplace):
    sizes = "--n_problems=50", "--n_val_problems=5"
    done = run(workplace, "tests/crash.py", ROOT / "data.py", *sizes, ok=False, CRASH="replace 2")
    assert done.returncode == -signal.SIGKILL and not (workplace / "data" / "problems").exists()
    done = run(workplace, "train.py", *TINY, "--max_iters=1")
    assert "killed while it replaced this dataset; now the new one is in place" in done.stdout
    assert read_meta(workplace / "data" / "problems")["splits"]["train"]["documents"] == 50
    assert os.listdir(workplace / "data") == ["problems"]


@pytest.mark.parametrize("fields", [{}, {"instruction": "q", "response": "a", "condition": "tag"}])
def test_a_wrong_column_is_told_with_the_columns_there_are(tmp_path, fields):
    """A name in --fields must be right, that of the condition too; without, the condition is optional."""
    source = write_jsonl(tmp_path / "x.jsonl", [{"q": "a", "a": "b"}])
    with pytest.raises(ValueError) as e:
        prepare(tmp_path / "d", source=source, fields=fields)
    what = f"no field '{fields.get('condition', 'instruction')}': the row's fields are 'q', 'a'; name them as in"
    assert f"""x.jsonl, line 1: {what} --fields="{{'instruction': 'q', 'response': 'a'}}";""" in str(e.value)
    with pytest.raises(ValueError, match="dropped: 1 no field '.*'; --skip_bad=False tells where"):
        prepare(tmp_path / "d", source=source, fields=fields, skip_bad=True, val_fraction=0.0)


def test_few_rows_are_in_work_at_a_time_if_they_are_large():
    taken = []
    results = in_order(str, ((2**24, taken.append(i) or i) for i in range(20)), 8, processes=False)
    assert next(results) == (2**24, 0, "0") and len(taken) <= 4
    assert [result for _, _, result in results] == [*map(str, range(1, 20))] and taken == [*range(20)]


def test_an_unknown_setting_is_refused(tmp_path):
    with pytest.raises(TypeError, match="no setting sauce"):
        prepare(tmp_path / "d", sauce="problems")


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("x.json", b"", "x.json is empty"),
        ("x.json", b"null", "x.json, line 1: not a JSON object"),
        ("x.json", b'[{"instruction": "a"', "x.json is damaged: "),
        ("x.json", b"[" * 100000, "x.json is damaged: "),
        ("x.json", b"[[1, 2]]", "x.json, row 0: not a JSON object"),
        ("x.json", b'{"data": []}', "x.json, line 1: no field 'instruction': the row's fields are 'data'"),
        ("x.parquet", b"PAR1" + bytes(100), "x.parquet is damaged: Parquet magic bytes not found"),
    ],
)
def test_a_damaged_source(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        prepare(tmp_path / "d", source=str(tmp_path / name))


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="cannot load the dataset"):
        prepare(tmp_path / "d", source="nobody/nothing")


# ----------------------------------------------------------------------------------------------------
# the packing loader


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """2,000 documents with lengths spread like GSM8K's; each is recognisable by its text."""
    directory = tmp_path_factory.mktemp("varied")
    lengths = np.random.default_rng(0).lognormal(5.3, 0.45, 2000).astype(int)
    rows = [{"instruction": f"{i} " + "q" * (n // 2), "response": "r" * (n // 2)} for i, n in enumerate(lengths)]
    prepare(directory / "d", source=write_jsonl(directory / "x.jsonl", rows), val_fraction=0.0, block_size=2048)
    return directory / "d"


def documents_in(batch, encoding):
    """The instruction numbers of a batch's documents, checked to be whole."""
    found = []
    for idx, doc in zip(batch.idx, batch.doc):
        for number in range(int(doc.max()) + 1):
            text = encoding.decode(idx[doc == number].tolist())
            assert text.startswith("<|im_start|>") and "<|im_end|>r" in text
            found.append(int(text.removeprefix("<|im_start|>").split()[0]))
    return found


@pytest.mark.parametrize("rows, T", [(1, 2048), (4, 2048), (2, 1500)])
def test_an_epoch_has_every_document_once(varied, rows, T):
    encoding = load_encoding(varied)
    seen = Counter()
    for batch in Loader(varied, "train", rows, T, seed=3, epochs=1):
        seen.update(documents_in(batch, encoding))
    assert seen == Counter(range(2000))
    twice = Counter()
    for batch in Loader(varied, "train", rows, T, seed=3, epochs=2):
        twice.update(documents_in(batch, encoding))
    assert twice == Counter({i: 2 for i in range(2000)})


def test_rows_are_full(varied):
    batches = [*islice(Loader(varied, "train", 4, 4096), 60)]
    assert sum(b.n_tokens for b in batches) >= 0.995 * 60 * 4 * 4096
    for b in batches:
        assert b.n_tokens == int((b.doc >= 0).sum()) and b.n_targets == int((b.targets != IGNORE).sum())


def test_ranks_share_one_plan(varied):
    whole = Loader(varied, "train", 4, 2048, seed=1)
    ranks = [Loader(varied, "train", 4, 2048, seed=1, rank=r, world_size=3) for r in range(3)]
    for _ in range(5):
        want, parts = next(whole), [next(loader) for loader in ranks]
        for i in range(4):
            for r in range(3):
                assert torch.equal(want[i][r::3], parts[r][i])
        assert all(want[4:] == part[4:] for part in parts)
    with pytest.raises(ValueError, match="4 rows is too small for 5 ranks"):
        Loader(varied, "train", 4, 2048, world_size=5)


def test_state_resumes_without_replay(varied):
    loader = Loader(varied, "train", 4, 2048, seed=1)
    for _ in range(80):  # over the end of an epoch
        next(loader)
    state = json.loads(json.dumps(loader.state))
    resumed = Loader(varied, "train", 4, 2048, seed=1, state=state)
    for _ in range(70):
        a, b = next(loader), next(resumed)
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4]))
    assert loader.state == resumed.state and loader.state["epoch"] >= 2


def test_batches_made_ahead_are_the_same_and_hold_the_state_after_them(varied):
    loader, ahead = Loader(varied, "train", 4, 2048, seed=1), prefetch(Loader(varied, "train", 4, 2048, seed=1))
    for _ in range(20):
        want, got = next(loader), next(ahead)
        assert all(torch.equal(a, b) for a, b in zip(want[:4], got[:4])) and want[4:] == got[4:]
        assert got.state == loader.state
    assert len(list(prefetch(Loader(varied, "train", 64, 2048, epochs=1)))) > 0  # it ends


def test_an_error_ahead_comes_in_its_turn():
    def broken():
        yield "a batch"
        raise ValueError("document 7")

    ahead = prefetch(broken())
    assert next(ahead) == "a batch"
    with pytest.raises(ValueError, match="document 7"):
        next(ahead)


def test_seeds_and_epochs_differ(varied):
    first = [next(Loader(varied, "train", 1, 2048, seed=s)).idx for s in (1, 2)]
    assert not torch.equal(*first)
    loader = Loader(varied, "train", 1, 2048, seed=1)
    orders = [loader._permutation(epoch) for epoch in (0, 1)]
    assert not np.array_equal(*orders) and np.array_equal(*map(np.sort, orders))
    for epoch, order in enumerate(orders):  # in plain words; a checkpoint counts on it
        assert np.array_equal(order, np.random.default_rng((1, epoch)).permutation(2000))


def test_documents_longer_than_a_row_are_left_out_and_counted(varied):
    loader = Loader(varied, "train", 2, 256)
    lengths = np.diff(open_split(varied, "train")[1], prepend=0) - 1
    assert loader.left_out == (lengths > 256).sum() > 0 and loader.n_tokens == lengths[lengths <= 256].sum()
    epoch, encoding = Loader(varied, "train", 2, 256, epochs=1), load_encoding(varied)
    assert sum(len(documents_in(batch, encoding)) for batch in epoch) == 2000 - loader.left_out
    with pytest.raises(ValueError, match="no document"):
        Loader(varied, "train", 2, 8)


@pytest.mark.parametrize("change", [dict(cursor=2000), dict(waiting=[2000]), dict(waiting=["1"]), dict(epoch=-1)])
def test_a_place_that_is_not_there_is_refused(varied, change):
    state = Loader(varied, "train", 4, 2048).state | change
    with pytest.raises(ValueError, match="the loader's state is damaged"):
        Loader(varied, "train", 4, 2048, state=state)


def test_the_loader_holds_four_bytes_per_document(varied, tmp_path):
    meta = json.loads((varied / "meta.json").read_text())
    meta["files"][0]["train"]["documents"] = meta["splits"]["train"]["documents"] = 10**6
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    n, lengths = 10**6, np.random.default_rng(0).integers(10, 300, 10**6)
    np.stack((lengths.cumsum(), lengths // 2), axis=1).tofile(tmp_path / "train.idx")
    with open(tmp_path / "train.bin", "wb") as file:
        file.truncate(2 * int(lengths.sum()))
    tracemalloc.start()
    loader = Loader(tmp_path, "train", 4, 1024)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loader.plan["documents"] == n and held < 5 * n and peak < 8 * n + 2**25
