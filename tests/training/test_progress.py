"""Progress output without a terminal."""

import time

from gptjax.training import progress
from gptjax.training.progress import Progress


def test_heartbeat_lines_do_not_suppress_progress_lines(monkeypatch):
    """A run whose steps take longer than the heartbeat interval still prints its loss."""
    monkeypatch.setattr(progress, "SILENCE_S", 0.0)
    lines = []
    with Progress(log=lines.append) as shown, shown.phase("training"):
        time.sleep(1.2)
        shown.status(10, 20, "step 10/20 loss 1.0")
        shown.status(11, 20, "not printed: too soon after the previous line")
    assert lines[0].startswith("... training") and lines[-1] == "step 10/20 loss 1.0"


def test_a_phase_ends_with_its_block(monkeypatch):
    written = []
    with Progress(written.append, lambda line: None) as shown:
        with shown.phase("one"):
            shown.say("inside")
        assert shown._phase == ""
    assert len(written) == 1 and written[0].endswith(" inside\n")


def test_escape_sequences_are_removed_without_a_terminal(capsys):
    kept: list[str] = []
    Progress(kept.append).say("learned: \x1b[32mIn\nFrance\x1b[0m, \x1b[1mbold")
    assert capsys.readouterr().out == "learned: «In\nFrance», bold\n"
    assert kept[0].endswith(" learned: «In\nFrance», bold\n")
