"""Settings apply from left to right; what is wrong ends with one sentence."""

import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = """
from configurator import configure

name = "a"  # text
size = 3  # a number
rate = 0.5
on = True
rules = []
settings = configure(globals())
later = 1
print(settings)
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script above, run in this process with arguments -> its settings."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    (tmp_path / "two.py").write_text("import re\n_own = 2\nsize = 3 * _own\nmax_iters = 7\n")

    def run(*args):
        monkeypatch.setattr(sys, "argv", [str(path), *args])
        space = {"__name__": "__main__", "__file__": str(path)}
        exec(SCRIPT, space)
        return space["settings"]

    monkeypatch.chdir(tmp_path)
    return run


def test_arguments_apply_from_left_to_right(script):
    assert script() == dict(name="a", size=3, rate=0.5, on=True, rules=[])
    assert script("two.py", "--size=9")["size"] == 9
    assert script("--size=9", "two.py")["size"] == 6
    changed = script("--rate=2", "--on=False", "--name=1", "--rules=[dict()]".replace("dict()", "{}"))
    assert changed == dict(name="1", size=3, rate=2.0, on=False, rules=[{}])


def test_a_tilde_is_the_home_directory(script, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert script("--name=~/data")["name"] == "/home/me/data"


WRONG = {
    "--sise=2": "there is no setting size".replace("size", "sise") + "; did you mean size?",
    "--size=2.5": "size must be a whole number, such as 3, not 2.5",
    "--size=x": "size must be a whole number, such as 3, not 'x'",
    "--on=1": "on must be True or False",
    "--on": "write it as --on=VALUE",
    "--later=2": "there is no setting later",
    "none.py": "there is no config file none.py",
    "bad.py": "bad.py: the config file cannot be read: ZeroDivisionError",
    "unknown.py": "there is no setting sizes; did you mean size?",
}


@pytest.mark.parametrize("arg", WRONG)
def test_what_is_wrong_ends_with_a_sentence(script, arg, tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0")
    (tmp_path / "unknown.py").write_text("sizes = 1")
    with pytest.raises(SystemExit, match=WRONG[arg].replace("?", r"\?")):
        script(arg)


def test_help_lists_the_settings_before_torch_loads():
    code = "import sys; sys.modules['torch'] = None; import runpy; runpy.run_path('train.py')"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = ['train.py', '--help']; {code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "learning_rate = 1e-3" in done.stdout and "Pretrain or fine-tune" in done.stdout


def test_any_terminal_can_be_printed_to():
    code = "import configurator; print('\u2713')"
    env = {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert done.stdout == b"\\u2713\n"
