"""Benchmarks: where the questions come from, and when an answer is right.

A task is an entry of TASKS. For one of your own, write a function that returns (question, reference) pairs, such as
def capitals(**_), and choose or write a scorer: score(generation, reference) -> "right", "wrong" or "invalid".
"""

from sources import read_rows, to_pair, word_problems


def problems(prepare_args, **_):
    """The validation split of the embedded word problems: that of the model's own dataset, if trained on them."""
    own = prepare_args.get("source") == "problems"
    n, seed = (prepare_args["n_val_problems"], prepare_args["seed"]) if own else (1000, 1337)
    return [(row["instruction"], row["response"]) for row in word_problems("val", n, seed)]


def gsm8k(gsm8k_source, **_):
    """The test set of grade-school mathematics (Cobbe et al. 2021)."""
    pairs = []
    for where, row in read_rows(gsm8k_source, "main", "test"):
        pair = to_pair(row, {"instruction": "question", "response": "answer"})
        if isinstance(pair, str):
            raise ValueError(f"{where}: {pair}")
        pairs.append(pair[:2])
    return pairs


def extract(text):
    """The answer in a text: what the last \\boxed{} holds, or what follows the last ####, or all of it."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for i in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : i]
    return text.rpartition("####")[2]


def to_number(text):
    """The whole number that a text writes, commas and $ aside, or None."""
    try:
        return int(float(text.replace(",", "").replace("$", "")))
    except (ValueError, OverflowError):
        return None


def same_number(generation, reference):
    """The scorer of answers that are a whole number."""
    answer, truth = to_number(extract(generation)), to_number(extract(reference))
    return "invalid" if answer is None else "right" if answer == truth else "wrong"


TASKS = {  # name: (the questions, the most new tokens that an answer may take, the scorer)
    "problems": (problems, 64, same_number),
    "gsm8k": (gsm8k, 1024, same_number),
}
