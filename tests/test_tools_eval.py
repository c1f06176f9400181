"""compare, contamination and the adapter for lm-evaluation-harness count as a plain recount does."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY

from tools import compare, contamination

# -----------------------------------------------------------------------------
# compare


def write_scores(directory, scores):
    Path(directory).mkdir()
    with open(Path(directory, "generations-quiz.jsonl"), "w") as file:
        for row, score in enumerate(scores):
            line = {"row": row, "prompt": f"{row}?", "truth": "t", "score": score}
            print(json.dumps(line), file=file)


def test_p_is_that_of_a_coin(run):
    """For scores of 0 and 1, that of McNemar's exact test."""
    differences = np.array([-1.0] * 3 + [1.0] * 12 + [0.0] * 50)
    exact = 2 * (1 + 15 + 105 + 455) / 2**15  # at most 3 of 15
    assert compare.permutation_test(differences) == pytest.approx(exact, abs=0.01)
    assert compare.permutation_test(np.zeros(9)) == 1
    write_scores("out-a", [1.0] * 12 + [0.0] * 8)
    write_scores("out-b", [0.0] + [1.0] * 18)  # one question less
    row = run("tools/compare.py").splitlines()[1].split()
    assert row[:5] == ["quiz", "19", "63.16%", "94.74%", "+31.58%"]
    assert row[6:8] == ["1", "7"]
    with pytest.raises(SystemExit, match="no generations of the same task"):
        run("tools/compare.py", "--b=nowhere")


# -----------------------------------------------------------------------------
# contamination


def plain_shares(questions, documents, n):
    seen = set()
    for d in documents:
        seen |= {tuple(d[i : i + n]) for i in range(len(d) - n + 1)}
    for q in questions:
        found = set()
        for i in range(len(q) - n + 1):
            if tuple(q[i : i + n]) in seen:
                found |= set(range(i, i + n))
        yield np.nan if len(q) < n else len(found) / len(q)


@pytest.mark.parametrize("dtype, block", [("uint16", 1), ("uint16", 7), ("uint32", 2**16)])
@pytest.mark.parametrize("n", [3, 7, 12])
def test_shares_are_those_of_a_plain_recount(dtype, block, n, monkeypatch):
    """Over any blocks, and never across documents; few kinds of tokens, so that much is found."""
    monkeypatch.setattr(contamination, "BLOCK", block)
    rng = np.random.default_rng(0)
    alphabet = rng.integers(np.iinfo(dtype).max, size=3)
    documents = [rng.choice(alphabet, size) for size in rng.integers(1, 60, 12)]
    questions = [rng.choice(alphabet, size) for size in rng.integers(1, 25, 30)]
    questions.append(documents[3][:9])
    tokens = np.concatenate(documents).astype(dtype)
    ids = np.concatenate(questions).astype(dtype)
    document_ends = np.cumsum([len(d) for d in documents])
    ends = np.cumsum([len(q) for q in questions])
    starts, place = contamination.scan(tokens, document_ends, ids, ends, n)
    shares = contamination.shares_of(starts, place, ends, n)
    np.testing.assert_array_equal(shares, list(plain_shares(questions, documents, n)))
    for start, at in zip(starts, place):
        assert at < 0 or (tokens[at : at + n] == ids[start : start + n]).all()


def test_subsets_and_z():
    """Llama 2's four, and sigma is that of all scores."""
    shares = np.array([0, 0.1, 0.19999, 0.2, 0.5, 0.79999, 0.8, 1, np.nan])
    scores = np.array([0, 0, 1, 0, 1, 1, 1, 1, 0.0])
    table = contamination.subsets_of(shares, scores)
    assert [table[name][0] for name in table] == [8, 3, 5, 6, 2]
    sigma = np.sqrt(5 / 8 * 3 / 8)
    assert table["clean"][2] == pytest.approx((1 / 3 - 5 / 8) / (sigma / 3**0.5))
    assert table["dirty"][1] == 1
    assert table["dirty"][2] == pytest.approx(3 / 8 / (sigma / 2**0.5))


def test_planted_questions_are_found(run):
    rng = np.random.default_rng(0)
    letters = list("abcdefghijklm")
    texts = ["".join(rng.choice(letters, 80)) for _ in range(20)]
    with open("rows.jsonl", "w") as rows, open("quiz.jsonl", "w") as quiz:
        for i, text in enumerate(texts):
            planted = "Nothing."
            if i < 5:
                planted = f"Exam: {text} Good luck."
            elif i < 10:
                planted = text[:40]
            pair = {"instruction": planted, "response": "A"}
            if i % 2:
                pair = {"instruction": "B", "response": planted}
            print(json.dumps(pair), file=rows)
            print(json.dumps({"prompt": f" {text}\n", "answer": "1"}), file=quiz)
    run("data.py", "--source=rows.jsonl", "--dataset=planted", "--val_fraction=0.0", "--workers=1")
    write_scores("answers", [1.0] * 5 + [0.0] * 10)
    said = run("tools/contamination.py", "--dataset=planted", "--tasks=quiz.jsonl")
    assert "dirty            5" in said and "Z" not in said
    lines = Path("out/contamination-quiz.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    shares = [line["share"] for line in lines[:20]]
    assert shares == [1.0] * 5 + [0.5] * 5 + [0.0] * 10
    assert all(line["document"] == line["row"] for line in lines[:10])
    answers = "--answers=answers"
    said = run("tools/contamination.py", "--dataset=planted", "--tasks=quiz.jsonl", answers)
    assert "all             15   33.33%" in said and "dirty            5  100.00%  Z +3.16" in said


# -----------------------------------------------------------------------------
# lm_eval_hrm


@pytest.fixture
def lm(run, monkeypatch):
    """The adapter, on stand-ins for what it takes from lm-eval."""
    stand_ins = {
        "__main__": {"cli_evaluate": None},
        "api.model": {"LM": object},
        "api.registry": {"register_model": lambda name: lambda cls: cls},
        "models.utils": {"normalize_gen_kwargs": lambda options, most: options},
    }
    for name in "", "api", "models", *stand_ins:
        module = ModuleType(f"lm_eval.{name}".strip("."))
        vars(module).update(stand_ins.get(name, {}))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "tools.lm_eval_hrm", raising=False)
    from tools.lm_eval_hrm import HRMForHarness

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run("train.py", *TINY, "--max_iters=2")
    return HRMForHarness("out", "synth+cot", device="cuda:0", dtype="float32")


def requests(*args):
    return [SimpleNamespace(args=arg) for arg in args]


def test_likelihoods_are_those_of_the_prefix_read_in_both_directions(lm):
    pairs = [
        ("Two?", "four"),
        ("Two?", "4"),
        ("Two?", "5"),
        ("", "from nothing"),
        ("é", ""),
        ("long" * 70, "cut"),
    ]
    found = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    for (context, continuation), (log_p, best) in zip(pairs, found):
        response = lm.tokenizer.encode(continuation)
        prompt = lm.tokenizer.prompt(context, "synth,cot")
        n_cut = max(0, len(prompt) + len(response) - 1 - 256)
        prompt = prompt[:3] + prompt[3 + n_cut :]
        idx = torch.tensor([prompt + response[:-1]])
        prefix = torch.arange(idx.size(1))[None] < len(prompt)
        logits = lm.model(idx, prefix=prefix)[0][0, len(prompt) - 1 :]
        loss = torch.nn.functional.cross_entropy(
            logits[: len(response)],
            torch.tensor(response, dtype=torch.long),
            reduction="sum",
        )
        assert log_p == pytest.approx(-loss.item(), abs=1e-3)
        assert best == (logits.argmax(-1).tolist()[: len(response)] == response)
    [whole] = lm.loglikelihood_rolling(requests(("from nothing",)), True)
    assert whole == pytest.approx(found[3][0], abs=1e-4)


def test_generation_ends_at_a_stop_string(lm):
    options = {"until": [], "max_gen_toks": 9, "do_sample": False}
    [text] = lm.generate_until(requests(("How?", options)), True)
    prompt = lm.tokenizer.prompt("How?", "synth,cot")
    eoa = lm.tokenizer.id_of["eoa"]
    [new] = lm.model.generate([prompt], 9, stop_token=eoa)
    assert text == lm.tokenizer.decode(new)
    stop = text[2]
    options["until"] = ["", stop]
    [stopped] = lm.generate_until(requests(("How?", options)), True)
    assert stopped == text.partition(stop)[0]
