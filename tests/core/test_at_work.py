"""What takes long shows that it lives, and nothing else is changed by it."""

from __future__ import annotations

import time

import pytest

from ttt_lib.core import at_work as module
from ttt_lib.core.at_work import at_work


def test_the_time_is_counted_while_something_works_and_nothing_is_left(capsys, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.01)
    with pytest.raises(KeyError), at_work("comparing", disabled=False):  # what is raised comes through
        time.sleep(0.3)
        raise KeyError
    shown = capsys.readouterr().err
    assert shown.count("comparing: 00:00") > 3 and shown.endswith("\r") and "\n" not in shown


def test_a_log_is_not_filled(capsys):
    with at_work("comparing"):
        pass
    assert capsys.readouterr().err == ""
