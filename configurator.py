"""
Settings: config files and --key=value, for every script here.

    python train.py config/demo.py --max_iters=20 --out_dir=out-try

A script lists its settings as plain globals, then calls configure(globals()). Arguments apply from
left to right: a config file is Python whose globals are settings; --key=value sets one; --help lists
them. Unlike nanoGPT's, this configurator refuses what it does not know: a name that is no setting, or
a value of another type than the default's, ends the script with one sentence. One config file serves
several scripts (data.py and train.py, say), so it may also name settings of the others.
"""

import ast
import difflib
import runpy
import sys
import types
from pathlib import Path

SCRIPTS = ("train.py", "data.py", "sample.py", "eval.py", "model.py", "bench.py")
TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def settings_of(script):
    """{name: source text} of a script's settings: what it assigns before it calls configure(). Reads, never runs it."""
    lines = script.read_text(encoding="utf-8").splitlines()
    body = ast.parse("\n".join(lines)).body
    if isinstance(body[-1], ast.If) and "__name__" in ast.dump(body[-1].test):  # a module that is a script too
        body = body[-1].body
    found = {}
    for node in body:
        if "configure(" in lines[node.lineno - 1]:
            break
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = "\n".join(lines[node.lineno - 1 : node.end_lineno]).strip()
    return found


def run_config(path):
    """{name: value} of the globals that a config file sets (imports, functions and _names are its own business)."""
    if not Path(path).is_file():
        sys.exit(f"there is no config file {path}" + (f"; did you mean --{path}?" if "=" in path else ""))
    try:
        values = runpy.run_path(path)
    except (Exception, SystemExit) as e:
        sys.exit(f"{path}: the config file cannot be read: {type(e).__name__}: {' '.join(str(e).split())}")
    private = (types.ModuleType, types.FunctionType, type)
    return {k: v for k, v in values.items() if not k.startswith("_") and not isinstance(v, private)}


def parse(text, default):
    """The value that --key=text stands for: text as it is where the default is text, else a Python literal."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text  # right where the default is None; elsewhere checked() refuses it


def checked(where, key, value, default):
    """The value if it has the default's type; any will do if the default is None, and a whole number as a float."""
    if default is None or type(value) is type(default):
        return value
    if type(default) is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    want = TYPES.get(type(default), f"a {type(default).__name__}")
    sys.exit(f"{where}: {key} must be {want}, such as {default!r}, and not {value!r}.")


def refuse(where, key, known):
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else "--help lists them."
    own_names = "" if where.startswith("--") else " (Names of your own start with _.)"
    sys.exit(f"{where}: there is no setting '{key}'; {hint}{own_names}")


def configure(settings, argv=None):
    """
    Apply the arguments (default: the command line's) to `settings`, a script's globals(), in place.
    Returns {name: value} of the script's settings. Exits with one sentence on an unknown name or a wrong type.
    """
    script = Path(settings["__file__"])
    own = settings_of(script)
    siblings = [script.with_name(name) for name in SCRIPTS if script.with_name(name).exists()]
    everyones = {name for sibling in siblings for name in settings_of(sibling)} | set(own)
    defaults = {key: settings[key] for key in own}
    for arg in sys.argv[1:] if argv is None else argv:
        if arg in ("-h", "--help"):
            print(settings["__doc__"].strip(), "", *own.values(), sep="\n")
            sys.exit(0)
        elif arg.startswith("--"):
            key, equals, text = arg[2:].partition("=")
            if key not in own:
                refuse(arg, key, own)
            if not equals:
                sys.exit(f"{arg}: write it as --{key}=VALUE.")
            settings[key] = checked(arg, key, parse(text, defaults[key]), defaults[key])
        else:
            for key, value in run_config(arg).items():
                if key not in everyones:
                    refuse(arg, key, everyones)
                if key in own:
                    settings[key] = checked(arg, key, value, defaults[key])
    return {key: settings[key] for key in own}
