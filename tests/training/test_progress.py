"""What a person sees where there is no terminal."""

import time

from gptjax.training import progress
from gptjax.training.progress import Progress


def test_signs_of_life_do_not_displace_what_the_run_says(monkeypatch):
    """A run whose steps are slower than the heartbeat still says its loss."""
    monkeypatch.setattr(progress, "SILENCE_S", 0.0)
    lines = []
    with Progress(log=lines.append) as shown, shown.phase("training"):
        time.sleep(1.2)
        shown.status(10, 20, "step 10/20 loss 1.0")
        shown.status(11, 20, "too soon after the last")
    assert lines[0].startswith("... training") and lines[-1] == "step 10/20 loss 1.0"


def test_phases_end(monkeypatch):
    written = []
    with Progress(written.append, lambda line: None) as shown:
        with shown.phase("one"):
            shown.say("inside")
        assert shown._phase == ""
    assert len(written) == 1 and written[0].endswith(" inside\n")


def test_escape_sequences_are_for_terminals(capsys):
    kept: list[str] = []
    Progress(kept.append).say("learned: \x1b[32mIn\nFrance\x1b[0m, \x1b[1mbold")
    assert capsys.readouterr().out == "learned: «In\nFrance», bold\n"
    assert kept[0].endswith(" learned: «In\nFrance», bold\n")
