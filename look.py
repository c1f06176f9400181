"""A look at a prepared dataset: documents as text, and how they are packed into rows.

    python data.py --dataset=problems --inspect=3
"""

import os
import shutil
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

import numpy as np

from common import check_types, errors_name_file, one_line
from loader import Loader, document, open_split
from tokenizer import SPECIAL, read_meta, read_tokenizer, special_id

PREFIX, RESPONSE, OTHER = 36, 33, 35  # colours: ANSI's cyan, yellow, magenta
MARKS = "⟪⟫│"  # ours; where text holds them, their escapes are shown
MAX_CHARS = 1200  # of a text; of a longer one, its head and tail
N_ROWS = 8


def show(directory, n, seed):
    """Print n training documents, spread over the dataset's files, and how a first step of N_ROWS rows of as many
    tokens as it was prepared for is packed. Raises ValueError or OSError where the dataset is damaged."""
    directory, meta = Path(directory), read_meta(directory)
    with errors_name_file(directory / "meta.json"):
        check_types(meta["prepare_args"], block_size=int)
    block_size = meta["prepare_args"]["block_size"]
    encoding, (tokens, ends, prefixes) = read_tokenizer(directory), open_split(directory, "train")
    files = [(f", {safe(one_line(file['name']))}", file["train"]["documents"]) for file in meta["files"]]
    for file, d in spread(files, n):
        ids, n_prefix = document(tokens, ends, prefixes, d)
        cut_off = "" if ids[-1] == special_id(encoding, "eoa") else ", cut off"
        with errors_name_file(f"{directory / 'train.bin'}: document {d}", "cannot be shown"):
            prefix, response = readable(encoding, ids[:n_prefix]), readable(encoding, ids[n_prefix:])
        print(f"document {d:,} of {len(ends):,}{file}: {n_prefix:,} + {len(ids) - n_prefix:,} tokens{cut_off}")
        text = f"\n{paint(prefix, PREFIX)}│{paint(response, RESPONSE)}"
        print(text.replace("\n", "\n    ")[1:], end="\n\n")
    batch = next(Loader(directory, "train", N_ROWS, block_size, seed))
    filled = f"{batch.n_tokens / N_ROWS / block_size:.1%} filled by {len(batch.documents):,} documents"
    print(f"a first step of {N_ROWS} rows of {block_size:,} tokens, {filled} (│█ prefix, ▒ response, · padding):")
    numbers, width = iter(batch.documents), max(shutil.get_terminal_size((120, 24)).columns - 2, 10)
    columns = np.arange(width) * block_size // width
    for doc, prefix in zip(batch.doc.numpy(), batch.prefix.numpy()):
        kinds = np.where(doc < 0, "·", np.where(prefix, "█", "▒"))[columns]
        kinds[np.diff(doc[columns], prepend=-1) > 0] = "│"
        runs = groupby(zip(kinds, doc[columns]), lambda pair: pair[1])
        print(" ", *(paint("".join(kind for kind, _ in run), (PREFIX, OTHER)[k % 2]) for k, run in runs), sep="")
        sizes = [(next(numbers), prefix[doc == k].sum(), (~prefix[doc == k]).sum()) for k in range(doc.max() + 1)]
        first = ", ".join(f"{d:,} ({a:,} + {b:,})" for d, a, b in sizes[:6])
        print(f"  {(doc >= 0).mean():.1%} filled by documents {first}" + f", {len(sizes) - 6} more" * (len(sizes) > 6))


def spread(files, n):
    """(name, document) of n documents, or of fewer where a file has too few: evenly over the files, which are (name,
    number of documents), and within them."""
    ends = np.cumsum([size for _, size in files]).tolist()
    some = [(name, end - size, size) for (name, size), end in zip(files, ends) if size]
    for f, share in Counter(i * len(some) // n for i in range(min(n, ends[-1]))).items():
        name, first, size = some[f]
        share = min(share, size)
        yield from ((name, first + (2 * i + 1) * size // (2 * share)) for i in range(share))


def readable(encoding, ids):
    """Ids as text that is safe to print, in which special tokens stand in ⟪⟫, by role."""
    names = {i: safe(text) for text, i in encoding.special_tokens.items()}
    names |= {special_id(encoding, role): role for role in SPECIAL}
    parts, head = [], MAX_CHARS * 3 // 4
    for special, run in groupby(ids, names.__contains__):
        if special:
            parts += [f"⟪{names[i]}⟫" for i in run]
        else:
            text = encoding.decode(run)
            hidden = len(text) - MAX_CHARS
            pieces = [text[:head], text[head + hidden :]] if hidden > 0 else [text]
            parts.append(f"⟪{hidden:,} characters⟫".join(map(safe, pieces)))
    return "".join(parts)


def safe(text):
    """Text with escapes for what would steer a terminal, and for our marks."""
    return "".join(c if c == "\n" or (c.isprintable() and c not in MARKS) else ascii(c)[1:-1] for c in text)


def paint(text, colour):
    """Text in a colour, if stdout is a terminal."""
    return f"\x1b[{colour}m{text}\x1b[0m" if sys.stdout.isatty() and not os.environ.get("NO_COLOR") else text
