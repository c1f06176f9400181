"""Exact-match accuracy of a trained model, by greedy generation with its averaged weights.

    python eval.py                                                   # the model in out/, on the task it was trained for
    python eval.py --out_dir=out-gsm8k --tasks=gsm8k --limit=100     # GSM8K's test set, from the hub
    python eval.py --tasks=gsm8k,problems --gsm8k_source=test.jsonl --save_generations=True
    python eval.py --init_from=sapientinc/HRM-Text-1B --condition=synth,cot --tasks=gsm8k --out_dir=out-published

Prints a table and writes out_dir/eval.json; with save_generations also out_dir/generations-<task>.jsonl. A generation
that holds no number counts as wrong and is reported as invalid; one that reaches max_new_tokens is reported as cut off.
"""

from configurator import configure

import json
import time
from pathlib import Path

from tqdm import tqdm

from common import exit_on_error, local_directory
from generate import cache_bytes_per_token, load_for_inference, stream
from tasks import TASKS
from tokenizer import encode_prompt, read_meta, special_id

# ---- settings ----
out_dir = "out"  # of train.py; results go there too
init_from = ""  # in place of its model, one in the Hugging Face layout: a directory or a hub id
tasks = ""  # of tasks.py, with commas between; "": what the model was trained on, if that is one
limit = 0  # questions per task; 0: all
condition = ""  # of the prompts: a tag, several, or none; "": what most of the training documents have
gsm8k_source = "openai/gsm8k"  # on the hub, or a local copy: a .jsonl or .parquet file, or a directory
batch_size = 128  # answers in work at a time; where one is complete, the next question takes its place
max_new_tokens = 0  # per answer; 0: the task's own
cache_gb = 8.0  # the batch is made smaller where its keys and values would take more memory
average = True  # the weights' moving average; False: the weights themselves
save_generations = False  # every prompt, generation, reference and verdict, as jsonl
device = "auto"  # cpu, cuda or mps
dtype = "auto"  # float32, or bfloat16 (auto: where the device multiplies it)
compile = False  # the blocks, with torch.compile: takes a while, then runs faster
settings = configure(globals())
# ----------------------------------------------------------------------------------------------------


def evaluate(name, pairs, most_new, score, model, encoding, condition):
    """Answer (question, reference) pairs. Returns a dict per pair (prompt, generation, reference, verdict, and whether
    the generation was cut off), and the new tokens per second."""
    block_size, bytes_per_token = model.config.block_size, cache_bytes_per_token(model)
    prompts = [encode_prompt(encoding, question, condition) for question, _ in pairs]
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= block_size]  # the others get no answer
    longest = min(max((len(prompts[i]) for i in fits), default=0) + most_new, block_size) + 1
    slots = max(1, min(batch_size, len(fits), int(cache_gb * 1e9 / (bytes_per_token * longest))))
    print(f"{name}: {slots} answers at a time; keys and values take {slots * bytes_per_token * longest / 1e9:.2f} GB")
    results = [dict(prompt=q, generation="", reference=r, verdict=score("", r), cut=False) for q, r in pairs]
    answers, verdicts, clock = [[] for _ in pairs], [], time.perf_counter()
    with tqdm(total=len(fits), desc=name, unit=" questions") as bar:
        options = dict(stop_token=special_id(encoding, "eoa"), slots=slots)
        for events in stream(model, [prompts[i] for i in fits], most_new, **options):
            for i, id in ((fits[k], id) for k, id in events):
                if id is not None:
                    answers[i].append(id)
                    continue
                text = encoding.decode(answers[i])
                verdicts.append(score(text, pairs[i][1]))
                results[i] |= dict(generation=text, verdict=verdicts[-1], cut=len(answers[i]) == most_new)
                bar.set_postfix(accuracy=f"{verdicts.count('right') / len(verdicts):.1%}", refresh=False)
                bar.update()
    return results, sum(map(len, answers)) / (time.perf_counter() - clock)


def main():
    source = local_directory(init_from or out_dir)
    model, encoding, tags = load_for_inference(source, average, device, dtype, compile, condition)
    prepare_args = read_meta(source)["prepare_args"] if (source / "meta.json").exists() else {}
    of_source = {"problems": "problems", "openai/gsm8k": "gsm8k"}
    names = [name.strip() for name in (tasks or of_source.get(prepare_args.get("source"), "")).split(",")]
    if not set(names) <= TASKS.keys():
        raise ValueError(f"--tasks names one or more of {', '.join(TASKS)}, not '{tasks}'")
    if limit < 0:
        raise ValueError(f"limit must be at least 0, not {limit}")
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    table = {}
    for name in names:
        questions, most_new, score = TASKS[name]
        pairs = questions(prepare_args=prepare_args, gsm8k_source=gsm8k_source)[: limit or None]
        results, speed = evaluate(name, pairs, max_new_tokens or most_new, score, model, encoding, tags)
        n, verdicts = max(len(results), 1), [r["verdict"] for r in results]
        table[name] = {"accuracy": verdicts.count("right") / n, "invalid": verdicts.count("invalid") / n}
        table[name] |= {
            "cut": sum(r["cut"] for r in results) / n,
            "count": len(results),
            "tokens_per_sec": round(speed),
        }
        if save_generations:
            path = Path(out_dir, f"generations-{name}.jsonl")
            path.write_text("".join(json.dumps(r) + "\n" for r in results), encoding="utf-8")
            print(f"generations: {path}")
    print(f"{'task':<12}{'accuracy':>10}{'invalid':>10}{'cut off':>10}{'count':>8}{'tokens/s':>10}")
    for name, r in table.items():
        shares = "".join(f"{r[key]:>10.2%}" for key in ("accuracy", "invalid", "cut"))
        print(f"{name:<12}{shares}{r['count']:>8,}{r['tokens_per_sec']:>10,.0f}")
    path = Path(out_dir, "eval.json")
    path.write_text(json.dumps({"tasks": table, "settings": settings}, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    with exit_on_error("interrupted; nothing was written"):
        main()
