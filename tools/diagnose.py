"""
What a trained model does at each step of its recurrence, on validation documents. Needs matplotlib.

$ python -m tools.diagnose                # the model in out/ -> out/diagnose.md, out/diagnose.svg
$ python -m tools.diagnose --H_cycles=4   # with more steps than it was trained with

A step applies a stack (of trm, H does L's work too); its state is what comes out, normed. Of each
step, over the positions that predict an answer's tokens:

attention  the share of it that goes to the instruction, mean over blocks and heads
accuracy   of the predicted tokens, if the head read this state (the logit lens)
cosine     of the state with the last one

Of each bp_steps, the norm of the gradient, and its cosine with that of full backpropagation.
"""

from configurator import configure

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import latest_checkpoint
from generate import load_for_inference
from loader import Loader
from model import IGNORE, Attention, Stack, norm, rotate, visible_keys

# -----------------------------------------------------------------------------
out_dir = "out"  # of train.py; the results go there, too
rows = 4  # of packed validation documents
H_cycles = 0  # of the recurrence; 0: as trained
L_cycles = 0
device = "auto"  # cpu, cuda or mps
configure(globals())
# -----------------------------------------------------------------------------


@torch.no_grad()
def trace(model, idx, targets, doc, prefix):
    """({column: [a value per step]}, the cosines (n_steps, n_steps) of their states)."""
    config = model.config
    first, last = visible_keys(doc, prefix & config.prefix_lm)
    key = torch.arange(idx.size(1), device=idx.device)
    visible = first[:, :, None] <= key  # (B, T, T): query, key
    visible &= key < last[:, :, None]
    answers = targets != IGNORE
    found = defaultdict(list)
    states = []
    shares = []  # of a stack's blocks

    def after_attention(module, args, _):
        x, cos, sin, *_ = args
        B, T, _ = x.shape
        gqkv = module.gqkv_proj(x).view(B, T, 4, -1, config.head_dim)
        _, q, k, _ = gqkv.unbind(2)
        q = rotate(q, cos, sin).transpose(1, 2)  # (B, n_head, T, head_dim)
        k = rotate(k, cos, sin).transpose(1, 2)
        scores = q @ k.mT * config.head_dim**-0.5
        scores.masked_fill_(~visible[:, None], -torch.inf)
        weights = scores.softmax(-1).mean(1)  # (B, T, T), over the heads
        share = (weights * prefix[:, None]).sum(-1)
        shares.append(share[answers].mean())

    def after_stack(last_block, _, out):
        name = "H" if last_block is model.H_module.layers[-1] else "L"
        states.append(norm(out, config.norm_eps)[answers])
        found["step"].append(f"{name}{len(states)}")
        found["attention"].append(torch.stack(shares).mean().item())
        shares.clear()

    hooks = []
    for module in model.modules():
        if isinstance(module, Attention):
            hooks.append(module.register_forward_hook(after_attention))
        if isinstance(module, Stack):
            last_block = module.layers[-1]
            hooks.append(last_block.register_forward_hook(after_stack))
    model(idx, None, doc, prefix)
    for hook in hooks:
        hook.remove()

    targets = targets[answers]
    for state in states:
        logits = F.linear(state, model.lm_head.weight)
        correct = logits.argmax(-1) == targets
        found["accuracy"].append(correct.float().mean().item())
    unit = F.normalize(torch.stack(states), dim=-1)
    cosines = torch.einsum("itc,jtc->ij", unit, unit).cpu() / len(targets)
    found["cosine"] = cosines[-1].tolist()
    return found, cosines


def gradients(model, batch):
    """{"bp_steps": [...], "H_module norm": [...], "H_module cosine": [...], ...}, for each part."""
    names, weights = zip(*model.named_parameters())
    found = defaultdict(list)
    full = {}
    model.recompute = True  # blocks in the backward pass, for memory
    for bp_steps in range(model.config.n_steps, 1, -1):
        found["bp_steps"].append(bp_steps)
        loss = model(*batch, bp_steps=bp_steps)[1]
        # zeros for weights that so few steps do not reach
        grads = torch.autograd.grad(loss, weights, materialize_grads=True)
        for part, _ in model.named_children():
            own = []
            for name, g in zip(names, grads):
                if name.startswith(part):
                    own.append(g.flatten())
            grad = torch.cat(own)
            cosine = F.cosine_similarity(grad, full.setdefault(part, grad), dim=0)
            found[f"{part} norm"].append(grad.norm().item())
            found[f"{part} cosine"].append(cosine.item())
    return found


def table(columns):
    """Markdown, from {head: values}."""
    text = f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
    for row in zip(*columns.values()):
        cells = []
        for x in row:
            if isinstance(x, float):
                x = f"{x:.3g}"
            cells.append(str(x))
        text += f"| {' | '.join(cells)} |\n"
    return text


def draw(steps, cosines, grads, path):
    try:
        from matplotlib.figure import Figure  # pyplot would look for a screen
    except ImportError:
        sys.exit("pictures need matplotlib: pip install matplotlib")

    figure = Figure(figsize=(15, 5), layout="constrained")
    states, lens, gradient = figure.subplots(1, 3)
    names = steps["step"]
    states.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    states.set_title("cosine between the states of two steps (red: 1)")
    states.set_xticks(range(len(names)), names)
    states.set_yticks(range(len(names)), names)
    lens.plot(names, steps["accuracy"], "o-", label="accuracy, if the head read this state")
    lens.plot(names, steps["attention"], "s--", label="share of attention on the instruction")
    for name in grads:
        if "cosine" in name:
            gradient.plot(grads["bp_steps"], grads[name], "o-", label=name.split()[0])
    gradient.set_title("cosine with the gradient of full backpropagation")
    gradient.set_xlabel("bp_steps")
    for axes in lens, gradient:
        axes.legend(frameon=False)
    figure.savefig(path)


def main():
    run = latest_checkpoint(out_dir)
    if not run:
        sys.exit(f"{out_dir} has no checkpoint of train.py")
    saved = json.loads((run / "train.json").read_text())
    model, _ = load_for_inference(run, device, "float32", H_cycles, L_cycles)
    directory = Path("data", saved["settings"]["dataset"])
    block_size = model.config.block_size
    loader = Loader(directory, "val", rows, block_size, epochs=1)
    place = model.lm_head.weight.device
    batch = [t.to(place) for t in next(loader)[:4]]
    steps, cosines = trace(model, *batch)
    grads = gradients(model, batch)
    text = f"{table(steps)}\n{table(grads)}"
    print(text)
    Path(out_dir, "diagnose.md").write_text(text)
    draw(steps, cosines, grads, Path(out_dir, "diagnose.svg"))
    print(f"written to {out_dir}: diagnose.md, diagnose.svg")


if __name__ == "__main__":
    main()
