"""The running of benchmarks: prompts that fit, one pass over the questions of all tasks, and answers kept as they come.

    answers-<task>.jsonl         a line per answer, until all are there (of rank 1: answers-<task>.jsonl.1, and so on)
    answers-<task>.json          the model and settings that these answers are of
    generations-<task>.jsonl     all answers, in the order of the rows, if they are to be saved

A question of choices, whose answer is one token, needs no cache: many are read as packed rows, and the logits at eoq
tell. All other questions, whatever their task, share the slots of the engine.

No keys and values are shared between prompts, though those of a task may begin with the same shots: under PrefixLM all
of the instruction is seen from all of it, so the keys of a shot depend on the question that comes after it.
"""

import glob
import json
import signal
import time
from collections import Counter
from typing import NamedTuple

import torch
from tqdm import tqdm

import ranks
from common import check_types, errors_name_file, lock_file, read_json, replace_file
from generate import choose_ids, slots_in_memory, stream
from ranks import print0
from tasks import Question, Task
from tokenizer import encode_prompt, special_id

PACKED_TOKENS = 2**12  # read in a pass without a cache: 2**14 took a CPU 1.4 times as long


class Job(NamedTuple):
    """One answer to be had."""

    name: str  # of the task
    task: Task
    question: Question
    sample: int  # from 0, of those of the same question
    prompt: str  # the literal instruction, shots included
    ids: list  # of the whole prompt
    limit: int  # new tokens; below 1 the prompt is too long to be answered
    shortened: int  # shots left out

    @property
    def key(self):
        return self.question.row, self.sample

    @property
    def one_token(self):
        return bool(self.question.choices) and self.task.max_new_tokens == 1


def plan(name, task, questions, encoding, condition, block_size, most_new, samples, mcq):
    """The jobs of a task. Where a prompt leaves no room for an answer of one token (or of a choice's, by likelihood),
    the last of its shots is left out, then the one before, and so on."""
    jobs, context = [], min(task.context or block_size, block_size)
    for question in questions:
        shots, least = question.shots, 1
        if mcq == "likelihood" and task.max_new_tokens == 1:
            least = max((len(encoding.encode(choice)) for choice in question.choices), default=1)
        while True:
            if isinstance(question.prompt, str):
                prompt = "".join((*shots, question.prompt))
                ids = encode_prompt(encoding, prompt, condition)
            else:
                prompt, ids = encoding.decode(question.prompt), question.prompt
            room = context + 1 - len(ids)  # a row of `context` tokens predicts one more
            if room >= least or not shots:
                break
            shots = shots[:-1]
        limit = min(most_new, room) if room >= least else 0
        n_left_out = len(question.shots) - len(shots)
        jobs += [Job(name, task, question, k, prompt, ids, limit, n_left_out) for k in range(samples)]
    if len({job.key for job in jobs}) < len(jobs):
        raise ValueError(f"the task {name} has two questions of the same row")
    return jobs


# ---- answers that are kept ----
def read_kept(directory, name, jobs, about):
    """(the file that takes the answers to these jobs, {key: line} of those that an earlier run of the same `about` has
    left). Lines that are torn or of other questions are dropped; where only the scorers have changed, verdicts are
    given anew. Raises ValueError or OSError."""
    path, header = directory / f"answers-{name}.jsonl", directory / f"answers-{name}.json"
    by_key, kept, again = {job.key: job for job in jobs}, {}, {}
    file = open_to_append(path)
    try:
        before = read_json(header)
    except (ValueError, OSError):
        before = {}
    differs = [key for key in {**before, **about} if before.get(key) != about.get(key)]
    same = not {*differs} - {"scorers"}
    with errors_name_file(path, "could not be read or written"):
        if not same and path.stat().st_size:
            what = f"with other {', '.join(differs)}" if before else "and does not say of which model"
            print0(f"{name}: {path} holds answers of an earlier run ({what}), so this one starts over")
        for part in parts_of(path) if same else ():
            for line in part.read_bytes().splitlines(keepends=True):
                try:
                    line = json.loads(line) if line.endswith(b"\n") else {}
                    job = by_key[line["row"], line["sample"]]
                    check_types(line, generation=str, tokens=int, prompt=str, invalid=bool, cut=bool)
                    as_asked = line["prompt"] == job.prompt
                    if as_asked and line["truth"] == json.loads(json.dumps(job.question.truth)):
                        kept[job.key] = line | (verdict(job, line["generation"]) if differs else {})
                        if differs or part != path:
                            again[job.key] = kept[job.key]
                except (ValueError, KeyError, TypeError, RecursionError):
                    pass
        for part in () if same else parts_of(path)[1:]:  # before a header says that they are of this model
            part.unlink()
        file.truncate(path.read_bytes().rfind(b"\n") + 1 if same else 0)
        file.write(text_of(again.values()))
        file.flush()
        replace_file(header, json.dumps(about).encode())
        for part in parts_of(path)[1:]:
            part.unlink()
    return file, kept


def parts_of(path):
    """The file of answers, and those of other ranks."""
    return [path] + sorted(path.parent.glob(f"{glob.escape(path.name)}.[0-9]*"))


def text_of(lines):
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def base_line(job, generation, n_tokens):
    """What is kept of an answer of n_tokens, its verdict aside."""
    question, over_long = job.question, job.limit < 1
    line = dict(row=question.row, sample=job.sample, group=question.group, prompt=job.prompt, generation=generation)
    line |= dict(truth=question.truth, cut=False, over_long=over_long, shortened=job.shortened, tokens=n_tokens)
    if not over_long and not job.one_token:
        line["cut"] = n_tokens == job.limit
    return line


def verdict(job, generation):
    """Of the task's scorer; a prompt that leaves no room for an answer counts as wrong."""
    if job.limit < 1:
        return {"score": 0.0, "invalid": False}
    return job.task.score(generation, job.question)


def open_to_append(path):
    """A file that no other process appends to. Raises ValueError or OSError."""
    with errors_name_file(path, "cannot be written"):
        file = open(path, "ab")
        lock_file(file, f"{path}: another eval.py is writing to it")
        return file


# ---- one pass over all tasks ----
def run(model, encoding, plans, abouts, directory, seed=0, mcq="token", batch_size=128, cache_gb=0.0):
    """Have the jobs of plans {task: jobs} done by all ranks, but for those whose answers a directory holds from a run
    of the same abouts {task: settings}. Returns ({task: lines in order}, {task: tokens/s}); lines are missing after
    Ctrl-C or SIGTERM."""
    stop, lines, files, counts = ranks.catch_stop_signals(), {}, {}, Counter()
    for name, jobs in plans.items() if ranks.master else ():
        files[name], lines[name] = read_kept(directory, name, jobs, abouts[name])
    done = ranks.gather({name: {*kept} for name, kept in lines.items()})[0]
    rest = [job for name, jobs in plans.items() for job in jobs if job.key not in done[name]]
    if any(done.values()):
        print0(f"{sum(map(len, done.values())):,} answers are kept from an earlier run, {len(rest):,} are left to do")
    rest = sorted(rest, key=lambda job: (-job.limit, -len(job.ids)))[ranks.rank :: ranks.world_size]
    new = {name: [] for name in plans}

    def record(job, generation, n_tokens, **more):
        line = base_line(job, generation, n_tokens) | more | verdict(job, generation)
        if job.name not in files:
            files[job.name] = open_to_append(directory / f"answers-{job.name}.jsonl.{ranks.rank}")
        with errors_name_file(files[job.name].name, "could not be written"):
            files[job.name].write(text_of([line]))
            files[job.name].flush()
        new[job.name].append(line)
        return line

    for job in rest:
        if job.limit < 1:
            record(job, "", 0)
    rest = [job for job in rest if job.limit > 0]
    texts = [job for job in rest if not job.one_token]
    passes = [([job for job in rest if job.one_token], "choices", answer_choices, (mcq, stop, counts))]
    for t in sorted({job.task.temperature for job in texts}):
        some = [job for job in texts if job.task.temperature == t]
        passes.append((some, "answers", answer_texts, (t, seed, batch_size, cache_gb, stop, counts)))
    for jobs, kind, function, options in passes:
        begin = said = time.perf_counter()
        total, n = len(jobs), 0
        with tqdm(total=total, desc=kind, unit=" answers", disable=None if ranks.master and jobs else True) as bar:
            for answer, more in function(model, encoding, jobs, *options) if jobs and not stop() else ():
                line, n, now = record(*answer, **more), n + 1, time.perf_counter()
                counts["score"], counts["n"] = counts["score"] + line["score"], counts["n"] + 1
                bar.set_postfix(score=f"{counts['score'] / counts['n']:.1%}", refresh=False)
                bar.update()
                if bar.disable and now - said > 30:  # into a file, where no bar shows
                    left, said = tqdm.format_interval((now - begin) * (total - n) / n), now
                    print0(f"{kind}: {n:,} of {total:,}, {counts['score'] / counts['n']:.1%}, {left} left")
        counts[f"{kind} seconds"] += time.perf_counter() - begin
    for file in files.values():
        file.close()
    gathered = ranks.gather((new, counts))
    for other, _ in gathered:
        for name, some in other.items():
            lines.setdefault(name, {}).update({(line["row"], line["sample"]): line for line in some})
    counts = [c for _, c in gathered]
    if slots := sum(c["slots"] for c in counts):
        print0(f"slots: {sum(c['busy'] for c in counts) / slots:.1%} had an answer in work, over all decode steps")
    speeds = {}
    for name, jobs in plans.items():
        kind = "choices" if jobs[0].one_token else "answers"
        seconds = max(c[f"{kind} seconds"] for c in counts)
        speeds[name] = sum(c[f"{kind} tokens"] for c in counts) / seconds if new[name] and seconds else 0.0
    lines = ranks.gather(lines if ranks.master else None)[0]  # which alone has those from before
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on, nobody asks stop()
    return {name: [lines[name][key] for key in sorted(lines[name])] for name in plans}, speeds


def finish(directory, names, lines, save, keep=False):
    """Save the complete answers of tasks, if asked, and unless `keep` remove the files in which they were kept."""
    for name in names:
        path, kept = (directory / f"{kind}-{name}.jsonl" for kind in ("generations", "answers"))
        with errors_name_file(path, "could not be written"):
            if save:
                replace_file(path, text_of(lines[name]))
                print0(f"written to {path}")
            for part in () if keep else (*parts_of(kept), kept.with_suffix(".json")):
                part.unlink(missing_ok=True)


def answer_texts(model, encoding, jobs, temperature, seed, batch_size, cache_gb, stop, counts):
    """Yields ((job, generation, its number of tokens), more) as answers are complete; with a kl_threshold, `more` has
    their mean depth: the share of all H-cycles that their tokens took."""
    prompts, limits = [job.ids for job in jobs], [job.limit for job in jobs]
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits))
    slots = slots_in_memory(model, longest, min(batch_size, len(jobs)), cache_gb)
    options = dict(stop_token=special_id(encoding, "eoa"), slots=slots, temperature=temperature)
    options["seed"] = [f"{seed} {job.name} {job.key}" for job in jobs]  # an answer's own, whatever is beside it
    answers, left, n_cut, begin = [[] for _ in jobs], {*range(len(jobs))}, 0, None
    spent = [[] for _ in jobs if model.kl_threshold]
    print0(f"{len(jobs):,} answers to generate, {slots} at a time")
    for step, events in enumerate(stream(model, prompts, limits, **options, spent=spent)):
        if stop():
            return
        active = {i for i, _ in events}
        if any(answers[i] for i in active):  # a decode step; others read prompts
            counts["busy"], counts["slots"] = counts["busy"] + len(active), counts["slots"] + slots
        for i, id in events:
            if id is not None:
                answers[i].append(id)
                continue
            left.remove(i)
            more = {"depth": sum(spent[i]) / len(spent[i]) / model.config.H_cycles} if spent else {}
            yield (jobs[i], encoding.decode(answers[i]), len(answers[i])), more
            n_cut += len(answers[i]) == limits[i]
            if n_cut == len(jobs) - len(left) == 16:
                advice = "--max_new_tokens=N makes them shorter, Ctrl-C shows the results so far"
                print0(f"the first 16 answers had no end and were cut off; {advice}")
        counts["answers tokens"] += len(events)
        if step == 1:  # what is compiled has been
            begin, n_before = time.perf_counter(), counts["answers tokens"]
        elif begin and (seconds := time.perf_counter() - begin) > 5:
            begin, speed = None, (counts["answers tokens"] - n_before) / seconds
            minutes = sum(limits[i] - len(answers[i]) for i in left) / speed / 60
            each = f"{len(left):,} answers of up to {max(limits):,} tokens at {speed:,.0f} tokens/s"
            print0(f"at most {minutes:,.1f} minutes more, for {each}; less for those that end earlier")


def answer_choices(model, encoding, jobs, mcq, stop, counts):
    """Yields ((job, generation, 1), more), where the generation is the likeliest token, or with mcq "likelihood" the
    likeliest of the choices, whose log-likelihoods `more` then has: sums over all tokens of a choice, eoa aside."""
    documents, reads = [], []  # (number of a job, what is read after its prompt: all of a choice but its last token)
    choices = [[tuple(encoding.encode(choice)) for choice in job.question.choices] for job in jobs]
    for j, job in enumerate(jobs):
        for head in {c[:-1] for c in choices[j]} if mcq == "likelihood" else {()}:
            documents.append(([*job.ids, *head], len(job.ids), len(head) + 1))
            reads.append((j, head))
    found, eoa = [{} for _ in jobs], special_id(encoding, "eoa")  # of each job, {what is read: log p of what follows}
    for i, logits in read_packed(model, documents):
        if stop():
            return
        j, head = reads[i]
        counts["choices tokens"] += len(documents[i][0])
        if mcq == "token":
            [id] = choose_ids(model.banned_ids, 0, None, None, None, logits).tolist()
            yield (jobs[j], encoding.decode([id] * (id != eoa)), 1), {}
            continue
        found[j][head] = logits.log_softmax(-1).cpu()
        if found[j].keys() == {c[:-1] for c in choices[j]}:
            sums = [sum(found[j][c[:-1]][k, id].item() for k, id in enumerate(c)) for c in choices[j]]
            yield (jobs[j], jobs[j].question.choices[sums.index(max(sums))], 1), {"loglikelihoods": sums}
            found[j] = None


@torch.no_grad()
def read_packed(model, documents):
    """Reads documents (ids, length of the prefix, n), many in a row and without a cache. Yields (number of a document,
    logits (n, vocab_size) of what follows each of its last n tokens), the longest documents first."""
    weights = model.cast_weights()
    for rows in batches_of_rows([len(ids) for ids, _, _ in documents], model.config.block_size):
        T = max(sum(len(documents[i][0]) for i in row) for row in rows)
        if model.compile_blocks:  # for few shapes
            T = min(-(-T // 512) * 512, model.config.block_size)
        idx, at = torch.zeros(len(rows), T, dtype=torch.long), []
        doc, prefix = torch.full_like(idx, -1), torch.zeros_like(idx, dtype=torch.bool)
        for r, row in enumerate(rows):
            end = 0
            for i in row:
                ids, n_prefix, n = documents[i]
                start, end = end, end + len(ids)
                idx[r, start:end], doc[r, start:end] = torch.tensor(ids), i
                prefix[r, start : start + n_prefix] = True
                at += range(r * T + end - n, r * T + end)
        logits, _ = model(idx, None, doc, prefix, weights=weights, at=torch.tensor(at, dtype=torch.long))
        if not logits.isfinite().all():
            raise ValueError("the model's logits are not finite, so its weights cannot be right")
        order = [i for row in rows for i in row]
        yield from zip(order, logits.split([documents[i][2] for i in order]))


def batches_of_rows(lengths, block_size):
    """Documents of these lengths in rows of at most block_size tokens, the longest first, so that the rows of a batch
    are about equally full. Yields batches: lists of rows, which are lists of numbers of documents."""
    rows, room, longest = [], 0, min(block_size, max([PACKED_TOKENS, *lengths]))
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] > room:
            rows.append([])
            room = longest
        rows[-1].append(i)
        room -= lengths[i]
    n = max(1, PACKED_TOKENS // longest)
    for start in range(0, len(rows), n):
        yield rows[start : start + n]
