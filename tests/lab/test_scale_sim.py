"""`copyspec bench scale-sim`: what is simulated is what probability says, and slots keep their conversations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from copyspec_engine.cli.main import app
from copyspec_engine.lab.bench.command import ScaleSimOptions
from copyspec_engine.lab.bench.scale_policies import Bounded, LeastLoaded, Rendezvous, Ring, Slots
from copyspec_engine.lab.bench.scale_sim import SCALING, STEADY, Activity, simulate
from copyspec_engine.scale.routing import most_calls

NAMES, IDS = "ring of names, as nginx", "ring of random ids, as Ray"
NONE = np.array([], dtype=np.int64)
OPTIONS = ScaleSimOptions(
    replicas=40, conversations=200_000, calls=4.0, lost=1.0, back_s=1.0, call_s=2.0, hours=0.2, running=64, least=(64,)
)
"""Replicas are lost often, so that little time says much."""


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, Any]]:
    return {row["policy"]: row for row in simulate(OPTIONS)}


def rates() -> Any:
    activity = Activity(OPTIONS.conversations, OPTIONS.calls, OPTIONS.exponent, OPTIONS.most_calls)
    return activity.rates(0, OPTIONS.conversations)


@pytest.mark.parametrize("exponent", [0.0, 0.7, 1.0, 1.4])
@pytest.mark.parametrize("most", [3.0, 50.0, 1e6])
def test_conversations_call_by_zipfs_law_and_none_more_than_it_may(exponent: float, most: float) -> None:
    activity = Activity(1000, 2.0, exponent, most)
    found = activity.rates(0, 1000)
    assert found.sum() == pytest.approx(2000)
    assert found.max() <= most * (1 + 1e-6)
    below = np.flatnonzero(found < 0.999 * found.max())
    if exponent and len(below):  # behind those that call as often as may be, the law of powers
        places = np.array([max(below[0], 100), 999])
        power = math.log(found[places[0]] / found[places[1]]) / math.log((places[1] + 1.5) / (places[0] + 1.5))
        assert power == pytest.approx(exponent, abs=0.01)
    drawn = np.bincount(activity.draw(200_000, np.random.default_rng(1)), minlength=1000)
    expected = found / 2000 * 200_000
    groups = np.minimum(np.cumsum(expected).astype(int) // 2000, 99)
    counted, hoped = (np.bincount(groups, weights, 100) for weights in (drawn, expected))
    full = hoped > 0
    assert (((counted - hoped)[full] ** 2) / hoped[full]).sum() < full.sum() + 6 * math.sqrt(2 * full.sum())


@pytest.mark.parametrize("lasting", [None, True, False])
def test_only_the_conversations_of_a_lost_slot_move(lasting: bool | None) -> None:
    keys, everyone = np.random.default_rng(2).integers(0, 2**64, 20_000, dtype=np.uint64), np.arange(20_000)
    slots = Slots.of(20, 24)
    policy = Rendezvous(slots, keys) if lasting is None else Ring(slots, keys, 100, lasting=lasting)
    before = policy.homes(everyone)
    slots.end(np.array([7]), 1.0)
    policy.changed(NONE, np.array([7]))
    away = policy.homes(everyone)
    assert (away == before)[before != 7].all()
    assert not (away == 7).any()
    assert np.bincount(away[before == 7], minlength=20)[np.arange(20) != 7].min() > 0  # to all others
    slots.begin(np.array([7]))
    policy.changed(np.array([7]), NONE)
    back = policy.homes(everyone)
    if lasting is False:
        assert 0 < (back != before)[before != 7].mean() < 0.15  # a new id takes others' conversations
    else:
        assert (back == before).all()
    slots.begin(np.arange(20, 24))
    policy.changed(np.arange(20, 24), NONE)
    grown = policy.homes(everyone)
    assert (grown[grown != back] >= 20).all()
    assert (grown != back).mean() == pytest.approx(4 / 24, abs=0.06)


def test_a_bound_holds_and_whoever_has_room_keeps_his_own() -> None:
    rng = np.random.default_rng(3)
    keys = rng.integers(0, 2**64, 5000, dtype=np.uint64)
    slots = Slots.of(10, 12)
    own = Rendezvous(slots, keys)
    for factor, calling in ((1.1, 400), (1.5, 400), (1.5, 20)):
        in_flight = np.append(rng.integers(0, 30, 10), [0, 0])
        conversations = rng.permutation(5000)[:calling]
        most = most_calls(int(in_flight.sum()) + calling - 1, 10, factor, least=8)
        policy = Bounded(own, factor, least=8)
        chosen = policy.choose(conversations, in_flight, rng)
        after = in_flight + np.bincount(chosen, minlength=12)
        home = own.homes(conversations)
        assert (after <= np.maximum(in_flight, most)).all()
        assert policy.num_second == (chosen != home).sum()
        assert (after[np.unique(home[chosen != home])] >= most).all()  # nobody leaves a slot that has room
    loads = LeastLoaded(slots).choose(np.arange(55), np.arange(12), rng)
    assert np.ptp((np.arange(12) + np.bincount(loads, minlength=12))[:10]) <= 1


def test_calls_find_what_probability_says(rows: dict[str, dict[str, Any]]) -> None:
    called, lost = rates(), OPTIONS.lost

    def found(losses: float) -> float:
        return float(1 - (called * losses / (losses + called)).sum() / called.sum())

    assert rows["rendezvous"][STEADY]["kv"] == pytest.approx(found(lost), abs=0.015)
    assert rows[NAMES][STEADY]["kv"] == pytest.approx(found(lost), abs=0.015)
    assert rows[IDS][STEADY]["kv"] == pytest.approx(found(2 * lost), abs=0.03)
    assert rows["rendezvous"][STEADY]["kv"] > rows[IDS][STEADY]["kv"] + 0.05
    for name in ("random", "least loaded"):
        assert rows[name][STEADY]["kv"] == pytest.approx(1 / OPTIONS.replicas, rel=0.3)
        assert rows[name]["moved"] == {"out": None, "in": None}
    for row in rows.values():
        for phase in (STEADY, SCALING):
            counts = row[phase]
            assert counts["kv"] <= counts["store"] <= 1
            assert counts["file"] is None or counts["kv"] <= counts["file"] <= 1
    assert rows["rendezvous"][STEADY]["file"] > 0.998  # but while a slot is empty, which is a second
    assert rows["rendezvous"][STEADY]["store"] > 0.998  # but calls that are not over
    assert rows[IDS][STEADY]["file"] is None


def test_slots_that_come_take_an_even_share_and_give_it_back(rows: dict[str, dict[str, Any]]) -> None:
    grown = OPTIONS.most_replicas
    for name in ("rendezvous", NAMES, IDS):
        moved = rows[name]["moved"]
        assert moved["out"] == pytest.approx(1 - OPTIONS.replicas / grown, abs=0.03)
        assert moved["in"] == pytest.approx(moved["out"], abs=0.03)
    assert rows["rendezvous"][SCALING]["file"] < rows["rendezvous"][STEADY]["file"] - 0.01


def test_load_is_as_even_as_the_busiest_conversations_let_it_be(rows: dict[str, dict[str, Any]]) -> None:
    shares = rates() / rates().sum()
    by_chance = OPTIONS.replicas / rows["random"][STEADY]["calls"]
    expected = math.sqrt(OPTIONS.replicas * (shares**2).sum() + by_chance)
    assert rows["rendezvous"]["spread"] == pytest.approx(expected, rel=0.4)
    assert rows["random"]["spread"] == pytest.approx(math.sqrt(by_chance), rel=0.5)
    assert rows["least loaded"]["busiest_at_once"] < 1.2 < rows["rendezvous"]["busiest_at_once"]
    assert rows["random"]["busiest"] < rows["rendezvous"]["busiest"]


def test_where_replicas_have_all_hands_full_a_bound_shortens_the_wait() -> None:
    full = ScaleSimOptions(
        replicas=20, conversations=20_000, calls=20.0, most_calls=900.0, call_s=3.0, hours=0.1, running=20, least=(20,)
    )
    plain, tight, loose = simulate(full)[:3]
    assert plain[STEADY]["second"] == 0 < loose[STEADY]["second"] < tight[STEADY]["second"]
    assert plain["longest_wait_s"] > loose["longest_wait_s"] > tight["longest_wait_s"]
    assert plain[STEADY]["kv"] > loose[STEADY]["kv"] > tight[STEADY]["kv"]


def test_the_command_says_it_in_tables_and_in_a_file_and_a_seed_gives_the_same(tmp_path: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        out = tmp_path / "out.json"
        words = ["--replicas", "5", "--conversations", "3000", "--hours", "0.02", "--seed", str(seed)]
        result = CliRunner().invoke(app, ["bench", "scale-sim", *words, "--json", str(out)], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        found.append(json.loads(out.read_text(encoding="utf-8")))
        assert "5 replicas, 1.0% of them lost an hour" in result.output
    assert found[0]["results"] == found[1]["results"] != found[2]["results"]
    assert found[2]["seed"] == 2
    assert "bench scale-sim" in found[2]["command"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--factor", "1"], "Got --factor 1 but expected more than 1"),
        (["--calls", "0"], "Got --calls 0 but expected"),
        (["--calls", "400"], "Got --calls 400 but expected 0 to 360"),
        (["--replicas", "0"], "Got --replicas 0 but expected 1 to 10000"),
        (["--back-s", "nan"], "Got --back-s nan but expected 1 to 3600"),
        (["--conversations", "1", "--replicas", "2", "--hours", "0.01"], "in which nobody calls"),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_one_line(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["bench", "scale-sim", *words])
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1
