"""Exact-match accuracy of a trained model, by greedy generation with its averaged weights.

    python eval.py                                                   # the model in out/, on held-out rows of its data
    python eval.py --out_dir=out-gsm8k --tasks=gsm8k --limit=100     # GSM8K's test set, from the hub
    python eval.py --tasks=gsm8k,problems --gsm8k_source=test.jsonl --save_generations=True
    python eval.py --init_from=sapientinc/HRM-Text-1B --condition=synth,cot --tasks=gsm8k --out_dir=out-published
    python eval.py --sweep=guidance=-0.5,-0.1,0,0.1,0.5              # or H_cycles, L_cycles: a table, task by value

Prints a table and writes out_dir/eval.json; with save_generations also out_dir/generations-<task>.jsonl. A generation
without an answer, or without a number where the reference is one, counts as wrong and is reported as invalid; one that
reaches max_new_tokens or the end of the context is reported as cut off. Ctrl-C prints the table so far, and writes
nothing.
"""

from configurator import configure

import json
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

from tqdm import tqdm

from common import errors_name_file, exit_on_error, local_directory, replace_file
from devices import free_memory
from generate import cache_bytes_per_token, load_for_inference, stream
from ranks import print0
from sweep import run_sweep
from tasks import TASKS
from tokenizer import encode_prompt, special_id

# ---- settings ----
out_dir = "out"  # of train.py; results go there too
init_from = ""  # in place of its model, one in the Hugging Face layout: a directory or a hub id
tasks = "heldout"  # of tasks.py, with commas between; heldout: validation documents of the model's own dataset
limit = 0  # questions per task; 0: all, but 1,000 of heldout
condition = ""  # of the prompts, but for heldout: a tag, several, or none; "": what most training documents have
gsm8k_source = "openai/gsm8k"  # on the hub, or a local copy: a .jsonl or .parquet file, or a directory
batch_size = 128  # answers in work at a time; where one is complete, the next question takes its place
max_new_tokens = 0  # per answer; 0: the task's own
cache_gb = 0.0  # the batch is made smaller where its keys and values would take more; 0: half of the free memory
average = True  # the weights' moving average; False: the weights themselves
save_generations = False  # every prompt, generation, reference and verdict, as jsonl
device = "auto"  # cpu, cuda or mps
dtype = "auto"  # float32, or bfloat16 (auto: where the device multiplies it)
compile = False  # the blocks, with torch.compile: takes a while, then runs faster
H_cycles = 0  # of the recurrence; 0: as many as the model was trained with
L_cycles = 0
guidance = 0.0  # w of auto-guidance: logits of the last H-step, and w times their difference from the step before
sweep = ""  # "guidance=-0.5,-0.1,0,0.1,0.5", or so for H_cycles or L_cycles: all tasks once per value, and a table
settings = configure(globals())
# ----------------------------------------------------------------------------------------------------


def evaluate(name, pairs, most_new, score, model, encoding, condition):
    """Answer (question, reference) pairs, where a question is text, or the ids of a whole prompt. Returns a dict per
    answer (prompt, generation, reference, verdict, and whether the generation was cut off), and the new tokens per
    second. Ctrl-C ends it early, with fewer answers than pairs."""
    prompts = [encode_prompt(encoding, q, condition) if isinstance(q, str) else q for q, _ in pairs]
    most_new = max_new_tokens or most_new or 2 * max(len(encode_prompt(encoding, r)) for _, r in pairs)
    block_size, bytes_per_token = model.config.block_size, cache_bytes_per_token(model)
    limits = [min(most_new, block_size + 1 - len(prompt)) for prompt in prompts]
    fits = [i for i, limit in enumerate(limits) if limit > 0]
    longest = max((len(prompts[i]) + limits[i] for i in fits), default=1)
    most = cache_gb * 1e9 or free_memory(model.embed.device) / 2
    slots = max(1, int(min(batch_size, len(fits), most / (bytes_per_token * longest))))
    print0(f"{name}: {slots} answers at a time; keys and values take {slots * bytes_per_token * longest / 1e9:.2f} GB")
    if len(fits) < len(pairs):
        print0(f"{name}: {len(pairs) - len(fits):,} prompts longer than block_size = {block_size:,} get no answer")
    results = []
    for question, reference in pairs:
        prompt = question if isinstance(question, str) else encoding.decode(question)
        results.append(dict(prompt=prompt, generation="", reference=reference, verdict=score("", reference), cut=False))
    answers, left, counts, clock, begin = [[] for _ in pairs], {*fits}, Counter(), time.perf_counter(), None
    with suppress(KeyboardInterrupt), tqdm(total=len(fits), desc=name, unit=" questions") as bar:
        options = dict(stop_token=special_id(encoding, "eoa"), slots=slots)
        for step, events in enumerate(stream(model, [prompts[i] for i in fits], most_new, **options)):
            for i, id in ((fits[k], id) for k, id in events):
                if id is not None:
                    answers[i].append(id)
                    continue
                text, cut = encoding.decode(answers[i]), len(answers[i]) == limits[i]
                results[i] |= dict(generation=text, verdict=score(text, pairs[i][1]), cut=cut)
                left.remove(i)
                counts.update(["done", results[i]["verdict"]] + ["cut"] * cut)
                bar.set_postfix(accuracy=f"{counts['right'] / counts['done']:.1%}", refresh=False)
                bar.update()
                if counts["done"] == counts["cut"] == 16:
                    advice = "--max_new_tokens=N makes them shorter, Ctrl-C shows the results so far"
                    print0(f"{name}: the first 16 answers had no end and were cut off; {advice}")
            counts["tokens"] += len(events)
            if step == 1:  # what is compiled has been
                begin, counts["tokens"] = time.perf_counter(), 0
            elif begin and (seconds := time.perf_counter() - begin) > 5:
                begin, speed = None, counts["tokens"] / seconds
                minutes = sum(limits[i] - len(answers[i]) for i in left) / speed / 60
                each = f"{len(left):,} answers of up to {max(limits):,} tokens at {speed:,.0f} tokens/s"
                print0(f"{name}: at most {minutes:,.1f} minutes more, for {each}; less for those that end earlier")
    results = [result for i, result in enumerate(results) if i not in left]
    return results, sum(map(len, answers)) / (time.perf_counter() - clock)


def main():
    for key, least in dict(limit=0, batch_size=1, max_new_tokens=0, cache_gb=0).items():
        if not settings[key] >= least:
            raise ValueError(f"{key} must be at least {least}, not {settings[key]}")
    names = list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if not names or not set(names) <= TASKS.keys():
        raise ValueError(f"--tasks names one or more of {', '.join(TASKS)}, not '{tasks}'")
    source = local_directory(init_from or out_dir)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    options = dict(source=source, gsm8k_source=gsm8k_source, limit=limit)
    questions = {name: TASKS[name][0](**options)[: limit or None] for name in names}
    if empty := [name for name in names if not questions[name]]:
        raise ValueError(f"the task {empty[0]} has no questions")
    depth = H_cycles, L_cycles, guidance
    model, encoding, tags = load_for_inference(source, average, device, dtype, compile, condition, *depth)
    table, generations, partial = {}, {}, ""
    for name, pairs in questions.items():
        results, speed = evaluate(name, pairs, *TASKS[name][1:], model, encoding, tags)
        n, verdicts = max(len(results), 1), [r["verdict"] for r in results]
        table[name] = {"accuracy": verdicts.count("right") / n, "invalid": verdicts.count("invalid") / n}
        table[name] |= {
            "cut": sum(r["cut"] for r in results) / n,
            "count": len(results),
            "tokens_per_sec": round(speed),
        }
        generations[f"generations-{name}.jsonl"] = "".join(json.dumps(r) + "\n" for r in results)
        if len(results) < len(pairs):
            partial = f"{len(results):,} of {len(pairs):,} questions of {name}; short prompts and answers come first"
            break
    if partial:
        print0(f"partial: {partial}")
    print0(f"{'task':<12}{'accuracy':>10}{'invalid':>10}{'cut off':>10}{'count':>8}{'tokens/s':>10}")
    for name, r in table.items():
        shares = "".join(f"{r[key]:>10.2%}" for key in ("accuracy", "invalid", "cut"))
        print0(f"{name:<12}{shares}{r['count']:>8,}{r['tokens_per_sec']:>10,.0f}")
    if partial:
        raise KeyboardInterrupt
    files = {"eval.json": json.dumps({"tasks": table, "settings": settings}, indent=1) + "\n"}
    for name, text in (files | generations if save_generations else files).items():
        path = Path(out_dir, name)
        with errors_name_file(path, "could not be written"):
            replace_file(path, text.encode())
        print0(f"written to {path}")
    return table


def main_with(**changes):
    """main() with other settings."""
    settings.update(changes)
    globals().update(changes)
    return main()


if __name__ == "__main__":
    with exit_on_error("interrupted; nothing was written"):
        if sweep:
            run_sweep(sweep, out_dir, partial(main_with, sweep="", init_from=init_from or out_dir))
        else:
            main()
