"""The simulation of large runs: known answers, and what must hold whatever the numbers are."""

from __future__ import annotations

import pytest

from ttt_lib.runs.simulate import Costs, simulate

EVEN = Costs(image=10.0, spread=0.0, start=0.0, scheduler=0.0)


def test_without_chance_the_time_is_known():
    found = simulate(96, 4, 8, EVEN)
    assert found["hours"] * 3600 == pytest.approx(120.0)  # 24 jobs of 40 s on 8 workers
    assert (found["busy"], found["tail"], found["restarts"], found["jobs"]) == (pytest.approx(1.0), 0.0, 0, 24)
    one_more = simulate(97, 4, 8, EVEN)  # a job of one image more: one worker is busy 10 s longer
    assert one_more["hours"] * 3600 == pytest.approx(130.0) and one_more["tail"] * 60 == pytest.approx(10.0)
    begun = simulate(96, 4, 8, Costs(image=10.0, spread=0.0, start=5.0, scheduler=0.0))
    assert begun["hours"] * 3600 == pytest.approx(135.0) and begun["busy"] == pytest.approx(40 / 45)


def test_a_slow_scheduler_is_what_limits():
    found = simulate(800, 1, 100, Costs(image=10.0, spread=0.0, start=0.0, scheduler=1.0))
    assert found["scheduler"] == pytest.approx(1.0, abs=0.02)
    assert found["hours"] * 3600 == pytest.approx(810.0)  # the last is asked for after 800 s


def test_deaths_lose_work_and_small_jobs_lose_less():
    mortal = Costs(image=10.0, lifetime=1.0, start=20.0)
    small, large = (simulate(4000, shard, 8, mortal, seed=1) for shard in (10, 100))
    never = simulate(4000, 10, 8, Costs(image=10.0, start=20.0), seed=1)
    assert min(large["restarts"], small["restarts"]) > 3 and large["lost"] > 2 * small["lost"] > 0
    assert never["lost"] == never["restarts"] == 0 and small["hours"] > never["hours"]
    assert small["gigabytes"] == pytest.approx(4000 * 4.6e-3 + (400 + small["restarts"]) * 5e-6)
    assert simulate(4000, 10, 8, mortal, seed=1) == small
