"""Pretraining and fine-tuning of an HRM, on one device or many.

    python train.py config/demo.py                                            # a laptop: minutes, and it can do sums
    torchrun --standalone --nproc_per_node=8 train.py config/hrm1b.py         # a node of 8 GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/hrm1b.py
    python train.py --init_from=resume --out_dir=out                          # go on from out/ckpt.pt

A step is batch_size rows of packed documents, shared among the ranks and then among micro-batches; the number of either
changes nothing but speed and memory. Ctrl-C, SIGTERM and SIGUSR1 finish the step, save, and end. A run that was killed
goes on to the same weights, bit for bit with as many CPU threads; under torchrun --max-restarts=N it does so by itself.
"""

from configurator import configure

import hashlib
import signal
import sys
import time
import uuid
from contextlib import suppress
from copy import copy
from dataclasses import asdict, fields
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from runpy import run_path

import torch

import plot
import ranks
from attention import FLEX_KERNELS
from checkpoint import RunFiles, read_settings
from common import Forgiving, errors_name_file, finish_rename, one_line
from devices import choose_device, cpu_threads, missing_compiler
from loader import Loader, document, prefetch
from model import HRM, IGNORE, HRMConfig
from optim import AdamATan2
from ranks import any_rank, gather, print0
from report import Progress, print_answers
from tokenizer import FILES, check_file, load_encoding, read_meta, read_tokenizer, same_tokenizer

# ---- settings ----
# input and output
out_dir = "out"
dataset = "problems"  # data/<dataset>, made by data.py ("problems" is made on the spot)
init_from = "scratch"  # or "resume" (the run in out_dir), or what to fine-tune: a run, a directory, a hub id
log_interval = 10  # steps between log lines
eval_interval = 500  # steps between validation losses; 0: only at the end
eval_iters = 0  # batches of a validation loss; 0: all of val.bin
sample_prompts = 2  # held-out instructions that are answered, and printed, at each validation
checkpoint_interval = 1000  # steps between checkpoints; 0: only at the end
checkpoint_minutes = 0.0  # minutes between checkpoints, whichever comes first; 0: steps alone
keep_checkpoints = 2  # the newest: ckpt.pt, and ckpt-<step>.pt before it
skip_nonfinite = 0  # skip up to this many steps whose loss or gradient is not finite, then abort
wandb_log = False
wandb_project = "hrm-text"
# batch
batch_size = 8  # rows per step, over all ranks and micro-batches
micro_batch_size = 8  # rows at a time on a device, at most
block_size = 1024  # tokens per row
# model
n_layer = 4  # blocks in all, half in each stack
n_head = 2
n_embd = 64
H_cycles = 2
L_cycles = 3
recurrence = "hrm"  # or trm, looped, rins, transformer: see HRM.recurrence in model.py
norm = "magic"  # or pre, post: where a block's norms stand
prefix_lm = True  # False: a causal mask in the instruction too
# optimizer
loss_on = "response"  # or all, of a document's tokens but the first; the validation loss is that of responses always
max_iters = 1000
epochs = 0.0  # above 0: sets max_iters to this many passes over the data
learning_rate = 1e-3
warmup_iters = 100  # linear from 0
decay = 0.0  # share of training, at its end, in which the rate falls linearly to 0; it is constant before
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
ema = 0.99  # decay of the weights' moving average, which is what is evaluated, sampled and exported
ema_ramp = True  # decay is at most (1 + step) / (10 + step), so that a short run's average is not its start
bp_min = 2  # steps of the recurrence with gradient, at the start of training
bp_max = 0  # and after bp_warmup; 0: 5, or all steps of a model that has fewer, such as a transformer's 2
bp_warmup = 0.2  # share of training in which bp_steps rises
# system
device = "auto"  # cpu, cuda or mps
dtype = "auto"  # of computation: float32, or bfloat16 (auto: where the device multiplies it). Weights are float32
attention = "auto"  # sdpa or flex (or tma, tuned, flash: see attention.py); auto is flex where compiled on cuda
compile = True  # the blocks, with torch.compile
recompute = "none"  # in the backward pass, to save memory: inputs (of the products: a third less) or blocks (all)
seed = 1337
settings = configure(globals())


# ---- schedules ----
def learning_rate_at(step):
    """Linear warmup, constant, and with decay a linear fall to 0 at the end."""
    fall = (max_iters - step) / (decay * max_iters) if decay else 1.0
    return learning_rate * min((step + 1) / (warmup_iters + 1), 1.0, fall)


def bp_steps_at(step):
    """Warmup deep credit assignment: from bp_min to bp_max over the first bp_warmup of training."""
    progress = min(1.0, step / (bp_warmup * max_iters)) if bp_warmup else 1.0
    return bp_min + int(progress * (bp_max - bp_min))


def ema_at(step):
    """The decay of the moving average."""
    return min(ema, (1 + step) / (10 + step)) if ema_ramp else ema


# ---- one step ----
def loss_and_accuracy(model, batch, micro_batch_size, bp_steps=None):
    """This rank's shares of the step's mean loss over targets, and of the part of them that is predicted, as a tensor
    of two; runs the backward passes too, unless under no_grad, and leaves the gradients' sums over all ranks."""
    totals, weights = torch.zeros(2, device=model.embed.device), model.cast_weights()
    *others, last = zip(*(t.split(micro_batch_size) for t in batch[:4]))
    for idx, targets, doc, prefix in (*others, last):
        share = int((targets != IGNORE).sum()) / batch.n_targets
        loss = model(idx, targets, doc, prefix, bp_steps, weights)[1] * share
        if torch.is_grad_enabled():
            with ranks.summing_gradients(model.backward_order() if targets is last[1] else ()):
                loss.backward()
        totals += torch.stack((loss.detach(), model.n_correct / batch.n_targets))
    return totals


def train_step(model, optimizer, batch, bp_steps, micro_batch_size, skip_nonfinite=False):
    """Returns {"loss", "accuracy", "grad_norm"}, and whether the loss and all gradients are finite: all of them on the
    device, which need not be awaited."""
    optimizer.zero_grad(set_to_none=True)
    loss, accuracy = totals = loss_and_accuracy(model, batch, micro_batch_size, bp_steps)
    ranks.sum_over_ranks(totals)
    grad_norm = torch.stack(torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])).norm()
    is_finite = (loss + grad_norm).isfinite()
    if not skip_nonfinite or is_finite:
        optimizer.step()
    return dict(loss=loss, accuracy=accuracy, grad_norm=grad_norm), is_finite


@torch.no_grad()
def validate(model, optimizer, loader, stop_asked):
    """(mean loss over the targets of val.bin, share of them predicted), with the averaged weights; None if a signal
    asks to stop meanwhile."""
    totals, n_targets = torch.zeros(2, device=model.embed.device), 0
    model.eval()
    with optimizer.averaged():
        for batch in islice(exit_on_bad_data(copy(loader)), eval_iters or None):
            if any_rank(stop_asked())[0]:
                return None
            totals += loss_and_accuracy(model, batch, micro_batch_size) * batch.n_targets
            n_targets += batch.n_targets
    model.train()
    ranks.sum_over_ranks(totals)
    return (totals / n_targets).tolist()


def exit_on_bad_data(batches):
    """The batches, up to one that cannot be right, which ends the run."""
    try:
        yield from batches
    except ValueError as e:
        ranks.shutdown(one_line(e))


# ---- setting up: what can be wrong is found here, before anything is written ----
def check_settings():
    """Raise ValueError, in one sentence, for a setting that would fail later."""
    at_least_1 = ("max_iters", "batch_size", "micro_batch_size", "block_size", "log_interval", "keep_checkpoints")
    at_least_0 = ("epochs", "learning_rate", "weight_decay", "warmup_iters", "seed", "eval_interval", "eval_iters")
    at_least_0 += ("checkpoint_interval", "checkpoint_minutes", "skip_nonfinite", "sample_prompts")
    for keys, low, high in (at_least_1, 1, sys.maxsize), (at_least_0, 0, sys.maxsize), (("decay", "bp_warmup"), 0, 1):
        for key in keys:
            if not low <= settings[key] <= high:
                bound = f"at least {low}" if settings[key] < low else f"at most {high:,}"
                raise ValueError(f"{key} must be {bound}, not {settings[key]}")
    for key in "beta1", "beta2", "ema":
        if not 0 <= settings[key] < 1:
            raise ValueError(f"{key} must be at least 0 and less than 1, not {settings[key]}")
    if attention not in ("auto", "sdpa") and not device.startswith("cuda"):
        raise ValueError(f"attention must be auto, sdpa, or on cuda {', '.join(FLEX_KERNELS)}, not {attention}")
    if not out_dir or not dataset or not init_from or Path(out_dir).is_file():
        raise ValueError("out_dir, dataset and init_from must be names, and out_dir that of a directory")
    if init_from not in ("scratch", "resume") and Path(out_dir).resolve() == Path(init_from).resolve():
        raise ValueError(f"init_from is out_dir ({out_dir}); give the new run another with --out_dir")


def make_loader(data_dir, split, seed=0, **options):
    """The loader of a split, or None where there is nothing to validate on."""
    if split == "val" and not read_meta(data_dir)["splits"]["val"]["documents"]:
        return print0(f"{data_dir} has no validation documents, so there will be no validation loss")
    loader = Loader(data_dir, split, batch_size, block_size, seed, ranks.rank, ranks.world_size, **options)
    if loader.left_out:
        advice = f"data.py --block_size={block_size} would truncate them"
        print0(f"{loader.left_out:,} documents in {split} are longer than block_size and left out; {advice}")
    return loader


def make_model(start_from, ckpt_meta, data_dir):
    """The model of a checkpoint, of the settings, or to fine-tune. Raises ValueError unless it fits the data."""
    read_tokenizer(data_dir)  # found out here if it does not fit the bins; training itself needs no tiktoken
    source, n_ids = out_dir if ckpt_meta else start_from, read_meta(data_dir)["vocab_size"]
    if start_from in ("scratch", "resume"):
        shape = {f.name: settings[f.name] for f in fields(HRMConfig) if f.name in settings}
        config = HRMConfig(**ckpt_meta["config"]) if ckpt_meta else HRMConfig(vocab_size=n_ids, **shape)
        differs = ", ".join(f"{k} {getattr(config, k)}" for k in shape if shape[k] != getattr(config, k))
        if differs and ckpt_meta["origin"] == "scratch":
            raise ValueError(f"{out_dir}/ckpt.pt holds another model; resume with its settings: {differs}")
        try:
            with torch.device(device):  # a CPU's thread would take a minute to draw 1B weights
                model = HRM(config)
        except RuntimeError as e:
            raise ValueError(f"a model of this size cannot be made here: {one_line(e)}") from None
    else:
        model = HRM.from_pretrained(start_from)
        config = model.config
        print0(f"fine-tuning {start_from}, whose shape overrides the settings: {config}")
        theirs, ours = load_encoding(start_from), load_encoding(data_dir)
        if not same_tokenizer(theirs, ours):
            names = [f"{place} ({e.name}, {e.n_vocab} ids)" for place, e in ((start_from, theirs), (data_dir, ours))]
            advice = f"data.py --tokenizer={start_from} mends that"
            raise ValueError(f"{' and '.join(names)} have different tokenizers; {advice}")
    if config.vocab_size < n_ids:
        raise ValueError(f"{source} has {config.vocab_size} embeddings, and its tokenizer {n_ids} ids")
    if config.block_size < block_size:
        raise ValueError(f"{source} has a context of {config.block_size} tokens, and block_size is {block_size}")
    return model


def check_ranks_agree(data_dir):
    """End all ranks unless their data, code and torch are the same."""
    names = "attention.py", "model.py", "optim.py", "loader.py", "train.py"
    code = b"".join(Path(__file__).with_name(name).read_bytes() for name in names)
    meta = read_meta(data_dir)
    ours = {f"{data_dir / name}": check_file(data_dir, name, meta) for name in FILES}
    ranks.check_agreement({**ours, "the code": hashlib.sha256(code).hexdigest()[:16], "torch": torch.__version__})


def setup():
    """Returns model, optimizer, the two loaders, the run's files, and its progress: plain values of a checkpoint."""
    global settings, device, dtype, max_iters, bp_max, compile
    with ranks.abort_if_any():
        if init_from == "resume":
            globals().update(read_settings(out_dir, settings))
            settings = configure(globals())  # what the command line says goes first
        data_dir, out = Path("data", dataset), Path(out_dir)
        device, dtype = choose_device(device, dtype)
        ranks.start(device)
        ranks.check_agreement({key: value for key, value in settings.items() if key != "out_dir"})
        check_settings()
        if compile and (missing := missing_compiler()):
            compile = False
            print0(f"torch.compile needs a C++ compiler, and there is no {missing}: training is slower without")
        if device.startswith("cuda") and attention == "auto" and not compile:
            print0("attention: SDPA over padded documents, as FlexAttention needs compile=True")
        files, start_from, ckpt = RunFiles(out, keep_checkpoints, device.startswith("cuda")), init_from, None
        if ranks.master:
            finish_rename(data_dir)
            if dataset == "problems" and not (data_dir / "meta.json").exists():
                data = run_path(str(Path(__file__).with_name("data.py")))  # `import data` might find the directory
                print0(data["report"](data_dir, data["prepare"](data_dir)))
            start_from, ckpt = files.load(init_from)
        # Only the first rank needs to have the checkpoint. The others get its plain values here, its tensors below.
        ckpt_meta = {key: value for key, value in ckpt.items() if key not in ("model", "optimizer")} if ckpt else None
        start_from, ckpt_meta = gather((start_from, ckpt_meta))[0]
        loader = make_loader(data_dir, "train", seed, state=ckpt_meta and ckpt_meta["loader"])
        loader.loss_on = loss_on
        val_loader = make_loader(data_dir, "val", epochs=1)
        if epochs:
            max_iters = max(1, round(epochs * loader.n_tokens / (batch_size * block_size)))
        torch.manual_seed(seed)
        model = make_model(start_from, ckpt_meta, data_dir).to(device).train()
        model.set_compute(dtype, attention, compile, recompute)
        bp_max = bp_max or min(5, model.config.n_steps)
        if not 2 <= bp_min <= bp_max <= (n := model.config.n_steps):
            raise ValueError(f"bp_min ({bp_min}) and bp_max ({bp_max}) must rise from 2 to at most {n} (bp_max=0 fits)")
        if loss_on != "response" and (loss_on != "all" or model.config.prefix_lm):  # which would show the next token
            raise ValueError(f"loss_on must be response, or all (which needs prefix_lm=False), not {loss_on}")
        options = dict(lr=learning_rate, betas=(beta1, beta2), weight_decay=weight_decay, ema=ema or None)
        optimizer = AdamATan2(model.parameters(), **options, compile=compile)
        if ckpt:
            with errors_name_file(out / "ckpt.pt"):
                model.load_state_dict(ckpt["model"])
                optimizer.load_state_dict(ckpt["optimizer"])
        check_ranks_agree(data_dir)
        run = dict(iter=0, tokens=0, skipped=0, loader=loader.state, wandb_id=uuid.uuid4().hex[:8], origin=start_from)
        if ckpt_meta:
            run = {key: ckpt_meta[key] for key in run}
            changed = {k: v for k, v in settings.items() if ckpt_meta["settings"].get(k) != v and k != "init_from"}
            print0(f"resuming {out} at step {run['iter']}; settings changed: {changed or 'none'}")
        if ranks.master:
            if wandb_log:
                files.start_wandb(wandb_project, run["wandb_id"], settings)
            files.claim(data_dir, settings, run["origin"])
    optimizer.param_groups[0].update(options)  # settings may change on the way
    optimizer.keep_average(bool(ema))
    states = [optimizer.state[p] for p in model.parameters()]
    for state, step in zip(states, gather([state["step"] for state in states])[0]):
        state["step"] = step
    tensors = (t for state in states for t in state.values() if isinstance(t, torch.Tensor))
    ranks.copy_from_first([*model.state_dict().values(), *tensors])
    return model, optimizer, loader, val_loader, files, run


# ---- the run ----
def main():
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)  # to print may fail, but never ends a run
    signal.signal(signal.SIGINT, lambda *_: sys.exit("train.py: interrupted before the first step; nothing is lost"))
    model, optimizer, loader, val_loader, files, run = setup()
    stop_asked, on_cuda = ranks.catch_stop_signals(), device.startswith("cuda")
    print0(f"{max_iters:,} steps of {batch_size} rows of {block_size} tokens; log: {files.directory / 'log.jsonl'}")
    progress = Progress(files, model, settings, max_iters, run["iter"], device)
    last_save, pending = time.monotonic(), []  # pending: steps not yet known to be finite
    batches = exit_on_bad_data(prefetch(loader, device))

    def check_finite():
        """End the run, or count, for pending steps whose loss or gradient is not finite. Waits for the device."""
        for step, documents, loss, _ in [entry for entry in pending if not entry[-1]]:  # the last: is_finite
            run["skipped"] += 1
            what = "a gradient is not finite" if loss.isfinite() else f"the loss is {loss.item()}"
            some = ", ".join(map(str, documents[:10])) + (", ..." if len(documents) > 10 else "")
            sentence = f"step {step}: {what}; its {len(documents)} documents of {loader.bin} ({some}) are in the log"
            files.log(iter=step, nonfinite=what, documents=documents)
            if run["skipped"] <= skip_nonfinite:
                print0(f"{sentence}; skipped, {run['skipped']} of at most {skip_nonfinite}")
                continue
            files.wait()
            ckpt = "none yet" if files.saved is None else f"{files.directory / 'ckpt.pt'} (step {files.saved})"
            sentence += f"; logged losses before: {', '.join(progress.last_losses) or 'none'}; checkpoint to return to "
            sentence += f"(--init_from=resume): {ckpt}; --skip_nonfinite={run['skipped']} skips such a step"
            gather(ranks.Trouble(sentence) if ranks.master else None)  # the first rank alone knows the checkpoint
        pending.clear()

    while True:
        step, is_last = run["iter"], run["iter"] >= max_iters
        save_now = step and checkpoint_interval and step % checkpoint_interval == 0
        save_now |= bool(checkpoint_minutes and time.monotonic() - last_save > 60 * checkpoint_minutes)
        stop, save_now = any_rank(stop_asked(), save_now)
        if stop or is_last or save_now:
            check_finite()
            if ranks.master:
                tensors = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
                content = {**tensors, "config": asdict(model.config), "settings": settings, **run}
                files.save(content, wait=stop or is_last)
            last_save = time.monotonic()
            progress.pause()
        if stop:
            break
        if val_loader and step and (is_last or (eval_interval and step % eval_interval == 0)):
            check_finite()
            progress.pause()
            result = validate(model, optimizer, val_loader, stop_asked)
            if result is None:
                continue  # to stop
            files.log(iter=step, val_loss=result[0], val_accuracy=result[1])
            print0(f"step {step}: validation loss {result[0]:.4f}, token accuracy {result[1]:.1%}")
            if ranks.master and sample_prompts:
                split = val_loader.tokens, val_loader.ends, val_loader.prefixes
                some = [document(*split, d) for d in val_loader.order[:sample_prompts].tolist()]
                with optimizer.averaged():
                    print_answers(model, files.directory, some)
        if is_last:
            break

        if n_threads := cpu_threads().adapt(model.embed.device):
            print0(f"step {step}: CPU threads: {n_threads}, as others use the cores; all again when those are free")
        batch, bp_steps, lr = next(batches), bp_steps_at(step), learning_rate_at(step)
        progress.resume(step, run["tokens"])
        torch.manual_seed(hash((seed, step, ranks.rank)))  # dropout, if you add it, is then the same after a resume
        optimizer.param_groups[0] |= dict(lr=lr, ema=ema_at(step) or None)
        metrics, is_finite = train_step(model, optimizer, batch, bp_steps, micro_batch_size, bool(skip_nonfinite))
        step, tokens = step + 1, run["tokens"] + batch.n_tokens
        run |= dict(iter=step, tokens=tokens, loader=batch.state)
        pending.append((step, batch.documents, metrics["loss"], is_finite))
        progress.count(step, metrics["loss"])
        if step % log_interval == 0 or step == max_iters:
            check_finite()
            progress.log(step, metrics, lr, bp_steps, tokens, batch.state)
    progress.bar.close()

    sentence = f"{'stopped' if stop else 'finished'} at step {run['iter']}"
    if ranks.master and files.saved != run["iter"]:
        ranks.shutdown(f"{sentence}, but its checkpoint could not be written")
    if files.wandb:
        files.wandb.finish()
    memory = f"; peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if on_cuda else ""
    print0(f"{sentence}; checkpoint: {files.directory / 'ckpt.pt'}{memory}")
    if stop:
        print0(f"to go on: python train.py --init_from=resume --out_dir={files.directory}")
    elif ranks.master and find_spec("matplotlib"):
        with suppress(ValueError, OSError):  # the run is complete without
            plot.draw([files.directory], files.directory / "loss.svg")
            print0(f"its losses: {files.directory / 'loss.svg'}")
    ranks.shutdown(status=0)


if __name__ == "__main__":
    main()
