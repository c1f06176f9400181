"""Answers to a file of prompts."""

import json

import pytest
import torch
from conftest import tiny_model

import sample
from tokenizer import encode_prompt, make_encoding, special_id

PROMPTS = ["How many?", "", "a b\u2028c", "x" * 70, "  and then ", "é" * 12]
ENCODING = make_encoding("bytes")


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Runs sample.py's main() in tmp_path, with a tiny model. Returns the lines of answers.jsonl."""
    model = tiny_model(n_layer=2)
    with torch.no_grad():
        model.lm_head[special_id(ENCODING, "eoa")] *= 2  # so that some answers end
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sample, "load_for_inference", lambda *_: (model, ENCODING, "cot"))

    def answers(prompts="prompts.txt", **changes):
        for key, value in {"jsonl": prompts, "save": "answers.jsonl", "max_new_tokens": 30, **changes}.items():
            monkeypatch.setattr(sample, key, value)
        sample.main()
        return [json.loads(line) for line in open("answers.jsonl", encoding="utf-8")]

    answers.model = model
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return answers


def test_each_prompt_gets_its_own_answer(answers, tmp_path, capsys):
    """Whatever the batch, and with its own condition."""
    lines = answers()
    said = capsys.readouterr().out
    assert "prompts.txt: 5 prompts; 1 lines are empty" in said and "answers.jsonl: 4 answers" in said
    assert "1 prompts are longer than block_size = 64 tokens, the first in line 4, and get no answer" in said
    assert sorted(line["row"] for line in lines) == [0, 2, 4, 5]
    for line in lines:
        assert line["prompt"] == PROMPTS[line["row"]]
        prompt, eoa = encode_prompt(ENCODING, line["prompt"], "cot"), special_id(ENCODING, "eoa")
        [alone] = answers.model.generate([prompt], 30, stop_token=eoa)
        assert line["answer"] == ENCODING.decode(alone)
        assert line["finished"] == (len(alone) < min(30, 65 - len(prompt)))
    rows = [{"prompt": PROMPTS[0]}, {"instruction": PROMPTS[2], "condition": "synth", "response": ""}, {"prompt": " "}]
    tmp_path.joinpath("p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    tmp_path.joinpath("answers.jsonl").unlink()
    one, two = sorted(answers("p.jsonl", batch_size=1), key=lambda line: line["row"])
    assert "p.jsonl: 2 prompts; 2 lines are empty" in capsys.readouterr().out
    assert one in lines
    [alone] = answers.model.generate([encode_prompt(ENCODING, PROMPTS[2], "synth")], 30, stop_token=eoa)
    assert two["answer"] == ENCODING.decode(alone)


def test_samples_are_numbered_and_follow_the_seed(answers, tmp_path):
    runs = []
    for seed in 1, 1, 2:
        runs.append(answers(num_samples=3, temperature=1.0, seed=seed))
        tmp_path.joinpath("answers.jsonl").unlink()
    assert runs[0] == runs[1] != runs[2] and len(runs[0]) == 12
    assert {(line["row"], line["sample"]) for line in runs[2]} == {(row, k) for row in (0, 2, 4, 5) for k in range(3)}
    assert len({line["answer"] for line in runs[0]}) > 9


def test_an_interrupted_file_goes_on(answers, tmp_path, monkeypatch, capsys):
    """Ctrl-C, and a kill within a line, lose nothing that is complete."""
    whole, path, stream = answers(), tmp_path / "answers.jsonl", sample.stream
    content = path.read_bytes()

    def interrupted(*args):
        for events in stream(*args):
            yield events
            if any(id is None for _, id in events):
                raise KeyboardInterrupt

    path.unlink()
    monkeypatch.setattr(sample, "stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers()
    kept = path.read_bytes()
    assert content.startswith(kept) and 0 < len(kept) < len(content)
    monkeypatch.setattr(sample, "stream", stream)
    path.write_bytes(kept + content[len(kept) :][:20])
    assert sorted(answers(), key=str) == sorted(whole, key=str)
    assert f"4 answers, {len(kept.splitlines())} of them from before" in capsys.readouterr().out
    kept = path.read_bytes()
    answers()
    assert path.read_bytes() == kept


@pytest.mark.parametrize(
    "content, sentence",
    [
        (b'{"prompt": "a"}\n{"prompt": 5}\n', "p.jsonl, line 2: no text in the field"),
        (b'\n\n{"prompt": "a"\n', "p.jsonl, line 3: not a JSON object with a prompt or an instruction"),
        (b'["prompt"]\n', "p.jsonl, line 1: not a JSON object with"),
        (b'"prompt"', "p.jsonl, line 1: not a JSON object with"),
        (b'{"question": "a"}', "p.jsonl, line 1: not a JSON object with a prompt or an instruction"),
        (b'{"prompt": "a", "condition": "x"}', "p.jsonl, line 1: unknown condition"),
        (b'{"prompt": "\\ud800"}', "p.jsonl, line 1: half a surrogate pair"),
        (b'{"prompt": "\xff"}', "p.jsonl, line 1: not UTF-8"),
    ],
)
def test_bad_lines_are_named(answers, tmp_path, content, sentence):
    tmp_path.joinpath("p.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        answers("p.jsonl")
    assert not tmp_path.joinpath("answers.jsonl").exists()


def test_files_of_something_else_are_not_touched(answers, tmp_path):
    path = tmp_path / "answers.jsonl"
    other = json.dumps({"row": 0, "prompt": "another", "answer": "", "finished": True}) + "\n"
    for content in "notes", "notes\n", '{"row": 0}\n', other, other[:-9] + "\n":
        path.write_text(content)
        with pytest.raises(ValueError, match="answers.jsonl holds something else than answers to these prompts"):
            answers()
        assert path.read_text() == content
    for changes in dict(save=""), dict(prompts=""), dict(batch_size=0):
        with pytest.raises(ValueError, match="--jsonl=FILE, --save=FILE for the answers, and a batch_size"):
            answers(**changes)
