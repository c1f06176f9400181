"""A run's directory: who may write there, its checkpoints, and its log.

    ckpt.pt, ckpt-<step>.pt          the newest checkpoint, and those before it
    run.json                         the settings, and which torchrun started it
    log.jsonl                        one JSON object per logged step
    meta.json, tokenizer.tiktoken    of the dataset, so that sample.py and eval.py need only this directory

A file may be damaged, or a stranger's: tensors and plain values are read from it, never code.
"""

import itertools
import json
import math
import os
import pickletools
import time
import zipfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from threading import Thread

import numpy as np
import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

import ranks
from common import (
    check_types,
    errors_name_file,
    local_directory,
    lock_file,
    one_line,
    read_json,
    replace_file,
    sync_directory,
)
from hf import load_hf
from model import HRM, HRMConfig, weight_shapes

# Of a checkpoint: the optimizer's state holds the moving averages; the loader's is the place in the data; origin is
# "scratch", or what was fine-tuned; skipped counts the steps whose loss or gradient was not finite.
CONTENT = dict(model=dict, optimizer=dict, config=dict, settings=dict, loader=dict)
CONTENT |= dict(iter=int, tokens=int, skipped=int, origin=str, wandb_id=str)
# All that its pickle may name, and its greatest size: other functions, and more of these, could fill the memory.
PICKLE_NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}
PLAIN = bool, int, float, str, type(None)
MAX_PICKLE = 2**20  # bytes; that of 700 layers


def checkpoints(directory):
    """Paths of a run's checkpoints, newest first: ckpt.pt, and the ones before it."""
    older = sorted(Path(directory).glob(f"ckpt-{'[0-9]' * 8}.pt"), reverse=True)
    return [path for path in (Path(directory, "ckpt.pt"), *older) if path.is_file()]


def older_checkpoint(directory, step):
    """What ckpt.pt is called when a newer one takes its place."""
    return Path(directory, f"ckpt-{step:08d}.pt")


def load_checkpoint(directory):
    """The newest whole checkpoint of a run, and its path; a line says so if that is not ckpt.pt. Raises ValueError or
    OSError."""
    damage = []
    for path in checkpoints(directory):
        try:
            ckpt = read_checkpoint(path)
        except ValueError as e:
            damage.append(str(e))
            continue
        if path.name != "ckpt.pt":
            print(f"{'; '.join(damage) or f'{directory} has no ckpt.pt'}; using {path} instead (step {ckpt['iter']})")
        return ckpt, path
    if damage:
        raise ValueError("; ".join(damage))
    raise FileNotFoundError(f"there is no checkpoint {Path(directory, 'ckpt.pt')}; train.py writes it to its out_dir")


def read_checkpoint(path):
    """The content of one checkpoint, all of it checked against its checksums, its keys and its own configuration.
    Takes no more memory than the file."""
    with errors_name_file(path):
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            by_name = {entry.filename.lower(): entry for entry in entries}  # torch ignores the case
            repeated = len(by_name) < len(entries) or sum(max(e.file_size, e.compress_size) for e in entries) > size
            if repeated or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("it has compressed or overlapping entries, which train.py never writes")
            for entry in (entry for name, entry in by_name.items() if name.endswith(".pkl")):
                if entry.file_size > MAX_PICKLE:
                    raise ValueError(f"{entry.filename} has more than {MAX_PICKLE:,} bytes")
                named = {arg for op, arg, _ in pickletools.genops(archive.read(entry)) if op.name == "GLOBAL"}
                if not named <= PICKLE_NAMES:
                    raise ValueError(f"it has {', '.join(named - PICKLE_NAMES)}, which train.py never writes")
            if wrong := archive.testzip():  # torch ignores the CRC32 that it writes with every tensor
                raise ValueError(f"the checksum of {wrong} is wrong")
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        check_types(ckpt, **CONTENT)
        if unknown := ckpt["config"].keys() - {field.name for field in fields(HRMConfig)}:
            raise ValueError(f"{path} has a setting {min(unknown)}, which the model here does not know")
        for key, value in ckpt["settings"].items():
            if not all(isinstance(x, PLAIN) for x in (value if isinstance(value, (tuple, list)) else [value])):
                raise ValueError(f"the setting {key} is no plain value")
        with errors_name_file(path, "is of a model that cannot be here"):
            config = HRMConfig(**ckpt["config"])
        shapes = weight_shapes(config, len(ckpt["model"]))
        states, [group] = ckpt["optimizer"]["state"], ckpt["optimizer"]["param_groups"]
        if not sorted(states) == group["params"] == [*range(len(shapes) - 1)]:
            raise ValueError("its optimizer is of other weights")
        weights, moments = list(ckpt["model"].items()), []
        for i, name in enumerate(name for name in shapes if name != "z_L_init"):
            check_types(states[i], step=int, m=torch.Tensor, v=torch.Tensor)
            moments += [(name, states[i][key]) for key in "mv"]  # v may hold infinity: a gradient's square
            weights += [(name, tensor) for key, tensor in states[i].items() if key not in ("step", "m", "v")]
        tensors = weights + moments
        for name, tensor in tensors:
            if tuple(tensor.shape) != shapes.get(name) or tensor.dtype != torch.float32:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not float32 {shapes.get(name)}")
        if ckpt["model"].keys() != shapes.keys():
            raise ValueError("it lacks weights")
        if sum(tensor.nbytes for _, tensor in tensors) > size:
            raise ValueError("its tensors share memory")
        for name, tensor in weights:
            if not all(bound.isfinite() for bound in tensor.aminmax()):
                raise ValueError(f"{name} holds NaN or infinity")
        return ckpt


def load_pretrained(name, average=True):
    """The model of HRM.from_pretrained()."""
    directory = local_directory(name)
    if not checkpoints(directory):
        return load_hf(directory)
    ckpt, _ = load_checkpoint(directory)
    with torch.device("meta"):
        model, states = HRM(HRMConfig(**ckpt["config"])), ckpt["optimizer"]["state"]
    model.to_empty(device="cpu").load_state_dict(ckpt["model"])
    for i, p in enumerate(model.parameters()):
        if average and "ema" in states[i]:
            p.data.copy_(states[i]["ema"])
    return model


def read_settings(directory, settings):
    """Of the settings {name: value}, those that the run in a directory was last started with, but for where it is."""
    path = Path(directory, "run.json")
    saved = read_json(path).get("settings") if path.exists() else {}
    with errors_name_file(path):
        names = (settings.keys() & saved.keys()) - {"out_dir", "init_from"}
        check_types(saved, **{name: type(settings[name]) for name in names})
        return {name: saved[name] for name in names}


class RunFiles:
    """The files of a run. load() looks, claim() begins to write; then save() and log(), and wait() at the end."""

    def __init__(self, directory, keep=2, pin_memory=False):
        self.directory, self.keep, self.pin_memory = Path(directory), keep, pin_memory
        self.saved = self.loaded = None  # step of the newest checkpoint; the file that the run resumes from
        self.lock_handle = self.thread = self.wandb = None
        self.buffers = []
        ranks.before_exit.append(self.wait)

    def load(self, init_from):
        """(what to start from, checkpoint or None) for the setting init_from. A run that torchrun has started again
        resumes by itself. Raises ValueError if the directory is another run's, or another process writes to it."""
        out = self.directory
        self.existed = out.is_dir()
        if self.existed:
            self._lock()
        claimed = read_json(out / "run.json") if (out / "run.json").exists() else {}
        if init_from != "resume" and not (ranks.launch_id and claimed.get("launch") == ranks.launch_id):
            self._refuse_other_runs()
            return init_from, None
        if checkpoints(out) or not claimed:
            ckpt, self.loaded = load_checkpoint(out)
            self.saved = ckpt["iter"]
            return "resume", ckpt
        ranks.print0(f"{out} has no checkpoint yet, so its run starts over")
        return str(claimed.get("init_from")), None

    def claim(self, data_dir, settings, origin):
        """Make the directory this run's, with no trace of steps after its newest whole checkpoint."""
        out, step = self.directory, self.saved or 0
        if not self.existed:
            out.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._refuse_other_runs()  # another may have begun a moment ago
        claim = {"launch": ranks.launch_id, "init_from": origin, "settings": settings}
        self.about = {"run.json": json.dumps(claim, indent=1).encode()}
        self.about |= {name: (data_dir / name).read_bytes() for name in ("meta.json", "tokenizer.tiktoken")}
        for name, content in self.about.items():
            replace_file(out / name, content)
        if self.loaded not in (None, out / "ckpt.pt"):  # which is damaged, or missing
            os.replace(self.loaded, out / "ckpt.pt")
        for path in checkpoints(out)[1:]:
            if path > older_checkpoint(out, step):
                path.unlink()
        lines = (out / "log.jsonl").read_bytes().splitlines(True) if (out / "log.jsonl").exists() else []
        replace_file(out / "log.jsonl", b"".join(line for line in lines if logged_before(line, step)))

    def _lock(self):
        """Raise ValueError if another process writes to the directory."""
        with suppress(OSError):  # Windows opens no directories
            self.lock_handle = os.open(self.directory, os.O_RDONLY)
            lock_file(self.lock_handle, f"another process is writing to {self.directory}")

    def _is_ours(self):
        """Whether the directory is still the one that is locked, and not removed, renamed, or since then another's."""
        try:
            return self.lock_handle is None or os.path.samestat(os.fstat(self.lock_handle), os.stat(self.directory))
        except FileNotFoundError:
            return False

    def _find_place(self):
        """Go on in a new directory where this run's is gone: what it has learnt would be lost, and in the old place
        another run may have begun. Raises OSError."""
        if self._is_ours():
            return
        self.wait()
        gone, names = self.directory, (f"{self.directory.name}-{n}" for n in itertools.count(1))
        place = next(path for path in map(gone.with_name, names) if not path.exists())
        place.mkdir()
        self.directory, self.saved = place, None
        self._lock()
        for name, content in self.about.items():
            replace_file(self.directory / name, content)
        ranks.print0(f"{gone} has been removed or replaced; this run goes on in {self.directory}, with a new log")

    def _refuse_other_runs(self):
        """Raise ValueError if the directory holds what a new run would overwrite."""
        names = "ckpt.pt", "run.json", "log.jsonl", "meta.json", "config.json"
        if held := [name for name in names if (self.directory / name).exists()]:
            advice = "--init_from=resume continues it (anew if it has no checkpoint), --out_dir=NAME starts elsewhere"
            raise ValueError(f"{self.directory} holds another run already ({', '.join(held)}): {advice}")

    def start_wandb(self, project, id, settings):
        """From now on, log() writes to W&B too."""
        with errors_name_file("wandb", "(an extra: pip install wandb) cannot start"):
            import wandb

            wandb.init(project=project, id=id, resume="allow", config=settings)
            self.wandb = wandb

    def save(self, content, wait=False):
        """Copy a checkpoint's content to host memory, and have a thread write it to ckpt.pt while training goes on,
        unless `wait`. While the one before is still being written, there is no checkpoint."""
        step, clock = content["iter"], time.perf_counter()
        if self.thread and self.thread.is_alive() and not wait:
            return ranks.print0(f"step {step}: no checkpoint, as the one before is still being written")
        self.wait()
        with suppress(OSError):  # whoever writes the checkpoint then meets it, and tells
            self._find_place()
        if self.saved != step:
            content = self._copy_to_host(content)
            ranks.print0(f"step {step}: checkpoint; training waited {time.perf_counter() - clock:.3f} s")
            self.thread = Thread(target=self._write, args=(content,))
            self.thread.start()
        if wait:
            self.wait()

    def wait(self):
        """Wait until the checkpoint in work is written."""
        if self.thread:
            self.thread.join()

    def _copy_to_host(self, content):
        """A copy of the content. Its memory serves again: to get it takes longer than to copy."""
        leaves, tree = tree_flatten(content)
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        if not self.buffers:
            self.buffers = host_buffers([leaves[i] for i in at], self.pin_memory)
        for i, buffer in zip(at, self.buffers):
            leaves[i] = buffer.copy_(leaves[i].detach(), non_blocking=self.pin_memory)
        if self.pin_memory:
            torch.cuda.synchronize()
        return tree_unflatten(leaves, tree)

    def _write(self, ckpt):
        """Write beside, flush to the disk, rename: a crash at any moment leaves the checkpoint before."""
        part, newest, log = (self.directory / name for name in ("ckpt.pt.part", "ckpt.pt", "log.jsonl"))
        try:
            with open(part, "wb") as file, open(log, "ab") as log:
                torch.save(ckpt, file)
                file.flush()
                os.fsync(file.fileno())
                os.fsync(log.fileno())
            if not self._is_ours():
                raise OSError(f"{self.directory} has been removed or replaced")
            if self.keep > 1 and self.saved is not None and self.saved < ckpt["iter"] and newest.exists():
                os.replace(newest, older_checkpoint(self.directory, self.saved))
            os.replace(part, newest)
            sync_directory(self.directory)
            self.saved = ckpt["iter"]
            for path in checkpoints(self.directory)[self.keep :]:
                path.unlink()
        except Exception as e:
            while e.__context__ and not isinstance(e, OSError):  # torch hides the disk's answer behind its own
                e = e.__context__
            with suppress(OSError):
                part.unlink(missing_ok=True)
            last = f"the last good one is of step {self.saved}" if self.saved is not None else "there is none before"
            ranks.print0(f"step {ckpt['iter']}: the checkpoint could not be written ({one_line(e)}); {last}")

    def log(self, **entry):
        """Append a line to log.jsonl, and to W&B's log. A full disk costs the line, but not the run."""
        if ranks.master:
            entry = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in entry.items()}
            try:
                self._find_place()
                with open(self.directory / "log.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as e:
                ranks.print0(f"step {entry['iter']}: the log could not be written ({one_line(e)})")
            if self.wandb:
                self.wandb.log(entry, step=entry["iter"])


def host_buffers(tensors, pin):
    """Tensors like these in host memory, in one piece that is pinned as a whole: torch rounds each that it pins up to a
    power of two, 28 GB in place of 19 for the 1B model."""
    sizes = [-(-t.nbytes // 64) * 64 for t in tensors]
    memory = np.empty(sum(sizes), np.uint8)
    if pin:
        try:
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
        except RuntimeError as e:
            with suppress(RuntimeError):  # CUDA keeps the error for the next launch of a kernel: let it be this one
                torch.zeros(1, device="cuda")
            ranks.print0(f"training will wait longer for checkpoints, as memory cannot be pinned: {one_line(e)}")
    ends = itertools.accumulate(sizes)
    pieces = (torch.from_numpy(memory[end - size :][: t.nbytes]) for t, size, end in zip(tensors, sizes, ends))
    return [piece.view(t.dtype).view(t.shape) for t, piece in zip(tensors, pieces)]


def logged_before(line, step):
    """Whether a line of log.jsonl is whole, and was there when the checkpoint of this step was taken."""
    try:
        entry = json.loads(line)
        return entry["iter"] < step or (entry["iter"] == step and "val_loss" not in entry)
    except (ValueError, KeyError, TypeError):
        return False
