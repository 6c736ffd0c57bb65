"""No text controls the terminal: records, answers, names of files and of the Hub are not trusted."""

import json

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from tinyllava.commands.chat import answer_once
from tinyllava.commands.check_data import check_source
from tinyllava.console import SafeConsole, neutralise, output
from tinyllava.eval.benchmarks import Question
from tinyllava.eval.page import _render_card

ATTACKS = {
    "colour": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;file:///etc/passwd\x1b\\click\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;cm0gLXJmIC8K\x07",
    "clear": "\x1b[2J\x1b[H",
    "C1": "\x9b31mred\x9d0;owned\x9c",
    "device control": "\x90q\x9c\x1bPq\x1b\\",
    "overwrite": "good\rbad\x08\x08\x7f",
    "bidi": "\u202egnp.exe\u2066x\u2069",
    "surrogate": "\ud800x\udfff",
    "bell": "\x07\x00\x0b\x0c",
}
UNSAFE = {*map(chr, range(32)), *map(chr, range(0x7F, 0xA0)), *"\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"}
UNSAFE -= {"\n", "\t"}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("wrap", [str, Text, lambda text: Table(text, title=text)])
def test_no_control_sequence_is_written(name, wrap, tmp_path):
    path = tmp_path / "out.txt"
    with path.open("w", encoding="utf-8") as file:
        SafeConsole(file=file, width=80, color_system=None).print(wrap(ATTACKS[name]), markup=False)
    written = path.read_text(encoding="utf-8")
    assert not UNSAFE & set(written) and "?" in written


def test_our_own_colours_and_bars_stay(tmp_path):
    """On a terminal the console still writes the sequences that are its own."""
    path = tmp_path / "out.txt"
    with path.open("w", encoding="utf-8") as file:
        console = SafeConsole(file=file, width=80, force_terminal=True, color_system="standard")
        console.print(Text("\x1b[5mid", style="red"))
        with Progress(TextColumn("{task.description}"), console=console) as bar:
            bar.add_task("\x1b[5mfile")
    written = path.read_text(encoding="utf-8")
    assert "\x1b[31m?[5mid\x1b[0m" in written and "?[5mfil" in written and "\x1b[?25l" in written
    assert "\x1b[5m" not in written


def test_ordinary_text_stays():
    text = "naïve — 猫 😀👨‍👩‍👧 עברית‏ العربية\n\tx"
    assert neutralise(text) == text
    assert isinstance(output, Console)


def test_the_check_of_hostile_records(pictures, tmp_path):
    """The id of a record is neither a control sequence nor markup: `[link=...]` would be a link, `[/]` an error."""
    records = json.loads((pictures / "captions.json").read_text())[:4]
    for record, identity in zip(
        records, ["\x1b[2Jx", "[/]", "[link=file:///etc/passwd]x[/link]", "\u202eid"], strict=True
    ):
        record |= {"id": identity, "image": f"\x1b]0;{identity}\x07.png"}
    path = tmp_path / "\x1b[31mdata.json"
    path.write_text(json.dumps(records))
    with (tmp_path / "out.txt").open("w", encoding="utf-8") as file:
        SafeConsole(file=file, width=400, color_system=None).print(
            check_source(str(path), [str(pictures)]).make_table()
        )
    written = (tmp_path / "out.txt").read_text(encoding="utf-8")
    assert not UNSAFE & set(written) and "?[2Jx" in written and "[/]" in written and "?id" in written


def test_html_pages_escape_questions_and_answers():
    question = Question("1", 1, "<script>alert(1)</script>", (), "<b>no</b>", "<i>cat</i>", ())
    html = _render_card(question, {"score": 0.0}, "<img src=x onerror=alert(1)>")
    assert all(text not in html for text in ("<script>", "<img", "<i>", "<b>")) and "&lt;script&gt;" in html


class Speaker:
    """A session that answers with given pieces."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def stream(self, *_, **__):
        return iter(self.pieces)


def test_an_answer_is_printed_as_it_is(capsys):
    """No markup, no emoji of a name, no spaces for tabs, no lost ends of lines."""
    pieces = ["a\tb", "\tc :smile: [bold]x[/bold] [/x]", " עברית‏ مرحبا‌ب 👨‍👩‍👧\n", "汉字　\u00a0x \\", "y" * 300, "  "]
    answer_once(Speaker(*pieces), "", [])
    assert capsys.readouterr().out == "".join(pieces) + "\n"
    answer_once(Speaker("\x1b", "[31mred\x1b", "]0;owned", "\x07"), "", [])
    assert capsys.readouterr().out == "?[31mred?]0;owned?\n"
