"""What evaluation says and writes."""

import errno
import json

import pytest
import torch
from conftest import tiny_model

import eval as evaluation
from scorers import same_answer
from tokenizer import encode_prompt, make_encoding

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
