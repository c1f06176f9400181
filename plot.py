"""The losses of one run, or of several, as a picture (needs matplotlib).

    python plot.py                                       # out/log.jsonl -> out/loss.svg
    python plot.py --out_dirs=out,out-two --picture=both.png
"""

from configurator import configure

import json
from pathlib import Path

from common import errors_name_file, exit_on_error

# ---- settings ----
out_dirs = "out"  # of train.py, with commas between
picture = ""  # an .svg, .png or .pdf file; "": loss.svg in the first of out_dirs
settings = configure(globals())
# ----------------------------------------------------------------------------------------------------


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
    """Draw the training and validation losses in the directories' log.jsonl. Raises ValueError or OSError."""
    figure, [[axes]] = new_figure(1, 1, (7, 2.6))
    for directory in directories:
        log = Path(directory, "log.jsonl")
        lines = log.read_text(encoding="utf-8").splitlines()
        with errors_name_file(log):
            entries = [json.loads(line) for line in lines]
            for key, label, style in ("loss", "training", "-"), ("val_loss", "validation, averaged weights", "o--"):
                points = [(entry["iter"], entry[key]) for entry in entries if entry.get(key) is not None]
                name = f"{directory}: {label}" if len(directories) > 1 else label
                axes.plot(*zip(*points), style, label=name, markersize=4) if points else None
    axes.set(xlabel="step", ylabel="loss per token of the answer", yscale="log")
    axes.legend(frameon=False)
    save_figure(figure, path)


def main():
    directories = out_dirs.split(",")
    path = picture or Path(directories[0], "loss.svg")
    draw(directories, path)
    print(f"written to {path}")


if __name__ == "__main__":
    with exit_on_error():
        main()
