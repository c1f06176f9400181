"""Scores of a trained model on benchmarks, with its averaged weights.

    python eval.py                                                   # the model in out/, on held-out rows of its data
    python eval.py --out_dir=out-gsm8k --tasks=gsm8k --limit=100     # GSM8K's test set, from the hub
    python eval.py --tasks=arc,boolq --data_dir=DIR --save_generations=True     # local files: DIR/arc_challenge, ...
    python eval.py --init_from=sapientinc/HRM-Text-1B --tasks=paper --out_dir=out-published    # the paper's table
    torchrun --nproc_per_node=8 eval.py --tasks=paper                # questions shared among 8 GPUs
    python eval.py --sweep=guidance=-0.5,-0.1,0,0.1,0.5              # or H_cycles, L_cycles: a table, task by value
    python eval.py --H_cycles=4 --sweep=kl_threshold=0,0.01,0.1      # adaptive depth: scores, H-cycles spent, a picture
    python eval.py --compare=out-a,out-b                             # paired, of two runs with --save_generations=True

Prints a table and writes out_dir/eval.json and eval.md; with save_generations also out_dir/generations-<task>.jsonl. A
generation without an answer is reported as invalid, one that reaches max_new_tokens or the end of the context as cut
off. A prompt too long for the context loses its last shots, one by one, and is counted as shortened; one that is too
long without any is counted as over-long, and wrong. A task whose rows are not in data_dir is left out, unless it is the
only one. Ctrl-C prints the table so far; answers are kept in out_dir as they come, and the same command goes on with
the rest.

With --mcq=likelihood the answer is the choice whose tokens have the largest sum of log p right after the prompt: with
no space before it, as responses have none, without eoa, and not divided by its length, as choices are letters. So does
acc of lm-evaluation-harness, by lm_eval_hrm.py with --apply_chat_template; without that it puts a space before them.
"""

from configurator import configure

import hashlib
import json
import os
import sys
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path

import ranks
from checkpoint import checkpoints
from common import errors_name_file, exit_on_error, local_directory, one_line, replace_file
from evaluate import finish, plan, run
from generate import load_for_inference
from ranks import print0
from results import compare as compare_runs
from results import figures_of, markdown, terminal
from sweep import run_sweep
from tasks import find_tasks
from tokenizer import condition_tags, encode_prompt, fingerprint, read_meta

# ---- settings ----
out_dir = "out"  # of train.py; results go there too
init_from = ""  # in place of its model, one in the Hugging Face layout: a directory or a hub id
tasks = "heldout"  # of tasks.py, with commas between; heldout: the model's own validation documents; paper: its eight
data_dir = ""  # of local copies of the benchmarks, a directory for each; "": from the hub
limit = 0  # questions per task; 0: all, but 1,000 of heldout
condition = ""  # of the prompts, but for heldout: a tag, several, or none; "": the task's, if the model knows it
mcq = "token"  # of choices with one-token answers: token (generate it) or likelihood (take the likeliest choice)
samples = 0  # answers per question of tasks with a temperature, which are those of AIME; 0: the task's own
batch_size = 128  # answers in work at a time; where one is complete, the next question takes its place
max_new_tokens = 0  # per answer; 0: the task's own
cache_gb = 0.0  # the batch is made smaller where its keys and values would take more; 0: half of the free memory
average = True  # the weights' moving average; False: the weights themselves
save_generations = False  # every prompt, generation, reference and score, as jsonl
compare = ""  # two directories with a comma between: print how their saved generations differ, and do nothing else
device = "auto"  # cpu, cuda or mps
dtype = "auto"  # float32, or bfloat16 (auto: where the device multiplies it)
compile = False  # the blocks, with torch.compile: takes a while, then runs faster
H_cycles = 0  # of the recurrence; 0: as many as the model was trained with
L_cycles = 0
guidance = 0.0  # w of auto-guidance: logits of the last H-step, and w times their difference from the step before
kl_threshold = 0.0  # nats: a token's H-cycles end where the next changes its prediction by less; 0: all, H_cycles
sweep = ""  # "guidance=-0.5,-0.1,0,0.1,0.5", or so for any of the four above: all tasks once per value, and a table
seed = 1337  # of samples; those of a question are the same for the same seed
settings = configure(globals())
# Settings that change no answer, or that a file of answers names in another form.
NO_MATTER = "out_dir init_from tasks data_dir limit condition samples batch_size max_new_tokens cache_gb".split()
NO_MATTER += "save_generations compare sweep device dtype compile".split()
SAID = "tasks limit condition mcq samples max_new_tokens average H_cycles L_cycles guidance kl_threshold".split()
BY_DEFAULT = "", "0", "0.0", "token", "True"  # of SAID, which eval.md tells where they are others
INTERRUPTED = "interrupted; the same command goes on with what is left"
# ----------------------------------------------------------------------------------------------------


def check_settings():
    """{the name that its files get: task}. Raises ValueError, in one sentence, for a setting that would fail later."""
    for key, least in dict(limit=0, batch_size=1, max_new_tokens=0, samples=0, cache_gb=0).items():
        if not settings[key] >= least:
            raise ValueError(f"{key} must be at least {least}, not {settings[key]}")
    if mcq not in ("token", "likelihood"):
        raise ValueError(f"mcq must be token or likelihood, not '{mcq}'")
    return find_tasks(tasks)


def fingerprint_of_model(source):
    """A hash of the files that make the model."""
    names = "config.json", "tokenizer.json", "tokenizer.tiktoken"
    paths = [source / name for name in names if (source / name).is_file()] + sorted(source.glob("*.safetensors"))
    prints = [fingerprint(path) for path in checkpoints(source)[:1] + paths]
    return hashlib.sha256(" ".join(prints).encode()).hexdigest()[:16]


def condition_of(name, task, source, own):
    """The condition of a task's prompts: the setting's, else the task's, unless the model's training data had none
    such; else that of most of those, which is `own`."""
    asked = ",".join(condition_tags(task.condition))
    if condition or not asked:
        return own
    known = read_meta(source)["splits"]["train"]["conditions"] if (source / "meta.json").exists() else {asked: 1}
    if asked not in {c.replace(" ", "") for c in known}:
        print0(f"{name}: the model was not trained on the task's condition {asked}; asked with {own or 'none'}")
        return own
    return asked


def score_tasks():
    """Returns the table {task: figures}, its lines, and for how many answers were asked."""
    chosen, source, directory = check_settings(), local_directory(init_from or out_dir), Path(out_dir)
    directory.mkdir(parents=True, exist_ok=True)
    options = dict(source=source, data_dir=data_dir, limit=limit)
    questions = {}
    for name, task in [*chosen.items()]:
        try:
            questions[name] = task.questions(**options)[: limit or None]
        except FileNotFoundError as e:
            if len(chosen) == 1:
                raise
            print0(f"{name} is left out: {one_line(e)}")
            del chosen[name]
    if empty := [name for name in chosen if not questions[name]]:
        raise ValueError(f"the task {empty[0]} has no questions")
    how = average, device, dtype, compile, condition, H_cycles, L_cycles, guidance, kl_threshold
    model, encoding, own = load_for_inference(source, *how)
    plans, abouts = {}, {}
    common = {key: value for key, value in settings.items() if key not in NO_MATTER}
    common |= dict(model=fingerprint_of_model(source), dtype=str(model.compute_dtype), device=model.embed.device.type)
    common["scorers"] = [fingerprint(Path(__file__).with_name(f"{name}.py")) for name in ("tasks", "scorers")]
    ranks.check_agreement(dict(questions={name: len(q) for name, q in questions.items()}, model=common["model"]))
    for name, task in chosen.items():
        tags, most_new = condition_of(name, task, source, own), task.max_new_tokens
        if most_new != 1:
            longest = max(len(encode_prompt(encoding, str(q.truth))) for q in questions[name])
            most_new = max_new_tokens or most_new or max(task.min_limit, 2 * longest)
        n_samples = (samples or task.samples) if task.temperature else 1
        of_all = encoding, tags, model.config.block_size, most_new, n_samples, mcq
        plans[name] = plan(name, task, questions[name], *of_all)
        abouts[name] = common | dict(condition=tags, max_new_tokens=most_new, context=task.context)
        abouts[name] |= dict(temperature=task.temperature)
    lines, speeds = run(model, encoding, plans, abouts, directory, seed, mcq, batch_size, cache_gb)
    table = {name: figures_of(task, lines[name], speeds[name]) for name, task in chosen.items() if lines[name]}
    return table, lines, sum(map(len, plans.values()))


def main(keep=False):
    """Evaluate, print and write. Returns the table. keep: the answers, for the same command once more."""
    table, lines, n_asked = score_tasks()
    n_answers = sum(map(len, lines.values()))
    if n_answers < n_asked:
        print0(f"partial: {n_answers:,} of {n_asked:,} answers, which are no random part")
    if table:
        print0(terminal(table))
    if n_answers < n_asked:
        ranks.shutdown(INTERRUPTED * ranks.master)
    if ranks.master:
        how = (f"--{key}={settings[key]}" for key in SAID if str(settings[key]) not in BY_DEFAULT)
        about = f"{init_from or out_dir}, `{' '.join(how)}`"
        content = json.dumps({"tasks": table, "settings": settings}, indent=1) + "\n"
        for name, text in {"eval.json": content, "eval.md": markdown(table, about)}.items():
            with errors_name_file(path := Path(out_dir, name), "could not be written"):
                replace_file(path, text.encode())
            print0(f"written to {path}")
        finish(Path(out_dir), table, lines, save_generations, keep)
    return table


def main_with(**changes):
    """main() with other settings, of a sweep, which goes on where it is killed."""
    settings.update(changes)
    globals().update(changes)
    return main(keep=True)


if __name__ == "__main__":
    with exit_on_error(INTERRUPTED):
        if compare:
            if len(compare.split(",")) != 2:
                raise ValueError(f"--compare=a,b names two directories, not '{compare}'")
            print(compare_runs(*compare.split(",")))
        else:
            ranks.advice = "the same command goes on"
            ranks.start("cpu", timedelta(days=9))  # ranks exchange answers alone; some have many more to give
            if not ranks.master:
                sys.stdout = open(os.devnull, "w")
            with ranks.abort_if_any() if ranks.world_size > 1 else nullcontext():
                if sweep:
                    run_sweep(sweep, out_dir, partial(main_with, sweep="", init_from=init_from or out_dir))
                else:
                    main()
            if ranks.world_size > 1:
                ranks.shutdown(status=0)
