"""
Ask a trained model.

    python sample.py                                                  # a few questions to the model in out/
    python sample.py --prompt="Tom has 12 apples and buys 9 more. How many apples does Tom have now?"
    python sample.py --out_dir=out-gsm8k --prompt=FILE:question.txt --num_samples=3 --temperature=0.8 --top_k=50
    python sample.py --interactive=True                               # a line is a prompt; Ctrl-D ends
    python sample.py --init_from=sapientinc/HRM-Text-1B --condition=synth,cot --prompt="..."
"""

import codecs
import sys
from pathlib import Path

import data
from configurator import configure
from model import blamed_on, choose_device, local_directory, reason

# ----------------------------------------------------------------------------------------------------
# settings
out_dir = "out"  # of train.py
init_from = ""  # in its place, a model in the Hugging Face layout: a directory or a hub id
prompt = ""  # an instruction, or FILE:path to read it from; "": a few of our own
condition = (
    ""  # direct, cot, synth, noisy, or several, as synth,cot; none; "": what most of the training documents have
)
num_samples = 1  # of each prompt
max_new_tokens = 512
temperature = 0.0  # 0: always the likeliest token
top_k = 0  # only so many of the likeliest tokens; 0: all
top_p = 1.0  # only the likeliest tokens that together have this probability
seed = 1337  # samples are the same for the same seed
interactive = False  # read prompts line by line
average = True  # the weights' moving average; False: the weights themselves
device = "auto"  # cpu, cuda or mps
dtype = "auto"  # float32 or bfloat16; auto is bfloat16 on cuda
compile = False  # the blocks, with torch.compile: takes a while, then runs faster
configure(globals())
# ----------------------------------------------------------------------------------------------------

EXAMPLES = (
    "Tom has 12 apples and buys 9 more. How many apples does Tom have now?",
    "Mia has 4 bags with 6 shells in each bag. How many shells does Mia have?",
    "Raj has 20 coins, buys 7 more and then gives 5 to Anna. How many coins does Raj have now?",
)


def answer(instruction):
    """Stream num_samples answers to an instruction to the terminal."""
    ids = data.encode_prompt(encoding, instruction, condition)
    stop = data.special_id(encoding, "eoa")
    for i in range(num_samples):
        print(f"--- sample {i + 1}" if num_samples > 1 else "---")
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a token may end within a character
        for news in model.stream([ids], max_new_tokens, temperature, top_k, top_p, stop, seed + i):
            for _, new in news:
                if new is not None:
                    print(text.decode(encoding.decode_single_token_bytes(new)), end="", flush=True)
        print(text.decode(b"", final=True))


try:
    if prompt.startswith("FILE:"):
        file = Path(prompt.removeprefix("FILE:"))
        with blamed_on(file):
            prompt = file.read_text(encoding="utf-8").strip()
        if not prompt:
            raise ValueError(f"{file} is empty")
    device, dtype = choose_device(device, dtype)
    source = local_directory(init_from) if init_from else out_dir
    model, encoding = data.load_for_inference(source, average, device, dtype)
    model.compile_blocks = compile
    condition = data.choose_condition(condition, source)
    print(f"{init_from or out_dir}, on {device}; condition: {condition or 'none'}")
    if interactive:
        print("A line is a prompt; Ctrl-D ends.")
        while True:
            line = input("> ").strip()
            try:
                answer(line) if line else None
            except ValueError as e:  # too long, say
                print(e)
    for instruction in () if interactive else [prompt] if prompt else EXAMPLES:
        print(instruction)
        answer(instruction)
        print()
except (ValueError, OSError) as e:
    sys.exit(f"sample.py: {reason(e)}")
except (KeyboardInterrupt, EOFError):
    print()
