"""Lag in seconds: from where the sources ended, never from a record's timestamp."""

from aiokafka import TopicPartition

from streams.engine.lag import Lag

CALLS, RESULTS = TopicPartition("calls", 0), TopicPartition("results", 0)


def test_who_has_booked_everything_has_no_lag() -> None:
    lag = Lag(level_at=0.0)
    assert lag.seconds(90.0) == 90.0
    lag.look(100.0, {CALLS: 7, RESULTS: 0}, {CALLS: 7, RESULTS: 0})
    assert lag.seconds(100.5) == 0.5


def test_a_shard_that_keeps_pace_has_a_small_lag_though_something_always_waits() -> None:
    lag = Lag(level_at=0.0)
    for second in range(300):
        lag.look(float(second), {CALLS: 1_000 * second - 10}, {CALLS: 1_000 * second})
        assert lag.seconds(float(second)) <= 2


def test_a_shard_that_falls_behind_is_told_by_how_much() -> None:
    lag = Lag(level_at=0.0)
    # A thousand records come each second, and half of them are booked.
    for second in range(200):
        lag.look(float(second), {CALLS: 500 * second}, {CALLS: 1_000 * second})
    assert 90 <= lag.seconds(199.0) <= 200


def test_one_source_that_stands_is_enough() -> None:
    lag = Lag(level_at=0.0)
    for second in range(100):
        lag.look(float(second), {CALLS: second, RESULTS: 3}, {CALLS: second, RESULTS: 4})
    assert lag.seconds(99.0) == 99.0
    lag.look(100.0, {CALLS: 100, RESULTS: 4}, {CALLS: 100, RESULTS: 4})
    assert lag.seconds(100.0) == 0.0


def test_a_mark_that_is_passed_makes_level_with_when_it_was_made() -> None:
    lag = Lag(level_at=0.0)
    lag.look(10.0, {CALLS: 0}, {CALLS: 100})
    lag.look(20.0, {CALLS: 99}, {CALLS: 200})
    assert lag.seconds(20.0) == 20.0
    lag.look(30.0, {CALLS: 100}, {CALLS: 300})
    assert lag.seconds(30.0) == 20.0
