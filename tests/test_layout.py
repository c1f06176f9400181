"""The rooms of the program: which may look into which, and that to enter one does nothing."""

import ast
import shutil
import subprocess
import sys
from importlib.machinery import all_suffixes

from scripts import ENV, ROOT, TINY, run

ROOMS = "configurator common devices attention model optim tokenizer generate hf ranks checkpoint report plot".split()
ROOMS += "sources puzzles mixture workers loader look data scorers tasks train sample evaluate results".split()
ROOMS += "contamination sweep eval diagnose grid bench".split()
ROOMS += "checks isolate bench_gpu lm_eval_hrm".split()  # the last needs an extra
UPWARDS = {"model": {"checkpoint", "generate"}}  # within a function: HRM.from_pretrained() and HRM.generate()
EXTRAS = "datasets tiktoken safetensors transformers tokenizers rustbpe wandb math_verify lm_eval reasoning_gym".split()


def project_imports(nodes):
    """The rooms that import statements among these nodes name."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & {*ROOMS}


def test_imports_go_downwards():
    assert {path.stem for path in ROOT.glob("*.py")} == {*ROOMS}
    for i, room in enumerate(ROOMS):
        text = (ROOT / f"{room}.py").read_text(encoding="utf-8")
        tree = ast.parse(text)
        assert project_imports(tree.body) <= {*ROOMS[:i]}, room
        assert project_imports(ast.walk(tree)) <= {*ROOMS[:i]} - {"data"} | UPWARDS.get(room, set()), room


def test_a_package_in_data_is_never_run(tmp_path):
    """data/ is where archives are unpacked, and `import data` would prefer a package there to data.py."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "data").mkdir()
    for suffix in all_suffixes():
        (tmp_path / "data" / f"__init__{suffix}").write_text("raise SystemExit('a file in data/ was run')")
    run(tmp_path, tmp_path / "train.py", *TINY, "--max_iters=1")  # which makes data/problems, too


def test_importing_does_nothing():
    """It reads no argument, starts no device, and needs no library that only some uses need. data.py needs no torch."""
    code = f"""
import sys
sys.argv = ["x", "--nonsense=1"]
import data, plot
assert "torch" not in sys.modules
import {", ".join(ROOMS[:-1])}
import torch
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
print(*sys.modules)
"""
    env = {**ENV, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {*EXTRAS}.isdisjoint(done.stdout.split())
