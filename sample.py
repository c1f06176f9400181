"""Ask a trained model.

    python sample.py                                                  # a few questions to the model in out/
    python sample.py --prompt="Tom has 12 apples and buys 9 more. How many apples does Tom have now?"
    python sample.py --out_dir=out-gsm8k --prompt=FILE:question.txt --num_samples=3 --temperature=0.8 --top_k=50
    python sample.py --interactive=True                               # a line is a prompt; Ctrl-D ends
    python sample.py --init_from=sapientinc/HRM-Text-1B --condition=synth,cot --prompt="..."
"""

from configurator import configure

import codecs
from pathlib import Path

from common import errors_name_file, exit_on_error
from generate import load_for_inference, stream
from sources import word_problems
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


def main():
    instructions = [prompt] * bool(prompt)
    if prompt.startswith("FILE:"):
        file = Path(prompt.removeprefix("FILE:"))
        with errors_name_file(file):
            instructions = [file.read_text(encoding="utf-8").strip()]
    name = init_from or out_dir
    model, encoding, tags = load_for_inference(name, True, device, dtype, compile, condition)
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
    with exit_on_error():
        main()
