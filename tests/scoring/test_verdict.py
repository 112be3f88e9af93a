"""Words for scores, and what is said of the threshold behind them."""

import pytest

from solution.bundles.bundle import About, Bundle
from solution.config import VoteConfig
from solution.scoring.verdict import NOBODY_LOOKED, meaning, rates_in_words, threshold_record, verdict_of

VOTE = VoteConfig({"face": 1}, threshold=0.7, unsure=0.05, false_alarm=0.04)
RATES = {
    "clean": {"false_alarms": 0.031, "fakes_found": 0.5},
    "degraded": {"false_alarms": 0.125, "fakes_found": None},
    "asked": 0.04,
    "false_alarms_by_source": {"web": 0.09, "studio": 0.01},
}
REPORT = {"at_threshold": RATES, "fitted_on": "90 pictures", "protocol": "5 folds"}


def bundle(report):
    return Bundle(None, "x", {}, VOTE, {}, "", {}, {}, report, About())


@pytest.mark.parametrize(
    ("score", "found", "word"),
    [
        (0.75, 1, "fake"),
        (0.65, 2, "real"),
        (0.7, 1, "unsure"),
        (0.66, 1, "unsure"),
        (1.0, 0, "no_face"),
        (1.0, NOBODY_LOOKED, "fake"),
    ],
)
def test_a_score_becomes_a_word(score, found, word):
    assert verdict_of(score, VOTE, found) == word


def test_the_record_says_what_was_measured_at_the_threshold():
    record = threshold_record(bundle(REPORT), VOTE)
    assert record["threshold"] == 0.7 and record["asked"] == 0.04 and record["on"] == "90 pictures"
    assert record["measured"] == {"clean": RATES["clean"], "degraded": RATES["degraded"]}
    text = meaning(record)
    for words in ("Fake from 0.75, real below 0.65", "3.1% of the real", "50.0% of the fakes", "90 pictures"):
        assert words in text
    assert "12.5% of the real above the threshold." in text and "worst source of real pictures, web, 9.0%" in text


def test_rates_are_those_of_the_words_where_they_were_measured():
    called = {"real": {"fake": 0.01, "unsure": 0.04, "real": 0.95}, "fake": {"fake": 0.4, "unsure": 0.2, "real": 0.4}}
    record = threshold_record(bundle({"at_threshold": {"clean": RATES["clean"] | {"called": called}}}), VOTE)
    text = meaning(record)
    assert (
        "clean: of real pictures 1.0% called fake, 4.0% unsure, of fake pictures 40.0% called fake, 20.0% unsure"
        in text
    )
    assert "3.1%" not in text
    assert meaning(record | {"unsure": 0}).startswith("Fake at 0.7 or above, else real.")


@pytest.mark.parametrize(
    ("report", "vote"),
    [({}, VOTE), (REPORT, VoteConfig({"face": 1, "qtfp": 0}, threshold=0.7, unsure=0.05, false_alarm=0.04))],
)
def test_no_figure_is_given_for_a_vote_that_was_not_measured(report, vote):
    record = threshold_record(bundle(report), vote)
    assert record["measured"] is None
    assert "not measured" in meaning(record) and "%" not in meaning(record)


def test_the_rates_in_one_plain_sentence():
    text = rates_in_words(threshold_record(bundle(REPORT), VOTE))
    assert text.startswith("Of 100 real pictures 3 to 12 scored 0.7 or above, of 100 fakes 50 scored less, ")
    called = {"real": {"fake": 0.01, "unsure": 0.04, "real": 0.95}, "fake": {"fake": 0.4, "unsure": 0.2, "real": 0.4}}
    text = rates_in_words(
        threshold_record(bundle({"at_threshold": {"clean": RATES["clean"] | {"called": called}}}), VOTE)
    )
    assert text.startswith("Of 100 real pictures 1 were taken for fakes, of 100 fakes 40 passed unnoticed, ")
    assert rates_in_words(threshold_record(bundle({}), VOTE)) == "How often it errs was not measured."
