"""
Pretraining and fine-tuning of an HRM, on one device or many.

    python train.py config/demo.py                                            # a laptop: minutes, and it can do sums
    torchrun --standalone --nproc_per_node=8 train.py config/hrm1b.py         # a node of 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/hrm1b.py
    python train.py config/demo.py --init_from=resume                         # go on from out_dir/ckpt.pt

A step is batch_size rows of packed documents, shared among the ranks and then among micro-batches; the number of either
changes nothing but speed and memory. Ctrl-C finishes the step, saves, and ends.
"""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, fields
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from configurator import configure
from model import HRM, IGNORE, AdamATan2, HRMConfig, choose_device, load_checkpoint, local_directory

# ----------------------------------------------------------------------------------------------------
# settings
# input and output
out_dir = "out"
dataset = "problems"  # data/<dataset>, made by data.py ("problems" is made on the spot)
init_from = "scratch"  # or "resume" (out_dir/ckpt.pt), or what to fine-tune: a run, a directory, a hub id
log_interval = 10  # steps between log lines
eval_interval = 500  # steps between validation losses; 0: only at the end
eval_iters = 0  # batches of a validation loss; 0: all of val.bin
checkpoint_interval = 1000  # steps between checkpoints; 0: only at the end
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


stop_asked = False


def ask_to_stop(signum, frame):
    """Ctrl-C or SIGTERM: stop after the next step. A second one does so at once."""
    global stop_asked
    stop_asked = True
    signal.signal(signum, signal.SIG_DFL)


signal.signal(signal.SIGINT, ask_to_stop)
signal.signal(signal.SIGTERM, ask_to_stop)

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
if world_size > 1:
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=timedelta(minutes=10))
    # To agree on stopping without waiting for the device:
    cpu_group = dist.new_group(backend="gloo") if on_cuda else dist.group.WORLD


def say(*text):
    """Print, once for all ranks, without breaking the progress bar."""
    if master:
        tqdm.write(" ".join(map(str, text)))


# data
out, data_dir = Path(out_dir), Path("data", dataset)
if master and dataset == "problems" and not (data_dir / "meta.json").exists():
    say(data.report(data_dir, data.prepare(data_dir)))
if world_size > 1:
    dist.barrier()


def val_batches():
    """The validation split, once, in the same batches for any number of ranks."""
    return data.Loader(data_dir, "val", batch_size, block_size, 0, rank, world_size, epochs=1)


def check_settings():
    """Raise ValueError, in one sentence, for a setting that would fail later."""
    at_least_1 = ("max_iters", "batch_size", "micro_batch_size", "block_size", "log_interval")
    at_least_0 = ("epochs", "learning_rate", "weight_decay", "warmup_iters", "seed")
    at_least_0 += ("eval_interval", "eval_iters", "checkpoint_interval")
    shares = ("decay", "bp_warmup", "beta1", "beta2", "ema")
    for keys, low, high in (at_least_1, 1, math.inf), (at_least_0, 0, math.inf), (shares, 0, 1):
        for key in keys:
            if not low <= settings[key] <= high:
                raise ValueError(f"{key} must be at least {low}{' and at most 1' * (high == 1)}, not {settings[key]}")
    if attention not in ("auto", "flex", "sdpa") or (attention == "flex" and not on_cuda):
        raise ValueError(f"attention must be auto, sdpa, or on cuda flex, not {attention}")
    if not out_dir or not dataset or not init_from or out.is_file():
        raise ValueError("out_dir, dataset and init_from must be names, and out_dir that of a directory")
    if wandb_log:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ValueError("wandb_log needs the package wandb: pip install wandb") from None


try:
    check_settings()
    resumed = load_checkpoint(out) if init_from == "resume" else None
    meta = data.read_meta(data_dir)
    state = resumed["loader"] if resumed else None
    loader = data.Loader(data_dir, "train", batch_size, block_size, seed, rank, world_size, state=state)
    if loader.left_out:
        say(f"{loader.left_out:,} of {len(loader.lengths):,} documents are longer than block_size and left out")
        say(f"  (data.py --block_size={block_size} would truncate them)")
    has_val = meta["splits"]["val"]["documents"] > 0
    if has_val:
        val_batches()
    else:
        say(f"{data_dir} has no validation documents, so there will be no validation loss")
    if epochs:
        max_iters = max(1, round(epochs * int(loader.lengths[loader.fitting].sum()) / (batch_size * block_size)))

    # model
    torch.manual_seed(seed)
    if init_from in ("scratch", "resume"):
        shape = {f.name: settings[f.name] for f in fields(HRMConfig) if f.name in settings}
        if resumed and resumed["origin"] == "scratch":
            differs = ", ".join(f"{k} {resumed['config'][k]}" for k in shape if shape[k] != resumed["config"][k])
            if differs:
                raise ValueError(f"{out / 'ckpt.pt'} holds another model than these settings ask for: there, {differs}")
        model = HRM(HRMConfig(**resumed["config"]) if resumed else HRMConfig(vocab_size=meta["vocab_size"], **shape))
    else:
        model = HRM.from_pretrained(init_from)
        say(f"fine-tuning {init_from}, whose shape overrides the settings: {model.config}")
    config = model.config
    source = out if resumed else init_from
    if init_from != "scratch":
        encodings = data.load_encoding(local_directory(source)), data.load_encoding(data_dir)
        if not data.same_tokenizer(*encodings):
            names = [f"{place} ({e.name}, {e.n_vocab} ids)" for place, e in zip((source, data_dir), encodings)]
            raise ValueError(
                f"{' and '.join(names)} have different tokenizers; data.py --tokenizer={source} mends that"
            )
        if config.vocab_size < meta["vocab_size"]:
            raise ValueError(f"{source} has {config.vocab_size} embeddings, and its tokenizer {meta['vocab_size']} ids")
    if config.block_size < block_size:
        raise ValueError(f"{source} has a context of {config.block_size} tokens, and block_size is {block_size}")
    if not 2 <= bp_min <= bp_max <= config.n_steps:
        raise ValueError(f"bp_min and bp_max must rise from 2 to at most H_cycles * (L_cycles + 1) = {config.n_steps}")
    if resumed:
        model.load_state_dict(resumed["model"])
    if out.resolve() == Path(init_from).resolve():
        raise ValueError(f"init_from is out_dir ({out}); give the new run another with --out_dir")
except (ValueError, OSError) as e:
    sys.exit(f"train.py: {e}")
model.to(device)
model.compute_dtype, model.attention, model.recompute_blocks = dtype, attention, recompute_blocks
for tensor in model.state_dict().values() if world_size > 1 else ():
    dist.broadcast(tensor, 0)
options = dict(lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, ema=ema or None)
optimizer = AdamATan2(model.parameters(), **options)
iteration = tokens = 0
if resumed:
    optimizer.load_state_dict(resumed["optimizer"])
    optimizer.param_groups[0].update(options)  # settings may change on the way
    for p, state in optimizer.state.items() if ema else ():
        state.setdefault("ema", p.detach().clone())
    iteration, tokens = resumed["iter"], resumed["tokens"]
    changed = {k: v for k, v in settings.items() if resumed["settings"].get(k) != v and k != "init_from"}
    say(f"resuming {out} at step {iteration}" + (f", with other settings than before: {changed}" if changed else ""))
origin = resumed["origin"] if resumed else init_from
del resumed
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
# one step, validation, checkpoint


def loss_of(batch, bp_steps=None):
    """This rank's share of the step's mean loss over targets; with gradient enabled, runs the backward passes too."""
    total = torch.zeros((), device=device)
    for parts in zip(*(t.split(micro_batch_size) for t in batch[:4])):
        share = int((parts[1] != IGNORE).sum()) / batch.n_targets
        if on_cuda:
            parts = [t.pin_memory() for t in parts]
        idx, targets, doc, prefix = (t.to(device, non_blocking=True) for t in parts)
        loss = model(idx, targets, doc, prefix, bp_steps)[1] * share
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.detach()
    return total


def over_ranks(value):
    """The sum over all ranks of a scalar tensor, as a float."""
    if world_size > 1:
        dist.all_reduce(value)
    return value.item()


def train_step(batch, bp_steps, lr):
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(batch, bp_steps)
    # Summed here and not by DistributedDataParallel: which weights have a gradient depends on bp_steps (the embedding
    # has none at 2), but it is the same ones on every rank.
    if world_size > 1:
        sums = [dist.all_reduce(p.grad, async_op=True) for p in model.parameters() if p.grad is not None]
        for s in sums:
            s.wait()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    return loss


@torch.no_grad()
def validate():
    """Mean loss over the targets of val.bin (the first eval_iters batches of it), with the averaged weights."""
    total = torch.zeros((), device=device)
    n_targets = 0
    with optimizer.averaged() if ema else nullcontext():
        for batch in islice(val_batches(), eval_iters or None):
            total += loss_of(batch) * batch.n_targets
            n_targets += batch.n_targets
    return over_ranks(total) / n_targets


def save_checkpoint():
    """out_dir/ckpt.pt, written beside and renamed, so that a crash leaves the one before."""
    if not master:
        return
    names = {p: name for name, p in model.named_parameters()}
    average = {names[p]: state["ema"] for p, state in optimizer.state.items()} if ema else {}
    ckpt = {
        "model": model.state_dict(),
        "ema": average,  # shares its storage with the optimizer's, so is in the file once
        "optimizer": optimizer.state_dict(),
        "config": asdict(config),
        "settings": settings,
        "origin": origin,  # "scratch", or what was fine-tuned
        "iter": iteration,
        "tokens": tokens,
        "loader": loader.state,
    }
    torch.save(ckpt, out / "ckpt.pt.part")
    os.replace(out / "ckpt.pt.part", out / "ckpt.pt")


def log(**entry):
    if master:
        log_file.write(json.dumps(entry) + "\n")
        log_file.flush()
        if wandb_log:
            wandb.log(entry, step=entry["iter"])


# ----------------------------------------------------------------------------------------------------
# the loop


def all_agree_to_stop():
    """Whether any rank was told to stop, so that all do after the same step."""
    asked = torch.tensor(int(stop_asked))
    if world_size > 1:
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=cpu_group)
    return bool(asked)


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16
device_name = torch.cuda.get_device_name() if on_cuda else f"{device} ({torch.get_num_threads()} threads)"
peak = next((flops for card, flops in PEAK_FLOPS.items() if card in device_name), None)
if master:
    if init_from != "resume" and ((out / "ckpt.pt").exists() or (out / "log.jsonl").exists()):
        aside = next(p for p in (Path(f"{out}.{i}") for i in range(1, 10**6)) if not p.exists())
        out.rename(aside)
        say(f"{out} held another run, which is now {aside}")
    out.mkdir(parents=True, exist_ok=True)
    for file in ("meta.json", "tokenizer.tiktoken"):  # so that sample.py and eval.py need only out_dir
        shutil.copy(data_dir / file, out / file)
    log_path = out / "log.jsonl"
    logged = log_path.read_text(encoding="utf-8").splitlines(keepends=True) if log_path.exists() else []
    log_file = open(log_path, "w", encoding="utf-8")  # without what a killed run logged after its last checkpoint
    log_file.writelines(line for line in logged if line.endswith("\n") and json.loads(line)["iter"] <= iteration)
    if wandb_log:
        import wandb

        wandb.init(project=wandb_project, name=wandb_run_name or None, config=settings)
n_params = sum(p.numel() for p in model.parameters())
blocks = "compiled" if model.compile_blocks else "not compiled"
say(f"{n_params:,} parameters, {world_size} x {device_name}, {str(dtype).removeprefix('torch.')}, blocks {blocks}")
say(f"{max_iters:,} steps of {batch_size} rows of {block_size} tokens; log: {out / 'log.jsonl'}")
start = time.perf_counter()

bar = tqdm(total=max_iters, initial=iteration, desc="training", disable=None if master else True)
clock, clock_tokens = time.perf_counter(), tokens
stopped = False
while iteration < max_iters and not stopped:
    lr, bp_steps = learning_rate_at(iteration), bp_steps_at(iteration)
    batch = next(loader)
    loss = train_step(batch, bp_steps, lr)
    if start:
        over_ranks(loss.clone())
        say(f"first step after {time.perf_counter() - start:.1f} s" + (", compilation included" if compile else ""))
        start = None
    iteration += 1
    tokens += batch.n_tokens
    bar.update()
    stopped = all_agree_to_stop()
    if iteration % log_interval == 0 or iteration == max_iters or stopped:
        loss = over_ranks(loss)  # the only wait for the device
        speed = (tokens - clock_tokens) / (time.perf_counter() - clock)
        mfu = model.flops_per_token(bp_steps) * speed / (peak * world_size) if peak else None
        log(iter=iteration, loss=loss, lr=lr, bp_steps=bp_steps, tokens=tokens, tokens_per_sec=round(speed, 1), mfu=mfu)
        text = f"step {iteration}: loss {loss:.4f}, lr {lr:.2e}, bp_steps {bp_steps}, {speed:,.0f} tokens/s"
        say(text + (f", mfu {mfu:.1%}" if mfu else ""))
        clock, clock_tokens = time.perf_counter(), tokens
    evaluate_now = iteration == max_iters or (eval_interval and iteration % eval_interval == 0)
    if evaluate_now and has_val:
        val_loss = validate()
        log(iter=iteration, val_loss=val_loss)
        say(f"step {iteration}: validation loss {val_loss:.4f}")
        clock, clock_tokens = time.perf_counter(), tokens
    if checkpoint_interval and iteration % checkpoint_interval == 0:
        save_checkpoint()
        clock, clock_tokens = time.perf_counter(), tokens
bar.close()
save_checkpoint()
memory = f"; peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_cuda else ""
say(f"{'stopped' if stopped else 'finished'} at step {iteration}; checkpoint: {out / 'ckpt.pt'}{memory}")
status = 0
if master:
    log_file.close()
    if wandb_log:
        wandb.finish()
if world_size > 1:
    dist.barrier()
    if on_cuda:
        dist.destroy_process_group()
if master and final_eval and not stopped:
    evaluation = [Path(__file__).with_name("eval.py"), f"--out_dir={out_dir}", f"--tasks={final_eval}"]
    status = subprocess.run([sys.executable, *evaluation]).returncode
sys.stdout.flush()
sys.stderr.flush()
if world_size > 1:
    os._exit(status)  # gloo's threads now and then abort a process that winds down in the ordinary way (torch 2.13)
sys.exit(status)
