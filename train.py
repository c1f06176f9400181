"""
Pretraining and fine-tuning of an HRM, on one device or many.

    python train.py config/demo.py                                            # a laptop: minutes, and it can do sums
    torchrun --standalone --nproc_per_node=8 train.py config/hrm1b.py         # a node of 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/hrm1b.py
    python train.py config/demo.py --init_from=resume                         # go on from out_dir/ckpt.pt

A step is batch_size rows of packed documents, shared among the ranks and then among micro-batches; the number of either
changes nothing but speed and memory. Ctrl-C, SIGTERM and SIGUSR1 finish the step, save, and end. A run that was killed,
whenever that was, goes on to the same weights, bit for bit; under torchrun --max-restarts=N it does so by itself.
"""

import ast
import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import deque
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import asdict, fields
from datetime import timedelta
from itertools import islice
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from configurator import configure
from model import (
    HRM,
    IGNORE,
    MKL_IS_SLOW,
    AdamATan2,
    HRMConfig,
    blamed_on,
    checkpoints,
    choose_device,
    download,
    load_checkpoint,
    local_directory,
    multiplies_bf16,
    older_checkpoint,
    read_json,
    reason,
    replace_file,
    sync_directory,
)

# ----------------------------------------------------------------------------------------------------
# settings
# input and output
out_dir = "out"
dataset = "problems"  # data/<dataset>, made by data.py ("problems" is made on the spot)
init_from = "scratch"  # or "resume" (the run in out_dir), or what to fine-tune: a run, a directory, a hub id
log_interval = 10  # steps between log lines
eval_interval = 500  # steps between validation losses; 0: only at the end
eval_iters = 0  # batches of a validation loss; 0: all of val.bin
checkpoint_interval = 1000  # steps between checkpoints; 0: only at the end
checkpoint_minutes = 0.0  # and minutes between them, whichever comes first; 0: steps alone
keep_checkpoints = 2  # the newest: ckpt.pt, and ckpt-<step>.pt before it
skip_nonfinite = 0  # so many steps whose loss or gradient is not finite are passed over; the next one ends the run
final_eval = ""  # tasks for eval.py to run on the finished model, such as "problems"
wandb_log = False
wandb_project = "hrm-text"
wandb_run_name = ""
# batch
batch_size = 8  # rows per step, over all ranks and micro-batches
micro_batch_size = 8  # at most so many rows at a time on a device
block_size = 1024  # tokens per row
# model
n_layer = 4  # blocks in all, half in each stack
n_head = 2
n_embd = 64
H_cycles = 2
L_cycles = 3
prefix_lm = True
# optimizer
max_iters = 1000
epochs = 0.0  # above 0: sets max_iters to so many passes over the data
learning_rate = 1e-3
warmup_iters = 100  # linear from 0
decay = 0.0  # over this share of training, at its end, the rate falls linearly to 0; constant before
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
ema = 0.99  # decay of the weights' moving average, which is what is evaluated, sampled and exported
bp_min = 2  # steps of the recurrence with gradient, at the start of training
bp_max = 5  # and after
bp_warmup = 0.2  # this share of training
# system
device = "auto"  # cpu, cuda or mps
dtype = "auto"  # of computation: float32 or bfloat16; auto is bfloat16 on cuda. Weights are always float32
attention = "auto"  # flex (FlexAttention) or sdpa; auto is flex on cuda where the blocks are compiled
compile = True  # the blocks, with torch.compile
recompute_blocks = False  # activation checkpointing: less memory, more time
seed = 1337
settings = configure(globals())
# ----------------------------------------------------------------------------------------------------


signal.signal(signal.SIGINT, lambda *_: sys.exit("train.py: interrupted before the first step; nothing is lost"))

# ----------------------------------------------------------------------------------------------------
# devices and ranks

rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
master = rank == 0
try:
    device, dtype = choose_device(device, dtype)
except ValueError as e:
    sys.exit(f"train.py: {e}")
if device == "cuda":
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    torch.cuda.set_device(device)
on_cuda = device.startswith("cuda")
writer = None  # the thread that writes a checkpoint


def say(*text):
    """Print, once for all ranks, without breaking the progress bar."""
    if master:
        tqdm.write(" ".join(map(str, text)))
        sys.stdout.flush()  # into a file or a pipe too


def leave(sentence="", status=1):
    """End this process, with a sentence if something is wrong, once the last checkpoint is written."""
    if sentence:
        tqdm.write(f"train.py: {sentence}", file=sys.stderr)
    if writer:
        writer.join()
    sys.stdout.flush()
    sys.stderr.flush()
    if world_size > 1:
        os._exit(status)  # gloo's threads now and then abort a process that winds down in the ordinary way (torch 2.13)
    sys.exit(status)


@contextmanager
def others():
    """Within, ranks wait for each other. Should one be lost, the rest end."""
    try:
        yield
    except RuntimeError as e:
        why = reason(e).split(". ")[0]
        leave(f"rank {rank} has lost another rank ({why}); --init_from=resume goes on from the checkpoint")


def fresh_store(minutes):
    """
    A key-value store for the ranks of this start alone. That of torchrun is the same after a restart (torch 2.13), and
    has the addresses of ranks that are gone. So each rank sends a new word, to which the first answers with a prefix.
    """
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(minutes=minutes)))
    word, prefix, deadline = uuid.uuid4().hex, uuid.uuid4().hex, time.monotonic() + 60 * minutes
    if not master:
        store.set(f"word of rank {rank}", word)
        prefix = store.get(word).decode()  # waits for it
        store.add(prefix, 1)
    while master and store.add(prefix, 0) < world_size - 1:  # a word may be an old one, so until all have come
        for key in (f"word of rank {r}" for r in range(1, world_size)):
            if store.check([key]):
                store.set(store.get(key).decode(), prefix)
        if time.monotonic() > deadline:
            leave(f"not all of {world_size} ranks have come within {minutes} minutes")
        time.sleep(0.02)
    return dist.PrefixStore(prefix, store)


if world_size > 1:
    with others():
        ranks = dict(store=fresh_store(minutes=5), rank=rank, world_size=world_size, timeout=timedelta(minutes=10))
        dist.init_process_group("nccl" if on_cuda else "gloo", **ranks)
        # To agree on stopping without waiting for the device:
        cpu_group = dist.new_group(backend="gloo") if on_cuda else dist.group.WORLD


def gather(value):
    """The value that each rank has, as a list."""
    values = [value] * world_size
    if world_size > 1:
        with others():
            dist.all_gather_object(values, value, group=cpu_group)
    return values


def end_on(trouble):
    """End all ranks if any has trouble: a sentence, which the first rank tells for all."""
    troubles = gather(trouble)
    if any(troubles):
        told = troubles[:1] if len(set(troubles)) == 1 else [f"rank {i}: {t}" for i, t in enumerate(troubles) if t]
        if master:
            tqdm.write(f"train.py: {'; '.join(told)}", file=sys.stderr)
            sys.stderr.flush()
        gather(None)  # or torchrun, when it sees the end of one rank, might end the one that is to speak
        leave()


# ----------------------------------------------------------------------------------------------------
# settings, data and checkpoint: everything that can be wrong with them is found here, before anything is written

out, data_dir = Path(out_dir), Path("data", dataset)
# torchrun starts all ranks anew when one fails; what it started first has the same name.
torchrun = os.environ.get("TORCHELASTIC_RUN_ID")
launch = f"{torchrun} {socket.gethostname()} {os.getppid()}"


def check_settings():
    """Raise ValueError, in one sentence, for a setting that would fail later."""
    at_least_1 = ("max_iters", "batch_size", "micro_batch_size", "block_size", "log_interval", "keep_checkpoints")
    at_least_0 = ("epochs", "learning_rate", "weight_decay", "warmup_iters", "seed")
    at_least_0 += ("eval_interval", "eval_iters", "checkpoint_interval", "checkpoint_minutes", "skip_nonfinite")
    for keys, low, high in (at_least_1, 1, sys.maxsize), (at_least_0, 0, sys.maxsize), (("decay", "bp_warmup"), 0, 1):
        for key in keys:
            if not low <= settings[key] <= high:
                bound = f"at least {low}" if settings[key] < low else f"at most {high:,}"
                raise ValueError(f"{key} must be {bound}, not {settings[key]}")
    for key in "beta1", "beta2", "ema":
        if not 0 <= settings[key] < 1:
            raise ValueError(f"{key} must be at least 0 and less than 1, not {settings[key]}")
    if attention not in ("auto", "flex", "sdpa") or (attention == "flex" and not on_cuda):
        raise ValueError(f"attention must be auto, sdpa, or on cuda flex, not {attention}")
    if not out_dir or not dataset or not init_from or out.is_file():
        raise ValueError("out_dir, dataset and init_from must be names, and out_dir that of a directory")
    if init_from not in ("scratch", "resume") and out.resolve() == Path(init_from).resolve():
        raise ValueError(f"init_from is out_dir ({out}); give the new run another with --out_dir")
    tree = ast.parse(Path(__file__).with_name("eval.py").read_text(encoding="utf-8"))  # a script, so not to be imported
    tasks = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "TASKS")
    unknown = {name.strip() for name in final_eval.split(",") if final_eval} - {key.value for key in tasks.keys}
    if unknown:
        raise ValueError(f"final_eval: eval.py has no task {', '.join(unknown)}")
    if wandb_log:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ValueError("wandb_log needs the package wandb: pip install wandb") from None


locked = False


def lock_out_dir():
    """Raise ValueError if another process holds this lock, which ends with a process however that ends."""
    global locked
    locked = True
    try:
        import fcntl  # which Windows lacks

        fcntl.flock(os.open(out, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is writing to {out}") from None
    except (ImportError, OSError):
        pass  # a system without such locks


def refuse_other_runs():
    """Raise ValueError if out_dir holds what a new run would overwrite."""
    held = [name for name in ("ckpt.pt", "run.json", "log.jsonl", "meta.json", "config.json") if (out / name).exists()]
    if held:
        advice = "--init_from=resume continues it, --out_dir=NAME starts elsewhere"
        raise ValueError(f"{out} holds another run already ({', '.join(held)}): {advice}")


def open_out_dir():
    """(what to start from, checkpoint or None). Raises ValueError if out_dir holds what is not this run's."""
    if out.is_dir():
        lock_out_dir()
    if init_from == "resume" and checkpoints(out):
        return init_from, load_checkpoint(out)
    claimed = read_json(out / "run.json") if (out / "run.json").exists() else {}
    restarted = torchrun and claimed.get("launch") == launch
    if restarted and checkpoints(out):
        return "resume", load_checkpoint(out)
    if restarted or (init_from == "resume" and claimed):
        say(f"{out} has no checkpoint yet, so its run starts over")
        return str(claimed.get("init_from")), None
    if init_from == "resume":
        raise FileNotFoundError(f"there is no checkpoint {out / 'ckpt.pt'} to resume")
    refuse_other_runs()
    return init_from, None


trouble, ckpt = "", None
try:
    check_settings()
    if master:
        if dataset == "problems" and not (data_dir / "meta.json").exists():
            say(data.report(data_dir, data.prepare(data_dir)))
        init_from, ckpt = open_out_dir()
except (ValueError, OSError) as e:
    trouble = reason(e)
end_on(trouble)
# Only the first rank needs to have the checkpoint. The others get what is small of it here, and its tensors below.
head = {key: value for key, value in ckpt.items() if key not in ("model", "ema", "optimizer")} if ckpt else None
init_from, head = gather((init_from, head))[0]
facts = {}
try:
    meta = data.read_meta(data_dir)
    facts = {f"{data_dir / name}": data.check_file(data_dir, name, meta) for name in data.FILES}
    state = head["loader"] if head else None
    loader = data.Loader(data_dir, "train", batch_size, block_size, seed, rank, world_size, state=state)
    if loader.left_out:
        say(f"{loader.left_out:,} of {len(loader.lengths):,} documents are longer than block_size and left out")
        say(f"  (data.py --block_size={block_size} would truncate them)")
    val_loader = None
    if meta["splits"]["val"]["documents"]:
        val_loader = data.Loader(data_dir, "val", batch_size, block_size, 0, rank, world_size, epochs=1)
    else:
        say(f"{data_dir} has no validation documents, so there will be no validation loss")
    if epochs:
        max_iters = max(1, round(epochs * int(loader.lengths[loader.fitting].sum()) / (batch_size * block_size)))

    torch.manual_seed(seed)
    encoding = data.load_encoding(data_dir)
    if init_from in ("scratch", "resume"):
        shape = {f.name: settings[f.name] for f in fields(HRMConfig) if f.name in settings}
        config = HRMConfig(**head["config"]) if head else HRMConfig(vocab_size=meta["vocab_size"], **shape)
        if head and head["origin"] == "scratch":
            differs = ", ".join(f"{k} {getattr(config, k)}" for k in shape if shape[k] != getattr(config, k))
            if differs:
                advice = "resume with the settings it began with"
                raise ValueError(f"{out / 'ckpt.pt'} holds another model than asked for ({advice}): there, {differs}")
        try:
            model = HRM(config)
        except RuntimeError as e:
            raise ValueError(f"a model of this size cannot be made here: {reason(e)}") from None
    else:
        model = HRM.from_pretrained(init_from)
        say(f"fine-tuning {init_from}, whose shape overrides the settings: {model.config}")
    config = model.config
    source = out if head else init_from
    if ckpt or init_from not in ("scratch", "resume"):
        theirs = data.load_encoding(local_directory(source))
        if not data.same_tokenizer(theirs, encoding):
            names = [f"{place} ({e.name}, {e.n_vocab} ids)" for place, e in ((source, theirs), (data_dir, encoding))]
            raise ValueError(
                f"{' and '.join(names)} have different tokenizers; data.py --tokenizer={source} mends that"
            )
        if config.vocab_size < meta["vocab_size"]:
            raise ValueError(f"{source} has {config.vocab_size} embeddings, and its tokenizer {meta['vocab_size']} ids")
    if config.block_size < block_size:
        raise ValueError(f"{source} has a context of {config.block_size} tokens, and block_size is {block_size}")
    if not 2 <= bp_min <= bp_max <= config.n_steps:
        raise ValueError(f"bp_min and bp_max must rise from 2 to at most H_cycles * (L_cycles + 1) = {config.n_steps}")
    model.to(device)
    options = dict(lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, ema=ema or None)
    optimizer = AdamATan2(model.parameters(), **options)
    if ckpt:
        with blamed_on(out / "ckpt.pt"):
            model.load_state_dict(ckpt["model"])
            optimizer.load_state_dict(ckpt["optimizer"])
except (ValueError, OSError) as e:
    trouble = reason(e)
end_on(trouble)
code = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("model.py", "data.py", "train.py"))
facts |= {"the code": hashlib.sha256(code).hexdigest()[:16], "torch": torch.__version__}
facts |= {key: value for key, value in settings.items() if key != "out_dir"}
first = gather(facts)[0]
differs = [f"{k} is {facts.get(k)!r} and not {first.get(k)!r}" for k in first | facts if facts.get(k) != first.get(k)]
end_on(f"unlike on rank 0, {'; '.join(differs)} (on {socket.gethostname()})" if differs else "")

# ----------------------------------------------------------------------------------------------------
# the state of the run, the same on all ranks, and out_dir

optimizer.param_groups[0].update(options)  # settings may change on the way
for p in model.parameters():
    if ema:
        optimizer.state[p].setdefault("ema", p.detach().clone())
    else:
        optimizer.state[p].pop("ema", None)
if world_size > 1:
    steps = gather([optimizer.state[p]["step"] for p in model.parameters()])[0]
    with others():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)
        for p, step in zip(model.parameters(), steps):
            optimizer.state[p]["step"] = step
            for tensor in optimizer.state[p].values():
                if isinstance(tensor, torch.Tensor):
                    dist.broadcast(tensor, 0)
iteration = tokens = validated = skipped = log_bytes = 0
best_val_loss, wandb_id, origin = math.inf, uuid.uuid4().hex[:8], init_from
if head:
    iteration, tokens, validated, skipped, log_bytes, best_val_loss, wandb_id, origin = (
        head[key] for key in "iter tokens validated skipped log_bytes best_val_loss wandb_id origin".split()
    )
    changed = {k: v for k, v in settings.items() if head["settings"].get(k) != v and k != "init_from"}
    say(f"resuming {out} at step {iteration}" + (f", with other settings than before: {changed}" if changed else ""))
saved = iteration if head else None  # the step of the newest checkpoint
dirty = saved is None  # whether there is more than it holds
del ckpt, head
try:
    if master:
        if not locked:
            out.mkdir(parents=True, exist_ok=True)
            lock_out_dir()
            refuse_other_runs()  # that began a moment ago
        claim = {"launch": launch, "init_from": origin, "settings": settings}
        replace_file(out / "run.json", json.dumps(claim, indent=1).encode())
        for name in "meta.json", "tokenizer.tiktoken":  # so that sample.py and eval.py need only out_dir
            replace_file(out / name, (data_dir / name).read_bytes())
        if saved is not None and older_checkpoint(out, saved).exists():  # ckpt.pt was damaged
            os.replace(older_checkpoint(out, saved), out / "ckpt.pt")
        for path in checkpoints(out)[1:]:
            if saved is None or path > older_checkpoint(out, saved):  # damaged, or of steps that will be made anew
                path.unlink()
        log_file = open(out / "log.jsonl", "ab", buffering=0)
        log_file.truncate(min(log_bytes, log_file.tell()))  # without what a killed run logged after its last checkpoint
        log_bytes = log_file.seek(0, os.SEEK_END)
        if wandb_log:
            import wandb

            names = dict(project=wandb_project, name=wandb_run_name or None, id=wandb_id)
            try:
                wandb.init(**names, resume="allow", config=settings)
            except wandb.Error as e:
                raise ValueError(f"wandb: {reason(e)}") from None
except (ValueError, OSError) as e:
    trouble = reason(e)
end_on(trouble)
model.compute_dtype, model.attention, model.recompute_blocks = dtype, attention, recompute_blocks
if compile:
    try:  # a machine without a C++ compiler or Triton still trains
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
        model.compile_blocks = True
    except Exception as e:
        say(f"torch.compile does not work here ({type(e).__name__}), so the blocks run uncompiled")
if on_cuda and attention == "auto" and not model.compile_blocks:
    say("attention: SDPA over padded documents; FlexAttention needs compiled blocks")


# ----------------------------------------------------------------------------------------------------
# schedules: progress counts from 0 to 1


def learning_rate_at(i):
    """Linear warmup, constant, and with decay a linear fall to 0 at the end."""
    fall = (max_iters - i) / (decay * max_iters) if decay else 1.0
    return learning_rate * min((i + 1) / (warmup_iters + 1), 1.0, fall)


def bp_steps_at(i):
    """Warmup deep credit assignment: from bp_min to bp_max over the first bp_warmup of training."""
    progress = min(1.0, i / (bp_warmup * max_iters)) if bp_warmup else 1.0
    return bp_min + int(progress * (bp_max - bp_min))


# ----------------------------------------------------------------------------------------------------
# one step


def loss_of(batch, bp_steps=None):
    """This rank's share of the step's mean loss over targets; with gradient enabled, runs the backward passes too."""
    total, weights = torch.zeros((), device=device), model.weights()
    for parts in zip(*(t.split(micro_batch_size) for t in batch[:4])):  # in host memory; see HRM.forward
        share = int((parts[1] != IGNORE).sum()) / batch.n_targets
        loss = model(*parts, bp_steps, weights)[1] * share
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.detach()
    return total


def sum_over_ranks(*tensors):
    if world_size > 1:
        with others():
            for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
                work.wait()


def train_step(batch, bp_steps, lr):
    """Returns the loss, still on the device, and a function that tells whether it and all gradients are finite."""
    torch.manual_seed(hash((seed, iteration, rank)))  # dropout, if you add it, is then the same after a resume
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(batch, bp_steps)
    # Summed here and not by DistributedDataParallel: which weights have a gradient depends on bp_steps (the embedding
    # has none at 2), but it is the same ones on every rank.
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    sum_over_ranks(loss, *grads)
    healthy = download((loss + torch.stack(torch._foreach_norm(grads, math.inf)).sum()).isfinite())
    optimizer.param_groups[0]["lr"] = lr
    if not skip_nonfinite or healthy():  # without skipping, the step need not wait for the answer
        optimizer.step()
    return loss, healthy


def check_health():
    """End the run, or count, if the loss or a gradient of the last step not yet checked was not finite."""
    global skipped, unchecked
    step, unchecked = unchecked, None
    if step is None or step[-1]():
        return
    i, documents, loss, _ = step
    what = "a gradient is not finite" if loss.isfinite() else f"the loss is {loss.item()}"
    if master:
        with suppress(OSError), open(out / "nonfinite.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"iter": i, "loss": str(loss.item()), "documents": documents}) + "\n")
    named = ", ".join(map(str, documents[:10])) + (", ..." if len(documents) > 10 else "")
    where = f"its {len(documents)} documents of {data_dir / 'train.bin'} ({named}) are in {out / 'nonfinite.jsonl'}"
    skipped += 1
    if skipped <= skip_nonfinite:
        say(f"step {i}: {what}; skipped, {skipped} of at most {skip_nonfinite}; {where}")
        return
    before = ", ".join(f"{loss:.4f} at {i}" for i, loss in last_losses) or "none"
    if writer:
        writer.join()
    back = f"{out / 'ckpt.pt'} (step {saved}), with --init_from=resume" if saved is not None else "none yet"
    sentence = f"step {i}: {what}; {where}; logged losses before: {before}; checkpoint to return to: {back}; "
    end_on(gather(sentence + f"--skip_nonfinite={skipped} passes over such a step")[0])


def any_rank(*flags):
    """For each flag, whether it is set on any rank, so that all ranks do the same."""
    flags = torch.tensor([int(bool(flag)) for flag in flags])
    if world_size > 1:
        with others():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=cpu_group)
    return flags.bool().tolist()


def sound(batches):
    """The batches, up to one that cannot be right, which ends the run."""
    try:
        yield from batches
    except ValueError as e:
        leave(reason(e))


@torch.no_grad()
def validate():
    """
    Mean loss over the targets of val.bin (the first eval_iters batches of it), with the averaged weights; None if told
    to stop meanwhile.
    """
    total = torch.zeros((), device=device)
    n_targets = 0
    with optimizer.averaged() if ema else nullcontext():
        for batch in islice(sound(copy(val_loader)), eval_iters or None):
            if any_rank(stop_asked)[0]:
                return None
            total += loss_of(batch) * batch.n_targets
            n_targets += batch.n_targets
    sum_over_ranks(total)
    return total.item() / n_targets


# ----------------------------------------------------------------------------------------------------
# checkpoints and the log


def to_host(content, buffers):
    """
    Nested dicts and lists with every tensor copied to host memory, each once however often it occurs. `buffers`, a
    list, keeps that memory for the next time: to get it fresh takes longer than the copy.
    """
    copies = {}

    def copied(x):
        if isinstance(x, dict):
            return {key: copied(value) for key, value in x.items()}
        if isinstance(x, list):
            return [copied(value) for value in x]
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) not in copies:
            if len(copies) == len(buffers):
                buffers.append(torch.empty_like(x, device="cpu", pin_memory=on_cuda))
            copies[id(x)] = buffers[len(copies)].copy_(x, non_blocking=on_cuda)
        return copies[id(x)]

    content = copied(content)
    if on_cuda:
        torch.cuda.synchronize()
    return content


def save_checkpoint(wait=False):
    """Copy the run's state, and have a thread write it to out_dir/ckpt.pt, while training goes on unless `wait`."""
    global writer, dirty
    dirty = False
    if not master:
        return
    if writer and writer.is_alive() and not wait:
        say(f"step {iteration}: no checkpoint, as the one before is still being written")
        return
    clock = time.perf_counter()
    if writer:
        writer.join()
    names = {p: name for name, p in model.named_parameters()}
    write_log()
    with suppress(OSError):  # a log that the disk refuses costs no checkpoint
        os.fsync(log_file.fileno())
    ckpt = {
        "model": dict(model.state_dict()),
        "ema": {names[p]: state["ema"] for p, state in optimizer.state.items()} if ema else {},
        "optimizer": optimizer.state_dict(),  # which holds the averages too; the file, like the copy, holds them once
        "config": asdict(config),
        "settings": settings,
        "origin": origin,  # "scratch", or what was fine-tuned
        "iter": iteration,
        "tokens": tokens,
        "loader": batches.state,
        "best_val_loss": best_val_loss,
        "validated": validated,  # the step of the last validation
        "skipped": skipped,
        "log_bytes": log_bytes,
        "wandb_id": wandb_id,
    }
    ckpt = to_host(ckpt, host_buffers)
    say(f"step {iteration}: checkpoint; training waited {time.perf_counter() - clock:.3f} s")
    writer = Thread(target=write_checkpoint, args=(ckpt,))
    writer.start()
    if wait:
        writer.join()


def write_checkpoint(ckpt):
    """Write beside, flush to the disk, rename: a crash at any moment leaves the checkpoint before."""
    global saved
    part, newest = out / "ckpt.pt.part", out / "ckpt.pt"
    try:
        with open(part, "wb") as file:
            torch.save(ckpt, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_checkpoints > 1 and saved is not None and saved < ckpt["iter"] and newest.exists():
            os.replace(newest, older_checkpoint(out, saved))
        os.replace(part, newest)
        sync_directory(out)
        saved = ckpt["iter"]
        for path in checkpoints(out)[keep_checkpoints:]:
            path.unlink()
    except Exception as e:
        while e.__context__ and not isinstance(e, OSError):  # torch hides the disk's answer behind its own
            e = e.__context__
        with suppress(OSError):
            part.unlink(missing_ok=True)
        last = f"the last good one is of step {saved}" if saved is not None else "there is none before"
        say(f"step {ckpt['iter']}: the checkpoint could not be written ({reason(e)}); training goes on, {last}")


def log(**entry):
    global unlogged
    if master:
        entry = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in entry.items()}
        unlogged += json.dumps(entry).encode() + b"\n"
        write_log()
        if wandb_log:
            wandb.log(entry, step=entry["iter"])


def write_log():
    """Append to log.jsonl; what a full disk does not take waits for the next time."""
    global unlogged, log_bytes
    try:
        unlogged = unlogged[log_file.write(unlogged) :]
    except OSError as e:
        say(f"step {iteration}: {out / 'log.jsonl'} cannot be written ({reason(e)}); training goes on")
    if not unlogged:
        log_bytes = log_file.tell()  # the end of a whole line


# ----------------------------------------------------------------------------------------------------
# the loop

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16
device_name = torch.cuda.get_device_name() if on_cuda else f"{device} ({torch.get_num_threads()} threads)"
peak = next((flops for card, flops in PEAK_FLOPS.items() if card in device_name), None)
n_params = sum(p.numel() for p in model.parameters())
blocks = "compiled" if model.compile_blocks else "not compiled"
kind = str(dtype).removeprefix("torch.") + " by oneDNN" * (MKL_IS_SLOW and device == "cpu" and dtype == torch.float32)
say(f"{n_params:,} parameters, {world_size} x {device_name}, {kind}, blocks {blocks}")
if device == "cpu" and dtype == torch.float32 and multiplies_bf16():
    say("this CPU multiplies bfloat16 too: --dtype=bfloat16 may be faster")
say(f"{max_iters:,} steps of {batch_size} rows of {block_size} tokens; log: {out / 'log.jsonl'}")

stop_asked = None


def ask_to_stop(signum, frame):
    """Stop after this step. A second signal does so at once, unless it is torchrun's copy of the first."""
    global stop_asked
    if stop_asked and not (torchrun and time.monotonic() - stop_asked < 2):
        signal.signal(signum, signal.SIG_DFL)
        signal.raise_signal(signum)
    stop_asked = stop_asked or time.monotonic()


for name in "SIGINT", "SIGTERM", "SIGUSR1":
    if hasattr(signal, name):  # Windows lacks one
        signal.signal(getattr(signal, name), ask_to_stop)
batches, host_buffers, unlogged, last_losses = data.Prefetch(loader, pin=on_cuda), [], b"", deque(maxlen=8)
feed = sound(batches)
bar = tqdm(total=max_iters, initial=iteration, desc="training", disable=None if master else True)
start = clock = last_save = time.perf_counter()
clock_tokens, stopped, unchecked = tokens, False, None
while True:
    evaluate_now = iteration == max_iters or (eval_interval and iteration % eval_interval == 0)
    if val_loader and evaluate_now and 0 < iteration != validated:
        check_health()
        val_loss = validate()
        stopped = val_loss is None
        if not stopped:
            validated, best_val_loss, dirty = iteration, min(best_val_loss, val_loss), True
            log(iter=iteration, val_loss=val_loss)
            say(f"step {iteration}: validation loss {val_loss:.4f} (best {best_val_loss:.4f})")
            clock, clock_tokens = time.perf_counter(), tokens
    due = checkpoint_interval and iteration % checkpoint_interval == 0
    late = checkpoint_minutes and time.perf_counter() - last_save > 60 * checkpoint_minutes
    stopped, due = any_rank(stopped or stop_asked, due or late)
    if iteration >= max_iters or stopped:
        break
    if due and dirty and iteration > 0:
        check_health()
        save_checkpoint()
        clock, clock_tokens = time.perf_counter(), tokens
        last_save = clock
    lr, bp_steps, batch = learning_rate_at(iteration), bp_steps_at(iteration), next(feed)
    loss, healthy = train_step(batch, bp_steps, lr)
    iteration, tokens, dirty = iteration + 1, tokens + batch.n_tokens, True
    bar.update()
    check_health()  # of the step before, so that the device always has the next one to work on
    unchecked = iteration, batch.documents, loss, healthy
    if start:
        loss.item()
        say(f"first step after {time.perf_counter() - start:.1f} s" + (", compilation included" if compile else ""))
        start = None
    if iteration % log_interval == 0 or iteration == max_iters:
        check_health()
        loss = loss.item()
        last_losses.append((iteration, loss))
        speed = (tokens - clock_tokens) / (time.perf_counter() - clock)
        mfu = model.flops_per_token(bp_steps) * speed / (peak * world_size) if peak else None
        log(iter=iteration, loss=loss, lr=lr, bp_steps=bp_steps, tokens=tokens, tokens_per_sec=round(speed, 1), mfu=mfu)
        text = f"step {iteration}: loss {loss:.4f}, lr {lr:.2e}, bp_steps {bp_steps}, {speed:,.0f} tokens/s"
        say(text + (f", mfu {mfu:.1%}" if mfu else ""))
        clock, clock_tokens = time.perf_counter(), tokens
bar.close()
check_health()
if world_size > 1:
    with others():
        dist.barrier()  # from here on each rank is on its own
if dirty:
    save_checkpoint(wait=True)
if not master:
    leave(status=0)
memory = f"; peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_cuda else ""
write_log()
log_file.close()
if wandb_log:
    wandb.finish()
if saved != iteration:
    leave(f"{'stopped' if stopped else 'finished'} at step {iteration}, but its checkpoint could not be written")
say(f"{'stopped' if stopped else 'finished'} at step {iteration}; checkpoint: {out / 'ckpt.pt'}{memory}")
status = 0
if final_eval and not stopped:
    evaluation = [Path(__file__).with_name("eval.py"), f"--out_dir={out_dir}", f"--tasks={final_eval}"]
    status = subprocess.run([sys.executable, *evaluation]).returncode
leave(status=status)
