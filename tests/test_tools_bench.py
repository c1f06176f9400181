"""tools/bench.py on a tiny model."""

import json
import math
import runpy
import sys

from conftest import ROOT

TINY = "--rounds=1 --n_layer=2 --n_head=2 --n_embd=32 --vocab_size=300 --block_size=256".split()
TINY += "--batch_size=2 --micro_batch_size=1 --peer_batches=(4,) --max_new_tokens=2".split()
TINY += "--device=cpu --dtype=float32 --compile=False".split()


def bench(place, monkeypatch, *args):
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["bench.py", *TINY, *args])
    runpy.run_path(str(ROOT / "tools/bench.py"), run_name="__main__")
    content = json.loads((place / "bench.json").read_text())
    return {title: table for title, table in content.items() if ", " in title}


def test_all_parts_measure_positive_rates(tmp_path, monkeypatch):
    tables = bench(tmp_path, monkeypatch)
    names = " ".join(tables)
    for part in "training", "decoding 1 prompts", "decoding 64 prompts", "tokenizing", "products":
        assert part in names
    for table in tables.values():
        assert all(0 < rate < math.inf for rate in table.values())
        assert "ours" in table or len(table) == 4  # weights of a block


def test_a_part_that_fails_costs_no_other(tmp_path, monkeypatch, capsys):
    tables = bench(tmp_path, monkeypatch, "--parts=data,products", f"--tokenizer={tmp_path}")
    assert list(tables) == ["products, GFLOP/s"]
    assert "data fails: SystemExit" in capsys.readouterr().out
