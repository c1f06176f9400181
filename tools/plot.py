"""
Draw what a run has logged, or several (needs matplotlib).

$ python -m tools.plot                                            # out/log.jsonl -> out/loss.svg
$ python -m tools.plot --out_dirs=out,out-two --picture=both.png  # a colour for each

Circles are of the validation set, with the averaged weights.
"""

from configurator import configure

import json
import sys
from pathlib import Path

# -----------------------------------------------------------------------------
out_dirs = "out"  # of train.py, with commas between
picture = ""  # an .svg, .png or .pdf file; "": loss.svg in the first of out_dirs
max_points = 500  # of a line: an .svg keeps all that it is given
configure(globals())
# -----------------------------------------------------------------------------

PANELS = {  # title: keys of the log
    "loss": ("loss", "val_loss"),
    "token accuracy": ("accuracy", "val_accuracy"),
    "norm of the gradient": ("grad_norm",),
    "learning rate": ("lr",),
    "bp_steps": ("bp_steps",),
    "tokens per second": ("tokens_per_sec",),
}


def draw_run(panels, label, entries, color):
    for axes, (title, keys) in zip(panels, PANELS.items()):
        axes.set_title(title)
        for key in keys:
            points = [(e["iter"], e[key]) for e in entries if e.get(key) is not None]
            if not points:
                continue
            points = points[:: -(-len(points) // max_points)]
            form = "o--" if key.startswith("val") else "-"
            axes.plot(*zip(*points), form, color=color, label=f"{label}, {key}", linewidth=1)


def main():
    try:
        from matplotlib.figure import Figure  # pyplot would look for a screen
    except ImportError:
        sys.exit("pictures need matplotlib: pip install matplotlib")
    figure = Figure(figsize=(11, 6), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    directories = out_dirs.split(",")
    for i, directory in enumerate(directories):
        log = Path(directory, "log.jsonl")
        if not log.exists():
            sys.exit(f"there is no {log}: python train.py --out_dir={directory} writes it")
        entries = [json.loads(line) for line in log.read_text().splitlines()]
        draw_run(panels, directory, entries, f"C{i}")
    for axes in panels[0], panels[2]:
        axes.set_yscale("log")
    panels[4].set_xlabel("step")
    panels[1].legend(frameon=False)
    path = picture or Path(directories[0], "loss.svg")
    figure.savefig(path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
