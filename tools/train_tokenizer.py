"""
Train a byte-level BPE on the texts that data.py would read (pip install tokenizers), by the
published recipe: all documents of a file, or ten times its cap. data.py takes the directory.

$ python -m tools.train_tokenizer config/hrm1b.py --out=tokenizer-hrm1b
$ python data.py config/hrm1b.py --tokenizer=tokenizer-hrm1b
"""

from configurator import configure

import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import data
from tokenizer import SPECIAL, load_tokenizer

# -----------------------------------------------------------------------------
out = "tokenizer"  # the directory
vocab_size = 65536
max_chars = 10000  # of a text
# as in data.py
source = ""
source_config = ""
split = "train"
val_split = ""
mixture = []
fields = {}
settings = configure(globals())
# -----------------------------------------------------------------------------

PATTERN = (  # numbers are split into digits
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def documents(part):
    for start, stop in data.slices(part):
        for _, item in data.read(part, start, stop):
            try:
                yield from data.to_documents(data.parse(item), part.rule)
            except Exception:
                continue  # data.py says what is wrong with it


def texts():
    for part in data.find_parts():
        if part.val_share == 1:
            continue
        left = 10 * part.rule.cap or sys.maxsize
        for instruction, response, *_ in documents(part):
            yield [instruction[:max_chars], response[:max_chars]]
            left -= 1
            if left == 0:
                break


if __name__ == "__main__":
    vars(data).update(settings)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split_by = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split_by, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts(), trainer)
    Path(out).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(out, "tokenizer.json")))
    print(f"{out} has {load_tokenizer(out).n_vocab:,} ids")
