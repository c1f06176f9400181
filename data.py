"""Instruction/response pairs -> tokens -> the bins that loader.py reads.

    python data.py                                   # the embedded word problems -> data/problems
    python data.py --dataset=add6 --source=addition:6    # 6-digit numbers; for other puzzles see puzzles.py
    python data.py config/gsm8k.py                   # GSM8K from the Hugging Face hub -> data/gsm8k
    python data.py config/hrm1b.py                   # a mixture of hundreds of files: see mixture.py
    python data.py --dataset=mine --source=pairs.jsonl --tokenizer=gpt2
    python data.py --dataset=mine --inspect=5        # five of its documents, and how rows are packed

data/<dataset>/ then holds, for the splits train and val, <split>.bin and <split>.idx (see loader.py), meta.json,
tokenizer.tiktoken, and report.md. No file imports this one: a directory data/ with an __init__.py would be taken for
it, and be run.
"""

from configurator import configure

import json
import os
import shutil
import sys
import time
from array import array
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from common import exit_on_error, finish_rename, lock_file, read_json, replace_file
from mixture import add_counts, find_parts, markdown, no_counts, sample_texts, source_of, split_of, to_pairs
from sources import item_size
from tokenizer import (
    FILES,
    condition_tags,
    encode_document,
    encoding_meta,
    fingerprint,
    make_encoding,
    read_encoding,
    save_encoding,
    token_dtype,
)
from workers import in_order

# ---- settings ----
dataset = "problems"  # the name of what is made: data/<dataset>
source = ""  # addition:6 (see puzzles.py), a hub id, a .jsonl, .json or .parquet file, a directory, or problems
source_config = ""  # the hub dataset's configuration
split = "train"  # of the source; "": all files of a directory, or of a repository on the hub
val_split = ""  # of the source; "": val_fraction of the documents of split
val_fraction = 0.01  # drawn by seed; documents with the same instruction stay together
mixture = []  # caps, repeats and more for some of the source's files, or several sources: see mixture.py
fields = {"instruction": "instruction", "response": "response", "condition": "condition"}  # names in the source
condition = ""  # of rows that have none: direct, cot, synth, noisy, or several, as synth,cot
answer = ""  # responses end in "#### N": "cot" keeps the working, "direct" only N; both become the condition
strip_annotations = False  # drop <<48/2=24>> from responses
skip_bad = False  # leave malformed and empty rows out and count them; otherwise the first one stops
n_problems = 40000  # how many word problems, or puzzles, to make for training
n_val_problems = 1000  # and for validation
tokenizer = "bytes"  # or train:4096, a tiktoken encoding, a BPE file in its format, a model's directory or hub id
pat_str = ""  # how text is split before a BPE file's or a trained BPE's merges: a regex; hrm: the published; "": ours
normalizer = ""  # of a BPE file or a trained BPE: NFC, as the published has, or none
block_size = 1024  # context: a document may have one token more
too_long = "truncate"  # longer documents; or "drop" (as always if the instruction alone is longer), or "stop"
batch_size = 0  # of train.py; with max_iters, report.md has how many epochs they make
max_iters = 0
inspect = 0  # so many documents of the prepared dataset are shown, and nothing is made
workers = 0  # processes, or threads for a small source; 0: one per core
seed = 1337
settings = configure(globals())

NOT_KEPT = {"dataset", "inspect", "workers", "batch_size", "max_iters"}  # by a dataset that is made
SAVE_EVERY = 5  # seconds, but whole files only
SMALL = 2**26  # bytes of a source for which no processes are started


# ---- preparing a dataset ----
def prepare(directory, **changes):
    """Make a dataset in `directory`, by the settings above with `changes`. It is made in <directory>.part and then
    renamed, so `directory` never holds half of one; a preparation that was killed goes on after the last file that it
    recorded. It replaces a dataset, and nothing else. Returns the content of meta.json.
    Raises ValueError or OSError."""
    directory, o = Path(directory), SimpleNamespace(**{**settings, **changes})
    o.source = o.source or "problems"
    if vars(o).keys() != settings.keys():
        raise TypeError(f"there is no setting {min(changes.keys() - settings.keys())}")
    finish_rename(directory)
    held, written = {path.name for path in directory.glob("*")}, {*FILES, "meta.json", "report.md"}
    if directory.exists() and not {"train.bin", "train.idx"} <= held <= written:
        other = ", ".join(sorted(held - written)[:3])
        what = f"holds what data.py did not write ({other})" if other else "is no prepared dataset"
        raise ValueError(f"{directory} exists and {what}; choose another name with --dataset")
    for key, least in dict(n_problems=1, n_val_problems=0, block_size=1, workers=0, inspect=0).items():
        if vars(o)[key] < least:
            raise ValueError(f"{key} must be at least {least}, not {vars(o)[key]}")
    if not 0 <= o.val_fraction < 1:
        raise ValueError(f"val_fraction is a share below 1, not {o.val_fraction}")
    parts, place = find_parts(o), directory.with_name(f"{directory.name}.part")
    old, new = place / "old", place / "new"
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "wb") as file:
        lock_file(file, f"another data.py is preparing {directory}")
        try:
            encoding, files = start_or_go_on(new, parts, o)
            write_bins(new, parts, files, encoding, o)
            meta = write_meta(new, files, encoding, o)
            if directory.exists():
                directory.rename(old)
            new.rename(directory)
        finally:
            if old.exists() and not directory.exists():
                old.rename(directory)
            if not (new / "progress.json").exists():
                shutil.rmtree(place, ignore_errors=True)
    return meta


def start_or_go_on(new, parts, o):
    """(the Encoding, the entries of the files that are done): of a preparation with the same settings that was killed,
    or of a new one."""
    progress = read_json(new / "progress.json") if (new / "progress.json").exists() else None
    if progress and progress["settings"] == kept_settings(o):
        files = []
        for part, file in zip(parts, progress["files"]):
            if not entry(part).items() <= file.items():
                print(f"{file['name']} has changed, or another file stands in its place")
                break
            files.append(file)
        print(f"going on after {len(files):,} of {len(parts):,} files: {new.parent} has them")
        return read_encoding(new, progress).checked(), files
    if progress:
        print(f"{new.parent} holds what other settings made, and begins anew")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    began = time.monotonic()
    encoding = make_encoding(o.tokenizer, o.pat_str, sample_texts(parts, o.seed), o.normalizer)
    save_encoding(encoding, new)
    if time.monotonic() > began + SAVE_EVERY:
        save(new, (), [], encoding, o)
    return encoding, []


def kept_settings(o):
    """The settings that a dataset depends on, as JSON has them. A function is its source."""
    kept = {key: value for key, value in vars(o).items() if key not in NOT_KEPT}
    return json.loads(json.dumps(kept, default=source_of))


def entry(part):
    """What meta.json's "files" and progress.json say of a file, but for what was found in it."""
    stat, rule = part.file.path.stat() if part.file.path else None, part.rule
    rules = {"group": part.group, "cap": rule.cap, "repeat": rule.repeat}
    return {"name": part.name, **rules, "bytes": stat and stat.st_size, "modified": stat and stat.st_mtime_ns}


# ---- rows -> ids ----
def encode_batch(parts, encoding, o, job):
    """A job, (number of a part, number of its first item here, items) -> {split: (ids, index, counts)}; the index is
    (n, 2) int64, with lengths where in the file the ends will be."""
    i, first, items = job
    part, dtype = parts[i], np.dtype(token_dtype(encoding.n_vocab)).char
    limit = o.block_size + 1  # the last id is never input
    made = {split: (array(dtype), array("q"), no_counts()) for split in ("train", "val")}
    for number, item in enumerate(items, first):
        pairs = to_pairs(part.rule, item)
        made["val" if part.val_share == 1 else "train"][2]["rows"] += pairs is not None  # else a blank line
        if pairs == []:
            made["train"][2]["dropped"]["left out by rows()"] += 1
        for pair in pairs or ():
            ids, index, counts = made[split_of(part, pair[0] if isinstance(pair, tuple) else "", o.seed)]
            document = fit_document(encoding, pair, part.rule, part.file.where(number), limit)
            if isinstance(document, str):
                counts["dropped"][document.partition(":")[0]] += 1  # few kinds, however many rows there are
                continue
            whole, n_prefix = document
            kept = whole[:limit]  # if cut, without eoa: it does not end there
            ids.extend(kept)
            index.extend((len(kept), n_prefix))
            counts["documents"] += 1
            counts["tokens"] += len(kept)
            counts["prefix_tokens"] += n_prefix
            counts["truncated"] += len(kept) < len(whole)
            counts["text_bytes"] += sum(len(text if text.isascii() else text.encode()) for text in pair[:2])
            counts["text_tokens"] += len(whole) - 3 - len(condition_tags(pair[2]))
            counts["conditions"][pair[2]] += 1
    for split, (ids, index, counts) in made.items():
        made[split] = ids.tobytes(), np.array(index).reshape(-1, 2), counts
    return made


def fit_document(encoding, pair, rule, where, limit):
    """What to_pairs() gives for an item -> (ids, length of the prefix), or why it is dropped: the kind, and details
    after a colon. Raises ValueError where it is not to be."""
    try:
        if isinstance(pair, str):
            raise ValueError(pair)
        ids, n_prefix = encode_document(encoding, *pair)
    except ValueError as e:
        if rule.skip_bad:
            return str(e)
        raise ValueError(f"{where}: {e}; --skip_bad=True leaves such rows out") from None
    if len(ids) > limit and rule.too_long == "stop":
        raise ValueError(f"{where}: {len(ids)} tokens, longer than block_size = {limit - 1}")
    if n_prefix + 2 > limit:
        return "instruction too long"
    return "too long" if len(ids) > limit and rule.too_long == "drop" else (ids, n_prefix)


def batches(parts, done):
    """Yields (bytes, job of encode_batch()) for the parts after those that are done: many small items, or a few large
    ones. A job per text takes more than twice as long. Each part has a job, if with no items."""
    for i, part in enumerate(parts[done:], done):
        size, items, number = 0, [], part.file.first
        for item in part.file.items():
            size += item_size(item)
            items.append(item)
            if len(items) == 1000 or size > 2**18:
                yield size, (i, number, items)
                size, items, number = 0, [], number + len(items)
        yield size, (i, number, items)


# ---- ids -> files ----
def write_bins(new, parts, files, encoding, o):
    """Write both splits' bins and indexes, after what `files` has, and append the other parts' entries to it.
    progress.json has those that are whole, but for the last seconds."""
    entries, saved, sizes = [entry(part) for part in parts], time.monotonic(), [part.file.size for part in parts]
    ends = {split: sum(file[split]["tokens"] for file in files) for split in ("train", "val")}
    with ExitStack() as stack:
        out = {name: stack.enter_context(open(new / name, "ab")) for name in FILES[:4]}
        for split, end in ends.items():  # what came after the last entry is made again
            out[f"{split}.bin"].truncate(end * np.dtype(token_dtype(encoding.n_vocab)).itemsize)
            out[f"{split}.idx"].truncate(sum(file[split]["documents"] for file in files) * 16)
        jobs, n_workers = batches(parts, len(files)), o.workers or os.cpu_count()
        large = sum(sizes) > SMALL or any(part.file.path is None and not part.file.size for part in parts)
        encode = partial(encode_batch, parts, encoding, o)
        results = stack.enter_context(closing(in_order(encode, jobs, n_workers, processes=large)))
        known = dict(total=sum(sizes) or None, initial=sum(sizes[: len(files)]), unit="B", unit_scale=True)
        desc, often = f"preparing {new.parent.with_suffix('')}", 0.1 if sys.stderr.isatty() else 10
        bar = stack.enter_context(tqdm(**known, desc=desc, mininterval=often))
        started, n_tokens = time.monotonic(), 0
        for size, (i, *_), made in results:
            if i == len(files):  # a part begins
                if time.monotonic() > saved + SAVE_EVERY:
                    save(new, out.values(), files, encoding, o)
                    saved = time.monotonic()
                files.append(entries[i] | {split: no_counts() for split in made})
            for split, (ids, index, counts) in made.items():
                index[:, 0] = ends[split] + np.cumsum(index[:, 0])
                ends[split] += counts["tokens"]
                out[f"{split}.bin"].write(ids)
                out[f"{split}.idx"].write(index.tobytes())
                add_counts(files[i][split], counts)
                n_tokens += counts["text_tokens"]
            speed = n_tokens / (time.monotonic() - started)
            bar.set_postfix_str(f"file {i + 1:,} of {len(parts):,}, {speed:,.0f} tokens/s", refresh=False)
            bar.update(size)
        bar.update(max(0, sum(sizes) - bar.n))  # sizes are estimates
        sync(out.values())


def save(new, out, files, encoding, o):
    """Write progress.json, after what it tells of."""
    sync(out)
    progress = {"settings": kept_settings(o), **encoding_meta(encoding), "files": files}
    replace_file(new / "progress.json", json.dumps(progress).encode())


def sync(out):
    for file in out:
        file.flush()
        os.fsync(file.fileno())


def write_meta(new, files, encoding, o):
    """Write meta.json and report.md. Returns the content of meta.json."""
    splits = {split: no_counts() for split in ("train", "val")}
    for split, counts in splits.items():
        for file in files:
            add_counts(counts, file[split])
        counts["length"] = length_points(new / f"{split}.idx", o.block_size + 1)
    if not splits["train"]["documents"]:
        dropped = ", ".join(f"{n:,} {why}" for why, n in splits["train"]["dropped"].items()) or "none"
        advice = "; --skip_bad=False tells where" if o.skip_bad else ""
        raise ValueError(f"{o.source} holds no document to train on; dropped: {dropped}{advice}")
    meta = {**encoding_meta(encoding), "splits": splits, "files": files, "prepare_args": kept_settings(o)}
    meta["checksums"] = {name: fingerprint(new / name) for name in FILES}
    replace_file(new / "meta.json", json.dumps(meta, indent=1).encode())
    text = markdown(meta, o.batch_size * o.max_iters * o.block_size)
    replace_file(new / "report.md", text.encode(errors="backslashreplace"))  # of names that are not UTF-8
    (new / "progress.json").unlink(missing_ok=True)
    return meta


def length_points(path, longest):
    """{"p50": length, ...} of the documents of an index."""
    n, n_of, before = path.stat().st_size // 16, np.zeros(longest + 1, np.int64), 0
    for first in range(0, n, 2**20):
        ends = np.fromfile(path, np.int64, 2**21, offset=16 * first)[::2]
        n_of += np.bincount(np.diff(ends, prepend=before), minlength=longest + 1)
        before = ends[-1]
    points = {"min": 0, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}
    found = np.searchsorted(n_of.cumsum(), [max(1, round(share * n)) for share in points.values()])
    return dict(zip(points, found.tolist())) if n else {}


def report(directory, meta):
    """What went into a dataset, as text."""
    stored = f"{meta['vocab_size']:,} ids, stored as {meta['dtype']}"
    lines = [f"{directory}: tokenizer {meta['tokenizer']['name']}, {stored}"]
    for split, c in meta["splits"].items():
        sizes = f"{c['documents']:,} documents, {c['tokens']:,} tokens ({c['prefix_tokens']:,} prefix)"
        lines.append(f"  {split}: {sizes}, {c['truncated']:,} truncated")
        for key in "length", "conditions", "dropped":
            counts = ", ".join(f"{n:,} ({what or 'none'})" for what, n in c[key].items())
            lines.append(f"    {key}: {counts or 0}")
    return "\n".join(lines)


if __name__ == "__main__":
    directory = Path("data", dataset)
    with exit_on_error(f"interrupted; {directory} is as it was; the same command goes on after the last whole file"):
        if dataset == "problems" and (source not in ("", "problems") or mixture):
            raise ValueError(f"give {'a mixture' if mixture else 'the data of ' + source} a name of its own: --dataset")
        if directory.parent != Path("data") or dataset == "..":
            raise ValueError(f"dataset is the name of a directory in data/, not a path: '{dataset}'")
        if dataset != "problems" and not (source or mixture or inspect):
            raise ValueError(f"--source tells what data/{dataset} is made of (--help lists what it can be)")
        if inspect:
            from look import show  # which needs torch

            show(directory, inspect, seed)
        else:
            print(report(directory, prepare(directory)))
