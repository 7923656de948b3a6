"""Foreign text is shown as one line that no terminal obeys and no reader takes for another line."""

import pytest

from dicode_jax.errors import Faults, UserError, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, été, 猫 and 🎬", "plain, été, 猫 and 🎬"),
        ("\x1b]0;mine\x07\x1b[2J", r"\x1b]0;mine\x07\x1b[2J"),
        ("a\nbroken      0\r\nb\u2028c", "a broken      0 b c"),
        ("\u202egpj.exe", r"\u202egpj.exe"),
        ("half \udcff", r"half \udcff"),
        ("\x9b31m", r"\x9b31m"),
        ("tab\there\u00a0and\u3000there", "tab here and there"),
        ("می\u200cخواهم 👩\u200d🚀", "می\u200cخواهم 👩\u200d🚀"),
        (b"\x1b".decode(), r"\x1b"),
        (["a\x1b"], r"['a\x1b']"),
    ],
)
def test_what_a_terminal_would_obey_is_spelt_out(text, shown):
    assert printable(text) == shown


def test_a_long_text_loses_its_middle():
    shown = printable("a" * 1000 + "b" * 1000, 40)
    assert shown == "a" * 30 + " [... 1960 characters ...] " + "b" * 10
    assert printable("a" * 40, 40) == "a" * 40


def test_every_message_of_an_error_is_printable_and_has_an_end():
    error = UserError("no \x1b[2J\nhere", "x" * 50_000_000)
    assert str(error).startswith("no \\x1b[2J here\n  xxx")
    assert len(str(error)) < 2100
    faults = Faults()
    with faults.gather():
        raise ValueError("key \x1b[2J")
    with pytest.raises(UserError) as caught:
        faults.tell()
    assert str(caught.value) == r"key \x1b[2J"


def test_steps_go_on_behind_a_mistake_and_earlier_mistakes_come_last():
    def refuse(value):
        raise UserError(f"no {value}")

    assert Faults().through(1, lambda x: x + 1, lambda x: 2 * x) == 4
    faults = Faults()
    faults.lines.append("known")
    with pytest.raises(UserError) as told:
        faults.through(1, refuse, lambda x: x + 1, refuse)
    assert faults.lines == ["no 1", "no 2", "known"]
    assert "3 things to mend" in str(told.value)
