"""What one run has logged, or several, as a picture (needs matplotlib).

    python plot.py                                       # out/log.jsonl -> out/loss.svg
    python plot.py out out-two --picture=both.png        # the same as --out_dirs=out,out-two
"""

from configurator import configure

import json
import sys
from pathlib import Path

from common import errors_name_file, exit_on_error

if __name__ == "__main__" and (named := [a for a in sys.argv[1:] if not a.startswith("--") and not a.endswith(".py")]):
    sys.argv[1:] = [f"--out_dirs={','.join(named)}", *(a for a in sys.argv[1:] if a not in named)]
# ---- settings ----
out_dirs = "out"  # of train.py, with commas between
picture = ""  # an .svg, .png or .pdf file; "": loss.svg in the first of out_dirs
settings = configure(globals())
# ----------------------------------------------------------------------------------------------------
PANELS = {"loss per target": ("loss", "val_loss"), "token accuracy": ("accuracy", "val_accuracy")}
PANELS |= {"norms of gradient, weights (--)": ("grad_norm", "weight_norm"), "learning rate": ("lr",)}
PANELS |= {"bp_steps": ("bp_steps",), "tokens/s": ("tokens_per_sec",)}
LOGARITHMIC = "loss per target", "norms of gradient, weights (--)"
MAX_POINTS = 400  # of a line, as an .svg holds them all


def new_figure(rows, columns, size):
    """(a figure, its axes in an array (rows, columns)). Raises ValueError where matplotlib is missing."""
    with errors_name_file("matplotlib", "(an extra: pip install matplotlib) cannot start"):
        from matplotlib.figure import Figure  # without pyplot, no display is looked for
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def save_figure(figure, path):
    figure.savefig(path, metadata={"Date": None} if Path(path).suffix == ".svg" else None)


def draw(directories, path):
    """Draw what the directories' log.jsonl tell: a colour per run; training as lines, validation with the averaged
    weights, and norms of weights, as dashes. Raises ValueError or OSError."""
    figure, panels = new_figure(2, 3, (10, 5))
    for number, directory in enumerate(directories):
        log = Path(directory, "log.jsonl")
        lines = log.read_text(encoding="utf-8").splitlines()
        with errors_name_file(log):
            entries = [json.loads(line) for line in lines]
            for axes, (title, keys) in zip(panels.flat, PANELS.items()):
                for key, style in zip(keys, ("-", "--" if "weight_norm" in keys else "o--")):
                    points = [(entry["iter"], entry[key]) for entry in entries if entry.get(key) is not None]
                    label = (str(directory) if key == "loss" else "") if len(directories) > 1 else key
                    options = dict(color=f"C{number}", markersize=3, linewidth=1, label=label or None)
                    axes.plot(*zip(*points[:: -(-len(points) // MAX_POINTS)]), style, **options) if points else None
                axes.set(title=title, yscale="log" if title in LOGARITHMIC else "linear")
    for axes in panels[1]:
        axes.set_xlabel("step")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path)


def main():
    directories = out_dirs.split(",")
    path = picture or Path(directories[0], "loss.svg")
    draw(directories, path)
    print(f"written to {path}")


if __name__ == "__main__":
    with exit_on_error():
        main()
