"""What a training run tells as it goes: its speed, log lines, and answers to held-out instructions."""

import time
from collections import deque
from textwrap import fill

import torch
from tqdm import tqdm

import ranks
from common import one_line
from generate import ban_ids_without_token, stream
from ranks import print0
from tokenizer import load_encoding, special_id

PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}  # dense bf16,
PEAK_FLOPS |= {"L40S": 362e12, "4090": 165e12}  # by the first of these names that is a part of the card's


def peak_flops(name):
    """The peak rate of the card of this name, or None where it is not known."""
    return next((flops for card, flops in PEAK_FLOPS.items() if card in name), None)


def row_text(row):
    """A table's row {column: number or text} as texts."""
    return {key: value if isinstance(value, str) else f"{value:,.4g}" for key, value in row.items()}


def markdown(tables):
    """Tables {title: {row: {column: number or text}}} for a README."""
    lines = []
    for title, table in ((title, table) for title, table in tables.items() if table):
        columns = list(dict.fromkeys(key for row in table.values() for key in row))
        lines += ["", f"| {title} | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
        for what, row in table.items():
            lines.append(f"| {what} | {' | '.join(row_text(row).get(key, '') for key in columns)} |")
    return "\n".join(lines)


class Progress:
    """The bar, speed and log lines of a run of `max_iters` steps that goes on after `step`. Speed counts from
    the first resume() after pause() or log(), so that checkpoints and validation do not."""

    def __init__(self, files, model, settings, max_iters, step, device):
        print0(fill(", ".join(f"{key}={value}" for key, value in settings.items()), 120, break_on_hyphens=False))
        self.files, self.model, self.max_iters, self.mark = files, model, max_iters, None
        on_cuda = device.startswith("cuda")
        name = torch.cuda.get_device_name() if on_cuda else f"{device} ({torch.get_num_threads()} threads)"
        self.peak_flops = peak_flops(name)
        dtype, compiled = str(model.compute_dtype).removeprefix("torch."), model.compile_blocks
        n_params = sum(p.numel() for p in model.parameters())
        print0(f"{n_params:,} parameters, {ranks.world_size} x {name}, {dtype}, compile {compiled}")
        self.bar = tqdm(total=max_iters, initial=step, desc="training", disable=None if ranks.master else True)
        self.begin, self.first_step, self.last_losses = time.perf_counter(), step + 1, deque(maxlen=8)

    def pause(self):
        self.mark = None

    def resume(self, step, tokens):
        self.mark = self.mark or (time.perf_counter(), step, tokens)

    def count(self, step, loss):
        """A step is done. Waits for the device at the first, and says how long that took."""
        self.bar.update()
        if step == self.first_step:
            loss.item()
            compilation = ", compilation included" if self.model.compile_blocks else ""
            print0(f"first step after {time.perf_counter() - self.begin:.1f} s{compilation}")
            self.first_mark, self.mark = self.mark, None  # its speed is that of compilation

    def log(self, step, metrics, lr, bp_steps, tokens, loader):
        """Print and log a step: `metrics` are scalars on the device, `loader` is its state."""
        clock, step_before, tokens_before = self.mark or self.first_mark
        seconds, self.mark = time.perf_counter() - clock, None
        speed = (tokens - tokens_before) / seconds
        flops = self.model.flops_per_token(bp_steps) * speed / ranks.world_size
        weight_norm = torch.stack(torch._foreach_norm([p.detach() for p in self.model.parameters()])).norm()
        metrics = metrics | {"weight_norm": weight_norm}
        entry = {"iter": step, **{name: value.item() for name, value in metrics.items()}, "lr": lr}
        entry |= {"bp_steps": bp_steps, "tokens": tokens}
        in_epoch = (loader["cursor"] - len(loader["waiting"])) / loader["documents"]
        entry |= {"epoch": round(loader["epoch"] + in_epoch, 4)}
        entry |= {"seconds": round(time.perf_counter() - self.begin, 1), "tokens_per_sec": round(speed, 1)}
        entry |= {"mfu": flops / self.peak_flops if self.peak_flops else None}
        self.files.log(**entry)
        text = f"step {step}: loss {entry['loss']:.4f}, token accuracy {entry['accuracy']:.1%}, lr {lr:.2e}"
        text += f", bp_steps {bp_steps}, {speed:,.0f} tokens/s" + (f", mfu {entry['mfu']:.1%}" if entry["mfu"] else "")
        left = (self.max_iters - step) * seconds / (step - step_before)
        print0(f"{text}, {tqdm.format_interval(left)} left")
        self.last_losses.append(f"{entry['loss']:.4f} at {step}")


def print_answers(model, directory, documents, max_new_tokens=64):
    """Print the instructions of documents, which are (ids, length of the prefix), and the model's answers to them."""
    as_it_was = model.compile_blocks, model.attention
    model.compile_blocks, model.attention = False, "auto"  # to compile would take longer than so few tokens
    try:
        encoding = load_encoding(directory)
        ban_ids_without_token(model, encoding)
        special, stop = encoding.special_tokens.values(), special_id(encoding, "eoa")
        for ids, n_prefix in documents:
            events = stream(model, [ids[:n_prefix]], max_new_tokens, stop_token=stop)
            new = [id for step in events for _, id in step if id is not None]
            texts = (encoding.decode([id for id in part if id not in special]) for part in (ids[:n_prefix], new))
            instruction, answer = ("".join(c if c.isprintable() else " " for c in text) for text in texts)
            print0(f"  {instruction[-200:]} -> {answer}")
    except (ValueError, RuntimeError) as e:  # no tiktoken, say, weights that diverge, or a card that is full
        print0(f"  no sample answers: {one_line(e)}")
    finally:
        (model.compile_blocks, model.attention), model.engine = as_it_was, None  # training needs the caches' memory
