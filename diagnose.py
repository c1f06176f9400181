"""What a trained model does at each step of its recurrence, on validation documents: a picture and tables.

    python diagnose.py                            # the model in out/ -> out/diagnose.png and out/diagnose.md
    python diagnose.py --H_cycles=4 --picture=deeper.svg

A step is one stack of blocks, and its state what comes out, normed. Of each step, over all tokens unless told:

    change      norm of what a block adds, relative to that of its input: the effective depth, mean over the blocks
    entropy     of attention, in nats, mean over blocks and heads; that of uniform attention stands beneath
    KL          of the final prediction from the state's, by the logit lens (the final norm and lm_head), in nats; over
                the tokens whose prediction is an answer's
    agrees      how many of these predictions have the final one's likeliest token
    cosine      between the states of two steps

And of each bp_steps, for the embedding, the stacks and lm_head: the norm of the gradient, and its cosine with that of
full backpropagation. Both are means over parts of the documents; the spread is the standard deviation of the norm over
the parts, relative to its mean.
"""

from configurator import configure

import math
from functools import partial

import torch
import torch.nn.functional as F

from common import errors_name_file, exit_on_error, local_directory, replace_file
from generate import divergence, load_for_inference
from model import IGNORE, norm, project_gqkv, visible_keys
from plot import new_figure, save_figure
from results import aligned, markdown_table, percent
from tasks import heldout
from tokenizer import special_id

# ---- settings ----
out_dir = "out"  # of train.py; the tables go there
picture = ""  # an .svg, .png or .pdf file; "": diagnose.png in out_dir
documents = 64  # of the model's own validation set, spread evenly
average = True  # the weights' moving average; False: the weights themselves
H_cycles = 0  # of the recurrence; 0: as many as the model was trained with
L_cycles = 0
device = "auto"  # cpu, cuda or mps
settings = configure(globals())
N_PARTS = 8  # of the documents, whose gradients differ
# ----------------------------------------------------------------------------------------------------


def rows_of(questions, encoding, block_size):
    """idx, targets, doc and prefix, each (documents, T), of the documents that fit: one in a row."""
    eoa = special_id(encoding, "eoa")
    found = [(q.prompt, [*encoding.encode(q.truth), eoa]) for q in questions]
    found = [(prompt, answer) for prompt, answer in found if len(prompt) + len(answer) <= block_size + 1]
    if not found:
        raise ValueError(f"no validation document fits into the model's block_size of {block_size}")
    shape = len(found), max(len(prompt) + len(answer) for prompt, answer in found) - 1
    idx, targets, doc = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE), torch.full(shape, -1)
    prefix = torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(found):
        end = len(prompt) + len(answer) - 1
        idx[row, :end] = torch.tensor(prompt + answer[:-1])
        targets[row, len(prompt) - 1 : end] = torch.tensor(answer)
        doc[row, :end] = 0
        prefix[row, : len(prompt)] = True
    return idx, targets, doc, prefix


def attention_entropy(q, k, first, last):
    """Entropy in nats (B, T) of softmax(q k) over the keys first <= k < last, mean over the heads. q (scaled already),
    k: (B, T, n_head, head_dim); first, last: (B, T)."""
    place, found = torch.arange(q.size(1), device=q.device), []
    for row in range(len(q)):  # one at a time, for memory
        visible = (first[row, :, None] <= place) & (place < last[row, :, None])
        scores = (q[row].transpose(0, 1) @ k[row].permute(1, 2, 0)).float().masked_fill(~visible, -math.inf)
        found.append(torch.special.entr(scores.softmax(-1)).sum(-1).mean(0))
    return torch.stack(found)


@torch.no_grad()
def trace(model, idx, targets, doc, prefix):
    """What the steps do: a dict of "step" (names, n_steps), "change" and "entropy" (n_steps, n_layer / 2), "KL" and
    "agrees" (n_steps), "cosine" (n_steps, n_steps), and "uniform", the entropy of uniform attention."""
    c, at_H = model.config, {block.o_proj.data_ptr() for block in model.H}
    first, last = visible_keys(doc, prefix & c.prefix_lm)
    names, states, change, entropy, real = [], [], [], [], doc >= 0
    recurrence, n, device = model.recurrence, c.n_layer // 2, model.embed.device

    def watched(idx, pos, weights, run_block, *others):
        def watch(x, w, cos, sin):
            y = run_block(x, w, cos, sin)
            q, k = project_gqkv(x, w.gqkv_proj, cos, sin, c.norm_eps, c.norm == "post")[1:3]
            entropy.append(attention_entropy(q, k, first.to(device), last.to(device)).cpu()[real].mean())
            change.append(((y - x).norm(dim=-1) / x.norm(dim=-1)).cpu()[real].mean())
            if len(change) % n == 0:
                is_H = w.o_proj.data_ptr() in at_H
                if c.recurrence == "trm":  # whose L is H
                    is_H = (len(names) + 1) % (c.L_cycles + 1) == 0
                names.append("H" if is_H else "L")
                states.append((y if c.norm == "post" else norm(y, c.norm_eps)).float().cpu())
            return y

        return recurrence(idx, pos, weights, watch, *others)

    model.recurrence = watched  # in place of the method, which the model finds otherwise
    try:
        model(idx, None, doc, prefix)
    finally:
        del model.recurrence
    lens = partial(F.linear, weight=model.lm_head.float().cpu())
    targeted, final = [z[targets != IGNORE] for z in states], lens(states[-1][targets != IGNORE])
    found = dict(step=[f"{i} {name}" for i, name in enumerate(names, 1)])
    found |= {key: torch.stack(x).view(-1, n) for key, x in dict(change=change, entropy=entropy).items()}
    found["KL"] = torch.stack([divergence(final, lens(z)).mean() for z in targeted])  # one step's logits at a time
    found["agrees"] = torch.stack([(lens(z).argmax(-1) == final.argmax(-1)).float().mean() for z in targeted])
    unit = torch.stack([F.normalize(z[real], dim=-1) for z in states])
    found["cosine"] = torch.einsum("itc,jtc->ij", unit, unit) / len(unit[0])
    return found | {"uniform": (last - first)[real].log().mean()}


def gradients(model, rows):
    """{group: {bp_steps: (norm of the gradient, its spread, its cosine with that of full backpropagation)}}; all are
    means over parts of the rows, and the cosine NaN where there is no gradient."""
    groups = {"embed": [model.embed], "L": [*model.L.parameters()], "H": [*model.H.parameters()]}
    groups["lm_head"] = [model.lm_head]
    found = {name: {K: [] for K in range(2, model.config.n_steps + 1)} for name, some in groups.items() if some}
    for part in zip(*(t.chunk(N_PARTS) for t in rows)):
        full = {}
        for K in range(model.config.n_steps, 1, -1):
            model.zero_grad()
            model(*part, K)[1].backward()
            for name in found:
                g = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in groups[name]])
                cosine = (g / g.norm()) @ (full.setdefault(name, g) / full[name].norm())
                found[name][K].append((g.norm().item(), cosine.item()))
    for by_steps in found.values():
        for K, pairs in by_steps.items():
            norms, cosines = torch.tensor(pairs).T
            by_steps[K] = norms.mean().item(), (norms.std(correction=0) / norms.mean()).item(), cosines.mean().item()
    model.zero_grad()
    return found


def tables(traced, by_group):
    """Two tables, as rows of cells: of the steps, and of the gradients."""
    steps = [("step", "change", "entropy", "KL", "agrees", "cosine with the last")]
    for i, name in enumerate(traced["step"]):
        means = (f"{traced[key][i].mean():.3f}" for key in ("change", "entropy", "KL"))
        steps.append((name, *means, percent(traced["agrees"][i].item()), f"{traced['cosine'][i, -1]:.3f}"))
    steps.append(("uniform", "", f"{traced['uniform']:.3f}", "", "", ""))
    rows = [("bp_steps", *(f"{name} {what}" for name in by_group for what in ("norm", "spread", "cosine")))]
    for K in [*by_group.values()][0]:
        triples = [by_group[name][K] for name in by_group]
        rows.append([K, *(cell for a, b, c in triples for cell in (f"{a:.3g}", percent(b, 0), f"{c:.3f}"))])
    return steps, [["-" if "nan" in str(cell) else cell for cell in row] for row in rows]


def draw(traced, by_group, path):
    """The picture of six. Raises ValueError or OSError."""
    figure, ((change, entropy, norms), (cosine, lens, cosines)) = new_figure(2, 3, (13, 7))
    names, n = traced["step"], traced["change"].size(1)
    for axes, key, title in (change, "change", "change per block"), (entropy, "entropy", "attention entropy, nats"):
        place, colours = range(1, len(names) * n + 1), ["C3" if "H" in s else "C0" for s in names for _ in range(n)]
        axes.plot(place, traced[key].flatten(), color="lightgrey", zorder=0)
        axes.scatter(place, traced[key].flatten(), c=colours)
        axes.set(title=f"{title} (red: H)", xlabel="block, as applied", ylim=(0, 1.05 * traced[key].max()))
    entropy.axhline(traced["uniform"], color="grey", linestyle=":")
    entropy.set(ylim=(0, 1.05 * traced["uniform"]))
    figure.colorbar(cosine.imshow(traced["cosine"], vmin=-1, vmax=1, cmap="RdBu_r"), ax=cosine)
    cosine.set(title="cosine between states", xticks=range(len(names)), yticks=range(len(names)))
    cosine.set_xticklabels(names, rotation=90)
    cosine.set_yticklabels(names)
    lens.plot(names, traced["KL"], "o-", label="KL of the final prediction, nats")
    lens.plot(names, traced["agrees"], "s--", label="share with its likeliest token")
    lens.set(title="logit lens", ylim=(0, 1.3 * max(1, traced["KL"].max())))
    lens.tick_params(axis="x", rotation=90)
    lens.legend(frameon=False)
    for i, (name, by_steps) in enumerate(by_group.items()):
        mean, spread, cos = (torch.tensor(column) for column in zip(*by_steps.values()))
        norms.errorbar([K + i / 9 for K in by_steps], mean, mean * spread, marker="o", label=name, elinewidth=0.7)
        cosines.plot([*by_steps], cos, "o-", label=name)
    norms.set(title="norm of the gradient, and its spread", xlabel="bp_steps")
    cosines.set(title="cosine with full backpropagation", xlabel="bp_steps", ylim=(None, 1.02))
    norms.legend(frameon=False, loc="upper left")
    cosines.legend(frameon=False)
    with errors_name_file(path, "could not be written"):
        save_figure(figure, path)


def main():
    source = local_directory(out_dir)
    if documents < 1:
        raise ValueError(f"documents must be at least 1, not {documents}")
    questions = heldout(source, documents)
    model, encoding, _ = load_for_inference(source, average, device, "float32", H_cycles=H_cycles, L_cycles=L_cycles)
    rows = rows_of(questions, encoding, model.config.block_size)
    traced, by_group = trace(model, *rows), gradients(model, rows)
    found = tables(traced, by_group)
    print("\n\n".join("\n".join(aligned(table)) for table in found))
    path = source / "diagnose.md"
    with errors_name_file(path, "could not be written"):
        replace_file(path, "\n".join(map(markdown_table, found)).encode())
    print(f"written to {path}")
    draw(traced, by_group, picture or source / "diagnose.png")
    print(f"written to {picture or source / 'diagnose.png'}")


if __name__ == "__main__":
    with exit_on_error():
        main()
