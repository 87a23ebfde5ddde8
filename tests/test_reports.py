"Inputs as users reported them, and what comes out: one test or more for each row of the list; `python -m pytest tests -m report` prints them side by side"
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from scipy.signal import correlate

from stetholm.bench.pairs import all_facts, kinds_of
from stetholm.core.config import StethoError
from stetholm.core.run import open_run
from stetholm.data.sources import read_source, scan
from stetholm.model.processor import StethoLMFeatureExtractor
from stetholm.sound.reading import AudioFile

SECONDS = 10.


@pytest.fixture(scope="module")
def made(reports, tmp_path_factory):
    "The inputs that the list's own program makes"
    folder = tmp_path_factory.mktemp("made")
    subprocess.run([sys.executable, reports/"make_inputs.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture
def outcome(record_property): return lambda *words: record_property("outcome", " ".join(map(str, words)))


def test_every_row_of_the_list_is_tested(listed):
    words = {w for p in Path(__file__).parent.rglob("*.py") for w in re.findall(r'report\("(.*?)"\)', p.read_text(encoding="utf-8"))}
    assert len(listed) > 20 and {w: sum(w in given for given, _ in listed) for w in words} == dict.fromkeys(words, 1)
    assert [given for given, _ in listed if not any(w in given for w in words)] == []


# published data sets as they are

@pytest.fixture(scope="module")
def circor(reports): return read_source("circor", reports/"CirCor")


@pytest.mark.report("`data scan circor CirCor`")
def test_a_tsv_under_another_name_costs_heart_states_only(circor, outcome):
    table, found = circor
    without = table[table.events.map(len) == 0].recording_id.tolist()
    outcome(len(table), "recordings;", *without, "without heart states;", *found.notes)
    assert len(table) == 6 and without == ["circor_50782_MV_1"] and "annotation file missing" in table.set_index("recording_id").extra[without[0]]


@pytest.mark.report("then `synthesize` on that table")
def test_states_listed_twice_are_one_event_and_told(reports, stetholm, outcome):
    scanned, audit, made = stetholm("data", "scan", "circor", reports/"CirCor"), stetholm("data", "audit", "recordings.parquet"), stetholm("synthesize", "recordings.parquet")
    twice = next(line for line in audit.stdout.splitlines() if line.startswith("note: 2 event listed twice"))
    outcome(made.stdout.splitlines()[0], "/", twice)
    assert scanned.returncode == made.returncode == 0, made.stderr  # the audit of six recordings ends with an error about their splits
    events = pd.read_parquet(stetholm.cwd/"recordings.parquet").events
    assert all(len({(e["label"], e["start_s"], e["end_s"]) for e in of}) == len(of) for of in events)


@pytest.mark.report("BMD-HS at GitHub HEAD")
def test_recordings_without_a_row_stay(tmp_path, outcome):
    names = [f"{disease}_{n}_{posture}_{valve}" for disease, n in (("N", "003"), ("AS", "007"), ("MD", "022")) for posture in ("sup", "sit") for valve in ("Mit", "Tri", "Pul", "Aor")]
    (tmp_path/"train").mkdir()
    for i, name in enumerate(names): soundfile.write(tmp_path/f"train/{name}.wav", .1*np.random.default_rng(i).standard_normal(400), 4000)
    (tmp_path/"train.csv").write_text("patient_id,AS,AR,MR,MS,N\npatient_003,0,0,0,0,1\npatient_007,1,0,0,0,0\n")
    table = scan("bmd_hs", tmp_path)
    told = [i for i, e in zip(table.recording_id, table.extra) if "patient without labels" in e]
    outcome(len(table), "rows,", int(table.binary.isna().sum()), "without labels, told of", len(told))
    assert len(table) == 24 and table.binary.isna().sum() == 8 and told == table.recording_id[table.binary.isna()].tolist()


@pytest.mark.report("`84690`, `50734`")
def test_a_place_that_names_no_area_is_not_asked_for(reports, tmp_path, outcome):
    def asked(folder): return {i: kinds_of(f).get("location") for i, f in all_facts(scan("circor", folder)).items() if "84690" in i}
    shutil.copytree(reports/"CirCor", tmp_path/"c")
    table = (tmp_path/"c/training_data.csv").read_text()
    assert (row := next(line for line in table.splitlines() if line.startswith("84690,"))).count(",MV,Holosystolic") == 1
    (tmp_path/"c/training_data.csv").write_text(table.replace(row, row.replace(",MV,Holosystolic", ",Phc,Holosystolic")))
    listed, elsewhere = asked(reports/"CirCor"), asked(tmp_path/"c")
    outcome("most audible at MV, as here:", listed, "; at Phc:", elsewhere)
    assert list(listed.values()) == [["site", "spread"]] and list(elsewhere.values()) == [["site"]]


@pytest.mark.report("`50054` and `68303`")
def test_two_visits_that_disagree_are_not_compared(reports, stetholm, outcome):
    stetholm("data", "scan", "circor", reports/"CirCor")
    made = stetholm("synthesize", "recordings.parquet")
    pairs = pd.read_parquet(next(stetholm.cwd.glob("*stethobench*.parquet")))
    across = [ids for ids in pairs.recording_ids if {"50054", "68303"} <= {i.split("_")[1] for i in ids}]
    outcome(made.stdout.splitlines()[0], ";", len(across), "pairs of both visits")
    assert made.returncode == 0 and len(pairs) and across == []


@pytest.mark.report("`synthesize` on `HLS-CMDS`")
def test_no_phase_is_asked_where_none_is_known(reports, stetholm, outcome):
    stetholm("data", "scan", "hlscmds", reports/"HLS-CMDS")
    made = stetholm("synthesize", "recordings.parquet", "--per-task", "6")  # a round asks for the phase or for a finding
    pairs = pd.read_parquet(next(stetholm.cwd.glob("*stethobench*.parquet")))
    phases = pairs[pairs.pair_id.str.contains("M0008.*:phase:")].response.tolist()
    outcome(made.stdout.splitlines()[0], "; phase of M0008:", *phases)
    assert made.returncode == 0 and len(pairs) > 40 and phases and all("early systolic" in p and "rub" not in p for p in phases)


# audio

AS_LONG = ("sox_pipe", "arecord_stopped", "length_of_file", "zero_length", "odd_chunk")

@pytest.mark.report("`sox_pipe.wav`")
def test_headers_of_streams(made, outcome, tmp_path):
    for name in AS_LONG: (tmp_path/f"{name}.wav").write_bytes((made/f"wav/{name}.wav").read_bytes())
    (tmp_path/"t.csv").write_text("path,labels,domain\n" + "".join(f"{name}.wav,normal,heart\n" for name in AS_LONG))
    table = scan("folder", tmp_path)
    outcome(*(f"{n} {s:.1f} s{' (noted)' if 'unusual audio' in e else ''};" for n, s, e in zip(AS_LONG, table.duration_s, table.extra)))
    assert table.duration_s.round(1).tolist() == [SECONDS]*len(AS_LONG) and all("header" in e for e in table.extra[:4])


@pytest.mark.report("`opposite.wav`")
def test_silence_and_channels_that_differ(made, stetholm, smoke_run, outcome):
    question, model = "Is this heart sound normal or abnormal?", ("--model", smoke_run.folder/"dpo")
    silence = stetholm("ask", made/"wav/silence.wav", question, *model)
    others = stetholm("ask", made/"wav/opposite.wav", made/"wav/good.wav", question, *model)
    rest = stetholm("ask", made/"wav/ecg_right.wav", made/"wav/right_silent.wav", question, *model)
    short = lambda text: text.replace(str(made/"wav") + "/", "").strip()
    outcome(short(silence.stderr), "/", short(others.stderr), "/", short(rest.stderr))
    one = [line.split()[1] for line in others.stdout.splitlines() if line.startswith("P(abnormal) ")]
    assert silence.returncode == 2 and "silence" in silence.stderr and not silence.stdout
    assert others.returncode == rest.returncode == 0 and len(set(one)) == 1 and "opposite.wav: its 2 channels differ" in others.stderr
    assert all(f"{name}: its 2 channels differ" in rest.stderr for name in ("ecg_right.wav", "right_silent.wav"))


@pytest.mark.report("`no_xing.mp3`")
def test_an_mp3_without_its_length(made, tmp_path, outcome):
    (tmp_path/"a.mp3").write_bytes((made/"wav/no_xing.mp3").read_bytes())
    (tmp_path/"t.csv").write_text("path,labels,domain\na.mp3,normal,heart\n")
    seconds, good = scan("folder", tmp_path).duration_s[0], np.repeat(soundfile.read(made/"wav/good.wav")[0], 11)
    with AudioFile(tmp_path/"a.mp3") as f: wave = f.read()
    end = good[-2*44_100:]
    lag = int(correlate(wave, end, "valid").argmax())
    alike = np.corrcoef(wave[lag:lag + len(end)], end)[0, 1]
    outcome(f"{seconds:.2f} s, the last two seconds of the 10 s among them (correlation {alike:.3f}): what was cut with the header is not in the file")
    assert 9.6 < seconds < SECONDS and len(wave) == round(seconds*44_100) and alike > .98 and lag > 7.5*44_100


@pytest.mark.report("`half.mp3`")
def test_half_an_mp3_is_refused_by_both(made, stetholm, smoke_run, outcome):
    (stetholm.cwd/"a.mp3").write_bytes((made/"wav/half.mp3").read_bytes())
    (stetholm.cwd/"t.csv").write_text("path,labels,domain\na.mp3,normal,heart\n")
    asked, scanned = stetholm("ask", "a.mp3", "Normal?", "--model", smoke_run.folder/"dpo"), stetholm("data", "scan", "folder", ".")
    outcome("ask:", asked.stderr.splitlines()[-1], "/ scan:", scanned.stderr.splitlines()[-1])
    assert (asked.returncode, scanned.returncode) == (2, 2) and all("a.mp3 is cut short" in d.stderr for d in (asked, scanned))


@pytest.mark.report("`iphone.m4a`")
def test_a_recording_of_a_phone(made, stetholm, outcome):
    (stetholm.cwd/"a.m4a").write_bytes((made/"wav/iphone.m4a").read_bytes())
    (stetholm.cwd/"t.csv").write_text("path,labels,domain\na.m4a,normal,heart\n")
    done = stetholm("data", "scan", "folder", ".")
    outcome(done.stderr.strip())
    assert done.returncode == 2 and "MPEG-4 audio" in done.stderr and "ffmpeg -i" in done.stderr


# tables and folders

@pytest.mark.parametrize("name", [
    pytest.param("csv_multiline", marks=pytest.mark.report("`csv_multiline`")), pytest.param("csv_vertical_tab", marks=pytest.mark.report("`csv_multiline`")),
    pytest.param("csv_semicolon", marks=pytest.mark.report("`csv_semicolon`")), pytest.param("csv_decomposed", marks=pytest.mark.report("`csv_decomposed`"))])
def test_tables_of_every_kind(made, name, outcome):
    table = scan("folder", made/"folders"/name)
    outcome(name, len(table), "recordings, labels", *table.findings)
    assert table.findings.tolist() == [[], ["murmur"], []][:len(table)] and len(table) == (2 if name == "csv_decomposed" else 3)


@pytest.mark.report("`links_to_files`")
@pytest.mark.parametrize("name, target", [("links_to_files", "blobs/a"), ("link_to_folder", "store/a.wav")])
def test_links(made, name, target, outcome, monkeypatch, tmp_path):
    monkeypatch.setenv("STETHOLM_RUNS", str(tmp_path))
    folder = made/"folders"/name
    before, table = open_run("smoke", recordings=str(folder)).fingerprint, scan("folder", folder)
    file = made/"folders"/target
    sound = file.read_bytes()
    try:
        file.write_bytes(sound + b"more")
        after = open_run("smoke", recordings=str(folder)).fingerprint
    finally: file.write_bytes(sound)
    rows = (folder/"t.csv").read_text()
    try:
        (folder/"t.csv").write_text(rows.replace("a.wav", "../store/a.wav", 1))
        with pytest.raises(StethoError, match="lies outside the folder"): scan("folder", folder)
    finally: (folder/"t.csv").write_text(rows)
    outcome(name, len(table), "recordings; `..` is refused; another fingerprint after a change behind the link")
    assert len(table) == 3 and before != after


@pytest.mark.report("the feature extractor on arrays")
def test_arrays_of_every_kind(outcome):
    front, wave = StethoLMFeatureExtractor(4000, 64, 40., 2000., 256, 64, 5., 3), (.1*np.random.default_rng(0).standard_normal(40000)).clip(-.9, .9).astype("float32")
    kinds = {"(n, 2)": np.stack([wave, wave], 1), "(1, n)": wave[None], "int16": np.round(wave*2**15).astype(np.int16), "dict of datasets": {"array": wave, "sampling_rate": 4000, "path": None}}
    far = {name: float((front(audio) - front(wave)).abs().max()) for name, audio in kinds.items()}
    with pytest.raises(StethoError, match="not numbers") as refused: front(np.where(np.arange(len(wave)) == 9, np.nan, wave))
    outcome(*(f"{name}: {db:.2f} dB from one channel;" for name, db in far.items()), "NaN:", refused.value)
    assert max(far.values()) < 1 and {name for name, db in far.items() if db} <= {"int16"}
