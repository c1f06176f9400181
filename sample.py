"""
Ask a trained model.

$ python sample.py                                  # three held-out questions, to the model in out/
$ python sample.py --prompt="Tom has 12 apples and buys 9 more. How many apples does Tom have now?"
$ python sample.py --out_dir=out-gsm8k --prompt=FILE:question.txt --num_samples=3 --temperature=0.8
$ python sample.py --interactive=True               # a line is a prompt; Ctrl-D ends
$ python sample.py --init_from=sapientinc/HRM-Text-1B --condition=synth,cot --prompt="..."
$ python sample.py --jsonl=prompts.jsonl --save=answers.jsonl   # a line is {"prompt": "..."}
"""

from configurator import configure

import codecs
import json
import sys
from pathlib import Path

from tqdm import tqdm

from checkpoint import find_directory
from generate import load_for_inference, stream
from tasks import heldout
from tokenizer import known_conditions

# -----------------------------------------------------------------------------
out_dir = "out"  # of train.py
init_from = ""  # in its place, a directory or a hub id
prompt = ""  # an instruction, or FILE:path; "": three held-out documents of the model's own dataset
condition = ""  # of your prompts: direct, cot, "synth,cot", ..., none; "": that of most documents
num_samples = 1  # of each prompt
max_new_tokens = 512
temperature = 0.0  # 0: always the likeliest token
top_k = 0  # choose among this many of the likeliest tokens; 0: all
top_p = 1.0  # only the likeliest tokens that together have this probability
seed = 1337
interactive = False  # read prompts line by line
jsonl = ""  # a file of prompts, whose answers go to the file `save`
save = ""
batch_size = 128  # of these, in work at a time
H_cycles = 0  # of the recurrence; 0: as trained
L_cycles = 0
guidance = 0.0  # w of auto-guidance
device = "auto"  # cpu, cuda or mps
dtype = "auto"  # float32 or bfloat16
compile = False  # slower to start, then faster
configure(globals())
# -----------------------------------------------------------------------------

if bool(jsonl) != bool(save):
    sys.exit("--jsonl=FILE and --save=FILE go together")
if jsonl and not Path(jsonl).is_file():
    sys.exit(f"there is no file {jsonl}")
if prompt.startswith("FILE:"):
    path = Path(prompt.removeprefix("FILE:"))
    if not path.is_file():
        sys.exit(f"there is no file {path}")
    prompt = path.read_text(encoding="utf-8").strip()
directory = find_directory(init_from or out_dir)
model, tokenizer = load_for_inference(
    str(directory), device, dtype, H_cycles, L_cycles, guidance, compile
)
options = dict(
    stop_token=tokenizer.id_of["eoa"],
    temperature=temperature,
    top_k=top_k,
    top_p=top_p,
    slots=batch_size,
)
if not condition:
    condition = (known_conditions(directory) or ["synth,cot"])[0]


def answer(ids):
    """Stream num_samples answers to the terminal."""
    for k in range(num_samples):
        print(f"--- sample {k + 1}" if num_samples > 1 else "---")
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end in a character
        for _, id in stream(model, [ids], max_new_tokens, seed=seed + k, **options):
            if id is not None:
                print(text.decode(tokenizer.tokens[id]), end="", flush=True)
        print(text.decode(b"", final=True))


def answer_file():
    lines = Path(jsonl).read_text(encoding="utf-8-sig").split("\n")
    try:
        rows = [json.loads(line) for line in lines if line.strip()]
        rows = [row for row in rows for _ in range(num_samples)]
        prompts = [tokenizer.prompt(row["prompt"], row.get("condition", condition)) for row in rows]
    except (ValueError, KeyError, TypeError):
        sys.exit(f'{jsonl}: each line must be like {{"prompt": "..."}}')
    new = [[] for _ in rows]
    with open(save, "w", encoding="utf-8") as file, tqdm(total=len(rows), unit=" answers") as bar:
        for i, id in stream(model, prompts, max_new_tokens, seed=seed, **options):
            if id is not None:
                new[i].append(id)
                continue
            entry = {"row": i, **rows[i], "answer": tokenizer.decode(new[i])}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            bar.update()


if jsonl:
    answer_file()
elif interactive:
    while True:
        try:
            text = input("A prompt, or Ctrl-D to end > ").strip()
        except EOFError:
            break
        if text:
            try:
                answer(tokenizer.prompt(text, condition))
            except SystemExit as error:  # it is too long, say
                print(error)
else:
    if prompt:
        prompts = [tokenizer.prompt(prompt, condition)]
    else:
        prompts = [question.prompt for question in heldout(directory, 3)]
    special = set(tokenizer.special.values())
    for ids in prompts:
        print(tokenizer.decode([id for id in ids if id not in special]))
        answer(ids)
        print()
