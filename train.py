"""
Pretrain or fine-tune an HRM, on one device or on many.

$ python train.py config/demo.py                                     # a laptop: minutes
$ torchrun --standalone --nproc_per_node=8 train.py config/hrm1b.py  # a node of 8 GPUs
$ torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ...
$ python train.py --init_from=resume --out_dir=out                   # go on

A step is batch_size rows of packed documents, which the ranks share and then split into
micro-batches: the number of either changes speed and memory, not the result. Ctrl-C, SIGTERM,
SIGUSR1 and SIGHUP save a checkpoint and stop. A killed run goes on to the same weights.
"""

from configurator import configure

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from copy import copy
from itertools import islice
from math import isfinite
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # shapes vary: no gaps
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from checkpoint import (
    checkpoints,
    find_directory,
    latest_checkpoint,
    load_checkpoint,
    read_config,
    save_checkpoint,
)
from generate import choose_device
from loader import Loader, prefetch, read_meta
from model import HRM, IGNORE, PEAK_FLOPS, HRMConfig
from optim import AdamATan2, MovingAverage
from tokenizer import load_tokenizer

# -----------------------------------------------------------------------------
# files
out_dir = "out"
dataset = "problems"  # data/<dataset>, made by data.py
init_from = "scratch"  # or resume, or what to fine-tune: a run's out_dir, a directory, a hub id
log_interval = 10  # steps
eval_interval = 500  # steps between validation losses; 0: only at the end
eval_iters = 0  # steps of a validation; 0: all of val.bin
sample_prompts = 2  # held-out instructions answered at each validation
checkpoint_interval = 1000  # steps; 0: only at the end
wandb_log = False
wandb_project = "hrm-text"
# batch
batch_size = 8  # rows in a step, over all ranks and micro-batches
micro_batch_size = 8  # rows at a time on a device
block_size = 1024  # tokens in a row
# model: see HRMConfig
n_layer = 4
n_head = 2
n_embd = 64
H_cycles = 2
L_cycles = 3
recurrence = "hrm"  # or trm, looped, rins, transformer
norm = "magic"  # or pre, post
prefix_lm = True  # False: the instruction is causal too
# optimizer
loss_on = "response"  # or all: every token of a document but the first
max_iters = 1000
epochs = 0.0  # above 0: sets max_iters
learning_rate = 1e-3
warmup_iters = 100
decay = 0.0  # the share of training, at its end, in which the rate falls to 0
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
ema = 0.99  # decay of the moving average, at most (1 + step) / (10 + step)
bp_min = 2  # steps of the recurrence that carry gradient, at the start
bp_max = 5  # and after bp_warmup; at most all steps
bp_warmup = 0.2  # the share of training in which bp_steps rises
# system
device = "auto"  # cpu, cuda or mps
dtype = "auto"  # of computation: float32, or bfloat16 where the device multiplies it
compile = True  # the blocks, with torch.compile
recompute = False  # the blocks in the backward pass: slower, less memory
seed = 1337
settings = configure(globals())
# -----------------------------------------------------------------------------

# where to start
FIXED = "dataset", "batch_size", "block_size", "seed", "loss_on"  # of a run, like the model's shape
n_restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)  # by torchrun
newest = latest_checkpoint(out_dir)
resume = init_from == "resume" or (n_restarts > 0 and newest)
if resume:
    if not newest:
        sys.exit(f"there is no checkpoint in {out_dir} to resume from")
    state = json.loads((newest / "train.json").read_text())
    saved = state.pop("settings")
    globals().update({key: saved[key] for key in saved if key not in ("out_dir", "init_from")})
    settings = configure(globals())  # the command line overrides the run's own settings
    config = read_config(newest / "config.json")
    fixed = {**vars(config), **{key: saved[key] for key in FIXED}}
    for key in settings.keys() & fixed.keys():
        if settings[key] != fixed[key]:
            sys.exit(f"the run in {out_dir} has {key}={fixed[key]}: it cannot go on with another")
else:
    state = dict(iter=0, tokens=0, loader=None)
    if checkpoints(out_dir) and not n_restarts:
        start = "--init_from=resume continues it, --out_dir=NAME starts elsewhere"
        sys.exit(f"{out_dir} holds a run already: {start}")

# ranks
ddp = bool(os.environ.get("RANK"))
rank = int(os.environ.get("RANK") or 0)
world_size = int(os.environ.get("WORLD_SIZE") or 1)
master = rank == 0
device, compute_dtype = choose_device(device, dtype)
if ddp:
    # torchrun's store outlives a restart, with the addresses of ranks that are gone
    store = dist.PrefixStore(str(n_restarts), next(dist.rendezvous("env://"))[0])
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def print0(text):
    if master:
        tqdm.write(text)


# data
data_dir = Path("data", dataset)
if dataset == "problems" and not data_dir.exists():  # word problems, made on the spot
    if master:
        script = Path(__file__).with_name("data.py")
        subprocess.run([sys.executable, script], check=True)
    if ddp:
        dist.barrier()
meta = read_meta(data_dir)
tokenizer = load_tokenizer(data_dir)
rows = dict(rows=batch_size, block_size=block_size, rank=rank, world_size=world_size)
train_loader = Loader(
    data_dir, "train", seed=seed, state=state["loader"], loss_on=loss_on, **rows
)
if train_loader.left_out:
    n = f"{train_loader.left_out:,} documents"
    print0(f"{n} are longer than block_size, and left out; data.py can truncate them")
val_loader = None
if meta["splits"]["val"]["documents"]:
    val_loader = Loader(data_dir, "val", epochs=1, **rows)
if epochs:
    max_iters = max(1, round(epochs * train_loader.n_tokens / (batch_size * block_size)))

# model
torch.manual_seed(seed)
if not resume and init_from == "scratch":
    shape = {key: settings[key] for key in HRMConfig.__dataclass_fields__ if key in settings}
    try:
        config = HRMConfig(vocab_size=meta["vocab_size"], **shape)
    except AssertionError as error:
        sys.exit(str(error))
elif not resume:
    config = read_config(find_directory(init_from) / "config.json")
    print0(f"fine-tuning {init_from}; the settings of its model hold: {config}")
    if vars(load_tokenizer(find_directory(init_from))) != vars(tokenizer):
        advice = f"data.py --tokenizer={init_from} makes data that fits"
        sys.exit(f"{data_dir} has another tokenizer than {init_from}: {advice}")
    if block_size > config.block_size:
        sys.exit(f"block_size is {block_size}, and {init_from} has {config.block_size}")
    settings.update({key: vars(config)[key] for key in vars(config) if key in settings})
    settings["block_size"] = block_size
if resume or init_from == "scratch":
    with torch.device(device):
        raw_model = HRM(config)
else:
    raw_model = HRM.from_pretrained(init_from).to(device)
raw_model.dtype = compute_dtype
raw_model.recompute = recompute
os.environ["CXX"] = os.environ.get("CXX") or "g++"  # an empty one would be no compiler
if compile and device == "cpu" and not shutil.which(os.environ["CXX"]):
    print0(f"torch.compile needs a C++ compiler, and there is no {os.environ['CXX']}: without it")
    compile = False
if compile:
    torch._dynamo.config.recompile_limit = 64  # with and without gradient, other numbers of rows
    raw_model.compile_blocks(dynamic=False)
bp_max = min(bp_max, config.n_steps)
if not 2 <= bp_min <= bp_max:
    sys.exit(f"bp_min must be from 2 to {bp_max}, which is bp_max or all steps, not {bp_min}")
optimizer = AdamATan2(
    raw_model.parameters(),
    lr=learning_rate,
    betas=(beta1, beta2),
    weight_decay=weight_decay,
    compile=compile,
)
average = MovingAverage(raw_model)
if resume:
    load_checkpoint(newest, raw_model, optimizer, average)
    print0(f"resuming {newest}")
    if state["iter"] >= max_iters:
        print0(f"its {max_iters} steps are done; --max_iters=N goes on to N")
model = raw_model
if ddp:
    model = DDP(
        raw_model,
        find_unused_parameters=True,  # with 2 bp_steps, the embedding gets no gradient
        gradient_as_bucket_view=True,
    )

# -----------------------------------------------------------------------------
# schedules


def lr_at(step):
    fall = (max_iters - step) / (decay * max_iters) if decay else 1.0
    return learning_rate * min((step + 1) / (warmup_iters + 1), 1.0, fall)


def bp_steps_at(step):
    """Warmup deep credit assignment."""
    progress = min(1.0, step / (bp_warmup * max_iters)) if bp_warmup else 1.0
    return bp_min + int(progress * (bp_max - bp_min))


# -----------------------------------------------------------------------------
# a step's micro-batches, validation, log, checkpoints


def micro_batches(batch):
    """This rank's (idx, targets, doc, prefix), and how many targets each has."""
    for part in zip(*(t.split(micro_batch_size) for t in batch[:4])):
        n_targets = (part[1] != IGNORE).sum().item()
        yield part, n_targets


@torch.no_grad()
def validate():
    """The mean loss over the targets, and the share predicted, with the averaged weights."""
    totals = torch.zeros(2, device=device)
    n_targets = 0
    raw_model.eval()
    with average.in_use():
        for batch in islice(copy(val_loader), eval_iters or None):
            n_targets += batch.n_targets
            for part, n in micro_batches(batch):
                totals[0] += raw_model(*part)[1] * n
                totals[1] += raw_model.correct.sum()
        if master:
            print_answers()
    raw_model.train()
    if ddp:
        dist.all_reduce(totals)
    return (totals / n_targets).tolist()


def print_answers():
    for d in val_loader.order[:sample_prompts].tolist():
        ids, n_prefix = val_loader.document(d)
        prompt = ids[:n_prefix].tolist()
        with torch.compiler.set_stance("force_eager"):  # each length would be compiled anew
            [new] = raw_model.generate([prompt], 64, stop_token=tokenizer.id_of["eoa"])
        special = set(tokenizer.special.values())
        question = tokenizer.decode([id for id in prompt if id not in special])
        print0(f"  {question[-200:]} -> {tokenizer.decode(new)}".replace("\n", " "))


def log(**entry):
    if master:
        entry = {"iter": state["iter"], **entry}
        try:
            with open(log_path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            print0(f"the log cannot be written: {error}")
        if wandb_log:
            wandb.log(entry, step=state["iter"])


def save():
    if master:
        content = {**state, "settings": {**settings, "max_iters": max_iters}}
        files = data_dir.glob("tokenizer*.json")
        save_checkpoint(out_dir, content, raw_model, optimizer, average, tokenizer, files)


n_signals = 0


def ask_to_stop(*_):
    global n_signals
    n_signals += 1
    if n_signals > 2:  # torchrun sends Ctrl-C on, so ranks get it twice
        sys.exit("ended at once")


for name in "SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP":
    number = getattr(signal, name, None)
    if number and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
        signal.signal(number, ask_to_stop)

# -----------------------------------------------------------------------------
# the loop

Path(out_dir).mkdir(parents=True, exist_ok=True)
log_path = Path(out_dir, "log.jsonl")
if master and log_path.exists():  # drop the steps that are trained again
    kept = []
    for line in log_path.read_text().splitlines():
        try:
            if json.loads(line)["iter"] <= state["iter"]:
                kept.append(f"{line}\n")
        except ValueError:
            pass  # a kill or a full disk has cut the line
    Path(out_dir, "log.part").write_text("".join(kept))
    Path(out_dir, "log.part").replace(log_path)
if wandb_log and master:
    import wandb

    wandb.init(project=wandb_project, config=settings, id=Path(out_dir).name, resume="allow")
print0(", ".join(f"{key}={value}" for key, value in settings.items()))
card = torch.cuda.get_device_name() if device.startswith("cuda") else device
peak_flops = next((flops for name, flops in PEAK_FLOPS.items() if name in card), None)
n_params = sum(p.numel() for p in raw_model.parameters())
print0(f"{n_params:,} parameters, {world_size} x {card}, {compute_dtype}")

bar = tqdm(total=max_iters, initial=state["iter"], disable=None if master else True)
batches = prefetch(train_loader, device)
pending = []  # (step, its sums and gradient norm), not yet looked at
mark = None  # time, step and tokens from which speed counts: the first interval holds compilation
step = state["iter"]
raw_model.train()

while step < max_iters:
    # forward and backward
    batch = next(batches)
    bp_steps = bp_steps_at(step)
    torch.manual_seed(seed + step * world_size + rank)  # dropout of yours draws the same on resume
    optimizer.zero_grad(set_to_none=True)
    # sums over micro-batches and ranks, all of which are logged
    sums = {key: torch.zeros((), device=device) for key in ("loss", "accuracy", "signals")}
    parts = list(micro_batches(batch))
    for i, (part, n_targets) in enumerate(parts):
        if ddp:
            model.require_backward_grad_sync = i == len(parts) - 1
        loss = model(*part, bp_steps=bp_steps)[1] * n_targets / batch.n_targets
        (loss * world_size).backward()  # DDP takes the mean over ranks
        sums["loss"] += loss.detach()
        sums["accuracy"] += raw_model.correct.sum() / batch.n_targets
    sums["signals"] += n_signals
    stats = torch.stack(list(sums.values()))
    if ddp:
        dist.all_reduce(stats)
    grads = [p.grad for p in raw_model.parameters() if p.grad is not None]
    grad_norm = torch.nn.utils.get_total_norm(grads)
    pending.append((step + 1, torch.stack((*stats, grad_norm))))

    # update
    lr = lr_at(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    average.update(min(ema, (1 + step) / (10 + step)))
    step += 1
    state.update(iter=step, tokens=state["tokens"] + batch.n_tokens, loader=batch.state)
    bar.update()

    # what waits for the device: log, validation, checkpoint
    last = step == max_iters
    eval_now = val_loader and (last or (eval_interval and step % eval_interval == 0))
    save_now = last or (checkpoint_interval and step % checkpoint_interval == 0)
    stop_now = n_signals and not ddp
    if not (step % log_interval == 0 or eval_now or save_now or stop_now):
        continue
    numbers, values = zip(*pending)
    values = torch.stack(values).tolist()
    pending.clear()
    for number, value in zip(numbers, values):
        entry = dict(zip([*sums, "grad_norm"], value))
        loss, grad_norm = entry["loss"], entry["grad_norm"]
        if not isfinite(loss + grad_norm):
            good = f"the last good checkpoint is {latest_checkpoint(out_dir)}"
            what = f"step {number}: loss {loss}, gradient norm {grad_norm}; {good}"
            sys.exit(what if master else 1)
    n_signals_of_all = entry.pop("signals")
    stop = n_signals_of_all if ddp else n_signals  # ranks must agree
    speed, speed_text = 0.0, ""
    if mark:
        seconds = time.time() - mark[0]
        speed = (state["tokens"] - mark[2]) / seconds
        minutes_left = (max_iters - step) * seconds / (step - mark[1]) / 60
        speed_text = f", {speed:,.0f} tokens/s, {minutes_left:.1f} min left"
    mfu = None
    if peak_flops:
        mfu = raw_model.flops_per_token(bp_steps) * speed / world_size / peak_flops
    log(
        **entry,
        lr=lr,
        bp_steps=bp_steps,
        tokens=state["tokens"],
        tokens_per_sec=speed,
        mfu=mfu,
    )
    print0(
        f"step {step}: loss {loss:.4f}, token accuracy {entry['accuracy']:.1%}, lr {lr:.2e}, "
        f"bp_steps {bp_steps}{speed_text}"
    )
    if eval_now:
        val_loss, val_accuracy = validate()
        log(val_loss=val_loss, val_accuracy=val_accuracy)
        print0(f"step {step}: validation loss {val_loss:.4f}, token accuracy {val_accuracy:.1%}")
    if save_now or stop:
        save()
    mark = time.time(), step, state["tokens"]
    if stop:
        print0(f"stopped; to go on: python train.py --init_from=resume --out_dir={out_dir}")
        break

bar.close()
if device.startswith("cuda"):
    print0(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")
if ddp:
    dist.destroy_process_group()
