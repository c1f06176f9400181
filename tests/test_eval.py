"""Reading answers out of texts."""

import pytest

from tasks import extract, same_number, to_number


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
def test_answers(text, number):
    assert to_number(extract(text)) == number
    assert same_number(text, f"So it is\n#### {number}") == ("invalid" if number is None else "right")
    assert same_number(text, "#### 5") == ("invalid" if number is None else "wrong")
