r"""
The benchmarks of the paper: how a row becomes a question, when an answer is right, and TASKS, the
table of both.

A file of JSON lines with "prompt" and "answer" is a task without any code:
python eval.py --tasks=path/to/quiz.jsonl. Another of your own is a function and an entry of the
table, at the end of this file:

    def capitals(row):
        return Question(f"What is the capital of {row['country']}?", row["capital"])

    TASKS["capitals"] = Task(capitals, same_answer, hub="me/capitals", max_new_tokens=64)

Its rows are those of DATA_DIR/capitals/test.jsonl or .parquet; without --data_dir, those of the
hub's me/capitals.
"""

import json
import re
import string
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from decimal import Decimal
from itertools import islice
from math import comb
from pathlib import Path
from threading import Timer
from typing import NamedTuple

from data import word_problems
from loader import Loader, read_meta
from tokenizer import load_tokenizer


class Question(NamedTuple):
    prompt: object  # the instruction without shots, or the ids of a whole prefix
    truth: object  # what the scorer compares with
    choices: str = ""  # the letters to choose from
    group: str = ""  # subject or category
    shots: tuple = ()  # texts to stand before the prompt


class Task(NamedTuple):
    question: Callable  # row -> Question
    score: Callable  # (answer, Question) -> verdict()
    hub: str = ""
    configs: str = ""  # of the hub's dataset, with spaces between
    split: str = "test"
    shots_split: str = ""
    n_shots: int = 0
    folder: str = ""  # in data_dir; "": the task's name
    condition: str = "direct"  # "": that of most of the model's training data
    context: int = 4096  # tokens of prompt and answer
    max_new_tokens: int = 1  # 0: twice as many as the longest truth has
    samples: int = 1  # answers to each question
    temperature: float = 0.0
    paper: tuple = ()  # percentages of the paper's HRM 1B and 0.6B
    macro: bool = False  # report the mean over groups, too


# -----------------------------------------------------------------------------
# free answers


def gsm8k(row):
    """Grade-school mathematics (Cobbe et al. 2021)."""
    truth = whole_number(row["answer"].rpartition("####")[2])
    if truth is None:
        raise ValueError("the answer does not end in #### and a number")
    return Question(row["question"], truth)


def math(row):
    """Competition mathematics (Hendrycks et al. 2021)."""
    truth = last_box(row["solution"])
    if truth is None:
        raise ValueError("the solution has no \\boxed{} answer")
    return Question(row["problem"], truth or "\\text{none}")  # a few boxes are empty


def aime(row):
    """Competition mathematics whose answers are whole numbers from 1 to 999."""
    answer = row.get("answer")
    if answer is None:  # as in 2024's
        answer = last_box(row["solution"])
    return Question(row["problem"], str(int(answer)))


def drop(row):
    """
    Reading with discrete reasoning (Dua et al. 2019). The truth has a list of spans for each
    annotator. The hub has `answer` and `validated_answers`, a dict of lists; copies, `answers`.
    """
    annotators = drop_answers(row.get("answers", row.get("answer")))
    annotators += drop_answers(row.get("validated_answers"))
    truth = []
    for answer in annotators:
        date = answer["date"]
        if answer["number"] != "":
            truth.append([str(answer["number"])])
        elif len(answer["spans"]):
            truth.append(list(answer["spans"]))
        else:
            truth.append([f"{date['day']} {date['month']} {date['year']}".strip()])
    if not truth:
        raise ValueError("there is no answer")
    return Question(f"{row['passage']}\nQ: {row['question']}\nA:", truth)


def drop_answers(found):
    """One answer, a list of answers, a dict of lists, or None -> a list of answers."""
    if isinstance(found, dict) and isinstance(found["number"], list):
        columns = zip(found["number"], found["spans"], found["date"])
        return [{"number": number, "spans": spans, "date": date} for number, spans, date in columns]
    return [found] if isinstance(found, dict) else list(found or [])


DROP_SHOTS = {  # the paper's: a question of the train split, and how its passage begins
    "How many points did the buccaneers need to tie in the first?": "To start the season, the Lion",
    "How many games had the Bills won before this game?": "Trying to snap a two-game skid, the Bi",
    "How many years before Navarrase used the captivity of John II?": "The French king, John II, ",
}


def drop_shots(rows):
    """The Questions of DROP_SHOTS, in that order."""
    found = {}
    for row in rows:
        passage, question = row["passage"].strip(), row["question"].strip()
        if question in DROP_SHOTS and passage.startswith(DROP_SHOTS[question]):
            shot = drop({**row, "passage": passage, "question": question})
            found.setdefault(question, shot._replace(truth=", ".join(shot.truth[0])))
        if len(found) == len(DROP_SHOTS):
            return [found[question] for question in DROP_SHOTS]
    sys.exit(f"the train split of drop has only {len(found)} of the three shots")


def quiz(row):
    """A row of a file of your own."""
    return Question(row["prompt"], str(row["answer"]))


def problem(row):
    """A word problem with numbers that no training problem has: the demo's validation split."""
    return Question(row["instruction"], row["response"])


# -----------------------------------------------------------------------------
# multiple choice


def multiple_choice(question, texts, right, group=""):
    """right: the number of the right text, from 0."""
    letters = string.ascii_uppercase[: len(texts)]
    lines = [f"{letter}. {text.strip()}" for letter, text in zip(letters, texts)]
    prompt = "\n".join([question.strip(), *lines, "Answer:"])
    return Question(prompt, letters[right], letters, group)


def mmlu(row):
    return multiple_choice(row["question"], row["choices"], row["answer"], row["subject"])


def arc(row):
    choices = row["choices"]  # whose labels are A to E, or 1 to 5
    right = choices["label"].index(row["answerKey"])
    return multiple_choice(row["question"], choices["text"], right)


def hellaswag(row):
    text = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    question = f"{text}\nQuestion: Which is the most logical continuation?"
    return multiple_choice(question, row["endings"], int(row["label"]))


def winogrande(row):
    options = [row["option1"], row["option2"]]
    return multiple_choice(row["sentence"], options, int(row["answer"]) - 1)


def boolq(row):
    question = f"{row['passage']}\nQuestion: {row['question'].capitalize()}?"
    return multiple_choice(question, ["Yes", "No"], 0 if row["answer"] else 1)


def mmlu_pro(row):
    letters = string.ascii_uppercase[: len(row["options"])]
    lines = [f"({letter}) {text}" for letter, text in zip(letters, row["options"])]
    prompt = "\n".join([row["question"], "Options:", *lines, ""])
    return Question(prompt, row["answer"], letters, row["category"])


# -----------------------------------------------------------------------------
# answers within a text


def last_box(text):
    r"""
    The content of the last \boxed that has any, else of the last \fbox; None without a box, or if
    the last one has no end. A number or a letter may stand without braces: \boxed 2, \boxed2.
    """
    for command in r"\\boxed", r"\\fbox":
        contents = []
        for match in re.finditer(command, text):
            rest = text[match.end() :].lstrip()
            bare = re.match(r"[-+]?\$?\d[\d.,/]*|[A-Za-z](?![A-Za-z])", rest)
            if rest.startswith("{"):
                contents.append(in_braces(rest))
            elif bare:
                contents.append(bare[0].rstrip(".,/"))
        if contents and contents[-1] is None:
            return None
        if contents:
            return next((content for content in reversed(contents) if content), "")
    return None


def in_braces(text):
    """What stands in the braces that a text begins with; None if they are not closed."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:i].strip()
    return None


def final_answer(text):
    """What the last box holds, or what follows the last ####, or all of the text."""
    box = last_box(text)
    return text.rpartition("####")[2] if box is None else box


def whole_number(text):
    """The number that a text writes, without commas, $ and decimals, or None."""
    try:
        return int(float(text.replace(",", "").replace("$", "")))
    except (ValueError, OverflowError):
        return None


# -----------------------------------------------------------------------------
# scorers


def verdict(right, invalid=False, **figures):
    """invalid: there is nothing to compare. All figures are from 0 to 1."""
    return {"score": float(right), "invalid": invalid, **figures}


def same_whole_number(answer, question):
    """
    GSM8K: int(float()) as in the paper, so 2.9 counts as 2. Without a box the paper takes the whole
    text; here it is what follows ####, which models that are trained on GSM8K itself write.
    """
    number = whole_number(final_answer(answer))
    return verdict(number == question.truth, invalid=number is None)


# 18, -2,000, $2.50, .5; not a part of a word or of another number, as in x2, 1e3 and 2.5.1
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+"
NUMBER = re.compile(rf"(?<![\w.])[-+]?\$?(?:{DIGITS})(?![\w.]*\d)", re.ASCII)


def same_answer(answer, question):
    """
    A task of your own. If the truth is a number, it must be the only number of the answer, as in
    "24 apples"; no number or several are invalid. Other texts must be equal but for white space.
    """
    answer, truth = one_line(answer), one_line(question.truth)
    if NUMBER.fullmatch(truth):
        numbers = NUMBER.findall(answer)
        answer = to_decimal(numbers[0]) if len(numbers) == 1 else ""
        truth = to_decimal(truth)
    return verdict(answer == truth, invalid=answer == "")


def one_line(text):
    text = final_answer(text).replace("\u2212", "-")  # the minus of typesetters
    return " ".join(text.split())


def to_decimal(number):
    return Decimal(number.replace("$", "").replace(",", ""))


def choice(letter, question):
    """What is none of the choices is invalid, and counts as a guess at random."""
    if letter in list(question.choices):
        return verdict(letter == question.truth)
    return verdict(1 / len(question.choices), invalid=True)


def one_letter(answer, question):
    return choice(answer.strip().upper(), question)


def last_letter(answer, question):
    """
    MMLU-Pro: the X of the last "answer is X" or "answer is (X)", else of the last "(X)", else the
    last letter that is a word; of the last box, or else of the text. The published code does not
    look for "answer is": `published` is its score.
    """
    text = last_box(answer) or answer
    letter = f"([{question.choices}])"
    said = re.findall(rf"answer is \(?{letter}\b", text)
    in_brackets = re.findall(rf"\({letter}\)", text)
    alone = re.findall(rf"\b{letter}\b", text)
    published = (in_brackets or alone or [""])[-1]
    found = (said or [published])[-1]
    return {**choice(found, question), "published": choice(published, question)["score"]}


def is_number(text):
    try:
        float(text)
        return True
    except ValueError:
        return False


NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def drop_words(text):
    """The words that DROP compares: lower case, without articles and punctuation, 5 as 5.0."""
    words = []
    for word in re.split("[ -]", text.lower()):
        if not is_number(word):
            word = word.translate(NO_PUNCTUATION)
        if is_number(word):
            words.append(str(float(word)))
        else:
            words += re.sub(r"\b(a|an|the)\b", " ", word).split()
    return words


def drop_f1(words, gold):
    numbers = {word for word in gold if is_number(word)}
    if numbers and not numbers & words:
        return 0.0
    both = len(gold & words)
    precision = both / len(words) if words else 1.0
    recall = both / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def drop_f1_em(answer, question):
    """
    DROP, by its authors' rules as lm-evaluation-harness has them: the score is F1, of the annotator
    that fits best. An answer is one span; it is set beside the nearest of the truth's.
    """
    words = drop_words(answer.strip())
    em, f1 = 0.0, 0.0
    for spans in question.truth:
        if spans[0].strip():
            gold = [drop_words(span) for span in spans]
            nearest = max(drop_f1(set(words), set(span)) for span in gold)
            em = max(em, float(gold == [words]))
            f1 = max(f1, round(nearest / len(gold), 2))
    return verdict(f1, invalid=not answer.strip(), em=em)


def same_mathematics(answer, question):
    r"""
    MATH and AIME: math-verify of the last box, or of the whole text, which is invalid too. The
    published code takes the boxes off first, so that math-verify reads many a formula wrongly, as
    \sqrt{51}: `unboxed` is its score.
    """
    box = last_box(answer)
    boxed = answer if box is None else f"\\boxed{{{box}}}"
    right = equal_in_mathematics(f"\\boxed{{{question.truth}}}", boxed)
    unboxed = equal_in_mathematics(question.truth, answer if box is None else box)
    return verdict(right, invalid=box is None, unboxed=float(unboxed))


MATH_VERIFY = r"""
import json, sys
from math_verify import parse, verify

def equal(truth, answer):
    try:
        return bool(verify(parse(truth), parse(answer)))
    except BaseException:  # its TimeoutException is no Exception
        return False

print(json.dumps(equal("\\boxed{\\frac12}", "\\boxed{0.5}")), flush=True)
for line in sys.stdin:
    print(json.dumps(equal(*json.loads(line))), flush=True)
"""
worker = None  # the process in which math-verify runs, because some formulas hang or crash it


def equal_in_mathematics(truth, answer, seconds=20):
    global worker
    if worker is None or worker.poll() is not None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        worker = subprocess.Popen([sys.executable, "-c", MATH_VERIFY], text=True, **pipes)
        if worker.stdout.readline() != "true\n":
            sys.exit("math and aime are scored by math-verify: pip install math-verify")
    reply = ""
    timer = Timer(seconds, worker.kill)
    timer.start()
    try:
        print(json.dumps([truth, answer]), file=worker.stdin, flush=True)
        reply = worker.stdout.readline()
    except OSError:
        pass  # it has died
    timer.cancel()
    if not reply:
        worker.kill()
        worker.wait()  # so that the next call sees that it is gone
    return reply == "true\n"


def pass_at(k, scores):
    """
    How likely one of k samples is right, from the scores of n >= k samples, without bias (Chen et
    al. 2021).
    """
    n_wrong = sum(score < 1 for score in scores)
    return 1 - comb(n_wrong, k) / comb(len(scores), k)


def majority_at(k, answers, truth):
    """Whether the truth is among the k most frequent whole numbers from 1 to 999."""
    votes = Counter()
    for answer in answers:
        box = last_box(answer)
        text = answer if box is None else box
        if re.fullmatch(r"0*[1-9]\d{0,2}", text.strip()):
            votes[str(int(text))] += 1
    return float(str(truth) in [number for number, _ in votes.most_common(k)])


# -----------------------------------------------------------------------------
# the table; an answer may fill what the prompt leaves of the context

FREE = {"condition": "synth,cot", "context": 3072, "max_new_tokens": 3072}
AIME = {"condition": "synth,cot", "max_new_tokens": 4096, "samples": 256, "temperature": 0.6}
MATH = "algebra counting_and_probability geometry intermediate_algebra number_theory prealgebra"
MATH += " precalculus"
PAPER = ("gsm8k", "math", "drop", "mmlu", "arc", "hellaswag", "winogrande", "boolq")  # its table

TASKS = {
    "gsm8k": Task(
        gsm8k,
        same_whole_number,
        hub="openai/gsm8k",
        configs="main",
        paper=(84.53, 78.39),
        **FREE,
    ),
    "math": Task(
        math,
        same_mathematics,
        hub="EleutherAI/hendrycks_math",
        configs=MATH,
        paper=(56.16, 50.28),
        **FREE,
    ),
    "drop": Task(
        drop,
        drop_f1_em,
        hub="EleutherAI/drop",
        split="validation",
        shots_split="train",
        n_shots=3,
        context=3072,
        max_new_tokens=3072,
        paper=(82.21, 78.07),
    ),
    "mmlu": Task(
        mmlu,
        one_letter,
        hub="cais/mmlu",
        configs="all",
        shots_split="dev",
        n_shots=5,
        paper=(60.73, 56.87),
        macro=True,
    ),
    "arc": Task(
        arc,
        one_letter,
        hub="allenai/ai2_arc",
        configs="ARC-Challenge",
        shots_split="validation",
        n_shots=25,
        folder="arc_challenge",
        paper=(81.91, 74.32),
    ),
    "hellaswag": Task(
        hellaswag,
        one_letter,
        hub="Rowan/hellaswag",
        split="validation",
        shots_split="train",
        n_shots=10,
        paper=(63.42, 50.48),
    ),
    "winogrande": Task(
        winogrande,
        one_letter,
        hub="allenai/winogrande",
        configs="winogrande_debiased",
        split="validation",
        shots_split="train",
        n_shots=5,
        paper=(72.38, 66.38),
    ),
    "boolq": Task(
        boolq,
        one_letter,
        hub="google/boolq",
        split="validation",
        shots_split="train",
        n_shots=5,
        paper=(86.18, 84.86),
    ),
    "mmlu_pro": Task(
        mmlu_pro,
        last_letter,
        hub="TIGER-Lab/MMLU-Pro",
        max_new_tokens=4096,
        macro=True,
    ),
    "aime24": Task(aime, same_mathematics, hub="math-ai/aime24", folder="aime", **AIME),
    "aime25": Task(aime, same_mathematics, hub="math-ai/aime25", **AIME),
    "heldout": Task(None, same_answer, condition="", max_new_tokens=0),  # see heldout()
    "problems": Task(problem, same_answer, condition="", max_new_tokens=64),
}
FEWER_SHOTS = {"high_school_european_history": 3}  # of MMLU: five do not fit 4,096 tokens


# -----------------------------------------------------------------------------
# rows -> questions


def find_task(name):
    if name in TASKS:
        return TASKS[name]
    if name.endswith(".jsonl"):
        return Task(quiz, same_answer, condition="", max_new_tokens=512)
    known = ", ".join(TASKS)
    sys.exit(f"there is no task '{name}': choose {known}, paper, or a .jsonl of prompts and answers")


def load_questions(name, directory, data_dir="", limit=0):
    """
    The Questions of a task. directory: of the model, for heldout. Raises OSError if the rows are
    not there.
    """
    if name == "heldout":
        return heldout(directory, limit or 1000)
    task = find_task(name)
    if task.score is same_mathematics:
        equal_in_mathematics("1", "1")  # ends now if math-verify is missing, and not after hours
    questions = []
    try:
        shots = load_shots(name, task, data_dir)
        for row in islice(read_rows(name, task, task.split, data_dir), limit or None):
            question = task.question(row)
            questions.append(question._replace(shots=tuple(shots[question.group])))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        sys.exit(f"row {len(questions)} of {name} is no question: {error!r}")
    return questions


def load_shots(name, task, data_dir):
    """{group: texts}. The first rows of a split; of MMLU, those of each subject."""
    shots = defaultdict(list)
    if not task.n_shots:
        return shots
    rows = read_rows(name, task, task.shots_split, data_dir)
    for question in drop_shots(rows) if name == "drop" else map(task.question, rows):
        texts = shots[question.group]
        if len(texts) < FEWER_SHOTS.get(question.group, task.n_shots):
            texts.append(f"{question.prompt} {question.truth}\n\n")
        elif not question.group:
            break
    return shots


def read_rows(name, task, split, data_dir):
    """Yields dicts: of a file of your own, of the files of a split in data_dir, or of the hub."""
    if name == "problems":
        yield from word_problems("val", 1000, 1337)
    elif name.endswith(".jsonl"):
        yield from read_file(Path(name))
    elif data_dir:
        folder = Path(data_dir, task.folder or name)
        paths = [*folder.glob(f"{split}.*"), *folder.glob(f"{split}-*")]  # -00000-of-00001.parquet
        if not paths:
            raise FileNotFoundError(f"there is no {folder}/{split}.jsonl or .parquet")
        for path in sorted(paths):
            yield from read_file(path)
    else:
        from datasets import load_dataset

        for config in task.configs.split() or [None]:
            yield from load_dataset(task.hub, config, split=split, streaming=True)


def read_file(path):
    if path.suffix == ".parquet":
        import pyarrow.parquet

        yield from pyarrow.parquet.read_table(path).to_pylist()
    else:
        for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines() cuts at \u2028
            if line.strip():
                yield json.loads(line)


def heldout(directory, limit):
    """
    Validation documents of the data that a run was trained on, spread evenly, each with its own
    condition. directory: a checkpoint of the run.
    """
    path = Path(directory, "train.json")
    if not path.exists():
        hint = "give --prompt=... or --tasks=..."
        sys.exit(f"{directory} is no run of train.py, with held-out documents: {hint}")
    run = json.loads(path.read_text())
    dataset = Path("data", run["settings"]["dataset"])
    splits = read_meta(dataset)["splits"]
    theirs, own = Path(dataset, "tokenizer.json"), Path(directory, "tokenizer.json")
    n_tokens = run["loader"]["data"][1]  # of the training data
    if theirs.read_bytes() != own.read_bytes() or splits["train"]["tokens"] != n_tokens:
        sys.exit(f"{dataset}, on which {directory} was trained, has changed")
    tokenizer = load_tokenizer(dataset)
    loader = Loader(dataset, "val", rows=1, block_size=2**30)
    n_documents = splits["val"]["documents"]
    documents = [loader.document(d) for d in range(n_documents)]
    # a document that data.py has cut has no eoa
    whole = [(ids, n) for ids, n in documents if ids[-1] == tokenizer.id_of["eoa"]]
    questions = []
    for i in range(min(limit, len(whole))):
        ids, n_prefix = whole[i * len(whole) // min(limit, len(whole))]
        response = tokenizer.decode(ids[n_prefix:-1].tolist())
        questions.append(Question(ids[:n_prefix].tolist(), response))
    return questions
