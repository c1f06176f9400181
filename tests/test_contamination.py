"""Questions in training data: what is counted is what a slow and plain recount counts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from scripts import run

import contamination


def write_bin(place, documents, dtype):
    np.concatenate([*documents, []]).astype(dtype).tofile(place / "train.bin")
    return np.cumsum([*map(len, documents)])


def plain_shares(questions, documents, n):
    seen = {tuple(d[i : i + n]) for d in documents for i in range(len(d) - n + 1)}
    for q in questions:
        there = [i for i in range(len(q) - n + 1) if tuple(q[i : i + n]) in seen]
        yield np.nan if len(q) < n else len({i + k for i in there for k in range(n)}) / len(q)


def plain_match(question, documents):
    best = 0
    for d in documents:
        for i in range(len(question)):
            for j in range(len(d)):
                k = 0
                while i + k < len(question) and j + k < len(d) and question[i + k] == d[j + k]:
                    k += 1
                best = max(best, k)
    return best


def scan(place, questions, documents, ns, dtype=np.uint16):
    """Shares by n, and of each question the longest match."""
    doc_ends = write_bin(place, documents, dtype)
    ends = np.cumsum([*map(len, questions)])
    ids = np.concatenate([*questions, [0] * max(ns)]).astype(dtype)
    by_n, best = contamination.scan(place / "train.bin", np.dtype(dtype), doc_ends, ids, ends, ns)
    tokens = np.fromfile(place / "train.bin", dtype)
    encoding = SimpleNamespace(decode=list)
    asked = [np.array(q, dtype) for q in questions]
    found = list(contamination.matches_of(asked, by_n[0][0], best, tokens, doc_ends, encoding, [("x", len(documents))]))
    return {grams.n: contamination.shares_of(grams, of_n, ends) for grams, of_n in by_n}, found


@pytest.mark.parametrize("dtype, block, threads", [("uint16", 1, 1), ("uint16", 7, 3), ("uint32", 2**16, 2)])
def test_shares_and_matches_are_those_of_a_plain_recount(dtype, block, threads, tmp_path, monkeypatch):
    """With few kinds of tokens, so that much is found: over any blocks and threads, and never across documents."""
    for key, value in dict(BLOCK=block, threads=threads).items():
        monkeypatch.setattr(contamination, key, value)
    rng = np.random.default_rng(0)
    high = {"uint16": 2**16, "uint32": 2**31}[dtype]
    for kinds in 2, 5:
        alphabet = rng.integers(0, high, kinds)
        sizes = rng.integers(1, 60, 12), rng.integers(1, 25, 30)
        documents, questions = ([alphabet[rng.integers(0, kinds, n)].tolist() for n in some] for some in sizes)
        questions += [documents[3][:9], questions[0] + documents[5], questions[1]]
        shares, matches = scan(tmp_path, questions, documents, (7, 3, 12), dtype)
        assert list(shares) == [3, 7, 12]
        for n, found in shares.items():
            np.testing.assert_array_equal(found, list(plain_shares(questions, documents, n)))
        longest = [plain_match(question, documents) for question in questions]
        assert all((3 <= m["match"] <= k) if k >= 3 else m["match"] == 0 for m, k in zip(matches, longest))
        for question, m in zip(questions, matches):
            text = "".join(f"{x} " for x in documents[m["document"]]) if m["match"] else ""
            starts = range(len(question) - m["match"] + 1)
            assert any("".join(f"{x} " for x in question[i : i + m["match"]]) in text for i in starts)


def test_no_ngram_crosses_documents_and_short_questions_have_no_share(tmp_path):
    a, b = list(range(1, 21)), list(range(21, 41))
    shares, matches = scan(tmp_path, [a + b, a[10:] + b[:10], a[:5]], [a, b], (13, 20))
    np.testing.assert_array_equal(shares[13], [1, 0, np.nan])
    assert [m["match"] for m in matches] == [20, 0, 0]


def test_the_longest_match_is_a_whole_copy_though_its_parts_come_before(tmp_path):
    q = list(range(100, 160))
    documents = [[1, *q[:35], 2], [3, *q[25:], 4], [5, *q, 6], [7, *q[:50]]]
    (shares, (match,)) = scan(tmp_path, [q], documents, (13,))
    assert shares[13] == [1] and (match["match"], match["document"]) == (60, 2)
    assert match["excerpt"] == documents[2]


def test_subsets_and_z():
    """Llama 2's four, and sigma that of all scores."""
    shares = np.array([0, 0.1, 0.19999, 0.2, 0.5, 0.79999, 0.8, 1, np.nan])
    scores = np.array([0, 0, 1, 0, 1, 1, 1, 1, 0.0])
    table = contamination.subsets_of(shares, scores)
    assert [r["questions"] for r in table.values()] == [8, 3, 5, 6, 2]
    sigma = np.sqrt(5 / 8 * 3 / 8)
    assert table["clean"]["z"] == pytest.approx((1 / 3 - 5 / 8) / (sigma / 3**0.5))
    assert table["dirty"]["z"] == pytest.approx((1 - 5 / 8) / (sigma / 2**0.5))
    assert table["dirty"]["share"] == 0.9 and table["all"]["z"] is None and not contamination.is_flagged(table)
    many = contamination.subsets_of(np.tile([0.0, 1.0], 50), np.tile([0.0, 1.0], 50))
    assert contamination.is_flagged(many) and many["dirty"]["z"] == pytest.approx(50**0.5)
    assert not contamination.is_flagged(contamination.subsets_of(np.tile([0.0, 1.0], 50), np.tile([1.0, 0.0], 50)))
    same = contamination.subsets_of(np.tile([0.0, 1.0], 50), np.ones(100))  # no sigma
    assert same["clean"]["z"] is None and not contamination.is_flagged(same)
    assert contamination.subsets_of(np.zeros(3))["dirty"] == {"questions": 0, "share": None, "score": None, "z": None}


@pytest.fixture
def place(tmp_path):
    """data/planted, of bytes, whose 50 documents hold the questions of quiz.jsonl, one each, in prefix or response: ten
    whole, ten whole within other text, ten by half, ten reworded in every eighth letter, and ten not at all."""
    questions = ["".join(q) for q in np.random.default_rng(0).choice([*"abcdefghijklmnopqrstuvwxyz"], (50, 120))]
    rows = []
    for i, q in enumerate(questions):
        q = questions[i] = "q" + q[1:-1] + "?"
        reworded = "".join(c if k % 8 else c.upper() for k, c in enumerate(q)).replace("Q", "_")
        text = (q, f"Exam: {q} Good luck.", q[:60], reworded, "Nothing.")[i // 10]
        rows.append(dict(zip(("instruction", "response"), (text, "A.") if i % 2 else ("B", text))))
    quiz = [{"prompt": f" {q}\n", "answer": str(i)} for i, q in enumerate(questions)]
    for name, some in ("quiz", quiz), ("rows", rows):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    run(tmp_path, "data.py", "--source=rows.jsonl", "--dataset=planted", "--val_fraction=0.0")
    return tmp_path


ARGS = ["--dataset=planted", "--tasks=quiz.jsonl", "--ngrams=(13, 20)"]


def lines_of(place, task="quiz"):
    lines = [json.loads(line) for line in (place / "out" / f"contamination-{task}.jsonl").read_text().splitlines()]
    return {n: [line for line in lines if line["n"] == n] for n in (13, 20)}


def save_answers(place, score):
    (place / "answers").mkdir()
    rows = [json.loads(line) for line in (place / "quiz.jsonl").read_text().splitlines()]
    lines = []
    for i, k in ((i, k) for i in range(45) for k in (0, 1)):
        prompt = "A shot.\n\n" + rows[i]["prompt"]
        lines.append(dict(row=i, sample=k, group="", prompt=prompt, generation="", truth="", score=score(i, k)))
    (place / "answers" / "generations-quiz.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_planted_questions_are_found_in_prefix_and_response(place):
    said = run(place, "contamination.py", *ARGS).stdout
    for lines in lines_of(place).values():
        assert [line["row"] for line in lines] == [*range(50)]
        share = [line["share"] for line in lines]
        assert share == [1.0] * 20 + [0.5] * 10 + [0.0] * 20
        assert all(line["document"] == line["row"] for line in lines[:30])
        assert "Exam: " in lines[11]["excerpt"] + lines[10]["excerpt"]
    assert "task   n  too short  contaminated  all  clean  not clean  not dirty  dirty\n" in said
    assert "quiz  13          0        50.00%   50     20         30         30     20\n" in said
    assert "quiz 0: 100.0%, " in said and "document 0" in said
    assert "| quiz | 20 | 0 | 50.00% | 50 | 20 | 30 | 30 | 20 |\n" in (place / "out" / "contamination.md").read_text()


def test_scores_of_eval_make_z(place):
    """The mean over samples of a question; only the 45 answered ones count."""
    save_answers(place, lambda i, k: float(i < 30) * (1 - k / 2))
    said = run(place, "contamination.py", *ARGS, "--answers=answers").stdout
    assert "quiz: 45 of 50 questions are answered in answers" in said
    assert "quiz, n = 13: all four |Z| are above 2" in said and "quiz, n = 20: all" in said
    z = (0.75 - 0.5) / (0.125**0.5 / 20**0.5)
    assert "  45: 50.00%  15: 0.00%, Z -" in said and f"  20: 75.00%, Z {z:+.2f}\n" in said
    (place / "quiz.jsonl").write_text('{"prompt": "Another question?", "answer": "1"}\n')
    failed = run(place, "contamination.py", *ARGS, "--answers=answers", ok=False).stderr
    assert failed.splitlines()[-1].endswith(": row 0 of quiz is not the question that is answered in answers")


def test_files_of_the_matches_are_named_where_meta_has_them(place):
    path = place / "data" / "planted" / "meta.json"
    meta = json.loads(path.read_text())
    sizes = {"whole.jsonl": 10, "none.jsonl": 0, "within.jsonl": 10, "rest.jsonl": 30}
    of = {name: {"documents": n, "tokens": 0} for name, n in sizes.items()}
    meta["files"] = [meta["files"][0] | {"name": name, "train": counts} for name, counts in of.items()]
    path.write_text(json.dumps(meta))
    said = run(place, "contamination.py", *ARGS).stdout
    assert "longest matches (of how many questions): whole.jsonl (10), within.jsonl (10), rest.jsonl (10)." in said
    assert lines_of(place)[20][11]["file"] == "within.jsonl" and "of whole.jsonl: " in said
    meta["files"] = [{"name": "x"}]
    path.write_text(json.dumps(meta))
    assert run(place, "contamination.py", *ARGS, ok=False).stderr.splitlines()[-1].endswith("damaged: it lacks 'group'")


BAD = {
    "--dataset=nowhere": "there is no data/nowhere/meta.json",
    "--tasks=gsm9k": "there is no task 'gsm9k'",
    "--tasks=heldout": "data/planted has no run.json",
    "--tasks=gsm8k": "there is no directory nowhere/gsm8k",
    "--tasks=none.jsonl": "there is no file none.jsonl",
    "--ngrams=()": "ngrams are numbers of tokens from 1 to 1,000",
    "--ngrams=(13, 0)": "ngrams are numbers of tokens from 1 to 1,000",
    "--ngrams=13": "ngrams must be a tuple",
    "--limit=-1": "must be at least 0",
    "--answers=nowhere": "nowhere has no generations-quiz.jsonl: run eval.py with --save_generations=True",
    "--out_dir=quiz.jsonl": "quiz.jsonl: File exists",
}


def test_what_is_wrong_ends_with_a_sentence(place):
    for arg, sentence in BAD.items():
        failed = run(place, "contamination.py", *ARGS, "--data_dir=nowhere", arg, ok=False)
        assert sentence in failed.stderr.splitlines()[-1] and "Traceback" not in failed.stderr, arg
    (place / "data" / "planted" / "train.bin").write_bytes(b"\0\0" * 99)
    assert "train.bin is damaged" in run(place, "contamination.py", *ARGS, ok=False).stderr.splitlines()[-1]
