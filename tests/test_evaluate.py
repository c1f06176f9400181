"""What evaluation asks, keeps, says and writes, and how two evaluations are compared."""

import errno
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import plain_logits, tiny_model
from scripts import ROOT, TINY, run

import eval as evaluation
import evaluate
import ranks
import results
from generate import generate
from tasks import TASKS, Question, Task
from tokenizer import encode_prompt, make_encoding, special_id


@pytest.fixture(autouse=True)
def print_for_capsys(monkeypatch):
    monkeypatch.setattr(evaluation, "print0", print)
    monkeypatch.setattr(evaluate, "print0", print)
    monkeypatch.setattr(ranks, "catch_stop_signals", lambda: lambda: False)


def same(generation, question):
    right, invalid = generation.strip() == question.truth, not generation.strip()
    return {"score": 1 / max(len(question.choices), 1) if invalid else float(right), "invalid": invalid}


FREE, CHOICE = Task(None, same), Task(None, same, max_new_tokens=1)


def ask(questions, task=FREE, most_new=10, model=None, directory=None, about=None, samples=1, mcq="token", **options):
    """The lines of evaluate.run(), with a tiny model that reads bytes."""
    model, encoding = model or tiny_model(), make_encoding("bytes")
    plans = {"quiz": evaluate.plan("quiz", task, questions, encoding, "", 64, most_new, samples, mcq)}
    lines, _ = evaluate.run(model, encoding, plans, {"quiz": about or {}}, directory, mcq=mcq, **options)
    return lines["quiz"]


# ----------------------------------------------------------------------------------------------------
# prompts and answers


def test_shots_are_left_out_one_by_one(tmp_path):
    """From the last on, until prompt and answer fit 64 tokens; a prompt is its letters, boq and eoq."""
    shots = ("a" * 20, "b" * 10, "c" * 20)
    questions = [Question(n, "x" * n, "", shots) for n in (5, 12, 30, 32, 33, 43, 62, 63, 90)]
    jobs = evaluate.plan("quiz", FREE, questions, make_encoding("bytes"), "", 64, 20, 1, "token")
    found = [(job.shortened, job.limit) for job in jobs]
    assert found == [(0, 8), (0, 1), (1, 3), (1, 1), (2, 10), (3, 20), (3, 1), (3, 0), (3, 0)]
    assert jobs[2].prompt == "a" * 20 + "b" * 10 + "x" * 30
    lines = ask(questions, most_new=20, directory=tmp_path)
    assert [line["shortened"] for line in lines] == [job.shortened for job in jobs]
    assert [line["over_long"] for line in lines] == [False] * 7 + [True] * 2
    assert all((line["score"], line["generation"], line["cut"]) == (0, "", False) for line in lines[7:])
    row = results.figures_of(FREE, lines, 0)
    assert (row["over_long"], row["shortened"], row["count"]) == (2, 7, 9)
    # a task's own context is a limit too
    short, encoding = FREE._replace(context=40), make_encoding("bytes")
    [job] = evaluate.plan("quiz", short, questions[:1], encoding, "", 64, 20, 1, "token")
    assert (job.shortened, job.limit) == (1, 4)


def test_cut_off_is_an_answer_without_end_whatever_stopped_it(tmp_path):
    """At max_new_tokens, or at the end of the context (64)."""
    model, lengths = tiny_model(), {30: 20, 50: 13, 62: 1, 63: 0}
    model.banned_ids = torch.arange(256, 263)  # no eoa
    lines = ask([Question(i, "x" * n, "5") for i, n in enumerate(lengths)], FREE, 20, model, tmp_path)
    assert [line["tokens"] for line in lines] == [*lengths.values()]
    assert [line["cut"] for line in lines] == [n > 0 for n in lengths.values()]
    # the ids of a prompt do as well as its text
    ids = encode_prompt(make_encoding("bytes"), "x" * 30)
    [line] = ask([Question(0, ids, "5")], FREE, 20, model, tmp_path, {"run": 2})
    assert line["generation"] == lines[0]["generation"] and "x" * 30 in line["prompt"]


def choice_questions(choices=("A", "B", "C")):
    texts = ["Which one is it? " * (i % 3) + str(7**i % 1000) for i in range(40)]
    return [Question(i, text, "A", choices=choices) for i, text in enumerate(texts)]


def test_packed_choices_are_what_generation_would_choose(tmp_path):
    model, encoding, questions = tiny_model(), make_encoding("bytes"), choice_questions()
    lines = ask(questions, CHOICE, 1, model, tmp_path)
    prompts = [encode_prompt(encoding, q.prompt) for q in questions]
    generated = generate(model, prompts, 1, stop_token=special_id(encoding, "eoa"))
    assert [line["generation"] for line in lines] == [encoding.decode(ids) for ids in generated]
    assert not any(line["cut"] for line in lines) and len({line["generation"] for line in lines}) > 3
    with pytest.raises(ValueError, match="logits are not finite"):
        model.lm_head.data[5] = math.nan
        ask(questions, CHOICE, 1, model, tmp_path, {"run": 2})


@pytest.mark.parametrize("choices", [("A", "B", "C"), ("no", "yes", "none", "n")])
def test_likelihoods_of_choices(tmp_path, choices):
    """Of all their tokens, each computed by the model written plainly."""
    model, encoding, questions = tiny_model(), make_encoding("bytes"), choice_questions(choices)
    lines = ask(questions, CHOICE, 1, model, tmp_path, mcq="likelihood")
    for line, question in zip(lines[::4], questions[::4]):
        prompt, sums = encode_prompt(encoding, question.prompt), []
        for choice in choices:
            ids = [*prompt, *encoding.encode(choice)]
            with torch.no_grad():
                log_p = plain_logits(model, torch.tensor(ids), len(prompt)).log_softmax(-1)
            sums.append(sum(log_p[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))))
        assert line["loglikelihoods"] == pytest.approx(sums, rel=1e-4)
        assert line["generation"] == choices[sums.index(max(sums))]


def test_rows_are_well_filled():
    lengths = [100 + i % 700 for i in range(2000)]
    batches = [*evaluate.batches_of_rows(lengths, 1024)]
    numbers = [i for rows in batches for row in rows for i in row]
    assert sorted(numbers) == [*range(2000)]
    sizes = [(len(rows), max(sum(lengths[i] for i in row) for row in rows)) for rows in batches]
    assert all(T <= 1024 and n * T <= 2**12 for n, T in sizes)
    assert sum(lengths) > 0.9 * sum(n * T for n, T in sizes)


def test_samples_are_the_same_in_any_slot(tmp_path):
    task, questions = Task(None, same, temperature=1.0), [Question(i, "x" * i, "5") for i in range(1, 9)]
    lines = [
        ask(questions, task, 12, None, tmp_path, {"run": i}, samples=5, batch_size=size, seed=seed)
        for i, (size, seed) in enumerate([(40, 1), (3, 1), (40, 2)])
    ]
    assert lines[0] == lines[1] != lines[2]
    assert len({line["generation"] for line in lines[0]}) > 30
    more = ask(questions, task, 12, None, tmp_path, {"run": 2}, samples=6, seed=2)
    assert [line for line in more if line["sample"] < 5] == lines[2] and len(more) == 48


# ----------------------------------------------------------------------------------------------------
# what is kept


def test_answers_are_kept_and_asked_once(tmp_path, monkeypatch, capsys):
    """A killed run's last line may be torn; other lines may be of other questions, or nonsense."""
    questions, path = [Question(i, f"{i}?", str(i), group="ab"[i % 2]) for i in range(12)], tmp_path / "whole"
    path.mkdir()
    whole = ask(questions, directory=path)
    lines = (path / "answers-quiz.jsonl").read_bytes().splitlines(keepends=True)
    assert sorted(map(json.loads, lines), key=lambda line: line["row"]) == whole
    other = json.dumps(json.loads(lines[0]) | {"prompt": "another"}).encode() + b"\n"
    asked = []
    stream = evaluate.stream
    monkeypatch.setattr(evaluate, "stream", lambda *a, **o: asked.append(len(a[1])) or stream(*a, **o))
    file, header = tmp_path / "answers-quiz.jsonl", tmp_path / "answers-quiz.json"
    header.write_text("{}")
    file.write_bytes(b"[1]\n\xff\n" + other + b"".join(lines[:5]) + lines[6][:-9])
    (tmp_path / "answers-quiz.jsonl.1").write_bytes(lines[7] + lines[8][:20])  # of another rank
    assert ask(questions, directory=tmp_path) == whole and asked == [6]
    assert "6 answers are kept from an earlier run, 6 are left to do" in capsys.readouterr().out
    assert ask(questions, directory=tmp_path) == whole and asked == [6]
    assert ask(questions[:3], directory=tmp_path) == whole[:3] and asked == [6]
    # other scorers: the answers are kept, and scored anew
    right = FREE._replace(score=lambda *_: {"score": 1.0, "invalid": False, "em": 0.5})
    again = ask(questions, right, directory=tmp_path, about={"scorers": 2})
    assert again == [line | {"score": 1.0, "em": 0.5, "invalid": False} for line in whole] and asked == [6]
    assert ask(questions, right, directory=tmp_path, about={"scorers": 2}) == again
    # another model or setting: the run starts over, and says so
    ask(questions, directory=tmp_path, about={"model": 2})
    said = capsys.readouterr().out
    assert "holds answers of an earlier run (with other scorers, model), so this one starts over" in said
    assert asked == [6, 12]
    header.write_text("torn")
    ask(questions, directory=tmp_path, about={"model": 2})
    assert "(and does not say of which model), so this one starts over" in capsys.readouterr().out
    for save in True, False:  # what an earlier run has saved stays
        evaluate.finish(tmp_path, ["quiz"], {"quiz": whole}, save)
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "generations-quiz.jsonl"}
        saved = (tmp_path / "generations-quiz.jsonl").read_bytes()
        assert [json.loads(line) for line in saved.splitlines()] == whole


def test_two_processes_do_not_write_to_the_same_file(tmp_path):
    with evaluate.open_to_append(tmp_path / "answers-quiz.jsonl"):
        with pytest.raises(ValueError, match="answers-quiz.jsonl: another eval.py is writing to it"):
            ask([Question(0, "0?", "0")], directory=tmp_path)


def test_rows_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="the task quiz has two questions of the same row"):
        ask([Question(0, "0?", "0")] * 2, directory=tmp_path)


@pytest.fixture
def trained(workplace):
    run(workplace, "train.py", *TINY, "--max_iters=3")
    return workplace


EVAL = "--tasks=problems --limit=60 --max_new_tokens=24 --dtype=float32 --device=cpu --save_generations=True".split()


def saved(place, out):
    table = json.loads((place / out / "eval.json").read_text())["tasks"]
    for row in table.values():
        row.pop("tokens_per_sec")
    return table, (place / out / "generations-problems.jsonl").read_text()


def test_a_run_that_was_killed_goes_on(trained):
    args = [*EVAL, "--init_from=out", "--batch_size=4"]
    run(trained, "eval.py", *args, "--out_dir=whole")
    path = trained / "killed" / "answers-problems.jsonl"
    for sign in "SIGKILL", "SIGINT":
        killed = ["tests/crash.py", ROOT / "eval.py", *args, "--out_dir=killed"]
        done = run(trained, *killed, ok=False, CRASH="answer 20", CRASH_SIGNAL=sign)
        assert path.read_bytes().count(b"\n") >= 10 and not (trained / "killed" / "eval.json").exists()
    assert "partial: " in done.stdout and "interrupted; the same command goes on" in done.stderr
    path.write_bytes(path.read_bytes()[:-5])
    header = json.loads(path.with_suffix(".json").read_text())
    done = run(trained, "eval.py", *args, "--out_dir=killed")
    assert "answers are kept from an earlier run" in done.stdout
    assert saved(trained, "killed") == saved(trained, "whole")
    shutil.move(trained / "killed" / "generations-problems.jsonl", path)  # as if it had been killed at its end
    path.with_suffix(".json").write_text(json.dumps(header))
    assert "60 answers are kept" in run(trained, "eval.py", *args, "--out_dir=killed", ranks=2).stdout
    assert saved(trained, "killed") == saved(trained, "whole")


def test_ranks_share_the_questions(trained):
    """Whatever the number of ranks and slots, the answers are the same."""
    run(trained, "eval.py", *EVAL, "--init_from=out", "--out_dir=one")
    done = run(trained, "eval.py", *EVAL, "--init_from=out", "--out_dir=two", "--batch_size=7", ranks=2)
    assert done.stdout.count("written to two/eval.json") == 1 and not [*(trained / "two").glob("*.jsonl.1")]
    assert saved(trained, "one") == saved(trained, "two")
    failed = run(trained, "eval.py", "--init_from=out", "--tasks=nonsense", ranks=2, ok=False).stderr
    assert failed.count("there is no task 'nonsense'") == 1


# ----------------------------------------------------------------------------------------------------
# what is said and written


def stream_of(answers):
    """In place of generate.stream(): these answers' bytes, a step at a time; 0 stands for eoa."""

    def stream(model, prompts, limits, **_):
        for step in range(max(limits)):
            events = []
            for i, answer in enumerate(answers[: len(prompts)]):
                if step < len(answer):
                    events += [(i, answer[step])] * (answer[step] > 0)
                    events += [(i, None)] * (answer[step] == 0 or step == limits[i] - 1)
            yield events

    return stream


def test_evaluation_says_early_how_long_it_may_take(monkeypatch, tmp_path, capsys):
    clock = iter(range(0, 10**6, 2))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(evaluate, "stream", stream_of([b"1" * 30] * 20))
    questions = [Question(i, "How many?", "1") for i in range(20)]
    lines = ask(questions, FREE, 30, directory=tmp_path)
    said = capsys.readouterr().out
    # 20 tokens in 2 s; the line comes at step 4, after 5 of 30 tokens
    assert "at most 0.8 minutes more, for 20 answers of up to 30 tokens at 10 tokens/s; less" in said
    assert "the first 16 answers had no end and were cut off; --max_new_tokens=N makes them shorter" in said
    assert "slots: 100.0% had an answer in work" in said
    assert "answers: 12 of 20, 0.0%, 00:21 left" in said  # stderr is no terminal
    assert all(line["cut"] for line in lines)
    monkeypatch.setattr(evaluate, "stream", stream_of([b"1" * 30] * 15 + [b"1\0"] * 5))
    ask(questions, FREE, 30, directory=tmp_path, about={"run": 2})
    assert "cut off" not in (said := capsys.readouterr().out)
    assert f"slots: {(15 * 29 + 5) / (20 * 29):.1%} had" in said


@pytest.fixture
def main(tmp_path, monkeypatch, capsys):
    """Runs eval.py's main() in out/, with a tiny model and two tasks. Returns what ends it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval.json").write_text("older")
    quiz = lambda **_: [Question(i, f"{i}?", str(i), group="ab"[i % 2]) for i in range(9)]  # noqa: E731
    tasks = {"quiz": Task(quiz, same, "", 0, 10, macro=True, paper=(84.53, 78.39)), "empty": Task(lambda **_: [], same)}
    for name, task in tasks.items():
        monkeypatch.setitem(TASKS, name, task)
    loaded = tiny_model(), make_encoding("bytes"), ""
    monkeypatch.setattr(evaluation, "load_for_inference", lambda *_: loaded)
    monkeypatch.setattr(evaluate, "stream", stream_of([b"%d\0" % i for i in range(9)]))

    def main(**changes):
        for key, value in {"tasks": "quiz", **changes}.items():
            monkeypatch.setattr(evaluation, key, value)
            monkeypatch.setitem(evaluation.settings, key, value)
        with pytest.raises(SystemExit) as end, evaluation.exit_on_error(evaluation.INTERRUPTED):
            evaluation.main()
            raise SystemExit("done")
        return end.value.code if end.value.code in (1, "done") else end.value.code.partition(": ")[2]

    return main


def test_what_is_written(main, tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    out, whole = tmp_path / "out", evaluation.replace_file
    monkeypatch.setattr(evaluation, "replace_file", full)
    assert "out/eval.json could not be written" in (end := main(save_generations=True)) and "No space left" in end
    assert "quiz        9  100.00%  0.00%  84.53%  78.39%    0.00%    0.00%" in capsys.readouterr().out
    assert (out / "eval.json").read_text() == "older"
    monkeypatch.setattr(evaluation, "replace_file", whole)
    assert main(tasks=" quiz,quiz ,") == "done"  # the answers were kept
    result = json.loads((out / "eval.json").read_text())
    assert result["settings"] == evaluation.settings and result["tasks"].keys() == {"quiz"}
    row = result["tasks"]["quiz"]
    assert (
        row.items() >= dict(accuracy=1.0, stderr=0.0, invalid=0.0, cut=0.0, count=9, over_long=0, shortened=0).items()
    )
    assert row["groups"]["a"]["count"] == 5 and row["figures"]["macro"] == [1.0, 0.0]
    assert "| quiz | 9 | 100.00% | 0.00% | 84.53% |" in (text := (out / "eval.md").read_text(encoding="utf-8"))
    assert "| a | 5 | 100.00% | 0.00% | 0.00% |" in text
    assert len((out / "generations-quiz.jsonl").read_text().splitlines()) == 9
    assert main(save_generations=False) == "done"
    assert sorted(path.name for path in out.iterdir()) == ["eval.json", "eval.md", "generations-quiz.jsonl"]


def test_one_token_truths_leave_room_for_working(main, tmp_path, monkeypatch, capsys):
    """And a task without rows does not stop the others."""
    limits = []
    answer = stream_of([b"2\0"])
    monkeypatch.setattr(evaluate, "stream", lambda m, p, most, **o: limits.extend(most) or answer(m, p, most))
    (tmp_path / "letters.jsonl").write_text('{"prompt": "1 or 2?", "answer": "2"}\n')
    model = tiny_model(block_size=512)
    monkeypatch.setattr(evaluation, "load_for_inference", lambda *_: (model, make_encoding("bytes"), ""))
    assert main(tasks="gsm8k,letters.jsonl", data_dir=str(tmp_path)) == "done" and limits == [256]
    assert f"gsm8k is left out: there is no directory {tmp_path}/gsm8k" in (said := capsys.readouterr().out)
    assert "letters  1  100.00%" in said
    assert main(tasks="letters.jsonl", max_new_tokens=7, average=False) == "done" and limits == [256, 7]
    said = (tmp_path / "out" / "eval.md").read_text(encoding="utf-8")
    assert "`--tasks=letters.jsonl --max_new_tokens=7 --average=False`. 1B" in said


def test_ctrl_c_shows_what_is_done_and_keeps_it(main, tmp_path, monkeypatch, capsys):
    steps = iter(range(100))
    stop = lambda: next(steps) >= 4  # noqa: E731
    monkeypatch.setattr(ranks, "catch_stop_signals", lambda: stop)
    monkeypatch.setattr(evaluate, "stream", stream_of([b"%d" % i * i + b"\0" for i in range(9)]))
    assert main() == 1
    said = capsys.readouterr()
    assert "partial: 3 of 9 answers" in said.out and "quiz        3" in said.out
    assert "interrupted; the same command goes on with what is left" in said.err
    assert (tmp_path / "out" / "eval.json").read_text() == "older"
    steps = iter([0] * 100)
    assert main() == "done" and "3 answers are kept from an earlier run, 6 are left" in capsys.readouterr().out


def test_settings_that_cannot_be(main, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "load_for_inference", None)  # refused before the model is loaded
    bounds = (
        ("limit", -1, 0),
        ("batch_size", 0, 1),
        ("max_new_tokens", -5, 0),
        ("cache_gb", -1.0, 0),
        ("samples", -1, 0),
    )
    for key, value, least in bounds:
        good = evaluation.settings[key]
        assert main(**{key: value}) == f"{key} must be at least {least}, not {value}"
        main(**{key: good, "tasks": ""})
    for names in "", " ,":
        assert main(tasks=names).startswith("no task is given: --tasks names one or more of gsm8k, math, ")
    assert "there is no task 'quizz'" in main(tasks="quizz")
    assert main(tasks="empty") == "the task empty has no questions"
    assert main(tasks="no/such.jsonl,nor/that.jsonl") == "there is no file nor/that.jsonl"
    assert "such is left out: there is no file no/such.jsonl" in capsys.readouterr().out
    assert main(mcq="letter") == "mcq must be token or likelihood, not 'letter'"


# ----------------------------------------------------------------------------------------------------
# figures


def line(row, score, generation="x", **more):
    question = dict(row=row, sample=0, group="", prompt=f"{row}?", truth="t", shortened=0, over_long=False)
    return question | dict(generation=generation, score=score, invalid=False, cut=False, tokens=1, **more)


def test_figures_have_their_errors():
    row = results.figures_of(FREE, [line(i, float(i < 3), em=0.5) for i in range(10)], 7.3)
    assert row["accuracy"] == 0.3 and row["stderr"] == pytest.approx((0.3 * 0.7 / 9) ** 0.5)
    assert row["figures"] == {"em": [0.5, 0.0]} and row["tokens_per_sec"] == 7
    assert results.figures_of(FREE, [line(0, 1.0)], 0)["stderr"] is None
    # micro and macro
    lines = [line(i, float(i % 4 == 0), **{}) | {"group": "large" if i < 8 else "small"} for i in range(10)]
    row = results.figures_of(FREE._replace(macro=True), lines, 0)
    assert row["accuracy"] == 0.3 and row["figures"]["macro"][0] == pytest.approx((2 / 8 + 1 / 2) / 2)
    assert row["figures"]["macro"][1] == pytest.approx((1 / 4 * 3 / 4 / 7 + 1 / 4) ** 0.5 / 2)
    # a group of one varies as questions of the others do, on average; where all are of one, nothing is known
    scores = {"a": [0.0, 1.0], "b": [0.0, 0.0, 1.0], "c": [1.0], "d": [0.0]}
    some = [line(i, x) | {"group": g} for i, (g, x) in enumerate((g, x) for g, xs in scores.items() for x in xs)]
    pooled = (1 / 2 + 2 / 3) / 3
    for rows, macro in (some, [11 / 24, ((1 / 4 + 1 / 9 + 2 * pooled) / 16) ** 0.5]), (some[5:], [0.5, None]):
        found = results.figures_of(FREE._replace(macro=True), rows, 0)["figures"]["macro"]
        assert found == pytest.approx(macro)
    # samples: an error is one over questions
    lines = [line(i, float(s < i), "t" if s < i else f"{s}") | {"sample": s} for i in range(3) for s in range(20)]
    row = results.figures_of(FREE, lines, 0)
    assert row["count"] == 3 and row["accuracy"] == pytest.approx(0.05)
    assert row["figures"].keys() == {"pass@1", "pass@10"}  # the truth is no number, of which a majority could be taken
    some = results.figures_of(FREE, [x | {"truth": 7, "generation": "7" if x["score"] else "8"} for x in lines], 0)
    assert some["figures"]["maj@1"][0] == 0 and some["figures"]["maj@10"][0] == pytest.approx(2 / 3)
    assert row["figures"]["pass@1"] == pytest.approx([0.05, 0.05 / 3**0.5])
    assert row["figures"]["pass@10"][0] == pytest.approx((0 + 0.5 + 1 - 10 * 9 / (20 * 19)) / 3)


def test_mcnemar_is_exact():
    assert results.mcnemar(0, 0) == results.mcnemar(5, 5) == results.mcnemar(1, 0) == 1
    assert results.mcnemar(1, 9) == results.mcnemar(9, 1) == pytest.approx(2 * (1 + 10) / 2**10)
    scipy = pytest.importorskip("scipy.stats")
    for a, b in (3, 17), (40, 71), (3000, 3200):
        assert results.mcnemar(a, b) == pytest.approx(scipy.binomtest(a, a + b).pvalue, rel=1e-9)


def test_two_runs_are_compared(tmp_path):
    def save(name, scores):
        (tmp_path / name).mkdir(exist_ok=True)
        lines = [line(i, s, f"of {name}") for i, s in enumerate(scores)]
        (tmp_path / name / "generations-quiz.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return tmp_path / name

    a, b = save("a", [1.0] * 12 + [0.0] * 8), save("b", [0.0] + [1.0] * 18)  # one question less
    text = results.compare(a, b)
    row = text.splitlines()[3].split()
    assert row[:2] == ["quiz", "19"] and row[2:5] == ["63.16%", "94.74%", "+31.58%"]
    assert row[6:] == ["1", "7", f"{results.mcnemar(1, 7):.2g}", "McNemar"]
    assert text.count("better in a") == 1 and text.count("better in b") == 3 and "'of a'" in text
    done = run(tmp_path, "eval.py", "--compare=a,b").stdout
    assert done.splitlines()[2:] == text.splitlines()[2:]
    for names, fault in ("a", "names two directories, not 'a'"), ("a,d", "d has no generations-*.jsonl: run eval.py"):
        assert fault in run(tmp_path, "eval.py", f"--compare={names}", ok=False).stderr
    text = results.compare(a, save("b", [0.25] * 20))
    assert "bootstrap" in text and text.splitlines()[3].split()[4] == "-35.00%"
    equal = results.compare(a, a).splitlines()[3].split()
    assert equal[4] == "+0.00%" and equal[8:] == ["1", "McNemar"]
    (tmp_path / "c").mkdir()
    with pytest.raises(ValueError, match="c has no generations-.*: run eval.py with --save_generations=True for both"):
        results.compare(a, tmp_path / "c")
    path = tmp_path / "b" / "generations-quiz.jsonl"
    for text, fault in ("{", "generations-quiz.jsonl is damaged"), ("", "have no question of quiz in common"):
        path.write_text(text)
        with pytest.raises(ValueError, match=fault):
            results.compare(a, Path(tmp_path, "b"))
    path.write_text(json.dumps(line(3, 1.0) | {"truth": "u"}))
    with pytest.raises(ValueError, match="row 3 of quiz is not the same question in"):
        results.compare(a, Path(tmp_path, "b"))
    path.write_text(json.dumps(line(3, math.nan)))
    with pytest.raises(ValueError, match="line 1 has no truth or no score"):
        results.compare(a, Path(tmp_path, "b"))
