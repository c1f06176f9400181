"""What the tests share: a tiny model, packed rows, and scripts that run in this process."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # for scripts of their own process

import pytest  # noqa: E402
import torch  # noqa: E402

from model import HRM, IGNORE, HRMConfig  # noqa: E402

torch.set_num_threads(1)
TINY = "--n_layer=2 --n_embd=32 --block_size=256 --batch_size=4 --warmup_iters=5".split()
TINY += "--device=cpu --dtype=float32 --compile=False --sample_prompts=0".split()


def tiny_model(**changes):
    """An HRM of 300 ids with random weights, the same each time."""
    torch.manual_seed(0)
    shape = dict(vocab_size=300, block_size=128, n_layer=4, n_head=2, n_embd=32)
    return HRM(HRMConfig(**{**shape, **changes}))


def documents(*lengths):
    """[(ids, length of the prefix)] of random ids, for (prefix, response) lengths."""
    generator = torch.Generator().manual_seed(1)
    return [(torch.randint(300, (p + r,), generator=generator), p) for p, r in lengths]


def pack(docs, T):
    """Documents in one row (1, T), then padding: idx, targets, doc, prefix as the model takes."""
    idx = torch.zeros(1, T, dtype=torch.long)
    targets = torch.full((1, T), IGNORE)
    doc = torch.full((1, T), -1)
    prefix = torch.zeros(1, T, dtype=torch.bool)
    start = 0
    for number, (ids, n_prefix) in enumerate(docs):
        end = start + len(ids) - 1
        idx[0, start:end] = ids[:-1]
        targets[0, start + n_prefix - 1 : end] = ids[n_prefix:]
        doc[0, start:end] = number
        prefix[0, start : start + n_prefix] = True
        start = end
    return idx, targets, doc, prefix


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    """A small data/problems of the embedded word problems."""
    place = tmp_path_factory.mktemp("problems")
    args = ["--n_problems=300", "--n_val_problems=20", "--workers=1"]
    subprocess.run([sys.executable, ROOT / "data.py", *args], cwd=place, check=True)
    return place / "data"


@pytest.fixture
def place(tmp_path, problems, monkeypatch):
    """The working directory: an empty one, which has data/problems."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "problems").symlink_to(problems / "problems")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(place, monkeypatch, capsys):
    """run("train.py", "--key=value", ...) in this process -> what it prints."""

    def run_script(script, *args):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, args)])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        return capsys.readouterr().out

    return run_script
