"""Reading answers out of texts. eval.py is a script, so its functions are taken from its source."""

import ast

import pytest
from scripts import ROOT


@pytest.fixture(scope="module")
def functions():
    tree = ast.parse((ROOT / "eval.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", "") in ("extract", "to_number")]
    scope = {}
    exec(compile(tree, "eval.py", "exec"), scope)
    return lambda text: scope["to_number"](scope["extract"](text))


@pytest.mark.parametrize(
    "text, number",
    [
        ("so \\boxed{72}.", 72),
        ("\\boxed{1} and then \\boxed{1,234}", 1234),
        ("\\boxed{\\text{5}}", None),
        ("\\boxed{ $18 }", 18),
        ("\\boxed{3", None),
        ("2+2=4\n#### 4", 4),
        ("#### 1\n#### -2,000", -2000),
        ("18", 18),
        ("$18.00", 18),
        ("-7", -7),
        ("eighteen", None),
        ("", None),
        ("#### ", None),
        ("inf", None),
        ("nan", None),
        ("2+2=4", None),
    ],
)
def test_answers(functions, text, number):
    assert functions(text) == number
