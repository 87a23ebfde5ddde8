"The reader of answers: every rule by hand, then what the grammar says of random labels is accepted and what is made wrong in it is found"
import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stetholm.bench.differential import CAUSES, valve_of
from stetholm.bench.facts import Facts, evidence
from stetholm.bench.grammar import DRUGS, OTHER_ORGAN, UNANSWERABLE
from stetholm.bench.grammar import ask, respond
from stetholm.bench.planted import ERRORS
from stetholm.bench.reader import faults, is_right, read
from stetholm.data.vocabulary import DIAGNOSES, FINDINGS, SITES

ASSERTED = {  # what a text asserts: {finding, verdict or other thing: (holds, *details)}
    # negation
    "There are wheezes.": {"wheeze": ("yes",)},
    "There are no wheezes.": {"wheeze": ("no",)},
    "No wheezes, crackles or rhonchi.": {"wheeze": ("no",), "crackle": ("no",), "rhonchi": ("no",)},
    "Neither wheezes nor stridor.": {"wheeze": ("no",), "stridor": ("no",)},
    "Crackles are absent.": {"crackle": ("no",)},
    "A wheeze is not heard.": {"wheeze": ("no",)},
    "Murmur: none.": {"murmur": ("no",)},
    "Free of crackles.": {"crackle": ("no",)},
    "No wheezes but there are crackles.": {"wheeze": ("no",), "crackle": ("yes",)},
    "There is no murmur; a third heart sound is heard.": {"murmur": ("no",), "third heart sound": ("yes",)},
    "No murmur. Ejection click.": {"murmur": ("no",), "click": ("yes",)},
    "Clear, without rales.": {"crackle": ("no",)},
    # what has other names
    "Crepitations.": {"crackle": ("yes",)},
    "S3 and S4.": {"third heart sound": ("yes",), "fourth heart sound": ("yes",)},
    "Heart block.": {"AV block": ("yes",)},
    "A pansystolic murmur.": {"murmur": ("yes", "holosystolic")},
    # verdicts
    "Normal.": {"normal": ("yes",)},
    "This is not normal.": {"normal": ("no",)},
    "Not an abnormal recording.": {"abnormal": ("no",)},
    "Normal breath sounds.": {},
    # uncertainty
    "Possible wheezes.": {"wheeze": ("maybe",)},
    "Crackles cannot be excluded.": {"crackle": ("maybe",)},
    "It may be asthma.": {"asthma": ("maybe",)},
    "The diagnosis is asthma.": {"asthma": ("yes",)},
    "The patient has pneumonia.": {"pneumonia": ("yes",)},
    "Asthma fits.": {"asthma": ("maybe",)},
    "This is not asthma.": {"asthma": ("no",)},
    # timing
    "Inspiratory crackles.": {"crackle": ("yes", "inspiration")},
    "Crackles in inspiration.": {"crackle": ("yes", "inspiration")},
    "Wheezes in inspiration and expiration.": {"wheeze": ("yes", "inspiration", "expiration")},
    "The murmur is early diastolic.": {"murmur": ("yes", "early diastolic")},
    "Expiratory wheezes and coarse crackles.": {"wheeze": ("yes", "expiration"), "crackle": ("yes", "coarse")},
    # severity and character
    "A holosystolic murmur, grade III/VI, high in pitch, plateau in shape.": {"murmur": ("yes", "holosystolic", "grade 3", "pitch high", "shape plateau")},
    "A soft murmur.": {"murmur": ("yes", "loudness soft")},
    "Fine crackles.": {"crackle": ("yes", "fine")},
    # quality, refusal
    "Inadequate; please record it again.": {"poor": ("yes",)},
    "The quality is adequate.": {"adequate": ("yes",)},
    "I cannot judge this.": {"declined": ("yes",)},
    # what is nothing of ours
    "Blood flows and the air moves.": {},
    "": {},
}


@pytest.mark.parametrize("text", ASSERTED)
def test_what_a_text_asserts(text):
    assert {s.what: (s.holds, *s.details) for s in read(text) if s.kind != "place"} == ASSERTED[text]


def test_sides_and_sites():
    places = lambda text: [s.what for s in read(text) if s.kind == "place"]
    assert places("Wheezes at the posterior left lower chest.") == ["posterior", "left", "lower"]
    assert places("It is loudest at the apex.") == ["loudest", "mitral area"] and places("Heard at the right upper sternal border.") == ["aortic area"]
    assert places("The left ventricle and the right lower lobe; upper airway.") == []  # parts of the body, not places of a stethoscope


def test_two_recordings_are_kept_apart():
    about = lambda text: {(s.about, s.what): s.holds for s in read(text) if s.kind in ("finding", "verdict")}
    assert about("The first has wheezes, while the second has no wheezes.") == {("first", "wheeze"): "yes", ("second", "wheeze"): "no"}
    assert about("Both have a murmur.") == {("first", "murmur"): "yes", ("second", "murmur"): "yes"}
    assert about("Neither has crackles.") == {("first", "crackle"): "no", ("second", "crackle"): "no"}
    assert about("Only the first is abnormal.") == {("first", "abnormal"): "yes", ("second", "abnormal"): "no"}


def test_numbers_with_their_units():
    numbers = lambda text: [(*s.details, s.what) for s in read(text) if s.kind == "number"]
    assert numbers("Wheezes from 1.2 to 3.4 s.") == [("1.2", "wheeze", "s"), ("3.4", "wheeze", "s")]
    assert numbers("Crackles twice, wheezes 14 times.") == [("2", "crackle", "times"), ("14", "wheeze", "times")]
    assert numbers("About 72 a minute.") == [("72", "", "a minute")] and numbers("A 64-year-old.") == [("64", "", "years")]
    assert numbers("1. Asthma. 2. COPD.") == numbers("Two beats where one is expected.") == []  # a list's own numbers, and no count of findings
    assert numbers("There are three coarse crackles.") == [("3", "", "")]


CRACKLES = Facts("r1", "lung", "abnormal", ("fine crackle",), "posterior left lower", age="50", phases=(("crackle", "inspiration"),), events=(("fine crackle", 1., 1.2), ("fine crackle", 4., 4.3)), quality="adequate", looked_for=("crackle", "wheeze"))
CLEAR = Facts("r2", "lung", "normal", (), "posterior right lower", looked_for=("crackle", "wheeze"))
MURMUR = Facts("r3", "heart", "abnormal", ("holosystolic murmur",), "mitral valve area", rate=90, murmur=(("grade", "2"),), heard_at=("mitral valve area", "tricuspid valve area"), loudest="mitral valve area", looked_for=("murmur",))
QUIET = Facts("r4", "heart", "normal", (), "aortic valve area", looked_for=("murmur",))
ONLY = Facts("r5", "lung", "abnormal", None)
NOISE = Facts("r6", "lung", quality="poor")
WRONG = [  # facts, what was asked, answer, kinds of fault
    ([CRACKLES], "verdict", "Abnormal.", set()),
    ([CRACKLES], "verdict", "Normal.", {"polarity"}),
    ([CRACKLES], "verdict", "Fine crackles.", set()),
    ([CRACKLES], "verdict", "It is a recording.", {"dropped"}),
    ([CRACKLES], "verdict", "I cannot tell.", {"refusal", "dropped"}),
    ([CLEAR], "verdict", "Abnormal, with wheezes.", {"polarity", "added"}),
    ([CLEAR], "verdict", "No wheezes.", set()),
    ([ONLY], "verdict", "Abnormal, with no wheezes.", {"added"}),  # nobody said so
    ([CRACKLES], "findings", "Fine crackles in inspiration.", set()),
    ([CRACKLES], "findings", "Crackles.", set()),
    ([CRACKLES], "findings", "Coarse crackles.", {"detail"}),
    ([CRACKLES], "findings", "Fine crackles in expiration.", {"timing"}),
    ([CRACKLES], "findings", "Fine crackles and wheezes.", {"added"}),
    ([CRACKLES], "findings", "No wheezes.", {"dropped"}),
    ([CRACKLES], "findings", "Possibly crackles.", {"certainty", "dropped"}),
    ([CRACKLES], "findings", "Fine crackles on the left.", set()),
    ([CRACKLES], "findings", "Fine crackles on the right.", {"side"}),
    ([CRACKLES], "findings", "Fine crackles at the posterior left upper chest.", {"place"}),
    ([CRACKLES], "findings", "Fine crackles from 1.0 to 1.2 s.", set()),
    ([CRACKLES], "times", "Fine crackles from 1.0 to 1.2 and from 4.0 to 4.3 s.", set()),
    ([CRACKLES], "times", "Fine crackles from 2.0 to 2.2 s.", {"timing"}),
    ([CRACKLES], "times", "Fine crackles.", {"dropped"}),
    ([CRACKLES], "count", "Fine crackles twice.", set()),
    ([CRACKLES], "count", "Fine crackles 3 times.", {"number"}),
    ([CRACKLES], "phase", "Fine crackles in inspiration.", set()),
    ([CRACKLES], "phase", "Fine crackles.", {"dropped"}),
    ([CRACKLES], "report", "Fine crackles. Impression: abnormal.", set()),
    ([CRACKLES], "report", "Fine crackles.", {"dropped"}),
    ([CRACKLES], "findings", "Fine crackles, as in SPRSound.", {"leak"}),
    ([CRACKLES], "findings", "Fine crackles in r1.", {"leak"}),
    ([CRACKLES], "quality", "The quality is adequate.", set()),
    ([CRACKLES], "quality", "Inadequate: too noisy.", {"quality"}),
    ([CRACKLES], "differential", "Most likely pneumonia: fine crackles fit.", set()),
    ([CRACKLES], "differential", "The patient has pneumonia: fine crackles.", {"certainty"}),
    ([CRACKLES], "differential", "Most likely asthma: fine crackles fit.", {"diagnosis"}),
    ([CRACKLES], "differential", "Fine crackles.", {"dropped"}),
    ([MURMUR], "murmur", "Yes, there is a holosystolic murmur.", set()),
    ([MURMUR], "murmur", "No.", {"polarity"}),
    ([MURMUR], "findings", "A mid systolic murmur.", {"timing"}),
    ([MURMUR._replace(findings=("early systolic murmur", "early diastolic murmur"))], "findings", "An early systolic and an early diastolic murmur.", set()),
    ([MURMUR._replace(findings=("early systolic murmur", "early diastolic murmur"))], "findings", "An early systolic murmur.", {"dropped"}),
    ([MURMUR], "findings", "A holosystolic murmur, grade 2 of 6.", set()),
    ([MURMUR], "findings", "A holosystolic murmur, grade 4 of 6.", {"severity"}),
    ([MURMUR], "report", "Rate: about 90 a minute. A holosystolic murmur. Impression: abnormal.", set()),
    ([MURMUR], "report", "Rate: about 120 a minute. A holosystolic murmur. Impression: abnormal.", {"number"}),
    ([MURMUR], "site", "A holosystolic murmur at the apex.", set()),
    ([MURMUR], "site", "A holosystolic murmur at the aortic area.", {"place"}),
    ([MURMUR], "spread", "It is heard at 2 areas and loudest at the apex.", set()),
    ([MURMUR], "spread", "It is loudest at the aortic area.", {"place", "dropped"}),
    ([QUIET], "murmur", "No, there is no murmur.", set()),
    ([QUIET], "murmur", "Yes.", {"polarity"}),
    ([CRACKLES, CLEAR], "patients", "The first has fine crackles; the second is normal.", set()),
    ([CRACKLES, CLEAR], "patients", "The first is normal; the second has fine crackles.", {"polarity", "added", "dropped"}),
    ([CRACKLES, CLEAR], "patients", "Both are normal.", {"polarity", "dropped"}),
    ([CRACKLES, CLEAR], "patients", "There are fine crackles.", {"added", "dropped"}),  # in which of the two?
    ([MURMUR, MURMUR._replace(recording_id="r7", site="aortic valve area")], "loudest", "It is louder in the first, at the mitral area.", set()),
    ([MURMUR, MURMUR._replace(recording_id="r7", site="aortic valve area")], "loudest", "It is louder in the second, at the aortic area.", {"place"}),
    ([MURMUR, MURMUR._replace(recording_id="r7", site="aortic valve area")], "loudest", "It is louder in the second, at the apex.", {"polarity"}),
    ([MURMUR, MURMUR._replace(recording_id="r7", site="aortic valve area")], "loudest", "The second recording is louder.", {"polarity"}),
    ([MURMUR._replace(site="aortic valve area"), MURMUR._replace(recording_id="r7")], "loudest", "It is loudest in the second.", set()),
    ([MURMUR._replace(site="aortic valve area"), MURMUR._replace(recording_id="r7")], "loudest", "The murmur is not louder in the first; they are alike.", {"dropped"}),
    ([NOISE], "noise", "I cannot judge this: it is too noisy.", set()),
    ([NOISE], "noise", "Normal.", {"refusal", "added"}),
    ([CLEAR], "unanswerable", "I cannot tell the blood pressure.", set()),
    ([CLEAR], "unanswerable", "It is high.", {"refusal"}),
    ([CLEAR], "treatment", "I cannot advise on drugs, but there are wheezes.", {"added"}),
]


def proof_of(asked, known):
    "The evidence of a hand-made answer, with every field it might rest on"
    more = {"causes": ["pneumonia", "lung fibrosis", "heart failure"]} if asked == "differential" else {}
    return evidence(asked, known, [f for f in Facts._fields if f not in ("recording_id", "domain", "binary", "findings", "site")], **more)


@pytest.mark.parametrize("known, asked, text, kinds", WRONG, ids=[f"{a}: {t}" for _, a, t, _ in WRONG])
def test_faults_by_hand(known, asked, text, kinds): assert {f.kind for f in faults(text, proof_of(asked, known))} == kinds


def test_right_is_what_was_asked_and_no_more():
    "A verdict may be right with a wrong finding beside it; a list of findings may not"
    assert is_right("Abnormal, with wheezes.", proof_of("verdict", [CRACKLES])) and not is_right("Wheezes.", proof_of("findings", [CRACKLES]))
    assert not is_right("Normal. There are wheezes.", proof_of("verdict", [CLEAR])) and not is_right("", proof_of("verdict", [CLEAR])) and not is_right("Fine crackles.", proof_of("count", [CRACKLES]))


def test_a_word_in_front_of_another_or_ten_thousand_of_them_are_read():
    assert read("Wheezes. " * 10_000)[:1] == read("Wheezes.") and len(read("Wheezes. " * 10_000)) == 10_000
    assert read("Giemen und Brummen über beiden Lungen.") == () and read("\x00\udcff") == ()


DOMAINS = {d: [t for t, f in FINDINGS.items() if f.domain == d] for d in ("heart", "lung")}
PLACED = {"heart": sorted({s for s in SITES["circor"].values() if s and valve_of(s)}), "lung": ["trachea", "posterior left lower", "posterior right upper", "anterior right middle", "left lateral"]}


@st.composite
def known(draw, findings=None):
    "Facts of any recording that labels could describe"
    domain = draw(st.sampled_from(["heart", "lung"]))
    found = findings if findings is not None else tuple(draw(st.lists(st.sampled_from(DOMAINS[domain]), max_size=3, unique=True)))
    found = tuple(t for t in found if t != FINDINGS[t].family or all(FINDINGS[o].family != t for o in found if o != t))  # no label says "murmur" beside what kind it is
    families = sorted({FINDINGS[t].family for t in found})
    site = draw(st.none() | st.sampled_from(PLACED[domain]))
    phases = tuple((f, p) for f in families if f in ("wheeze", "crackle", "rhonchi") for p in draw(st.sampled_from([("inspiration",), ("expiration",), ("inspiration", "expiration")]))) if draw(st.booleans()) else ()
    starts = {t: draw(st.lists(st.integers(0, 80), min_size=1, max_size=6, unique=True)) for t in found}
    events = tuple(sorted(((t, s/4, s/4 + .2) for t, at in starts.items() for s in at), key=lambda e: e[1]))
    murmurs = [t for t in found if FINDINGS[t].family == "murmur"]
    graded = len(murmurs) == 1 and "systolic" in murmurs[0] and draw(st.booleans())
    at = tuple(draw(st.lists(st.sampled_from(PLACED["heart"]), min_size=1, max_size=4, unique=True))) if murmurs else ()
    murmur = (("grade", str(draw(st.integers(1, 6)))), ("shape", draw(st.sampled_from(["plateau", "diamond", "decrescendo"]))), ("pitch", draw(st.sampled_from(["low", "medium", "high"])))) if graded else ()
    if murmurs == ["murmur"]:
        murmur = draw(st.sampled_from([(), (("loudness", "soft"),), (("loudness", "loud"),)]))
        phases += tuple(("murmur", part) for part in draw(st.sampled_from([(), ("systole",), ("diastole",), ("systole", "diastole")])))
    return Facts(draw(st.sampled_from(["a1", "b2"])), domain, "abnormal" if found else "normal", found, site, draw(st.none() | st.sampled_from(["0.5", "4", "17", "61", "Child", "Infant"])), draw(st.sampled_from([None, "Female", "Male"])), "Digital stethoscope", 20.,
                 draw(st.sampled_from([None, "adequate"])), phases, events or (() if not found else None), bool(phases), draw(st.none() | st.integers(40, 180)) if domain == "heart" else None, murmur, at, draw(st.sampled_from(at)) if at else None,
                 draw(st.none() | st.sampled_from(sorted(DIAGNOSES))), tuple(sorted({*families, *draw(st.lists(st.sampled_from(sorted({FINDINGS[t].family for t in DOMAINS[domain]})), min_size=1, max_size=3))})))


def fitting(f):
    "The kinds of question that the facts support"
    murmurs = any(FINDINGS[t].family == "murmur" for t in f.findings)
    return ["verdict", "findings", "present", "report", "reasoning", "differential", "mismatch", "unanswerable", "treatment"] + ["murmur"]*(f.domain == "heart") + ["quality"]*bool(f.quality) + ["times", "count"]*(f.events is not None) + \
           ["phase"]*(f.findings == () or {x for x, _ in f.phases} == {FINDINGS[t].family for t in f.findings} or (murmurs and len({FINDINGS[t].family for t in f.findings}) == 1 and "murmur" not in f.findings)) + ["site"]*bool(f.site) + ["spread"]*murmurs + ["character"]*(bool(f.murmur) or f.findings == ())


def about(kind, f, draw):
    return {"family": draw(st.sampled_from(f.looked_for))} if kind == "present" else {"about": draw(st.sampled_from({"unanswerable": sorted(UNANSWERABLE), "treatment": DRUGS, "mismatch": OTHER_ORGAN[f.domain]}[kind]))} if kind in ("unanswerable", "treatment", "mismatch") else {}


@given(st.data(), known(), st.integers(0, 2**32 - 1))
@settings(max_examples=800, deadline=None, derandomize=True)
def test_what_the_grammar_says_of_any_labels_is_accepted_and_what_is_made_wrong_in_it_is_found(data, f, seed):
    rng, kind = np.random.default_rng(seed), data.draw(st.sampled_from(fitting(f)))
    answer, proof = respond(kind, [f], rng, **about(kind, f, data.draw))
    assert faults(answer, proof) == () and is_right(answer, proof), (answer, proof)
    error = data.draw(st.sampled_from(sorted(ERRORS)))
    wrong = ERRORS[error](answer, json.loads(proof), rng)
    assume(wrong not in (None, answer))
    assert faults(wrong, proof), (error, answer, wrong, proof)


@given(st.data(), known(), known(), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_two_recordings_of_any_labels(data, a, b, seed):
    assume(a.domain == b.domain)
    kind, rng = data.draw(st.sampled_from(["patients", "sites"])), np.random.default_rng(seed)
    b = b._replace(recording_id="c3", site=a.site if kind == "patients" else b.site)
    answer, proof = respond(kind, [a, b], rng)
    assert faults(answer, proof) == () and is_right(answer, proof), (answer, proof)
    if {FINDINGS[t].family for t in a.findings} != {FINDINGS[t].family for t in b.findings}:
        wrong = answer.translate(str.maketrans({})).replace("first", "\0").replace("second", "first").replace("\0", "second")
        if "heart sound" not in wrong: assert faults(wrong, proof), (answer, wrong, proof)


@given(known(), st.sampled_from(["verdict", "findings", "report", "differential"]), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_questions_of_any_labels_do_not_give_the_answer_away(f, kind, seed):
    "Nothing that a question asserts is one of the findings, nor a verdict"
    task = {"verdict": "classification", "findings": "detection", "report": "reporting", "differential": "differential"}[kind]
    question, form = ask(task, kind, [f], np.random.default_rng(seed))
    assert not {s.what for s in read(question) if s.kind == "finding"} & {FINDINGS[t].family for t in f.findings} and form.startswith(f"{task}/{kind}/")
    assert not any(f.kind == "leak" for f in faults(question, proof_of(kind, [f]))) and "{" not in question


def test_every_cause_of_the_table_is_read():
    assert {s.what for name in CAUSES for s in read(f"It may be {name}.") if s.kind == "diagnosis"} == {*CAUSES} - {n for n in CAUSES if any(s.kind == "finding" for s in read(n))}
