"""What messages say."""

from __future__ import annotations

from tamba.errors import UserError, nearest


def test_a_message_is_one_line() -> None:
    error = UserError("here", "two\nlines", "do\n that")
    assert str(error) == "here: two lines; do that"
    assert str(UserError("here", "wrong")) == "here: wrong"


def test_nearest_names_one_or_a_few() -> None:
    known = [f"name_{letter}" for letter in "abcdefghijkl"]
    assert nearest("nam_c", known) == "did you mean 'name_c'?"
    assert nearest("xyz", known[:9]) == "known: " + ", ".join(known[:9])
    assert nearest("xyz", known) == "known: " + ", ".join(known[:8]) + " and 4 more"
