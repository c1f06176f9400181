"""data.py: from public files to bins. What is read, what is refused, and what a kill leaves."""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

from data import to_condition, to_pair, word_problems
from loader import Loader
from tokenizer import load_tokenizer

ROWS = [{"instruction": f"What is {i} plus {i}?", "response": f"{2 * i} é"} for i in range(300)]
TEXTS = [f"<|im_start|>{row['instruction']}<|im_end|>{row['response']}<|box_end|>" for row in ROWS]


def write(path, rows):
    path = Path(path)
    path.parent.mkdir(exist_ok=True, parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, path, row_group_size=70)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text(lines)


def texts_of(name, split="train"):
    loader = Loader(f"data/{name}", split, 1, 2**20)
    tokenizer = load_tokenizer(f"data/{name}")
    return [tokenizer.decode(loader.document(d)[0].tolist()) for d in range(len(loader.lengths))]


def contents(name):
    return {path.name: path.read_bytes() for path in Path("data", name).iterdir()}


@pytest.fixture
def prepare(run):
    """prepare("--key=value", ...) -> what data.py prints; the dataset is data/d, all of it train."""

    def prepare_d(*args):
        return run("data.py", "--dataset=d", "--val_fraction=0.0", "--workers=1", *args)

    return prepare_d


# -----------------------------------------------------------------------------
# rows


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "response": "a"},
        {"instruction": "q", "input": "", "output": "a"},
        {"question": "q", "answer": "a", "context": "not read"},
        {"prompt": "q", "completion": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    ],
)
def test_public_layouts_are_known_by_their_fields(row):
    assert to_pair(row)[:2] == ("q", "a")


def test_inputs_contexts_and_system_turns_are_joined_to_the_instruction():
    assert to_pair({"instruction": "q", "input": "i", "output": "a"})[0] == "q\n\ni"
    assert to_pair({"instruction": "q", "context": "c", "response": "a"})[0] == "q\n\nc"
    roles = ["system", "user", "assistant"]
    turns = [{"role": role, "content": role} for role in roles]
    assert to_pair({"messages": turns})[:2] == ("system\n\nuser", "assistant")


@pytest.mark.parametrize(
    "row, sentence",
    [
        ({"q": "a", "r": "b"}, "no known pair of fields: q, r; name one as in --fields="),
        ({"instruction": "a", "response": None}, "no text in the field response"),
        ({"instruction": 3, "response": "b"}, "no text in the field instruction"),
        ({"instruction": " ", "response": "b"}, "empty instruction"),
        ({"instruction": "a", "input": ["x"], "output": "b"}, "no text in the field input"),
        ({"messages": [{"role": "user", "content": "a"}]}, "several turns"),
        ({"messages": [{"role": r, "content": r} for r in ("user", "assistant") * 2]}, "several"),
    ],
)
def test_a_row_without_a_pair_is_refused(row, sentence):
    with pytest.raises(ValueError, match=sentence):
        to_pair(row)


def test_conditions_are_read_as_people_write_them():
    assert to_condition("synth, cot") == to_condition("synth,cot") == "synth,cot"
    assert to_condition(None) == to_condition("") == ""
    for value in 0, False, "cto", ["cot"]:
        with pytest.raises(ValueError, match="unknown condition"):
            to_condition(value)


def test_word_problems_are_right_and_validation_has_combinations_of_its_own():
    found = {}
    for split in "train", "val":
        found[split] = set()
        for row in word_problems(split, 2000, seed=0):
            *working, last = row["response"].split("\n")
            for step in working:
                left, result = step.split("=")
                assert eval(left) == int(result) > 0
            assert last == f"#### {result}"
            words = row["instruction"].replace(",", "").replace(".", "").split()
            found[split].add((" ".join(w for w in words if w.isdigit()), *working))
    assert len(found["val"]) > 300 and not found["train"] & found["val"]


# -----------------------------------------------------------------------------
# files


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.parquet"])
def test_every_kind_of_file_gives_the_same_documents(prepare, name):
    write(name, ROWS)
    out = prepare(f"--source={name}")
    assert texts_of("d") == TEXTS
    assert f"{name}: instruction + response\n  'What is 0 plus 0?' -> '0 é'" in out


def test_lines_with_a_bom_crlf_blank_lines_and_no_final_newline_are_read(prepare):
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    Path("x.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    prepare("--source=x.jsonl")
    assert texts_of("d") == TEXTS


def test_a_file_named_as_the_split_wins_and_what_is_read_is_printed(prepare):
    for name in "train.jsonl", "train_val_notes.jsonl", ".ipynb_checkpoints/train.jsonl", "x.jsonl":
        write(f"s/{name}", ROWS[:3])
    Path("s/train.csv").touch()
    out = prepare("--source=s")
    assert "s: reading train.jsonl; not train.csv, train_val_notes.jsonl" in out
    assert texts_of("d") == TEXTS[:3]


def test_numbered_files_and_folders_of_a_split_are_read(prepare):
    for i, name in enumerate(["train-00000-of-00002", "train-00001-of-00002"]):
        write(f"s/data/{name}.parquet", ROWS[i : i + 1])
    write("s/test/b.jsonl", ROWS[2:3])
    prepare("--source=s", "--val_split=test")
    assert (texts_of("d"), texts_of("d", "val")) == (TEXTS[:2], TEXTS[2:3])


def test_only_needed_columns_of_a_table_are_read(prepare):
    odd = pyarrow.array([2**62, 0], pyarrow.timestamp("us"))  # beyond Python's datetime
    texts = [pyarrow.array(["a", "b"]).dictionary_encode(), pyarrow.array(["c", "d"], "large_string")]
    table = pyarrow.table([*texts, odd], ["question", "answer", "date"])
    pyarrow.parquet.write_table(table, "x.parquet")
    assert "question + answer; not used: date" in prepare("--source=x.parquet")
    assert texts_of("d") == [f"<|im_start|>{q}<|im_end|>{a}<|box_end|>" for q, a in ("ac", "bd")]


def test_a_bad_cell_is_a_bad_row(prepare):
    texts = pyarrow.array([b"good", b"\xff"]).view("string")
    pyarrow.parquet.write_table(pyarrow.table([texts] * 2, ["prompt", "completion"]), "x.parquet")
    with pytest.raises(SystemExit, match="x.parquet, row 1: UnicodeDecodeError"):
        prepare("--source=x.parquet")
    assert "1 dropped: UnicodeDecodeError" in prepare("--source=x.parquet", "--skip_bad=True")


def test_fields_override_what_is_found(prepare):
    write("x.jsonl", [{"instruction": "no", "response": "no", "q": "yes", "input": "no", "tag": "cot"}])
    fields = {"instruction": "q", "response": "q", "condition": "tag"}
    prepare("--source=x.jsonl", f"--fields={fields}")
    assert texts_of("d") == ["<|im_start|><|object_ref_end|>yes<|im_end|>yes<|box_end|>"]


def test_a_dataset_of_the_hub_is_read_by_split(prepare, monkeypatch):
    import datasets

    def load_dataset(source, config, split):
        assert (source, config) == ("somebody/pairs", "main")
        labels = datasets.ClassLabel(names=["direct", "cot"])
        features = datasets.Features(dict.fromkeys(ROWS[0], datasets.Value("string")), level=labels)
        rows = [{**row, "level": 0} for row in (ROWS[:40] if split == "train" else ROWS[40:50])]
        return datasets.Dataset.from_list(rows, features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = ["--source=somebody/pairs", "--source_config=main", "--val_split=test"]
    assert "instruction + response; not used: level" in prepare(*args)
    assert (texts_of("d"), texts_of("d", "val")) == (TEXTS[:40], TEXTS[40:50])
    fields = {"condition": "level"}
    with pytest.raises(SystemExit, match="pairs main train, row 0: unknown condition: 0"):
        prepare(*args, f"--fields={fields}")


def test_what_neither_a_file_nor_the_hub_has_is_one_sentence(prepare, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for split in "train", "":
        with pytest.raises(SystemExit, match="nobody/nothing is not here, and the hub does not"):
            prepare("--source=nobody/nothing", f"--split={split}")


def test_gsm8k_is_read_without_its_annotations(run):
    answer = "He has 48/2 = <<48/2=24>>24 left.\n#### 24"
    write("s/train.jsonl", [{"question": "How many?", "answer": answer}])
    run("data.py", ROOT / "config" / "gsm8k.py", "--dataset=d", "--source=s", "--val_fraction=0.0")
    text = "How many?<|im_end|>He has 48/2 = 24 left.\n#### 24"
    assert texts_of("d") == [f"<|im_start|><|object_ref_end|>{text}<|box_end|>"]


BAD = [
    (b"{not json", "JSONDecodeError"),
    (b"[1, 2]", "not a JSON object"),
    (b'{"prompt": "\xff", "completion": "b"}', "UnicodeDecodeError"),
    (b'{"prompt": "\\ud800", "completion": "b"}', "UnicodeEncodeError"),
    (b'{"prompt": "a", "completion": ""}', "empty completion"),
]


@pytest.mark.parametrize("line, reason", BAD)
def test_a_bad_row_ends_with_its_file_and_line(prepare, line, reason):
    Path("x.jsonl").write_bytes(b'{"prompt": "a", "completion": "b"}\n\n' + line)
    with pytest.raises(SystemExit, match=f"x.jsonl, line 3: {reason}.*--skip_bad=True leaves"):
        prepare("--source=x.jsonl")
    out = prepare("--source=x.jsonl", "--skip_bad=True")
    assert f"1 dropped: {reason}" in out and len(texts_of("d")) == 1


def cut(name):
    data = Path(name).read_bytes()
    Path(name).write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.parquet", "x.json"])
def test_a_damaged_file_is_named(prepare, name):
    write(name, ROWS)
    cut(name)
    with pytest.raises(SystemExit, match=f"{name} cannot be read: "):
        prepare(f"--source={name}", "--skip_bad=True")


def test_a_line_without_end_is_refused(prepare):
    with open("x.jsonl", "wb") as file:
        file.write(b'{"prompt": "a", "completion": "b"}\n')
        file.truncate(2**27)  # sparse
    with pytest.raises(SystemExit, match="x.jsonl cannot be read: .* the line at byte 35 has"):
        prepare("--source=x.jsonl", "--skip_bad=True")


@pytest.mark.parametrize(
    "args, sentence",
    [
        (["--source=none.jsonl"], "none.jsonl is not there"),
        (["--source=s", "--split=dev"], "no .jsonl, .* for the split 'dev', only: x.jsonl"),
        (["--source=s", "--val_split=x", "--split="], "x.jsonl is of both splits"),
        ([], "--source=... tells what data/d is made of"),
        (["--source=s/x.jsonl", "--val_fraction=1.5"], "val_fraction is a share"),
        (["--source=s/x.jsonl", "--too_long=cut"], "too_long must be truncate or drop"),
        (["--source=s/x.jsonl", "--mixture=[{'cap': -1}]"], "cap must be 0 or more"),
        (["--source=s/x.jsonl", "--mixture=[{'capp': 1}]"], "no capp; it may have name"),
        (["--source=s/x.jsonl", "--mixture=[{'files': 'y*'}]"], "no file, or none is left.* y"),
        (["--source=s/x.jsonl", "--condition=cto"], "unknown condition: 'cto'"),
    ],
)
def test_what_cannot_be_is_one_sentence(prepare, args, sentence):
    write("s/x.jsonl", ROWS)
    with pytest.raises(SystemExit, match=sentence):
        prepare(*args)


def test_long_documents_are_truncated_or_dropped_and_counted(prepare):
    pairs = ("i" * 10, "r" * 17), ("i" * 10, "R" * 18), ("i" * 50, "r")  # with 3 more: 30, 31, 54
    write("x.jsonl", [{"prompt": i, "completion": r} for i, r in pairs])
    out = prepare("--source=x.jsonl", "--block_size=29")
    assert texts_of("d")[1] == f"<|im_start|>{'i' * 10}<|im_end|>{'R' * 18}"  # no eoa
    assert "1 truncated: too long" in out and "1 dropped: instruction too long" in out
    assert "1 dropped: too long" in prepare("--source=x.jsonl", "--block_size=29", "--too_long=drop")
    assert len(texts_of("d")) == 1


def test_answers_to_one_instruction_are_in_one_split(run):
    write("x.jsonl", ROWS + ROWS)
    run("data.py", "--dataset=d", "--source=x.jsonl", "--val_fraction=0.2")
    train, val = Counter(texts_of("d")), Counter(texts_of("d", "val"))
    assert {*train.values(), *val.values()} == {2} and 30 < len(val) < 90 and len(train + val) == 300


# -----------------------------------------------------------------------------
# a mixture


CONFIG = """
def twice(row):
    return [row, {**row, "response": "short", "condition": "direct"}] if row["n"] else None

mixture = [
    dict(files="big*", cap=40),
    dict(files=["b*", "none*"], cap=25, condition="synth, cot"),
    dict(name="rows", files="rows*", rows=twice, repeat=3),
]
"""


def test_the_first_rule_that_fits_counts(prepare):
    for name, n in ("big.jsonl", 150), ("sub/bees.parquet", 60), ("rows.jsonl", 5), ("z.jsonl", 9):
        write(f"s/{name}", [{"n": i, **row} for i, row in enumerate(ROWS[:n])])
    Path("config.py").write_text(CONFIG)
    out = prepare("config.py", "--source=s", "--split=", "--batch_size=2", "--max_iters=10")
    meta = json.loads(Path("data/d/meta.json").read_text())
    counts = {file["name"]: (file["train"]["documents"], file["train"]["per_epoch"]) for file in meta["files"]}
    assert counts == {"big.jsonl": (150, 40), "rows.jsonl": (8, 24), "sub/bees.parquet": (60, 25), "z.jsonl": (9, 9)}
    epochs = 2 * 10 * 1024 / meta["splits"]["train"]["tokens_per_epoch"]
    line = next(line for line in meta["report"] if line.startswith("big*"))
    assert f"{epochs * 40 / 150:.2f}" in line and line in out
    config = json.loads(Path("data/d/tokenizer_config.json").read_text())
    assert config["conditions"] == ["", "synth,cot", "direct"]


# -----------------------------------------------------------------------------
# replaced whole or not at all


def test_two_preparations_are_the_same_whatever_the_number_of_workers(prepare):
    write("x.parquet", ROWS)
    prepare("--source=x.parquet")
    before = contents("d")
    prepare("--source=x.parquet", "--workers=3")
    assert contents("d") == before and not Path("data/d.part").exists()


def test_a_failed_preparation_leaves_the_dataset_and_no_other_directory_is_touched(prepare):
    write("x.jsonl", ROWS)
    prepare("--source=x.jsonl")
    before = contents("d")
    write("bad.jsonl", [*ROWS, {}])
    with pytest.raises(SystemExit):
        prepare("--source=bad.jsonl")
    assert contents("d") == before
    Path("data/d/notes.txt").touch()
    with pytest.raises(SystemExit, match="holds what data.py did not write"):
        prepare("--source=x.jsonl")
    assert Path("data/d/notes.txt").exists()


def test_a_dataset_killed_between_the_two_renames_is_restored(prepare):
    write("x.jsonl", ROWS)
    prepare("--source=x.jsonl")
    before = contents("d")
    os.makedirs("data/d.part")
    os.rename("data/d", "data/d.part/old")
    with pytest.raises(SystemExit):
        prepare("--source=none.jsonl")
    assert contents("d") == before


KILLED = """
import os, runpy, signal, sys
from pathlib import Path
script, method, suffix, n = sys.argv[1:5]
original, n = getattr(Path, method), int(n)
def counted(self, *args, **options):
    global n
    n -= self.suffix == suffix
    if n < 0:
        os.kill(os.getppid() if suffix == ".tmp" else os.getpid(), signal.SIGKILL)
    return original(self, *args, **options)
setattr(Path, method, counted)
sys.argv[:] = [script, *sys.argv[5:]]
sys.path.insert(0, str(Path(script).parent))
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "place_of_death",
    [("rename", ".tmp", n) for n in range(3)]  # of a worker's shards
    + [("rename", "", n) for n in range(2)]  # of the old and the new dataset
    + [("unlink", ".json", n) for n in range(3)],  # when shards are removed
)
def test_a_killed_preparation_goes_on_and_ends_the_same(prepare, place_of_death):
    for i in range(3):
        write(f"s/train-{i}.jsonl", ROWS[i * 100 :][:100])
    args = ["--dataset=d", "--val_fraction=0.0", "--source=s", "--workers=1"]
    prepare(*args[2:])
    before = contents("d")
    command = [sys.executable, "-c", KILLED, ROOT / "data.py", *place_of_death, *args]
    done = subprocess.run(list(map(str, command)))
    assert done.returncode == -signal.SIGKILL
    prepare(*args[2:])
    assert contents("d") == before and len(os.listdir("data")) == 2


# -----------------------------------------------------------------------------
# the tools before and after it


@pytest.mark.parametrize("kind", ["addition", "lists", "arithmetic", "permutations", "sudoku4"])
def test_puzzles_are_read_and_none_is_in_both_splits(run, kind):
    run("tools/puzzles.py", f"--kind={kind}", "--level=2", "--n_train=300", "--n_val=30", "--out=s")
    run("data.py", "--dataset=d", "--source=s", "--val_split=val")
    train, val = texts_of("d"), texts_of("d", "val")
    assert (len(train), len(val)) == (300, 30) and not set(train) & set(val)
    for text in train:
        question, answer = text.removesuffix("<|box_end|>").split("<|im_end|>")
        question = question.removeprefix("<|im_start|><|object_ref_start|>")
        if kind == "addition":
            assert eval(question) == int(answer)
        if kind == "arithmetic":
            assert eval(question.removesuffix(" mod 10")) % 10 == int(answer)
        if kind == "sudoku4":
            rows = answer.split()
            boxes = [rows[r][c : c + 2] + rows[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2)]
            assert all(sorted(unit) == list("1234") for unit in [*rows, *map("".join, zip(*rows)), *boxes])


def test_a_tokenizer_is_trained_on_what_data_py_reads(run, prepare):
    write("x.jsonl", ROWS)
    run("tools/train_tokenizer.py", "--source=x.jsonl", "--vocab_size=400", "--out=bpe")
    prepare("--source=x.jsonl", "--tokenizer=bpe")
    assert texts_of("d") == TEXTS
    n_tokens = len(Loader("data/d", "train", 1, 64).tokens)
    prepare("--source=x.jsonl")
    assert n_tokens < 0.7 * len(Loader("data/d", "train", 1, 64).tokens)


def test_inspect_data_shows_documents_and_rows(run, prepare):
    write("x.jsonl", [*ROWS, {"prompt": "\x1b[31m", "completion": "a"}])
    prepare("--source=x.jsonl", "--block_size=300")
    out = run("tools/inspect_data.py", "--dataset=d", "--n=301", "--rows=2")
    assert "document 0 of 301, x.jsonl: 19 + 5 tokens" in out
    assert "    <|im_start|>What is 0 plus 0?<|im_end|> | 0 é<|box_end|>" in out
    assert "\\x1b[31m" in out and "\x1b" not in out
    first, second = out.splitlines()[-2:]
    assert len(first) == len(second) == 100 and set(first) <= set("|#=.")
