"""Lines of a log that say how long the rest will take."""

import pytest

from iqe_jax import progress


def test_time_left_is_told_by_what_was_done_in_this_run(monkeypatch, capsys):
    """Of 100 files 60 were done before: 10 in a minute leave 3 minutes for the other 30."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Meter("Predicting", 100, 60) as meter:
        now[0] = 29
        meter.update(65)
        now[0] = 60
        meter.update(70, "2 skipped")
        now[0] = 89
        meter.update(75)
    assert capsys.readouterr().err.splitlines() == ["Predicting, 2 skipped: 70 of 100, 3 min left"]


@pytest.mark.parametrize("total", [None, 3])
def test_tracking_gives_every_item_once(total):
    assert list(progress.track(iter("abc"), "Letters", total)) == ["a", "b", "c"]
