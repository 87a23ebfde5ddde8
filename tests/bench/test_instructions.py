"StethoBench of hand-made recordings: which questions labels allow, the same pairs however they are made, no patient in two splits, and what cannot be asked about"
import json
import re
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from stetholm.core.config import PROFILES, StethoError
from stetholm.core.run import Run
from stetholm.bench import grammar
from stetholm.bench.facts import Facts
from stetholm.bench.grammar import TASKS
from stetholm.bench.grammar import QUESTIONS, ask, hide_unstated, names_organ, respond, with_organ
from stetholm.bench.pairs import PAIRS, all_facts, kinds_of, make_pairs, without_pairs
from stetholm.bench.pairs import synthesize
from stetholm.phantom.patients import make_phantom
from stetholm.bench.planted import ERRORS, detection, plant
from stetholm.bench.reader import faults, is_right
from stetholm.data.recordings import RECORDINGS, write_table
from stetholm.data.sources import scan
from stetholm.study.instructions import instructions


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    "Recordings of a phantom"
    return scan("phantom", make_phantom(tmp_path_factory.mktemp("phantom")/"phantom", 48, 0))


@pytest.fixture(scope="module")
def pairs(table): return synthesize(table, 1, 0)


def same(a, b): return a.assign(recording_ids=a.recording_ids.map(tuple)).equals(b.assign(recording_ids=b.recording_ids.map(tuple)))


def change(table, column, value, row=0):
    "The table with another value in one cell"
    table = table.reset_index(drop=True).copy()
    table[column] = [value if i == row else v for i, v in enumerate(table[column])]
    return table


def test_each_task_has_ten_forms_of_question_that_differ():
    for task in TASKS:
        forms = [f for kinds in QUESTIONS[task].values() for f in kinds]
        assert len(forms) >= 10 and len({re.sub(r"\{context\}|\W", "", f).lower() for f in forms}) >= 10, task
    lengths = [len(f.split()) for kinds in QUESTIONS.values() for forms in kinds.values() for f in forms]
    assert min(lengths) <= 2 and max(lengths) >= 12


@pytest.mark.parametrize("kind", sorted({k for kinds in QUESTIONS.values() for k in kinds}))
def test_an_answer_varies_in_wording_and_not_in_facts(kind):
    f = Facts("r-1", "heart" if kind in ("murmur", "spread", "loudest") else "lung", "abnormal", ("mid systolic murmur",) if kind in ("murmur", "spread", "loudest") else ("wheeze", "fine crackle"), "aortic valve area" if kind in ("murmur", "spread", "loudest") else "posterior left lower",
              "61", "Male", "x", 10., "poor" if kind in ("noise", "noisy") else "adequate", (("wheeze", "expiration"), ("crackle", "inspiration")), (("wheeze", 1., 2.), ("fine crackle", 3., 3.2)), heard_at=("aortic valve area",), loudest="aortic valve area", looked_for=("murmur", "wheeze", "crackle"))
    two = kind in ("patients", "sites", "noisy", "loudest")
    known = [f, f._replace(recording_id="r-2", site="mitral valve area" if f.domain == "heart" else "posterior right lower", quality="adequate")] if two else [f]
    about = {"present": {"family": "wheeze"}, "unanswerable": {"about": "the blood pressure"}, "treatment": {"about": "steroid"}, "mismatch": {"about": "Is there a murmur?"}}.get(kind, {})
    task = next(t for t, kinds in QUESTIONS.items() if kind in kinds)
    made = [(ask(task, kind, known, rng, **about), respond(kind, known, rng, **about)) for rng in map(np.random.default_rng, range(40))]
    assert len({q for (q, _), _ in made}) >= 4 and len({a for _, (a, _) in made}) >= 2
    assert len({proof for _, (_, proof) in made}) == 1 and all(faults(a, p) == () and is_right(a, p) for _, (a, p) in made)
    assert all(q and "None" not in q and "{" not in q for (q, _), _ in made)


def test_an_answer_leans_on_age_and_site_only_where_the_question_tells_them():
    a = Facts("r-1", "lung", "normal", (), "trachea", "61", "Male", loudest="apex")
    b = a._replace(recording_id="r-2", site="left lateral")
    hidden = lambda q, *known: [(f.age, f.site, f.loudest) for f in hide_unstated(q, list(known))]
    assert hidden("Report?", a) == [(None, None, "apex")] and hidden("61-year-old man, trachea. Report?", a) == [("61", "trachea", "apex")]
    assert hidden("First the trachea, then the left lateral chest.", a, b) == [(None, "trachea", "apex"), (None, "left lateral", "apex")]
    assert hidden("The second is from the left lateral chest.", a, b) == [(None, None, None), (None, "left lateral", None)]
    assert "Site: not given." in respond("report", hide_unstated("Report?", [a]), np.random.default_rng(0))[0]


def organs_named(pairs, table):
    "Of each pair, but for questions about the other organ: whether its question names its recordings' organ. None names the other one."
    pairs = pairs[~pairs.pair_id.str.contains(":mismatch:")]
    organ, named = pairs.recording_ids.str[0].map(table.set_index("recording_id").domain), pairs.instruction.map(names_organ)
    assert (named.isna() | (named == organ)).all()
    return pairs.assign(named=named.notna())


def test_four_questions_in_five_name_the_organ(table):
    "About one recording and about two, in every task that does not need a site"
    pairs = organs_named(synthesize(table, 3, 0), table)
    share = pairs.named.groupby(pairs.recording_ids.map(len)).mean()
    assert share.between(.75, .85).all() and pairs[pairs.task != "location"].groupby("task").named.mean().between(.7, .9).all(), share


@pytest.mark.parametrize("f", [Facts("r", "heart", mixed=True), Facts("r", "lung", findings=("wheeze", "third heart sound"), site="apex")])
def test_of_a_mixture_both_organs_are_named_or_none(f):
    asked = {ask("classification", "verdict", [f], np.random.default_rng(n))[0] for n in range(200)}
    about = {(bool(re.search("heart", q, re.I)), bool(re.search("lung", q, re.I))) for q in asked if "apex" not in q}
    assert about == {(True, True), (False, False)} and {names_organ(q) for q in asked} == {None}


def test_a_question_about_the_other_organ_names_its_own_or_none():
    f = Facts("r", "lung", "normal", (), "left posterior", "61", "Male", "x")
    asked = [ask("safety", "mismatch", [f], np.random.default_rng(n), about="Is there a murmur?")[0] for n in range(300)]
    assert {names_organ(q) for q in asked} == {"lung", None} and .7 < np.mean([names_organ(q) == "lung" for q in asked]) < .9
    assert all(q.endswith("Is there a murmur?") for q in asked)


def test_the_organ_is_put_into_a_question_once():
    for question in ("Is it normal?", "Could it be heart failure?", "A child short of breath. Is there a murmur?", "Left anterior chest. Findings?"):
        for organ in ("heart", "lung"):
            told = with_organ(question, organ)
            assert names_organ(question) is None and names_organ(told) == organ and told.endswith(question) and with_organ(told, organ) == told


def test_what_labels_allow():
    lung = dict(domain="lung", looked_for=("wheeze", "crackle"))
    asked = lambda **f: {(t, k if isinstance(k, str) else tuple(k)) for t, kinds in kinds_of(Facts("r", **f)).items() for k in kinds if t != "safety"}
    whole = {("detection", "findings"), ("reporting", "report"), ("reasoning", "reasoning"), ("differential", "differential")}
    assert asked(**lung) == set() and asked(**lung, binary="abnormal") == {("classification", "verdict")}
    assert asked(**lung, binary="normal", findings=()) == {("classification", "verdict"), ("detection", ("present",))} | whole
    assert asked(**lung, binary="abnormal", findings=("wheeze",), site="trachea", phases=(("wheeze", "expiration"),), events=(("wheeze", 0., 1.),)) == {("classification", "verdict"), ("detection", ("present", "times", "count", "phase")), ("location", "site")} | whole
    assert asked(**lung, quality="poor") == {("classification", "quality")} and kinds_of(Facts("r", **lung, quality="poor"))["safety"] == ["noise"]
    murmur = dict(domain="heart", looked_for=("murmur",), binary="abnormal", findings=("mid systolic murmur",))
    assert asked(**murmur) == {("classification", "verdict"), ("classification", "murmur"), ("detection", ("present", "phase"))} | whole
    assert ("location", "spread") in asked(**murmur, heard_at=("aortic valve area",), loudest="aortic valve area")
    assert asked(**murmur | dict(findings=None, binary=None)) == set()


def test_every_pair_reads_back_and_is_of_its_recordings(pairs, table):
    assert set(pairs.task) == set(TASKS) and list(pairs) == list(PAIRS.columns)
    PAIRS.validate(pairs)
    assert all(faults(p.response, p.evidence) == () and is_right(p.response, p.evidence) for p in pairs.itertuples())
    rows = table.set_index("recording_id")
    for p in pairs.itertuples():
        said = json.loads(p.evidence)["recordings"]
        assert [r["recording_id"] for r in said] == list(p.recording_ids) and len(said) == (2 if p.task == "comparison" or ":loudest:" in p.pair_id else 1)
        for r in said: assert r["binary"] == rows.binary[r["recording_id"]] and set(r["findings"] or ()) <= set(rows.findings[r["recording_id"]]) and p.split == rows.split[r["recording_id"]]


def test_no_question_names_its_answer_or_its_dataset(pairs, table):
    assert not pairs.instruction.str.contains("phantom|dataset|" + "|".join(table.source.unique()), case=False).any()
    assert not (pairs.instruction.str.contains(r"\babnormal\b", case=False) & ~pairs.instruction.str.contains("normal or abnormal|abnormal (?:sound|event)|(?:anything|which is|is there an|be) abnormal|abnormal here", case=False)).any()


def test_the_same_pairs_for_any_workers_and_any_order_of_the_rows_and_others_for_another_seed(pairs, table):
    assert same(synthesize(table, 1, 0, 2), pairs)
    shuffled = synthesize(table.sample(frac=1, random_state=1), 1, 0)
    assert same(shuffled.sort_values("pair_id", ignore_index=True), pairs.sort_values("pair_id", ignore_index=True))
    assert not same(synthesize(table, 1, 1), pairs)


def test_more_rounds_ask_more_and_never_the_same_twice(pairs, table):
    more = synthesize(table, 3, 0)
    assert len(more) > 2*len(pairs) and not more.assign(second=more.recording_ids.map(lambda x: x[-1]), first=more.recording_ids.str[0]).duplicated(["first", "second", "instruction"]).any()


def test_planted_errors_are_found_and_faithful_answers_let_through(pairs):
    "At least 300 answers with one error of at least eight kinds each: precision 1, recall .97"
    found = detection(plant(pairs, 60))
    assert found.errors.sum() >= 300 and len(found) == len(ERRORS) >= 8
    assert (found.accepted == found.errors).all() and found.found.sum() >= .97*found.errors.sum() and (found.recall >= .9).all(), found


FULL = """
import sys, time
import pandas as pd
from stetholm.bench.pairs import synthesize
from stetholm.core.compute import peak_memory
table, n, workers = pd.read_parquet(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
many = pd.concat([table.assign(**{c: table[c] + f"_{k}" for c in ("recording_id", "patient_id")}) for k in range(-(-n//len(table)))], ignore_index=True).head(n)
begun = time.perf_counter()
pairs = synthesize(many, 1, 0, workers)
print(len(many), len(pairs), time.perf_counter() - begun, peak_memory(), pd.util.hash_pandas_object(pairs.assign(recording_ids=pairs.recording_ids.map(tuple))).sum())
"""


@pytest.mark.timed
def test_the_papers_size_in_two_minutes_and_in_little_memory(table, tmp_path):
    "16,125 recordings (arXiv 2603.00355), their answers read back included, on two cores"
    table.to_parquet(tmp_path/"table.parquet")
    recordings, pairs, seconds, memory, _ = map(float, subprocess.run([sys.executable, "-c", FULL, tmp_path/"table.parquet", "16125", "2"], check=True, capture_output=True, text=True).stdout.split())
    assert recordings == 16_125 and pairs >= 77_027 and seconds < 120 and memory < 1.5


@pytest.mark.parametrize("spoil, said", [
    (lambda t: change(t, "findings", ["wheze"]), r"recording .*: finding 'wheze' is not in the clinical vocabulary"),
    (lambda t: change(t, "findings", [""]), r"recording .*: finding '' is not in the clinical vocabulary"),
    (lambda t: t.drop(columns="binary"), "no column binary: make it with `stetholm data scan`"),
    (lambda t: t.assign(binary=None, findings=[[] for _ in range(len(t))], extra="{}"), "no pairs: no recording has a verdict"),
    (lambda t: t.head(0), "no pairs"),
])
def test_what_cannot_be_asked_about_is_named(table, spoil, said):
    with pytest.raises(StethoError, match=said): synthesize(spoil(table), 1, 0)


def test_a_recording_without_a_label_gives_no_pair_and_is_counted(table):
    silent = change(change(change(table, "binary", None), "findings", []), "extra", "{}")
    pairs, i = synthesize(silent, 1, 0), silent.recording_id[0]
    assert i not in set(pairs.recording_ids.explode())
    assert without_pairs(silent, pairs).to_dict("records") == [{"source": table.source.iloc[0], "why": "no label to ask about", "recordings": 1}]
    outside = synthesize(left := change(table, "split", None), 1, 0)
    assert without_pairs(left, outside).to_dict("records") == [{"source": table.source.iloc[0], "why": "left out of every split", "recordings": 1}]
    assert i not in set(outside.recording_ids.explode())


def test_facts_of_another_recording_are_never_lent(table):
    known = all_facts(table)
    for r in table.itertuples(): assert known[r.recording_id].recording_id == r.recording_id and set(known[r.recording_id].findings or ()) <= set(r.findings)


def recording(name, patient, domain="heart", findings=(), site=None, events=(), split="train", **extra):
    "A row of the recordings table; `extra` are the source's own labels"
    return dict(recording_id=name, source="ward", patient_id=patient, domain=domain, path=f"{name}.wav", sample_rate=4000, duration_s=12., site=site, findings=list(findings), diagnosis=None, events=list(events),
                binary="abnormal" if findings else "normal", age=None, sex=None, device=None, split=split, distribution="in_domain", licence="x", sha256=f"{name:0>64}", extra=json.dumps(extra))


def visit(child, *sites, heard, loudest, patient=None, **more):
    "A child's recordings at `sites`, coded as in CirCor, whose murmur is heard at the sites of `heard`"
    areas = {"AV": "aortic valve area", "PV": "pulmonary valve area", "TV": "tricuspid valve area", "MV": "mitral valve area"}
    labels = {"Murmur": "Present", "Murmur locations": heard, "Most audible location": loudest} | more
    return [recording(f"{child}_{s}", patient or child, site=areas.get(s), findings=["late systolic murmur"] if s in heard.split("+") else [], **labels) for s in sites]


def asked(rows, rounds=6):
    "The pairs of hand-made recordings, with the kind of question"
    pairs = synthesize(pd.DataFrame(rows), rounds, 0)
    return pairs.assign(kind=pairs.pair_id.str.split(":").str[-2])


def test_heart_sounds_that_are_listed_twice_are_one():
    beats = [dict(label="S1", start_s=t, end_s=t + .1) for t in (0., .75, 1.5, 2.25, 3.)]
    once, twice = (all_facts(pd.DataFrame([recording("a", "p", findings=["murmur"], events=e)]))["a"] for e in (beats, [e for e in beats for _ in range(2)]))
    assert once == twice and once.rate == 80
    wheezes = [dict(label="wheeze", start_s=1.25, end_s=1.75)]*2
    assert all_facts(pd.DataFrame([recording("b", "p", "lung", ["wheeze"], events=wheezes)]))["b"].events == (("wheeze", 1.2, 1.8),)


def test_a_site_that_names_no_area_is_not_asked_for_the_louder_one():
    "Phc is a place on the chest, but none of the four areas"
    pairs = asked(visit("5", "TV", "Phc", "AV", heard="AV+Phc+TV", loudest="TV") + visit("6", "PV", "Phc", heard="Phc+PV", loudest="Phc"))
    loudest = pairs[pairs.kind == "loudest"]
    assert set(loudest.recording_ids.map(tuple)) == {("5_AV", "5_TV"), ("5_TV", "5_AV")} and not pairs.instruction.str.contains(r"\bNone (?!are)").any()
    assert set(pairs[pairs.kind == "spread"].recording_ids.str[0]) == {"5_TV", "5_Phc", "5_AV"}


def test_a_patient_is_compared_with_itself_only_where_its_visits_agree():
    first = visit("11", "AV", "MV", heard="AV+MV", loudest="MV", patient="7")
    other = visit("7", "PV", "TV", heard="PV+TV", loudest="TV")
    again = visit("9", "PV", "TV", heard="AV+MV", loudest="MV", patient="7")
    visits = lambda pairs, kinds: {frozenset(i.split("_")[0] for i in ids) for ids in pairs[pairs.kind.isin(kinds)].recording_ids}
    pairs = asked(first + other)
    assert visits(pairs, ["loudest", "sites"]) == {frozenset({"11"}), frozenset({"7"})}
    assert frozenset({"11", "9"}) in visits(asked(first + again), ["sites"])
    assert visits(asked(first + visit("7", "PV", "TV", heard="AV+MV", loudest="MV", **{"Systolic murmur grading": "III/VI"})), ["sites"]) == {frozenset({"11"}), frozenset({"7"})}


def test_mixtures_of_heart_and_lung_sounds():
    "What is asked and answered about both organs; `present` is of both, `the other organ` is not there"
    mixed = [recording("m1", "p1", "lung", ["holosystolic murmur", "stridor"], "right upper anterior"), recording("m2", "p2", "heart", ["fourth heart sound"], "apex", heart_sound="S4", lung_sound="Normal"),
             recording("m3", "p3", "heart", (), "apex", heart_sound="Normal", lung_sound="Normal"), recording("h1", "p4", "heart", ["fourth heart sound"], "apex"), recording("l1", "p5", "lung", ["stridor"], "trachea")]
    known = all_facts(pd.DataFrame(mixed))
    assert {i: f.organs for i, f in known.items()} == {"m1": ("heart", "lung"), "m2": ("heart", "lung"), "m3": ("heart", "lung"), "h1": ("heart",), "l1": ("lung",)}
    assert known["m3"].looked_for == ("fourth heart sound", "murmur", "stridor") and known["h1"].looked_for == ("fourth heart sound", "murmur") and known["l1"].looked_for == ("stridor",)
    pairs = asked(mixed, 40)
    first = pairs.recording_ids.str[0]
    assert set(pairs[first == "m1"].kind) >= {"phase", "murmur", "report", "differential", "site"} and "phase" not in set(pairs[first == "m2"].kind)
    assert pairs[(first == "m1") & (pairs.kind == "phase")].response.str.contains("holosystolic").all()
    assert not pairs[first.str.startswith("m")].kind.eq("mismatch").any() and all({i[0] for i in ids} in ({"m"}, {"h"}, {"l"}) for ids in pairs.recording_ids)
    report = pairs[(first == "m2") & (pairs.kind == "report")].response
    assert report.str.contains("Heart sounds: a fourth heart sound. Vesicular breath sounds, no wheezes or crackles.", regex=False).all()
    assert pairs[(first == "m3") & (pairs.kind == "findings")].response.str.contains("o wheezes, crackles or murmur").all()
    assert not pairs[first.str.startswith("m")].instruction.str.contains("this (?:heart|lung) (?:sound|recording)").any()


def test_a_verdict_that_its_findings_contradict_is_asked_alone():
    innocent, silent = recording("w1", "p", findings=["mid systolic murmur"]) | {"binary": "normal"}, recording("w2", "q", Murmur="Absent") | {"binary": "abnormal"}
    pairs = asked([innocent, silent, recording("w3", "r", findings=["murmur"])])
    by = pairs.groupby(pairs.recording_ids.str[0]).kind.agg(set)
    safe = {"unanswerable", "treatment", "mismatch"}
    assert by["w1"] - safe == {"verdict"} and by["w2"] - safe == {"verdict", "murmur"} and "report" in by["w3"]


def broken(*forms, **known): raise IndexError("list index out of range")


def test_a_pair_that_fails_its_check_is_left_out_and_the_rest_is_kept(table, pairs, monkeypatch):
    monkeypatch.setitem(grammar._ANSWERS, "report", broken)
    kept, left_out = make_pairs(table, 1, 0)
    assert kept.pair_id.str.rsplit(":", n=2).str[0].tolist() == pairs[pairs.task != "reporting"].pair_id.str.rsplit(":", n=2).str[0].tolist() and list(left_out) == ["pair_id", "kind", "question", "answer", "evidence", "why"]
    assert set(left_out.pair_id) == set(pairs[pairs.task == "reporting"].pair_id) and set(left_out.kind) == {"report"} and set(left_out.why) == {"IndexError: list index out of range"}
    assert left_out.question.ne("").all() and all(json.loads(e)["asked"] == "report" for e in left_out.evidence)
    with pytest.raises(StethoError, match="does not read back as .*IndexError"): synthesize(table, 1, 0)
    monkeypatch.setattr(grammar, "_ANSWERS", dict.fromkeys(grammar._ANSWERS, lambda f, pick, rng, **about: "It rains."))
    kept, left_out = make_pairs(table.assign(binary=table.binary), 1, 0)
    assert set(kept.task) == {"comparison"} | ({"location"} & set(kept.task)) and left_out.why.str.len().gt(0).all()
    assert without_pairs(table, kept.head(0), left_out).why.unique().tolist() == ["every pair fails its check"]


def test_the_stage_goes_on_without_a_pair_that_fails_its_check_and_tells(table, tmp_path, capsys):
    run = Run(tmp_path/"run", PROFILES["smoke"])
    run.folder.mkdir()
    for site, said in (("intercostal space 4", "fail their check and are left out"), (table.site[0], "0 pairs left out")):
        write_table(change(table.reset_index(drop=True), "site", site), run/"recordings.parquet", RECORDINGS)
        pairs, listed = instructions.__wrapped__(run), run/"stethobench.bad.csv"
        assert said in capsys.readouterr().out and listed.exists() == ("fail" in said) and len(pd.read_parquet(run/"stethobench.parquet")) == len(pairs) > 300
