"""
Settings: config files and --key=value, for every script here.

$ python train.py config/demo.py --max_iters=20 --out_dir=out-try
$ python train.py --help

A script lists its settings as plain globals, then calls configure(globals()). Arguments apply
from left to right: a config file is Python whose globals are settings, perhaps of other scripts
too; --key=value sets one. An unknown name, or a value of another type than the default's, ends
with one sentence. Scripts import this file first, so --help is answered before torch loads.
"""

import ast
import difflib
import os
import runpy
import sys
import types
from pathlib import Path

TYPES = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}

for stream in sys.stdout, sys.stderr:
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")  # a terminal may not know a character


def settings_of(script):
    """{name: source text} of what a script assigns before it calls configure(). Never runs it."""
    lines = Path(script).read_text(encoding="utf-8").splitlines()
    found = {}
    for node in ast.parse("\n".join(lines)).body:
        if "configure(" in lines[node.lineno - 1]:
            return found
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            found[node.targets[0].id] = text
    return {}  # no script


def settings_of_all():
    """The names of the settings of all scripts: a config file may have them."""
    here = Path(__file__).parent
    names = set()
    for path in [*here.glob("*.py"), *here.glob("tools/*.py")]:
        names |= set(settings_of(path))
    return names


def run_config(path):
    """{name: value} of the globals of a config file, without imports, functions and _names."""
    if not os.path.isfile(path):
        sys.exit(f"there is no config file {path}; a setting is written --key=value")
    try:
        values = runpy.run_path(path)
    except Exception as error:
        sys.exit(f"{path}: the config file cannot be read: {type(error).__name__}: {error}")
    private = types.ModuleType, types.FunctionType, type
    return {
        key: value
        for key, value in values.items()
        if not key.startswith("_") and not isinstance(value, private)
    }


def read_argument(arg, own, defaults):
    """{name: value} of one argument of the command line."""
    if not arg.startswith("--"):
        return run_config(arg)
    key, equals, value = arg[2:].partition("=")
    if key in own and not equals:
        sys.exit(f"{arg}: write it as --{key}=VALUE")
    if not isinstance(defaults.get(key), str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # it stays text, and is refused if the default is none
    return {key: value}


def configure(settings):
    """
    Apply the command line to `settings`, a script's globals(), in place, if the script is run
    and not imported. Returns {name: value} of its settings.
    """
    own = settings_of(settings["__file__"])
    defaults = {key: settings[key] for key in own}
    for arg in sys.argv[1:] if settings["__name__"] == "__main__" else []:
        known = own if arg.startswith("--") else {*own, *settings_of_all()}
        for key, value in read_argument(arg, own, defaults).items():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]}?" if near else "--help lists them"
                sys.exit(f"{arg}: there is no setting {key}; {hint}")
            if key not in own:
                continue  # of another script
            want = type(defaults[key])
            if want is float and type(value) is int:
                value = float(value)
            if want is not type(None) and type(value) is not want:
                kind = TYPES.get(want, f"a {want.__name__}")
                sys.exit(f"{arg}: {key} must be {kind}, such as {defaults[key]!r}, not {value!r}")
            if want is str and value.startswith("~/"):
                value = os.path.expanduser(value)  # the shell leaves it in --key=~/path
            settings[key] = value
    return {key: settings[key] for key in own}


if {"-h", "--help"} & set(sys.argv[1:]):
    script = Path(sys.argv[0])
    if script.suffix == ".py" and settings_of(script):
        text = script.read_text(encoding="utf-8")
        first = next(iter(settings_of(script).values()))
        print(ast.get_docstring(ast.parse(text)), end="\n\n")
        print(text[text.index(first) : text.index("configure(globals")].rpartition("\n")[0])
        sys.exit()
