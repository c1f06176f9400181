"""Settings: what is accepted, and the sentence that ends everything else."""

from configurator import SCRIPTS, configure, settings_of

import subprocess
import sys

import pytest
from scripts import ENV, ROOT

SCRIPT = '''"""A script."""
rate = 1e-3
steps = 10  # a comment
name = "x"
flag = False
sizes = (1, 2)
options = {}
anything = None
result = configure(globals())
after = 1
'''


@pytest.fixture
def run(tmp_path):
    """run(*arguments) -> the settings of a script with these arguments; config.py is at run.config."""

    def run(*argv):
        path = tmp_path / "train.py"
        path.write_text(SCRIPT)
        scope = {"configure": lambda settings: configure(settings, argv), "__file__": str(path)}
        exec(SCRIPT, scope)
        return scope["result"]

    (tmp_path / "eval.py").write_text("limit = 0\nconfigure(globals())\n")
    run.config = tmp_path / "config.py"
    return run


def test_values_of_every_type(run):
    argv = ["--rate=3e-4", "--steps=7", "--name=a=b c", "--flag=True", "--sizes=(3, 4)"]
    argv += ["--options={'a': 1}", "--anything=None"]
    want = dict(rate=3e-4, steps=7, name="a=b c", flag=True, sizes=(3, 4), options={"a": 1}, anything=None)
    assert run(*argv) == want
    assert run("--rate=2", "--name=5", "--anything=cpu")["rate"] == 2.0
    assert run("--name=5")["name"] == "5" and run("--anything=cpu")["anything"] == "cpu"


def test_files_and_arguments_apply_from_left_to_right(run):
    run.config.write_text(
        "import math\nsteps = 2 * 50\nname = 'file'\n_private = 1\nlimit = 3  # of a sibling script\n"
    )
    assert run(str(run.config), "--steps=7") == run() | dict(steps=7, name="file")
    assert run("--steps=7", str(run.config))["steps"] == 100


@pytest.mark.parametrize(
    "argument, sentence",
    [
        ("--stesp=3", "did you mean 'steps'"),
        ("--qqqqqq=3", "no setting 'qqqqqq'"),
        ("--steps=3.5", "steps must be a whole number"),
        ("--steps=many", "steps must be a whole number"),
        ("--rate=fast", "rate must be a number"),
        ("--flag=1", "flag must be True or False"),
        ("--flag=yes", "flag must be True or False"),
        ("--steps=True", "steps must be a whole number"),
        ("--steps=None", "steps must be a whole number"),
        ("--sizes=3", "sizes must be a tuple"),
        ("--steps", "--steps=VALUE"),
        ("--limit=3", "no setting 'limit'"),
        ("--after=3", "no setting 'after'"),
        ("missing.py", "missing.py"),
    ],
)
def test_what_cannot_be_meant_ends_with_a_sentence(run, argument, sentence):
    with pytest.raises(SystemExit) as end:
        run(argument)
    assert sentence in end.value.code and "\n" not in end.value.code


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("stesp = 3", "did you mean 'steps'"),
        ("steps = 'a'", "steps must be a whole number"),
        ("steps = ", "cannot be read"),
    ],
)
def test_config_files_are_held_to_the_same(run, text, sentence):
    run.config.write_text(text)
    with pytest.raises(SystemExit) as end:
        run(str(run.config))
    assert sentence in end.value.code and "config.py" in end.value.code


def test_every_config_file_names_settings_that_exist():
    for script in ("train.py", "data.py", "sample.py", "eval.py"):
        assert len(settings_of(ROOT / script)) > 10
    for config in sorted((ROOT / "config").glob("*.py")):
        scope = {"__file__": str(ROOT / "train.py"), "__doc__": ""}
        for line in settings_of(ROOT / "train.py").values():
            exec(line, scope)
        configure(scope, [str(config)])


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_the_settings_and_is_quick(script, tmp_path):
    """It imports neither torch nor numpy."""
    for name in "torch.py", "numpy.py":
        (tmp_path / name).write_text("raise SystemExit(1)")
    start, env = [sys.executable, ROOT / script, "--help"], {**ENV, "PYTHONPATH": str(tmp_path)}
    shown = subprocess.run(start, env=env, capture_output=True, text=True, check=True).stdout
    assert all(line in shown for line in settings_of(ROOT / script).values()) and f"python {script}" in shown
