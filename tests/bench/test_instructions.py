"StethoBench of hand-made recordings: which questions labels allow, the same pairs however they are made, no patient in two splits, and what cannot be asked about"
import json
import re
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from stetholm.core.config import StethoError
from stetholm.bench.facts import Facts
from stetholm.bench.grammar import TASKS
from stetholm.bench.grammar import QUESTIONS, ask, hide_unstated, respond
from stetholm.bench.pairs import PAIRS, all_facts, kinds_of, without_pairs
from stetholm.bench.pairs import synthesize
from stetholm.phantom.patients import make_phantom
from stetholm.bench.planted import ERRORS, detection, plant
from stetholm.bench.reader import faults, is_right
from stetholm.data.sources import scan


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
