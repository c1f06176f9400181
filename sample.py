"""Ask a trained model.

    python sample.py                                                  # a few questions to the model in out/
    python sample.py --prompt="Tom has 12 apples and buys 9 more. How many apples does Tom have now?"
    python sample.py --out_dir=out-gsm8k --prompt=FILE:question.txt --num_samples=3 --temperature=0.8 --top_k=50
    python sample.py --interactive=True                               # a line is a prompt; Ctrl-D ends
    python sample.py --init_from=sapientinc/HRM-Text-1B --condition=synth,cot --prompt="..."
    python sample.py --jsonl=prompts.txt --save=answers.jsonl         # many at a time

With jsonl, each line of a file is a prompt, or, of a file named .jsonl, an object with "prompt" or "instruction" and
perhaps "condition". An answer is a line of `save`, written as it is complete: the number of the prompt's row, from 0,
prompt, answer, and whether it is finished or was cut off; "sample" is its number where num_samples is above 1.
Ctrl-C keeps what is there, and the same command goes on, to the same answers.
"""

from configurator import configure

import codecs
import json
import os
from pathlib import Path

from tqdm import tqdm

from common import check_types, errors_name_file, exit_on_error
from generate import load_for_inference, slots_in_memory, stream
from sources import to_pair, word_problems
from tasks import heldout
from tokenizer import encode_prompt, special_id

# ---- settings ----
out_dir = "out"  # of train.py
init_from = ""  # in its place, a model in the Hugging Face layout: a directory or a hub id
prompt = ""  # an instruction, or FILE:path to read it from; "": three held-out ones of the model's own dataset
condition = ""  # of your prompts: direct, cot, synth, noisy, several (synth,cot), none; "": most documents' own
num_samples = 1  # of each prompt
max_new_tokens = 512
temperature = 0.0  # 0: always the likeliest token
top_k = 0  # choose among this many of the likeliest tokens; 0: all
top_p = 1.0  # only the likeliest tokens that together have this probability
seed = 1337  # samples are the same for the same seed
interactive = False  # read prompts line by line
jsonl = ""  # a file of prompts, whose answers go to the file `save`
save = ""
batch_size = 128  # answers to it in work at a time; fewer where their keys and values take half of the free memory
H_cycles = 0  # of the recurrence; 0: as many as the model was trained with
L_cycles = 0
guidance = 0.0  # w of auto-guidance: logits of the last H-step, and w times their difference from the step before
kl_threshold = 0.0  # nats: a token's H-cycles end where the next changes its prediction by less; 0: all, H_cycles
device = "auto"  # cpu, cuda or mps
dtype = "auto"  # float32, or bfloat16 (auto: where the device multiplies it)
compile = False  # the blocks, with torch.compile: takes a while, then runs faster
settings = configure(globals())
# ----------------------------------------------------------------------------------------------------


def answer(model, encoding, ids):
    """Stream num_samples answers to a prompt to the terminal."""
    stop = special_id(encoding, "eoa")
    for i in range(num_samples):
        print(f"--- sample {i + 1}" if num_samples > 1 else "---")
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end within a character
        for events in stream(model, [ids], max_new_tokens, temperature, top_k, top_p, stop, seed + i):
            for _, id in events:
                if id is not None:
                    print(text.decode(encoding.decode_single_token_bytes(id)), end="", flush=True)
        print(text.decode(b"", final=True))


def read_prompts(path):
    """{row: (prompt, condition or "")} of the lines of a file that have a prompt. Raises ValueError or OSError."""
    rows, empty, content = {}, 0, path.read_bytes()
    for row, line in enumerate(content.removesuffix(b"\n").split(b"\n")):
        try:
            text = line.decode("utf-8-sig").removesuffix("\r")
            found = json.loads(text) if path.suffix == ".jsonl" and text.strip() else {"prompt": text}
            instruction = found["prompt" if "prompt" in found else "instruction"]
            pair = to_pair({"instruction": instruction, "response": "-", "condition": found.get("condition")}, {})
        except UnicodeDecodeError:
            pair = "not UTF-8"
        except (ValueError, TypeError, KeyError, RecursionError):
            pair = "not a JSON object with a prompt or an instruction"
        if pair == "empty instruction":
            empty += 1
        elif isinstance(pair, str):
            raise ValueError(f"{path}, line {row + 1}: {pair}")
        else:
            rows[row] = pair[0], pair[2]
    print(f"{path}: {len(rows):,} prompts" + f"; {empty:,} lines are empty" * bool(empty))
    return rows


def answers_in(path, rows):
    """The (row, sample) of the answers that a file holds; a line that was cut off at its end is dropped."""
    if not path.exists():
        return set()
    content, found = path.read_bytes(), set()
    whole = content[: content.rfind(b"\n") + 1]
    with errors_name_file(path, "holds something else than answers to these prompts: choose another --save"):
        if content and not content.startswith(b'{"row": '):
            raise ValueError("it begins otherwise")
        for number, line in enumerate(whole.splitlines(), 1):
            check_types(entry := json.loads(line), row=int, prompt=str, answer=str, finished=bool)
            if rows.get(entry["row"], ("",))[0] != entry["prompt"]:
                raise ValueError(f"line {number} has another prompt")
            found.add((entry["row"], entry.get("sample", 0)))
    os.truncate(path, len(whole))
    return found


def answer_file(model, encoding, tags, rows, done):
    """Answer the prompts of a file that have no answer yet; `rows` and `done` as of the functions above."""
    ids = {row: encode_prompt(encoding, prompt, own or tags) for row, (prompt, own) in rows.items()}
    block_size = model.config.block_size
    if long := {row for row in ids if len(ids[row]) > block_size}:
        limit = f"block_size = {block_size:,} tokens, the first in line {min(long) + 1}"
        print(f"{jsonl}: {len(long):,} prompts are longer than {limit}, and get no answer")
    todo = [(row, k) for row in ids if row not in long for k in range(num_samples) if (row, k) not in done]
    limits = [min(max_new_tokens, block_size + 1 - len(ids[row])) for row, _ in todo]
    longest = max((len(ids[row]) + limit for (row, _), limit in zip(todo, limits)), default=1)
    slots, answers = slots_in_memory(model, longest, batch_size), [[] for _ in todo]
    seeds = [f"{seed} {row} {sample}" for row, sample in todo]  # so that an answer is the same whatever is beside it
    options = temperature, top_k, top_p, special_id(encoding, "eoa"), seeds, slots
    events = stream(model, [ids[row] for row, _ in todo], max_new_tokens, *options)
    with open(save, "a", encoding="utf-8") as file, tqdm(total=len(todo), unit=" answers") as bar:
        for i, id in (event for step in events for event in step):
            if id is not None:
                answers[i].append(id)
                continue
            row, sample = todo[i]
            entry = {"row": row, **({"sample": sample} if num_samples > 1 else {}), "prompt": rows[row][0]}
            entry |= {"answer": encoding.decode(answers[i]), "finished": len(answers[i]) < limits[i]}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            bar.update()
    print(f"{save}: {len(done) + len(todo):,} answers" + f", {len(done):,} of them from before" * bool(done))


def main():
    if jsonl or save:
        if not (jsonl and save and batch_size >= 1):
            raise ValueError("--jsonl=FILE, --save=FILE for the answers, and a batch_size of at least 1 go together")
        rows = read_prompts(Path(jsonl))
        done = answers_in(Path(save), rows)
    instructions = [prompt] * bool(prompt)
    if prompt.startswith("FILE:"):
        file = Path(prompt.removeprefix("FILE:"))
        with errors_name_file(file):
            instructions = [file.read_text(encoding="utf-8").strip()]
    name, depth = init_from or out_dir, (H_cycles, L_cycles, guidance, kl_threshold)
    model, encoding, tags = load_for_inference(name, True, device, dtype, compile, condition, *depth)
    if save:
        return answer_file(model, encoding, tags, rows, done)
    prompts = [encode_prompt(encoding, instruction, tags) for instruction in instructions]
    if not prompt and not interactive:
        try:
            prompts = [q.prompt for q in heldout(Path(name), 3) if len(q.prompt) <= model.config.block_size]
        except (ValueError, OSError):  # a model in the Hugging Face layout, say
            prompts = [encode_prompt(encoding, row["instruction"], tags) for row in word_problems("val", 3, seed)]
    for ids in () if interactive else prompts:
        print(encoding.decode([id for id in ids if id not in encoding.special_tokens.values()]))
        answer(model, encoding, ids)
        print()
    while interactive:
        try:
            if line := input("A prompt, or Ctrl-D to end > ").strip():
                answer(model, encoding, encode_prompt(encoding, line, tags))
        except EOFError:
            return print()
        except ValueError as e:  # the prompt is too long, say
            print(e)


if __name__ == "__main__":
    with exit_on_error("interrupted" + f"; {save} keeps its answers, and the same command goes on" * bool(save)):
        main()
