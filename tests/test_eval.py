"""Reading answers out of texts, held-out rows, and what evaluation says and writes."""

import errno
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import tiny_model

import eval as evaluation
import tasks
from tasks import extract, same_answer, same_whole_number, to_whole_number
from tokenizer import encode_prompt, fingerprint, load_encoding, make_encoding, special_id


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
    pairs = [(encode_prompt(encoding, q, "cot"), reference) for q, reference in tasks.problems()[:20]]
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


# ----------------------------------------------------------------------------------------------------
# evaluation


@pytest.fixture(autouse=True)
def print_for_capsys(monkeypatch):
    monkeypatch.setattr(evaluation, "print0", print)


def evaluate(pairs, most_new=10, model=None):
    return evaluation.evaluate("quiz", pairs, most_new, same_answer, model or tiny_model(), make_encoding("bytes"), "")


def test_cut_off_is_an_answer_without_end_whatever_stopped_it(capsys):
    """At max_new_tokens, or at the end of the context (64); a prompt beyond it gets no answer."""
    model, lengths = tiny_model(), {30: 20, 50: 13, 62: 1, 63: 0, 90: 0}
    model.banned_ids = torch.arange(256, 263)  # no eoa
    results, _ = evaluate([("x" * n, "5") for n in lengths], 20, model)
    encoding = make_encoding("bytes")
    assert [r["cut"] for r in results] == [n > 0 for n in lengths.values()]
    assert [r["prompt"] for r in results] == ["x" * n for n in lengths]
    assert all(r["verdict"] == "invalid" and not r["generation"] for r in results[3:])
    assert "quiz: 2 prompts longer than block_size = 64 get no answer" in capsys.readouterr().out
    # the ids of a prompt do as well as its text; 0 new tokens are twice those of the longest reference
    ids, _ = evaluate([(encode_prompt(encoding, "x" * 30), "5" * 8)], 0, model)
    assert ids[0]["generation"] == results[0]["generation"] and "x" * 30 in ids[0]["prompt"]


def stream_of(answers, interrupt=None):
    """In place of generate.stream(): these answers' bytes, a step at a time; 0 stands for eoa."""

    def stream(model, prompts, max_new_tokens, **_):
        for step in range(max_new_tokens):
            if step == interrupt:
                raise KeyboardInterrupt
            events = []
            for i, answer in enumerate(answers):
                if step < len(answer):
                    events += [(i, answer[step])] * (answer[step] > 0)
                    events += [(i, None)] * (answer[step] == 0 or step == max_new_tokens - 1)
            yield events

    return stream


def test_evaluation_says_early_how_long_it_may_take(monkeypatch, capsys):
    clock = iter(range(0, 10**6, 2))
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(evaluation, "stream", stream_of([b"1" * 30] * 20))
    results, _ = evaluate([("How many?", "1")] * 20, 30)
    said = capsys.readouterr().out
    # 20 tokens in 2 s; the line comes at step 4, after 5 of 30 tokens
    assert "quiz: at most 0.8 minutes more, for 20 answers of up to 30 tokens at 10 tokens/s; less" in said
    assert "quiz: the first 16 answers had no end and were cut off; --max_new_tokens=N makes them shorter" in said
    assert all(r["cut"] for r in results)
    monkeypatch.setattr(evaluation, "stream", stream_of([b"1" * 30] * 15 + [b"1\0"] * 5))
    evaluate([("How many?", "1")] * 20, 30)
    assert "cut off" not in capsys.readouterr().out


@pytest.fixture
def main(tmp_path, monkeypatch):
    """Runs eval.py's main() in out/, with a tiny model and two tasks. Returns what ends it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval.json").write_text("older")
    quiz = lambda **_: [(f"{i}?", str(i)) for i in range(9)]  # noqa: E731
    monkeypatch.setattr(evaluation, "TASKS", {"quiz": (quiz, 10, same_answer), "empty": (lambda **_: [], 1, None)})
    loaded = tiny_model(), make_encoding("bytes"), ""
    monkeypatch.setattr(evaluation, "load_for_inference", lambda *_: loaded)
    monkeypatch.setattr(evaluation, "stream", stream_of([b"%d\0" % i for i in range(9)]))

    def main(**changes):
        for key, value in {"tasks": "quiz", **changes}.items():
            monkeypatch.setattr(evaluation, key, value)
            monkeypatch.setitem(evaluation.settings, key, value)
        with pytest.raises(SystemExit) as end, evaluation.exit_on_error("interrupted; nothing was written"):
            evaluation.main()
            raise SystemExit("done")
        return end.value.code.partition(": ")[2] or end.value.code

    return main


def test_results_are_written_whole_or_not_at_all(main, tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    whole = evaluation.replace_file
    monkeypatch.setattr(evaluation, "replace_file", full)
    assert "out/eval.json could not be written" in (end := main(save_generations=True)) and "No space left" in end
    assert "quiz           100.00%     0.00%     0.00%       9" in capsys.readouterr().out  # and printed before
    assert [path.name for path in tmp_path.joinpath("out").iterdir()] == ["eval.json"]
    monkeypatch.setattr(evaluation, "replace_file", whole)
    monkeypatch.setattr(evaluation, "stream", stream_of([b"%d" % i * (i + 1) + b"\0" for i in range(9)], interrupt=3))
    assert main() == "interrupted; nothing was written"
    said = capsys.readouterr().out
    assert "partial: 2 of 9 questions of quiz; short" in said and "100.00%" not in said
    assert tmp_path.joinpath("out", "eval.json").read_text() == "older"
    monkeypatch.setattr(evaluation, "stream", stream_of([b"%d\0" % i for i in range(9)]))
    assert main(tasks=" quiz,quiz ,") == "done"
    result = json.loads(tmp_path.joinpath("out", "eval.json").read_text())
    assert result["settings"] == evaluation.settings and result["tasks"].keys() == {"quiz"}
    assert result["tasks"]["quiz"].keys() == {"accuracy", "invalid", "cut", "count", "tokens_per_sec"}
    assert len(tmp_path.joinpath("out", "generations-quiz.jsonl").read_text().splitlines()) == 9


def test_settings_that_cannot_be(main, monkeypatch):
    monkeypatch.setattr(evaluation, "load_for_inference", None)  # refused before the model is loaded
    for key, value, least in ("limit", -1, 0), ("batch_size", 0, 1), ("max_new_tokens", -5, 0), ("cache_gb", -1.0, 0):
        good = evaluation.settings[key]
        assert main(**{key: value}) == f"{key} must be at least {least}, not {value}"
        main(**{key: good, "tasks": ""})
    for names in "", " ,", "quizz":
        assert main(tasks=names) == f"--tasks names one or more of quiz, empty, not '{names}'"
    assert main(tasks="empty") == "the task empty has no questions"
