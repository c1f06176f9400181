"""
The picture in the README, from the log of a run: python docs/plot.py out docs/demo.svg (needs matplotlib)
"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

entries = [json.loads(line) for line in Path(sys.argv[1], "log.jsonl").read_text().splitlines()]
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
for key, label, style in ("loss", "training", "-"), ("val_loss", "validation, averaged weights", "o--"):
    steps, losses = zip(*((e["iter"], e[key]) for e in entries if key in e))
    axes.plot(steps, losses, style, label=label, markersize=4)
axes.set(xlabel="step", ylabel="loss per byte of the answer", yscale="log")
axes.legend(frameon=False)
axes.spines[["top", "right"]].set_visible(False)
figure.savefig(sys.argv[2], metadata={"Date": None})
