"""sample.py answers what it is asked."""

import io
import json
from pathlib import Path

import pytest
from conftest import TINY


@pytest.fixture
def ask(run):
    """sample.py with the model of a short run."""
    run("train.py", *TINY, "--max_iters=2")

    def ask(*args):
        return run("sample.py", "--device=cpu", "--max_new_tokens=6", *args)

    return ask


def test_questions_on_the_command_line_in_a_file_and_typed_get_the_same_answer(ask, monkeypatch):
    Path("question.txt").write_text("What is 2+2?\n")
    said = ask("--prompt=What is 2+2?")
    assert "What is 2+2?\n---\n" in said
    answer = said.partition("---\n")[2].strip()
    assert ask("--prompt=FILE:question.txt") == said
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 2+2?\n\n"))
    assert answer in ask("--interactive=True")
    Path("q.jsonl").write_text('{"prompt": "What is 2+2?", "id": 7}\n\n{"prompt": "Why?"}\n')
    ask("--jsonl=q.jsonl", "--save=a.jsonl")
    lines = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["row"] == 0)
    assert first["answer"].strip() == answer and first["id"] == 7 and len(lines) == 2


def test_without_a_prompt_it_asks_held_out_questions(ask):
    said = ask()
    assert said.count("---") == 3 and said.count("How many") == 3


def test_samples_are_repeatable(ask):
    args = ["--prompt=What is 2+2?", "--temperature=1.0", "--num_samples=2"]
    said = ask(*args)
    assert "--- sample 1" in said and "--- sample 2" in said
    assert ask(*args) == said != ask(*args, "--seed=2")


def test_a_mistake_ends_with_a_sentence(ask):
    for args, sentence in {
        ("--prompt=FILE:none.txt",): "there is no file none.txt",
        ("--jsonl=none.jsonl", "--save=a"): "there is no file none.jsonl",
        ("--jsonl=q.jsonl",): "--jsonl=FILE and --save=FILE go together",
        ("--out_dir=nowhere",): "there is no model in nowhere",
        ("--prompt=x", "--condition=loud"): "direct, cot, noisy, synth",
        (f"--prompt={'x' * 301}",): "a prompt has 304 tokens; the model takes 256",
    }.items():
        with pytest.raises(SystemExit, match=sentence):
            ask(*args)
