"""
A look at a dataset: documents as text, spread over its files, and how rows are packed.

$ python -m tools.inspect_data --dataset=problems --n=3
"""

from configurator import configure

from pathlib import Path

import numpy as np

from loader import Loader, read_meta
from tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
dataset = "problems"  # data/<dataset>
split = "train"
n = 3  # documents
rows = 8
width = 100  # characters for a row
max_chars = 1200  # of a document
seed = 1337
settings = configure(globals())
# -----------------------------------------------------------------------------


def readable(ids):
    """Text that steers no terminal."""
    text = tokenizer.decode(ids.tolist())
    if len(text) > max_chars:
        text = text[:max_chars] + "..."
    characters = []
    for c in text:
        visible = c == "\n" or c.isprintable()
        characters.append(c if visible else ascii(c)[1:-1])
    return "".join(characters)


directory = Path("data", dataset)
meta = read_meta(directory)
tokenizer = load_tokenizer(directory)
loader = Loader(directory, split, rows, meta["block_size"], seed, epochs=1)
ends = np.cumsum([file[split]["documents"] for file in meta["files"]])

for i in range(min(n, ends[-1])):
    d = (2 * i + 1) * ends[-1] // (2 * n)
    file = meta["files"][np.searchsorted(ends, d, side="right")]
    ids, n_prefix = loader.document(d)
    sizes = f"{n_prefix:,} + {len(ids) - n_prefix:,} tokens"
    print(f"document {d:,} of {ends[-1]:,}, {file['name']}: {sizes}")
    text = f"{readable(ids[:n_prefix])} | {readable(ids[n_prefix:])}"
    print("    " + text.replace("\n", "\n    ") + "\n")

batch = next(loader)
share = batch.n_tokens / batch.idx.numel()
print(f"{rows} rows of {meta['block_size']:,} tokens, {share:.1%} full")
print("| a document begins, # prefix, = response, . padding")
columns = np.arange(width) * meta["block_size"] // width
for doc, prefix in zip(batch.doc.numpy()[:, columns], batch.prefix.numpy()[:, columns]):
    row = np.where(doc < 0, ".", np.where(prefix, "#", "="))
    row[np.diff(doc, prepend=-1) > 0] = "|"
    print("".join(row))
