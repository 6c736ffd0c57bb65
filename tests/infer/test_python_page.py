"""docs/python.md: its code runs, and answers as it says."""

from pathlib import Path

import pytest

from tests.test_docs import ROOT, blocks


def test_the_code_of_the_page_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    (code,) = blocks(Path(ROOT / "docs/python.md"), "python")
    monkeypatch.chdir(ROOT)
    exec(code, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "elephant" and len(lines) == 4
    assert lines[2] == "['elephant']" and lines[3].count("Likelihood(") == 2
