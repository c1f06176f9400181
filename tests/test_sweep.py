"""One setting at several values."""

import json

import pytest
from scripts import TINY, run

from sweep import run_sweep


def test_each_value_has_its_own_evaluation_and_column(tmp_path, capsys):
    asked = []

    def evaluate(**changes):
        asked.append(changes)
        return {"quiz": {"accuracy": 0.5 + changes["guidance"] / 10}, "other": {"accuracy": 1 / 3}}

    run_sweep("guidance=-.5,0,1e0,0.0", tmp_path, evaluate)
    names = {f"guidance={text}": value for text, value in (("-0.5", -0.5), ("0", 0.0), ("1", 1.0))}
    assert asked == [{"guidance": value, "out_dir": str(tmp_path / name)} for name, value in names.items()]
    table = "| task | guidance = -0.5 | guidance = 0 | guidance = 1 |\n| --- | ---: | ---: | ---: |\n"
    table += "| quiz | 45.00% | 50.00% | 60.00% |\n| other | 33.33% | 33.33% | 33.33% |\n"
    assert table in capsys.readouterr().out and (tmp_path / "sweep.md").read_text() == table
    results = json.loads((tmp_path / "sweep.json").read_text())["guidance"]
    assert results.keys() == {"-0.5", "0", "1"} and results["1"]["quiz"] == {"accuracy": 0.6}


WRONG = ["guidance", "guidance=", "=1", "depth=1", "H_cycles=1.5", "L_cycles=2;3", "guidance=0,,1"]


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_sweep_ends_with_a_sentence(wrong):
    with pytest.raises(ValueError, match="--sweep is one of guidance, H_cycles, L_cycles, kl_threshold, then ="):
        run_sweep(wrong, "out", None)


def test_the_model_runs_at_each_depth(workplace):
    run(workplace, "train.py", *TINY, "--max_iters=2")
    args = "--tasks=problems --limit=3 --max_new_tokens=4 --dtype=float32 --device=cpu".split()
    said = run(workplace, "eval.py", *args, "--sweep=H_cycles=1,2,3").stdout
    for n in 1, 2, 3:
        settings = json.loads((workplace / "out" / f"H_cycles={n}" / "eval.json").read_text())["settings"]
        assert (settings["H_cycles"], settings["init_from"]) == (n, "out")
        assert (f"condition: cot; H_cycles {n}, L_cycles 3" in said) == (n != 2)  # as trained
    assert "| task | H_cycles = 1 | H_cycles = 2 | H_cycles = 3 |" in said
    again = run(workplace, "eval.py", *args, "--sweep=H_cycles=1,2,3,4").stdout
    assert again.count("3 answers are kept from an earlier run, 0 are left to do") == 3


def test_adaptive_depth_is_a_curve(workplace):
    run(workplace, "train.py", *TINY, "--max_iters=2")
    args = "--tasks=heldout --limit=4 --max_new_tokens=4 --dtype=float32 --device=cpu --H_cycles=3".split()
    said = run(workplace, "eval.py", *args, "--sweep=kl_threshold=0,1e-9,1e9", PLOTS="1").stdout
    assert "| heldout depth | 100.00% | 100.00% | 66.67% |\n| heldout tokens/s |" in said
    assert "kl_threshold = 1e-09" in said and (workplace / "out" / "sweep.svg").stat().st_size > 1000
