"What unseen sets are asked beside their pooled label: which recordings, whose probability, and what is left out"
import json

import numpy as np
import pandas as pd
import pytest

from stetholm.core.config import StethoError
from stetholm.score.taught import COLUMNS, DIFFERENCE, ENCODER, EVERY_SYSTEM, FILTERS, FLIP_RATE, MEANS, reasons, taught_scores

RESAMPLES = 200
MEAN, = MEANS


def recording(recording_id, source, binary, patient=None, domain="heart", findings=(), split="test", **more):
    return dict(recording_id=recording_id, source=source, patient_id=patient or recording_id, domain=domain, binary=binary,
                findings=list(findings), split=split, extra=json.dumps(more))


def verdicts_of(p, model="sft"): return pd.DataFrame([dict(recording_id=i, model=model, p_abnormal=x) for i, x in p.items()])


def heard_of(folder, ids, **labels):
    "What stage alignment writes: a column per label of the encoder, of all test recordings"
    pd.DataFrame(dict(recording_id=ids, **labels)).to_parquet(folder/"heard.parquet")
    return pd.read_parquet(folder/"heard.parquet")


def asked(verdicts, heard, *recordings):
    found = taught_scores(verdicts, heard, pd.DataFrame(recordings), RESAMPLES)
    assert list(found) == COLUMNS and (found.value.isna() == (found.left_out != "")).all()
    return found.set_index(["question", "model", "metric"])


@pytest.fixture
def training_b():
    "Ten recordings of six subjects; P(abnormal) follows the diagnosis"
    grades = [("strong", "abnormal"), ("weak", "abnormal"), ("none", "abnormal"), ("none", "abnormal"), ("none", "normal"),
              ("none", "normal"), ("none", "normal"), ("unclear", "abnormal"), (None, "normal"), ("strong", "abnormal")]
    rows = [recording(f"b{i}", "cinc2016", binary, f"s{i//2 if i < 8 else i - 4}", findings=["murmur"]*(grade in ("weak", "strong")),
                      database="training-b", murmur_grade=grade) for i, (grade, binary) in enumerate(grades)]
    return rows, {r["recording_id"]: .9 if r["binary"] == "abnormal" else .1 for r in rows}


def test_murmur_is_asked_of_graded_recordings_by_the_label_and_by_p_abnormal(training_b, tmp_path):
    rows, p = training_b
    murmur = [.9, .4, .5, .1, .1, .1, .1, 1., 1., .6]
    found = asked(verdicts_of(p), heard_of(tmp_path, [*p], abnormal=[*p.values()], murmur=murmur), *rows)
    by_label = found.loc["CinC 2016 b, murmur", ENCODER, "AUROC (murmur)"]
    by_verdict = found.loc["CinC 2016 b, murmur", "sft", "AUROC (abnormal)"]
    assert by_label.value == 14/15  # of 3 with and 5 without a murmur, .4 lies below .5
    assert by_verdict.value == (9 + 6/2)/15  # the two ill without a murmur tie with the three that have one
    assert list(by_label[["n", "positives", "patients"]]) == list(by_verdict[["n", "positives", "patients"]]) == [8, 3, 5]
    assert found.value["CinC 2016 b, weak murmur", ENCODER, "AUROC (murmur)"] == 4/5
    assert found.value["CinC 2016 b, strong murmur", ENCODER, "AUROC (murmur)"] == 1
    assert found.positives["CinC 2016 b, weak murmur", ENCODER, "AUROC (murmur)"] == 1
    assert ("CinC 2016 b, murmur", ENCODER, "AUROC (abnormal)") not in found.index  # it has the label itself


def test_the_pack_nests_the_same_labels(training_b, tmp_path):
    rows, p = training_b
    packed = [r | {"extra": json.dumps({"findings": r["extra"]})} for r in rows]
    heard = heard_of(tmp_path, [*p], abnormal=[*p.values()], murmur=.5)
    pd.testing.assert_frame_equal(asked(verdicts_of(p), heard, *packed), asked(verdicts_of(p), heard, *rows))


def test_subjects_are_drawn_with_all_their_recordings(tmp_path):
    rng = np.random.default_rng(0)
    rows = [recording(f"b{i}", "bmd_hs", "abnormal" if i % 20 < 10 else "normal", f"s{i//10}") for i in range(200)]
    bias = np.repeat(rng.normal(0, .3, 20), 10)  # recordings of one subject are alike
    p = {r["recording_id"]: (r["binary"] == "abnormal")*.2 + b for r, b in zip(rows, bias)}
    heard = heard_of(tmp_path, [*p])
    grouped = asked(verdicts_of(p), heard, *rows).loc["BMD-HS, valve disease", "sft"].iloc[0]
    apart = [r | {"patient_id": r["recording_id"]} for r in rows]
    alone = asked(verdicts_of(p), heard, *apart).loc["BMD-HS, valve disease", "sft"].iloc[0]
    assert grouped.value == alone.value and (grouped.patients, alone.patients) == (20, 200)
    assert grouped.hi - grouped.lo > 2*(alone.hi - alone.lo)


def test_verdict_within_databases_and_their_mean_forgive_a_shift_between_them(tmp_path):
    right = {"a": [0, 1]*6, "e": [0, 0, 0, 1]*5, "d": [0, 0]}
    places = [(d, i, y) for d, ys in right.items() for i, y in enumerate(ys)]
    rows = [recording(f"{d}{i}", "cinc2016", "abnormal" if y else "normal", database=f"training-{d}") for d, i, y in places]
    p = {f"{d}{i}": .1*y + .5*(d == "e") for d, i, y in places}  # rightly ordered within each, all of e above all of a
    found = asked(verdicts_of(p), heard_of(tmp_path, [*p]), *rows)
    assert found.value["CinC 2016 a, verdict", "sft", "AUROC (abnormal)"] == found.value[MEAN, "sft", "AUROC (abnormal)"] == 1
    assert list(found.loc[MEAN, "sft", "AUROC (abnormal)"][["n", "positives", "patients"]]) == [32, 11, 32]  # of a and e
    assert found.left_out["CinC 2016 d, verdict", EVERY_SYSTEM, "AUROC (abnormal)"] == "present in no recording"
    assert found.left_out["CinC 2016 c, verdict", EVERY_SYSTEM, "AUROC (abnormal)"] == "no recording of the set has this label"


def test_findings_of_the_manikins_are_asked_within_their_organ_and_of_the_encoder_alone(tmp_path):
    kinds = [("lung", ["wheeze"]), ("lung", ["fine crackle"]), ("lung", ["coarse crackle"]), ("lung", []),
             ("heart", ["mid systolic murmur"]), ("heart", ["tachycardia"])]
    rows = [recording(f"h{i}", "hlscmds", "abnormal" if f else "normal", "FM"[i % 2], domain, f) for i, (domain, f) in enumerate(kinds)]
    p = {r["recording_id"]: .5 for r in rows}
    found = asked(verdicts_of(p), heard_of(tmp_path, [*p], abnormal=.5, crackle=[.5, .9, .4, .1, 1., 1.], murmur=.5), *rows)
    crackle = found.loc["HLS-CMDS, crackle", ENCODER, "AUROC (crackle)"]
    assert crackle.value == 3/4 and crackle.n == 4 and crackle.positives == 2 and np.isnan(crackle.lo)  # two manikins have no interval
    assert found.value["HLS-CMDS, murmur", ENCODER, "AUROC (murmur)"] == .5
    assert found.left_out["HLS-CMDS, wheeze", ENCODER, "AUROC (wheeze)"] == "the encoder was not trained on this label"
    assert found.left_out["HLS-CMDS, rhonchi", EVERY_SYSTEM, "AUROC (rhonchi)"] == "present in no recording"
    assert "sft" not in found.index.get_level_values("model")


def test_a_verdict_that_depends_on_the_filter_flips(tmp_path):
    def breath(n, binary, *filters, **more):
        same = {"B": {"same_breath_as": f"EP{n}"}, "D": {"same_breath_as": f"EP{n}"}, "E": {}}
        return [recording(f"{f}P{n}", "kauh", binary, str(n), "lung", **more, **same[f]) for f in filters]
    rows = [*breath(1, "abnormal", *"EBD"), *breath(2, "normal", *"EBD"), *breath(3, "normal", *"BD"), *breath(4, "normal", "E"),
            *breath(5, "abnormal", *"EBD", split="train")]
    p = dict(EP1=.5, BP1=.4, DP1=.8, EP2=.1, BP2=.2, DP2=.4, BP3=.9, DP3=.6, EP4=.9)
    found = asked(verdicts_of(p), heard_of(tmp_path, [*p], abnormal=.3), *rows).loc[FILTERS]
    assert found.value["sft", FLIP_RATE] == pytest.approx(1/3)  # .4 is normal, .5 abnormal
    assert found.value["sft", DIFFERENCE] == pytest.approx(((.1 + .4 + .3)/3 + (.1 + .3 + .2)/3 + .3)/3)
    assert found.value[ENCODER, FLIP_RATE] == found.value[ENCODER, DIFFERENCE] == 0
    assert list(found.loc["sft", FLIP_RATE][["n", "positives", "patients"]]) == [3, 1, 3]
    one_filter = asked(verdicts_of(p), heard_of(tmp_path, [*p]), *(r for r in rows if r["recording_id"].startswith("E")))
    assert one_filter.left_out.tolist() == ["no breath is there through two filters"]*2


def test_a_set_that_is_not_there_is_not_asked_about(training_b, tmp_path):
    rows, p = training_b
    found = asked(verdicts_of(p), heard_of(tmp_path, [*p], murmur=.5), *rows, recording("t", "bmd_hs", "normal", split="train"))
    assert found.index.get_level_values("question").str.startswith("CinC 2016").all()
    none = taught_scores(verdicts_of({"x": .5}), heard_of(tmp_path, ["x"]), pd.DataFrame([recording("x", "circor", "normal")]), RESAMPLES)
    assert list(none) == COLUMNS and not len(none) and not len(reasons(none))


def test_an_encoder_without_labels_leaves_its_questions_out_with_the_reason(training_b, tmp_path):
    rows, p = training_b
    found = asked(verdicts_of(p), heard_of(tmp_path, [*p]), *rows)
    why = reasons(found.reset_index()).set_index(["system", "why"]).questions
    assert why[ENCODER, "the encoder was not trained on this label"].split("; ") == [
        "CinC 2016 b, murmur", "CinC 2016 b, weak murmur", "CinC 2016 b, strong murmur", "CinC 2016 b, verdict"]
    assert found.value["CinC 2016 b, verdict", "sft", "AUROC (abnormal)"] == 1


def test_a_missing_probability_is_an_error_that_names_the_recording(training_b, tmp_path):
    rows, p = training_b
    with pytest.raises(StethoError, match="2 recordings that 'sft' has no probability of, as b3"):
        asked(verdicts_of({i: x for i, x in p.items() if i not in ("b3", "b4")}), heard_of(tmp_path, [*p]), *rows)
