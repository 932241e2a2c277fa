"""Searches: what the ranking, the verdict on the winner and the page say."""

import csv
import math

import numpy as np
import pytest

from jaxmed.evaluation.sweep_page import write_sweep_page
from jaxmed.evaluation.sweep_ranking import (
    Trial,
    bearable_trials,
    expected_maximum,
    judge_winner,
    rank_trials,
    tell_verdict,
    write_ranking,
)


def finished(number, score, width=0.04, **more):
    ends = {"low": score - width / 2, "high": score + width / 2, "cases": 50, "step": 8}
    return Trial(number, "finished", {"a.b": 0.1 * number}, score, **{**ends, **more})


def test_the_largest_of_normals_is_as_order_statistics_say():
    assert expected_maximum(1) == pytest.approx(0, abs=1e-9)
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi), abs=1e-9)
    assert expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi), abs=1e-9)
    drawn = np.random.default_rng(0).standard_normal((20_000, 24)).max(1)
    assert expected_maximum(24) == pytest.approx(drawn.mean(), abs=4 * drawn.std() / 141)
    assert 4.8 < expected_maximum(1_000_000) < 4.9


@pytest.mark.parametrize("count", [1, 2, 7, 300])
def test_as_many_trials_are_borne_as_chance_allows(count):
    lead = (expected_maximum(count) + 1e-6) * 0.01
    assert bearable_trials(lead, 0.01) == count
    assert bearable_trials(lead + 1, 0.01) == 1_000_000


def test_no_spread_bears_any_number():
    assert bearable_trials(0.1, 0.0) == 1_000_000
    assert bearable_trials(0.0, 0.0) == 1


def test_finished_trials_come_first_and_pruned_ones_by_how_far_they_got():
    trials = [
        Trial(0, "failed", {}, message="diverged"),
        Trial(1, "pruned", {}, 0.99, step=2),
        finished(2, 0.5),
        Trial(3, "pruned", {}, 0.4, step=4),
        finished(4, 0.7),
        finished(5, 0.7),
    ]
    assert [trial.number for trial in rank_trials(trials)] == [4, 5, 2, 3, 1, 0]


def test_equally_good_settings_are_doubted_and_a_clear_lead_is_not():
    noise = np.random.default_rng(1).normal(0.8, 0.01, 20).tolist()
    verdict = judge_winner([finished(i, score) for i, score in enumerate(noise)])
    assert verdict.is_doubtful
    assert verdict.trials == 20
    assert verdict.error == pytest.approx(0.04 / 3.92, rel=1e-3)
    assert "no better than" in tell_verdict(verdict)[0]
    clear = [*(finished(i, 0.6 + 0.001 * i) for i in range(9)), finished(9, 0.9)]
    verdict = judge_winner(clear)
    assert not verdict.is_doubtful
    assert list(verdict.level) == []
    assert verdict.bears == 1_000_000
    assert "bear over 1,000,000 trials" in tell_verdict(verdict)[0]


def test_trials_that_were_pruned_count_as_tried():
    trials = [finished(0, 0.8), finished(1, 0.7)]
    more = [*trials, *(Trial(i, "pruned", {}, 0.5, step=2) for i in range(2, 30))]
    assert judge_winner(more).excess > judge_winner(trials).excess
    assert judge_winner(more).trials == 30


def test_without_a_finished_trial_nothing_is_claimed():
    assert judge_winner([Trial(0, "pruned", {}, 0.5)]) is None
    assert judge_winner([finished(0, 0.5, low=None, high=None)]) is None
    assert "nothing can be said" in tell_verdict(None)[0]


def test_the_table_has_all_trials_and_numbers_in_full(tmp_path):
    trials = [finished(0, 1 / 3, seeds=(0.3, 0.4)), Trial(1, "failed", {}, message="a, b\nc")]
    write_ranking(tmp_path / "ranking.csv", trials, ["a.b"])
    with (tmp_path / "ranking.csv").open() as file:
        first, second = csv.DictReader(file)
    assert float(first["score"]) == 1 / 3
    assert float(first["seeds_std"]) == pytest.approx(np.std([0.3, 0.4], ddof=1))
    assert (second["rank"], second["message"]) == ("", "a, b\nc")


def test_the_page_shows_names_and_runs_none_of_them(tmp_path):
    hostile = "<script>alert(1)</script>$x$"
    trials = [
        Trial(0, "finished", {"k": hostile, "n": 1e-3}, 0.5, 0.4, 0.6, cases=9, step=4),
        Trial(1, "finished", {"k": "plain", "n": 1e-2}, 0.6, 0.5, 0.7, cases=9, step=4),
        Trial(2, "pruned", {"k": "plain", "n": 1e-1}, 0.3, step=2),
        Trial(3, "failed", {"k": hostile, "n": 1.0}, message=hostile),
    ]
    write_sweep_page(
        tmp_path / "sweep.html",
        title=hostile,
        trials=trials,
        space={"k": hostile, "n": "0.001 to 1, logarithmic"},
        log_keys=["n"],
        importance={"n": 0.7, "k": 0.3},
        score_name="dice",
    )
    page = (tmp_path / "sweep.html").read_text()
    assert page.count("<script") == 1
    assert "&lt;script&gt;alert(1)" in page
    assert "Content-Security-Policy" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64") == 3
    assert "Trial 1 scored best: dice 0.6000" in page


def test_a_page_of_nothing_can_be_written(tmp_path):
    failed = [Trial(0, "failed", {}, message="no such file")]
    write_sweep_page(tmp_path / "sweep.html", title="t", trials=failed, space={"k": "a, b"})
    assert "no such file" in (tmp_path / "sweep.html").read_text()
