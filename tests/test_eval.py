"""eval.py asks each question once, and its figures are those of the answers."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY

import tasks
from tasks import TASKS, Question, Task, same_answer

EVAL = ["--device=cpu", "--dtype=float32", "--max_new_tokens=6", "--save_generations=True"]


def write_rows(path, rows):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(out_dir="out"):
    """{task: result}, {task: lines} of what eval.py has written."""
    results = json.loads(Path(out_dir, "eval.json").read_text())["tasks"]
    lines = {}
    for task in results:
        text = Path(out_dir, f"generations-{task}.jsonl").read_text(encoding="utf-8")
        lines[task] = [json.loads(line) for line in text.splitlines()]
    return results, lines


@pytest.fixture
def score(run, monkeypatch):
    """eval.py with the model of a short run, a quiz and a task with shots."""
    run("train.py", *TINY, "--max_iters=2")
    write_rows("quiz.jsonl", [{"prompt": f"{i}+1?", "answer": i + 1} for i in range(5)])
    for split, n in ("train", 5), ("validation", 3):
        row = {"question": "is it", "passage": "It is.", "answer": True}
        write_rows(f"local/boolq/{split}.jsonl", [row] * n)

    def score(*args):
        return run("eval.py", "--data_dir=local", *EVAL, *args)

    return score


def test_figures_are_those_of_the_answers(score):
    said = score("--tasks=heldout, quiz.jsonl,boolq")
    results, lines = read()
    assert list(results) == ["heldout", "quiz", "boolq"]
    counts = [results[name]["count"] for name in results]
    assert counts == [20, 5, 3]
    for name in "heldout", "quiz":
        for line in lines[name]:
            answer = same_answer(line["generation"], Question("", line["truth"]))
            assert {key: line[key] for key in answer} == answer
    for name, result in results.items():
        assert f"{name:<22} {result['count']:>9}" in said
        for key, figure in ("score", "accuracy"), ("invalid", "invalid"), ("cut_off", "cut_off"):
            mean = np.mean([line[key] for line in lines[name]])
            assert result[figure] == pytest.approx(mean)
    assert "86.18%    84.86%" in said  # the paper's boolq


def test_a_prompt_that_is_too_long_loses_its_last_shots(score):
    """Of 256 tokens a prompt has at most 256, and its answer one."""
    shot = "It is.\nQuestion: Is it?\nA. Yes\nB. No\nAnswer:"
    score("--tasks=boolq")
    [line, *_] = read()[1]["boolq"]
    assert line["shortened"] and line["prompt"] == f"{shot} A\n\n" * 4 + shot
    rows = [{"prompt": "x" * n, "answer": ""} for n in (252, 253, 254)]
    write_rows("quiz.jsonl", rows)
    score("--tasks=quiz.jsonl")
    results, lines = read()
    too_long = [line["too_long"] for line in lines["quiz"]]
    assert too_long == [False, False, True]
    assert results["quiz"]["too_long"] == pytest.approx(1 / 3)


def test_what_is_finished_is_not_asked_again(score, monkeypatch):
    """Another question, setting or model is; what a run has not finished starts over."""
    score("--tasks=boolq")
    assert "boolq is in out/eval.json already" in score("--tasks=boolq")
    assert "already" not in score("--tasks=boolq", "--H_cycles=1")
    assert "already" not in score("--tasks=boolq")
    generations = Path("out/generations-boolq.jsonl").read_bytes()
    write_rows("local/boolq/validation.jsonl", [{"question": "a", "passage": "", "answer": False}])
    assert "already" not in score("--tasks=boolq")
    assert Path("out/generations-boolq.jsonl").read_bytes() != generations

    def interrupt(*_):
        raise KeyboardInterrupt

    write_rows("local/boolq/validation.jsonl", [{"question": "b", "passage": "", "answer": False}])
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(tasks, "same_answer", interrupt)
        context.setitem(TASKS, "heldout", TASKS["heldout"]._replace(score=interrupt))
        score("--tasks=boolq,heldout")
    said = score("--tasks=boolq,heldout")
    assert "boolq is in" in said and "heldout is in" not in said
    Path("out/step-0000002/config.json").touch()
    assert "already" not in score("--tasks=boolq")


def test_samples_do_not_depend_on_what_is_beside_them(score, monkeypatch):
    def dice(row):
        return Question(row["question"], "7", group=row["question"])

    task = Task(dice, same_answer, max_new_tokens=6, samples=12, temperature=1.0, macro=True)
    monkeypatch.setitem(TASKS, "dice", task)
    write_rows("local/dice/test.jsonl", [{"question": text} for text in ("a", "bb")])
    said = score("--tasks=dice")
    first = read()
    generations = {line["generation"] for line in first[1]["dice"]}
    assert len(generations) > 12
    for figure in "pass@10", "maj@1", "macro":
        assert f"dice {figure}" in said
    assert list(first[0]["dice"]["groups"]) == ["a", "bb"]
    score("--tasks=dice", "--batch_size=5", "--out_dir=other", "--init_from=out")
    assert read("other")[1] == first[1]
    score("--tasks=dice", "--seed=2")
    assert read()[1] != first[1]


def test_standard_errors(score, monkeypatch):
    """Over questions, whatever the number of samples; a group of one varies as the others do."""
    monkeypatch.setattr(sys, "argv", ["eval.py", "--tasks=quiz.jsonl", *EVAL])
    script = runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    assert script["mean_and_error"]([1.0]) == (1.0, None)
    some = [1.0] * 3 + [0.0] * 7
    error = (0.3 * 0.7 / 9) ** 0.5
    assert script["mean_and_error"](some) == pytest.approx((0.3, error))
    groups = [[0.0, 1.0], [0.0, 0.0, 1.0], [1.0], [0.0]]
    pooled = (1 / 2 + 2 / 3) / 3
    error = ((1 / 4 + 1 / 9 + 2 * pooled) / 16) ** 0.5
    assert script["macro_mean"](groups) == pytest.approx((11 / 24, error))
    assert script["macro_mean"](groups[2:]) == (0.5, None)
    lines = []
    for row in range(3):
        for sample in range(20):
            right = sample < row
            line = {
                "row": row,
                "group": "",
                "generation": "7" if right else "8",
                "truth": 7,
                "score": float(right),
                "em": 0.5,
            }
            lines.append(line)
    result = script["summarize"](TASKS["aime24"], lines)
    assert result["count"] == 3
    assert result["stderr"] == pytest.approx(0.05 / 3**0.5)
    figures = result["figures"]
    assert figures["em"] == (0.5, 0)
    assert figures["pass@1"][0] == pytest.approx(0.05)
    two_of_20 = 1 - 10 * 9 / (20 * 19)
    assert figures["pass@10"][0] == pytest.approx((0 + 0.5 + two_of_20) / 3)
    assert figures["maj@1"][0] == 0
    assert figures["maj@10"][0] == pytest.approx(2 / 3)


def test_a_mistake_ends_with_a_sentence(score):
    for args, sentence in {
        ("--tasks=gsm9k",): "there is no task 'gsm9k'",
        ("--tasks=gsm8k",): "there is nothing to ask",
        ("--tasks=quiz.jsonl,local/quiz.jsonl",): "two of the tasks have the same name",
        ("--out_dir=nowhere",): "there is no model in nowhere",
        ("--tasks=quiz.jsonl", "--condition=loud"): "direct, cot, noisy, synth",
        ("--guidence=1",): "did you mean guidance?",
    }.items():
        with pytest.raises(SystemExit, match=sentence):
            score(*args)
    said = score("--tasks=gsm8k,quiz.jsonl")
    assert "gsm8k is left out: there is no local/gsm8k/test.jsonl or .parquet" in said
    assert "quiz     " in said


@pytest.mark.slow
def test_ranks_share_the_questions_and_give_the_same_answers(score):
    args = [*EVAL, "--tasks=heldout,quiz.jsonl,boolq", "--data_dir=local", "--init_from=out"]
    score(*args, "--out_dir=one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, ROOT / "eval.py", *args, "--out_dir=two"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.count("written to two/eval.json") == 1
    for name in "eval.json", "generations-heldout.jsonl", "generations-quiz.jsonl":
        assert Path("one", name).read_text() == Path("two", name).read_text()
