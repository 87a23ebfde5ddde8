"Three checks that a label prior or a second head cannot pass: text beside P(abnormal), the organ that is named, and accuracy averaged over labels"
import json

import numpy as np
import pandas as pd
import pytest

from stetholm.bench.facts import Facts
from stetholm.bench.grammar import respond
from stetholm.bench.pairs import synthesize
from stetholm.data.sources import scan
from stetholm.phantom.patients import make_phantom
from stetholm.score.measures import counts, strata
from stetholm.score.scores import KEY, MEAN_OVER_LABELS, score_predictions

ORGAN, AGREES = "names the wrong organ", "text agrees with P(abnormal)"


def question(i, organ, findings, asked="verdict", binary=None):
    "One row of a file of answers, without the answer"
    recording = dict(recording_id=f"r{i}", domain=organ, binary=binary or ("abnormal" if findings else "normal"), findings=findings)
    return dict(pair_id=f"q{i}", patient_id=f"p{i}", task="classification" if asked == "verdict" else "detection", dataset="a", distribution="in_domain",
                instruction="?", response="Normal.", evidence=json.dumps(dict(asked=asked, recordings=[recording])))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    "Questions about a phantom"
    table = scan("phantom", make_phantom(tmp_path_factory.mktemp("phantom")/"phantom", 12, 0)).set_index("recording_id", drop=False)
    return synthesize(table, 1, 0)


def test_text_that_contradicts_the_p_of_its_system_is_found_in_a_file_of_answers(stetholm):
    questions = [question(i, "lung", ["wheeze"] if i % 2 else [], "findings") for i in range(8)]
    answers = pd.DataFrame([q | dict(generated="Wheezes." if i % 2 else "No wheezes.", model="mine") for i, q in enumerate(questions)])
    verdicts = pd.DataFrame([dict(model="mine", recording_id=f"r{i}", p_abnormal=.9 if i % 2 else .1, binary="abnormal" if i % 2 else "normal", source="a",
                                  distribution="in_domain", patient_id=f"p{i}") for i in range(8)])

    def share(answers, verdicts):
        answers.to_json(stetholm.cwd/"answers.jsonl", orient="records", lines=True)
        verdicts.to_csv(stetholm.cwd/"verdicts.csv", index=False)
        done = stetholm("score", "answers.jsonl", "--verdicts", "verdicts.csv", "--resamples", 20, "-o", "scores.csv")
        assert done.returncode == 0 and "mean over labels: lung, abnormal, wheeze" not in done.stdout, done.stderr  # 4 questions are too few
        return pd.read_csv(stetholm.cwd/"scores.csv").set_index(KEY).value["mine", "all", "all", "in_domain", AGREES]

    flipped = verdicts.assign(p_abnormal=1 - verdicts.p_abnormal)
    assert share(answers, verdicts) == 1 and share(answers, flipped) == 0
    carried = answers.assign(p_abnormal=[[p] for p in flipped.p_abnormal])  # an answer's own P is the one that counts
    assert share(carried, verdicts) == 0


def test_without_p_the_agreement_does_not_appear():
    scores = score_predictions(pd.DataFrame([question(i, "heart", []) | dict(generated="Normal.", p_abnormal=[None]) for i in range(5)]), 20)
    assert AGREES not in set(scores.metric) and ORGAN not in set(scores.metric)  # and no answer names an organ


def test_rhonchi_in_a_heart_are_of_the_wrong_organ():
    heart, lung = (question(0, organ, [], "findings")["evidence"] for organ in ("heart", "lung"))
    for text in ("I hear rhonchi.", "No wheezes or crackles.", "Vesicular breath sounds.", "No murmur, but rhonchi."):
        assert counts(text, heart)[ORGAN] == (1, 1)
    assert counts("I hear rhonchi.", lung)[ORGAN] == counts("First and second heart sounds, no murmur.", heart)[ORGAN] == (0, 1)
    assert ORGAN not in counts("Abnormal.", heart) and counts("Abnormal, with a third heart sound.", lung)[ORGAN] == (1, 1)


def test_no_right_answer_names_the_wrong_organ(pairs):
    found = [counts(*row).get(ORGAN, (0, 0)) for row in zip(pairs.response, pairs.evidence, pairs.task)]
    wrong, named = np.sum(found, 0)
    assert wrong == 0 and named > len(pairs)/2


@pytest.mark.parametrize("kind", ["verdict", "findings", "report", "reasoning", "differential", "site"])
def test_a_mixture_has_no_wrong_organ(kind):
    f = Facts("r", "heart", "normal", (), "apex", looked_for=("murmur", "wheeze"), mixed=True)
    for seed in range(6): assert ORGAN not in counts(*respond(kind, [f], np.random.default_rng(seed)))


def test_a_constant_answer_earns_the_prior_and_one_in_so_many_strata():
    labels = [[]]*30 + [["wheeze"]]*6 + [["fine crackle"]]*5 + [["rhonchi"]]*5
    answers = pd.DataFrame([question(i, "lung", x, "findings") | dict(generated="No wheezes or crackles.") for i, x in enumerate(labels)])
    scores = score_predictions(answers, 50).set_index(KEY).loc["other", :, "all", "in_domain", "clinical accuracy"]
    assert len(set().union(*map(strata, answers.evidence))) == 4
    assert np.isclose(scores.value["all"], 30/46) and np.isclose(scores.value[MEAN_OVER_LABELS], 1/4)
    assert scores.lo[MEAN_OVER_LABELS] == scores.hi[MEAN_OVER_LABELS] == 1/4 and scores.lo["all"] < 30/46 < scores.hi["all"]


def test_two_families_count_in_two_strata_and_rare_ones_in_none():
    labels = [["fine crackle", "wheeze"]]*5 + [["stridor"]]*4
    answers = pd.DataFrame([question(i, "lung", x, "findings") | dict(generated="Stridor." if i > 4 else "") for i, x in enumerate(labels)])
    scores = score_predictions(answers, 20).set_index(KEY).loc["other", :, "all", "in_domain", "clinical accuracy"]
    assert strata(answers.evidence[0]) == {"lung, abnormal, crackle", "lung, abnormal, wheeze"}
    assert scores.value["all"] == 4/9 and scores.value[MEAN_OVER_LABELS] == 0 and scores.n[MEAN_OVER_LABELS] == 5
