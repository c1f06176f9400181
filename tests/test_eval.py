"""Reading answers out of texts, and held-out rows."""

import json
import shutil

import numpy as np
import pytest

import tasks
from tasks import extract, same_answer, same_whole_number, to_whole_number
from tokenizer import encode_prompt, fingerprint, load_encoding, special_id


@pytest.mark.parametrize(
    "text, number",
    [
        ("so \\boxed{72}.", 72),
        ("\\boxed{1} and then \\boxed{1,234}", 1234),
        ("\\boxed{\\text{5}}", None),
        ("\\boxed{ $18 }", 18),
        ("\\boxed{3", None),
        ("2+2=4\n#### 4", 4),
        ("#### 1\n#### -2,000", -2000),
        ("18", 18),
        ("$18.00", 18),
        ("18.9", 18),
        ("-7", -7),
        ("24 apples", None),
        ("eighteen", None),
        ("", None),
        ("#### ", None),
        ("inf", None),
        ("nan", None),
        ("2+2=4", None),
    ],
)
def test_gsm8k_answers_are_whole_numbers(text, number):
    assert to_whole_number(extract(text)) == number
    assert same_whole_number(text, f"So it is\n#### {number}") == ("invalid" if number is None else "right")
    assert same_whole_number(text, "#### 5") == ("invalid" if number is None else "wrong")


@pytest.mark.parametrize(
    "reference, verdicts",
    [
        ("2.5", {"right": "2.50|#### 2.5|so \\boxed{2.5}.|$2.5|it is 2.5.", "wrong": "2.9|2|25|-2.5"}),
        ("1,000", {"right": "1000|$1,000.00|+1000|1000.", "wrong": "1|1000.5", "invalid": "1,00|1,0000|1 000"}),
        ("3+4=7\n#### 7", {"right": "7|9-2=7 #### 7|#### $7 each|\\boxed{\\text{7}}", "wrong": "8|#### 78"}),
        ("24", {"right": "24 apples|24kg|**24**", "wrong": "25 apples", "invalid": "apples|24 or 25|x24|2e4|2.4.1|"}),
        ("5", {"right": "=5|H2O: 5", "wrong": "-5|\u22125", "invalid": "inf|nan|Infinity|\u0665|1e5|5/1|#### "}),
        (f"{10**400 + 1}", {"right": f"{10**400 + 1}.0", "wrong": f"{10**400}", "invalid": "1e400"}),
        (".5", {"right": "0.50|$.5", "wrong": ".05", "invalid": "1/2"}),
        ("Paris", {"right": " Paris\n|#### Paris|\\boxed{Paris}", "wrong": "paris|Paris, USA|5", "invalid": " |####"}),
        ("24 apples and\n 3 pears", {"right": "24  apples and 3 pears", "wrong": "24 apples|24"}),
        ("1/2", {"right": "1/2", "wrong": "0.5|1/20"}),
        ("inf", {"right": "inf", "wrong": "nan|1"}),
    ],
)
def test_answers_are_numbers_or_text(reference, verdicts):
    for verdict, generations in verdicts.items():
        for generation in generations.split("|"):
            assert same_answer(generation, reference) == verdict, generation


# ----------------------------------------------------------------------------------------------------
# held-out rows


@pytest.fixture
def run_dir(workplace, monkeypatch):
    """What heldout needs of a run on data/problems."""
    monkeypatch.chdir(workplace)
    shutil.copytree(workplace / "data" / "problems", workplace / "out")
    (workplace / "out" / "run.json").write_text(json.dumps({"settings": {"dataset": "problems"}}))
    return workplace / "out"


def change_val(run_dir, name, content):
    """Put content into a file of data/problems, as if the run had been trained on that."""
    path = run_dir.parent / "data" / "problems" / name
    path.write_bytes(content)
    meta = json.loads((run_dir / "meta.json").read_text())
    meta["checksums"][name] = fingerprint(path)
    for directory in run_dir, path.parent:
        (directory / "meta.json").write_text(json.dumps(meta))


def test_heldout_rows_are_the_validation_documents(run_dir, capsys):
    encoding = load_encoding(run_dir)
    pairs = [q._replace(prompt=encode_prompt(encoding, q.prompt, "cot")) for q in tasks.problems()[:20]]
    assert tasks.heldout(source=run_dir, limit=0) == pairs
    assert tasks.heldout(source=run_dir, limit=7) == [pairs[i * 20 // 7] for i in range(7)]
    assert "7 of 20 validation documents of data/problems" in capsys.readouterr().out
    # a document that data.py cut off has no eoa
    ids = np.fromfile("data/problems/val.bin", dtype=np.uint16)
    third = np.flatnonzero(ids == special_id(encoding, "eoa"))[2]
    ids[third] = 65
    change_val(run_dir, "val.bin", ids.tobytes())
    assert tasks.heldout(source=run_dir, limit=0) == pairs[:2] + pairs[3:]
    assert "19 of 19 validation documents" in (said := capsys.readouterr().out) and "(1 that data.py cut off" in said


def test_heldout_rows_that_are_not_there(run_dir):
    def refusal():
        with pytest.raises(ValueError) as error:
            tasks.heldout(source=run_dir, limit=0)
        assert "choose with --tasks from problems, gsm8k" in str(error.value)
        return str(error.value)

    bin, index = (run_dir.parent / "data" / "problems" / name for name in ("val.bin", "val.idx"))
    kept = bin.read_bytes(), index.read_bytes()
    change_val(run_dir, "val.bin", b"")
    change_val(run_dir, "val.idx", b"")
    assert "data/problems has no validation documents: prepare it with a larger --val_fraction" in refusal()
    change_val(run_dir, "val.bin", kept[0].replace(kept[0][-2:], b"A\0"))
    change_val(run_dir, "val.idx", kept[1])
    assert "(20 that data.py cut off are left out): prepare it" in (said := refusal()) and "--block_size" in said
    change_val(run_dir, "val.bin", b"\xff\xff" + kept[0][2:])  # in a prefix
    with pytest.raises(ValueError, match="val.bin is damaged: the tokenizer bytes has no token"):
        tasks.heldout(source=run_dir, limit=0)
    shutil.copy(run_dir / "meta.json", run_dir / "other.json")
    change_val(run_dir, "val.bin", kept[0])
    shutil.copy(run_dir / "other.json", run_dir / "meta.json")
    assert "holds other data now" in refusal()
    shutil.rmtree("data")
    assert f"data/problems, on which {run_dir} was trained, is not here" in refusal()
    (run_dir / "run.json").write_text('{"settings": {"dataset": 5}}')
    with pytest.raises(ValueError, match="run.json is damaged"):
        tasks.heldout(source=run_dir, limit=0)
    (run_dir / "run.json").unlink()
    assert "has no run.json, which names the dataset of held-out rows: choose" in refusal()
