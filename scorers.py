"""When an answer is right.

A scorer is score(generation, question) -> {"score": from 0 to 1, "invalid": whether there was no answer to compare},
and perhaps further figures from 0 to 1. Of a question (tasks.py) it reads the truth and the choices.
`python scorers.py` is the process in which math-verify runs, see equal_in_mathematics().
"""

import json
import re
import string
import subprocess
import sys
from collections import Counter
from decimal import Decimal
from math import comb
from threading import Lock, Timer

import numpy as np


def verdict(right, invalid=False):
    return {"score": float(right), "invalid": invalid}


# ---- answers within a text ----
def last_box(text):
    """What the last \\boxed{} holds, or where there is none the last \\fbox{}; None where that has no end."""
    _, box, rest = text.rpartition("\\boxed")
    if not box:
        _, box, rest = text.rpartition("\\fbox")
    content, depth = rest.partition("{")[2] if box else "", 1
    for i, character in enumerate(content):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return content[:i].strip()
    return None


def extract(text):
    """The answer in a text: what the last box holds, or what follows the last ####, or all of it."""
    box = last_box(text)
    return text.rpartition("####")[2] if box is None else box


# 18, -2,000, $2.50, .5; not a part of a word or of another number, as in x2, 1e3 and 2.5.1
NUMBER = re.compile(r"(?<![\w.])[-+]?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?![\w.]*\d)", re.ASCII)


def numbers_in(text):
    return [Decimal(re.sub("[$,]", "", number)) for number in NUMBER.findall(text)]


def same_answer(generation, question):
    """The scorer of a task of your own. Answers are compared as numbers where the truth is one: that of a generation is
    the only number in it, as in "24 apples", and is invalid with none or several. Other answers are compared as text,
    but for white space; invalid is then an empty one."""
    answer, truth = (" ".join(extract(t).replace("\u2212", "-").split()) for t in (generation, str(question.truth)))
    if NUMBER.fullmatch(truth):
        found, [truth] = numbers_in(answer), numbers_in(truth)
        answer = found[0] if len(found) == 1 else None
    return verdict(answer == truth, answer in ("", None))


def to_whole_number(text):
    """The number that a text writes, commas and $ aside and without its decimals, or None."""
    try:
        return int(float(text.replace(",", "").replace("$", "")))
    except (ValueError, OverflowError):
        return None


def same_whole_number(generation, question):
    """GSM8K's scorer: int(float()) of the answer, as in the paper, so that 2.9 counts as 2. Where there is no box, the
    paper takes the whole text; here it is what follows ####, which models trained on GSM8K itself write."""
    answer = to_whole_number(extract(generation))
    return verdict(answer == question.truth, answer is None)


# ---- choices ----
def choice(letter, question):
    """What is none of the choices is invalid and counts as a guess at random."""
    if letter not in question.choices:
        return verdict(1 / len(question.choices), invalid=True)
    return verdict(letter == question.truth)


def one_letter(generation, question):
    """The scorer of questions that one generated token answers."""
    return choice(generation.strip().upper(), question)


def last_letter(generation, question):
    """MMLU-Pro's scorer: the last "(X)" of the last box or of the text, or else the last X that is a word."""
    text, letters = last_box(generation) or generation, "|".join(question.choices)
    found = re.findall(rf"\(({letters})\)", text) or re.findall(rf"\b({letters})\b", text)
    return choice(found[-1] if found else None, question)


# ---- DROP ----
def is_number(text):
    try:
        float(text)
        return True
    except ValueError:
        return False


def drop_words(text):
    """The words of an answer as DROP compares them: lower case, without articles and punctuation, 5 as 5.0."""
    words = []
    for word in re.split("[ -]", text):
        word = word.lower()
        if not is_number(word):
            word = "".join(character for character in word if character not in string.punctuation)
        word = str(float(word)) if is_number(word) else re.sub(r"\b(a|an|the)\b", " ", word)
        words += word.split()
    return words


def drop_f1(words, gold):
    """F1 of two sets of words; 0 where the gold one has numbers and the other has none of them."""
    numbers, both = {word for word in gold if is_number(word)}, len(gold & words)
    if numbers and not numbers & words:
        return 0.0
    precision, recall = both / len(words) if words else 1.0, both / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def drop(generation, question):
    """DROP's scorer, by its authors' rules as lm-evaluation-harness has them. The truth is a list of answers, each a
    list of spans; the best answer counts. A generation is one span: in the best alignment with the spans of an answer
    it stands beside the nearest of them, and gets nothing for the rest."""
    words, em, f1 = drop_words(generation.strip()), 0.0, 0.0
    for answer in question.truth:
        if answer[0].strip():
            spans = [drop_words(span) for span in answer]
            nearest = max(drop_f1({*words}, {*span}) for span in spans)
            em, f1 = max(em, float(spans == [words])), max(f1, float(np.round(nearest / len(spans), 2)))
    return verdict(f1, not generation.strip()) | {"em": em}


# ---- mathematics ----
worker, worker_lock = None, Lock()
SECONDS = 20  # math-verify ends itself after 5 for each of its three steps, but not within one large multiplication


def start_math_verify():
    """Start the process of math-verify where it does not run. Raises ValueError where the package is missing."""
    global worker
    if worker is None:
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        process = subprocess.Popen([sys.executable, __file__], **pipes, start_new_session=True)  # Ctrl-C is not for it
        if process.stdout.readline() != "ready\n":
            raise ValueError("MATH and AIME are scored by math-verify: pip install math-verify")
        worker = process


def equal_in_mathematics(truth, answer):
    """Whether math-verify finds two texts equal. It needs the main thread, for its signals, and some texts make it hang
    or crash; so it runs in a process of its own, may be called from any thread, and what ends it is not equal."""
    global worker
    with worker_lock:
        start_math_verify()
        timer, right = Timer(SECONDS, worker.kill), None
        timer.start()
        try:
            worker.stdin.write(json.dumps([truth, answer]) + "\n")
            worker.stdin.flush()
            right = json.loads(worker.stdout.readline())
        except (OSError, ValueError):  # it has died
            pass
        finally:
            timer.cancel()
            if right is None:
                worker.kill()
                worker = None
    return bool(right)


def serve_math_verify():
    """Answer lines of JSON, [truth, answer], with true or false."""
    from math_verify import parse, verify

    print("ready", flush=True)
    for line in sys.stdin:
        try:
            right = bool(verify(*map(parse, json.loads(line))))
        except BaseException:  # its TimeoutException is no Exception
            right = False
        print(json.dumps(right), flush=True)


def same_mathematics(generation, question):
    """MATH's and AIME's scorer: math-verify of the last box, or without one of the whole text, which is invalid too.
    The published code takes the boxes off first, and math-verify then reads many a formula wrongly or not at all, as
    \\sqrt{51}; that figure is `unboxed`, the one to set beside the paper's."""
    box = last_box(generation)
    boxed = generation if box is None else f"\\boxed{{{box}}}"
    right = equal_in_mathematics(f"\\boxed{{{question.truth}}}", boxed)
    unboxed = equal_in_mathematics(question.truth, generation if box is None else box)
    return verdict(right, box is None) | {"unboxed": float(unboxed)}


def pass_at(k, scores):
    """How likely one of k samples is right, from the scores of n >= k samples, without bias (Chen et al. 2021)."""
    return 1 - comb(sum(score < 1 for score in scores), k) / comb(len(scores), k)


def majority_at(k, generations, truth):
    """Whether the truth is among the k most frequent answers of these generations, whole numbers from 1 to 999."""
    votes = Counter()
    for text in generations:
        box = last_box(text)
        try:
            votes[int(text if box is None else box)] += 1
        except ValueError:
            pass
    valid = [number for number, _ in votes.most_common() if 1 <= number <= 999]
    return float(int(truth) in valid[:k])


if __name__ == "__main__":
    serve_math_verify()
