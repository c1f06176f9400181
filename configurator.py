"""Settings: config files and --key=value, for every script here.

    python train.py config/demo.py --max_iters=20 --out_dir=out-try

A script lists its settings as plain globals, then calls configure(globals()). Arguments apply from left to right: a
config file is Python whose globals are settings (perhaps of other scripts, too); --key=value sets one; --help lists
them. An unknown name, or a value of another type than the default's, ends with one sentence.

A script imports this file first, so that --help is answered before torch loads.
"""

import ast
import difflib
import os
import runpy
import sys
import types
from contextlib import suppress
from pathlib import Path

SCRIPTS = "train data sample eval hf plot contamination diagnose grid bench bench_gpu".split()
SCRIPTS = [f"{name}.py" for name in SCRIPTS]
TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def settings_of(script):
    """{name: source text} of a script's settings: what it assigns before it calls configure(). Never runs it."""
    lines = script.read_text(encoding="utf-8").splitlines()
    found = {}
    for node in ast.parse("\n".join(lines)).body:
        if "configure(" in lines[node.lineno - 1]:
            break
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = "\n".join(lines[node.lineno - 1 : node.end_lineno]).strip()
    return found


def print_help(script):
    """The docstring and the settings of a script."""
    print(ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))), "", *settings_of(script).values(), sep="\n")


def run_config(path):
    """{name: value} of the globals that a config file sets, without imports, functions and _names."""
    if not os.path.isfile(path):
        sys.exit(f"there is no config file {path}" + (f"; did you mean --{path.lstrip('-')}?" if "=" in path else ""))
    try:
        values = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        sys.exit(f"{path}: the config file cannot be read: {type(e).__name__}: {' '.join(str(e).split())}")
    private = (types.ModuleType, types.FunctionType, type)
    return {k: v for k, v in values.items() if not k.startswith("_") and not isinstance(v, private)}


def configure(settings, argv=None):
    """Apply the arguments to `settings`, a script's globals(), in place. Returns {name: value} of its settings.
    Without argv they are the command line's, or none where the file is imported."""
    if argv is None:
        argv = sys.argv[1:] if settings["__name__"] == "__main__" else []
    script = Path(settings["__file__"])
    own = settings_of(script)
    siblings = [script.with_name(name) for name in SCRIPTS if script.with_name(name).exists()]
    everyones = {name for sibling in siblings for name in settings_of(sibling)} | set(own)
    defaults = {key: settings[key] for key in own}
    for arg in argv:
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            if key in own and not equals:
                sys.exit(f"{arg}: write it as --{key}=VALUE.")
            if not isinstance(defaults.get(key), str):
                with suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                    value = ast.literal_eval(value)  # or it stays text
            values, known, hint = {key: value}, own, "--help lists them."
        else:
            values, known, hint = run_config(arg), everyones, "names of your own start with _."
        for key, value in values.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = "another script has it, and config files may." if key in everyones else hint
                hint = f"did you mean '{near[0]}'?" if near else hint
                sys.exit(f"{arg}: there is no setting '{key}'; {hint}")
            default = defaults.get(key)
            if type(default) is float and type(value) is int and abs(value) <= sys.float_info.max:
                value = float(value)
            if default is not None and type(value) is not type(default):
                want = TYPES.get(type(default), f"a {type(default).__name__}")
                sys.exit(f"{arg}: {key} must be {want}, such as {default!r}, and not {value!r}.")
            if key in own:
                settings[key] = value
    return {key: settings[key] for key in own}


# ---- before torch loads ----
script = Path(sys.argv[0]).resolve()
if {"-h", "--help"} & {*sys.argv[1:]} and script.parent == Path(__file__).resolve().parent and script.name in SCRIPTS:
    with suppress(BrokenPipeError):  # --help | head
        print_help(script)
        sys.stdout.flush()
    os._exit(0)
