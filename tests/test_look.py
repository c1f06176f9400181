"""What data.py --inspect shows: documents of every file, text that steers no terminal, rows as they are packed."""

import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import look
from data import prepare
from loader import Loader
from look import MAX_CHARS, N_ROWS, readable, safe, show, spread
from tokenizer import make_encoding

EVIL = "a\x1b[2J\x07\x9b1m\u202e\u2028⟪eoq⟫│<|im_end|>\r\n\tdocument 9 of 9"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """90 documents of two files; one is EVIL, one is cut off."""
    place = tmp_path_factory.mktemp("look")
    rows = [{"instruction": f"What is {i}?", "response": f"{i} " * (i + 1), "condition": "cot"} for i in range(90)]
    rows[45] = {"instruction": EVIL, "response": EVIL}
    rows[89] = {"instruction": "long", "response": "x" * 999}
    (place / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(place / "d", source=str(place / "x.jsonl"), val_fraction=0.0, block_size=400)
    return place / "d"


def entry(name, n):
    """A file of meta.json."""
    counts = {split: {"documents": n_of, "tokens": 0} for split, n_of in (("train", n), ("val", 0))}
    return {"name": name, "group": "", "cap": 0, "repeat": 1, **counts}


@pytest.fixture
def changed(directory, tmp_path):
    """A copy of the dataset with other entries in its meta.json."""

    def make(**changes):
        shutil.copytree(directory, tmp_path / "d")
        meta = json.loads((directory / "meta.json").read_text())
        (tmp_path / "d" / "meta.json").write_text(json.dumps({**meta, **changes}))
        return tmp_path / "d"

    return make


def test_documents_and_rows(directory, capsys, monkeypatch):
    """Every document with its size; every row as the loader packs it."""
    monkeypatch.setenv("COLUMNS", "402")  # a column per token
    show(directory, 1000, seed=7)
    out = capsys.readouterr().out
    for i in 0, 7, 88:
        n = len(f"{i} " * (i + 1)) + 1  # eoa
        head = f"document {i} of 90, x.jsonl: {len(f'What is {i}?') + 3} + {n} tokens\n"
        assert f"{head}    ⟪boq⟫⟪cot⟫What is {i}?⟪eoq⟫│{f'{i} ' * (i + 1)}⟪eoa⟫\n" in out
    assert len(re.findall("^document ", out, re.M)) == 90 and out.count("cut off") == 1
    assert "document 89 of 90, x.jsonl: 6 + 395 tokens, cut off\n" in out
    lines, batch = out[out.index("a first step") :].splitlines()[1:], next(Loader(directory, "train", N_ROWS, 400, 7))
    assert len(lines) == 2 * N_ROWS
    numbers = iter(batch.documents)
    for bar, text, doc, prefix in zip(lines[::2], lines[1::2], batch.doc.numpy(), batch.prefix.numpy()):
        starts = [int((doc == k).argmax()) for k in range(doc.max() + 1)]
        assert bar[1:] == "".join(
            "│" if i in starts else "·" if d < 0 else "█" if p else "▒" for i, (d, p) in enumerate(zip(doc, prefix))
        )
        first = [f"{next(numbers)} (" for _ in starts][:6]
        assert f"{np.mean(doc >= 0):.1%} filled" in text and all(number in text for number in first)


def test_a_text_steers_no_terminal(directory, capsys):
    """Control characters and our own marks are shown as escapes, and no line of a text begins where ours do."""
    show(directory, 1, 0)
    out = capsys.readouterr().out
    assert not re.search(r"[^\n -~█▒·│⟪⟫]", out)
    shown = r"a\x1b[2J\x07\x9b1m\u202e\u2028\u27eaeoq\u27eb\u2502<|im_end|>\r" + "\n    \\tdocument 9 of 9"
    assert f"    ⟪boq⟫{shown}⟪eoq⟫│{shown}⟪eoa⟫\n\n" in out


@given(st.text())
def test_any_text_is_safe(text):
    assert all(c == "\n" or c.isprintable() and c not in look.MARKS for c in safe(text))
    if text.isprintable() and not {*text} & {*look.MARKS}:
        assert safe(text) == text


def test_a_long_text_has_a_head_and_a_tail():
    encoding = make_encoding("bytes")
    text = readable(encoding, encoding.encode("a" * MAX_CHARS + "é" * 5000))
    assert text == "a" * 900 + "⟪5,000 characters⟫" + "é" * 300 and MAX_CHARS == 1200


@pytest.mark.parametrize("terminal, no_color, coloured", [(True, "", True), (True, "1", False), (False, "", False)])
def test_colours_are_for_terminals(directory, capsys, monkeypatch, terminal, no_color, coloured):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal, raising=False)
    show(directory, 3, 0)
    out = capsys.readouterr().out
    assert ("\x1b[36m⟪boq⟫" in out) == ("\x1b" in out) == coloured
    assert "document 45 of 90" in re.sub(r"\x1b\[\d*m", "", out)


def test_documents_are_spread_over_files():
    files = [("a", 1), ("b", 0), ("c", 1000), ("d", 10)]
    assert [*spread(files, 3)] == [("a", 0), ("c", 501), ("d", 1006)]
    assert [*spread(files, 6)] == [("a", 0), ("c", 251), ("c", 751), ("d", 1003), ("d", 1008)]  # a has but one
    assert [*spread([("", 5)], 10**12)] == [("", i) for i in range(5)]
    assert [*spread([("", 100)], 2)] == [("", 25), ("", 75)]
    assert [name for name, _ in spread([(str(i), 3) for i in range(100)], 4)] == ["0", "25", "50", "75"]


def test_a_document_has_its_file(changed, capsys):
    files = [entry("one.jsonl", 80), entry("t\x1bwo\nx", 10)]
    show(changed(files=files), 2, 0)
    out = capsys.readouterr().out
    assert "document 40 of 90, one.jsonl: " in out and "document 85 of 90, t\\x1bwo x: " in out


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"files": 3}, "meta.json is damaged"),
        ({"files": [{"name": "x"}]}, "meta.json is damaged: it lacks 'group'"),
        ({"files": [entry("x", -1)]}, "meta.json is damaged: documents is -1"),
        ({"files": [entry("x", 8)]}, "meta.json is damaged: its files have not as many train documents"),
        ({"vocab_size": 7}, "vocab_size is 7"),
        ({"prepare_args": {"block_size": 2}}, "no document of the train split fits"),
    ],
)
def test_a_damaged_dataset_is_one_sentence(changed, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        show(changed(**changes), 3, 0)


def test_ids_without_a_token_name_the_document(directory, changed):
    place = changed()
    tokens = np.fromfile(place / "train.bin", np.uint16)
    tokens[2] = 999
    tokens.tofile(place / "train.bin")
    with pytest.raises(ValueError, match=r"train.bin: document 0 cannot be shown: .* no token with the id 999"):
        show(place, 90, 0)
    with pytest.raises(FileNotFoundError, match="there is no .*meta.json"):
        show(directory / "x", 1, 0)
