"The real recordings: every row and file read as it is, and the first stages run on a part of them"
import json
import os
import shutil
import time

import librosa
import numpy as np
import pandas as pd
import pytest
import torch

from stetholm.sound.audio import load_audio, log_mel, recording_features
from stetholm.core.config import PROFILES, STAGES
from stetholm.core.files import file_hash
from stetholm.bench.grammar import TASKS
from stetholm.bench.planted import ERRORS, detection, plant
from stetholm.bench.reader import faults, is_right
from stetholm.data.shift import spectra
from stetholm.data.sources import scan
from stetholm.data.vocabulary import FINDINGS

SOURCES = {"sprsound", "kauh", "circor", "cinc2016", "hlscmds"}


def listing(folder):
    "Everything in a folder, with sizes and times of change"
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*"))


@pytest.fixture(scope="module")
def cost():
    "Of the commands of `scanned`: processor seconds and the most memory, GiB"
    return {}


@pytest.fixture(scope="module")
def scanned(stetholm_in, recordings, cost):
    "The command in a folder where the recordings were scanned, audited and made into pairs"
    shell, before = stetholm_in("scanned"), listing(recordings)
    for words in (("data", "scan", "stetho-mini", recordings), ("data", "audit", "recordings.parquet", "-o", "."), ("synthesize", "recordings.parquet")):
        running = shell.start(*words)
        said = running.stdout.read()
        _, status, used = os.wait4(running.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, said
        cost[words[0] if words[0] == "synthesize" else words[1]] = used.ru_utime + used.ru_stime, used.ru_maxrss/2**20
    assert listing(recordings) == before
    return shell


@pytest.fixture(scope="module")
def meta(recordings):
    "The pack's own table, as text"
    return pd.read_csv(recordings/"metadata.csv", dtype=str, keep_default_na=False).set_index("recording_id")


@pytest.fixture(scope="module")
def table(scanned): return pd.read_parquet(scanned.cwd/"recordings.parquet").set_index("recording_id", drop=False)


@pytest.fixture(scope="module")
def pairs(scanned): return pd.read_parquet(scanned.cwd/"stethobench.parquet")


def test_scan_keeps_every_recording_of_every_source(table, meta):
    assert len(table) == 1215 and table.index.tolist() == meta.index.tolist()
    assert table.source.value_counts().to_dict() == meta.source.value_counts().to_dict() and set(table.source) == SOURCES
    assert (table.licence == meta.licence).all() and table.licence.ne("").all()
    assert (table.binary.fillna("") == meta.binary).all() and (table.split == meta.split).all() and (table.distribution == meta.distribution).all()
    assert np.allclose(table.duration_s, meta.duration_s.astype(float), atol=1e-3) and (table.sample_rate == meta.sample_rate.astype(int)).all()


def test_scan_hashes_the_files_that_the_pack_lists(table, recordings):
    listed = dict(reversed(line.split(maxsplit=1)) for line in (recordings/"SHA256SUMS").read_text().splitlines())
    listed = {name.strip().removeprefix("./"): digest for name, digest in listed.items()}
    assert all(listed[path.removeprefix(f"{recordings.resolve()}/")] == sha256 for path, sha256 in zip(table.path, table.sha256))


def test_patients_are_in_one_split_and_out_of_distribution_is_only_tested_on(table):
    assert table.groupby("patient_id").split.nunique().max() == 1
    assert set(table[table.distribution == "ood"].source) == {"cinc2016", "hlscmds"} and set(table[table.distribution == "ood"].split) == {"test"}


@pytest.mark.parametrize("spelt, family", [("wheez", "wheeze"), ("rhonchi", "rhonchi"), ("stridor", "stridor"), ("crackle|crepitation", "crackle"), ("pleural rub", "pleural rub"),
                                           ("bronchial", "bronchial breathing"), ("murmur present|systolic|diastolic", "murmur"), ("(?:^|;)s3", "third heart sound"),
                                           ("(?:^|;)s4", "fourth heart sound"), ("fibrillation", "atrial fibrillation"), ("tachycardia", "tachycardia"), ("block", "AV block")])
def test_findings_are_what_the_labels_spell(table, meta, spelt, family):
    heard = table.findings.map(lambda terms: family in {FINDINGS[t].family for t in terms})
    assert heard.sum() and (heard == meta.labels.str.contains(spelt, case=False)).all()


def test_every_event_is_kept_and_a_double_one_becomes_two(table, recordings):
    events = pd.read_csv(recordings/"events.csv")
    assert len(events) == 36_882
    kept = table.events.map(len)
    double = events.label == "Wheeze+Crackle"
    assert kept.sum() == len(events) + double.sum() and double.any()
    want = events.assign(n=1 + double).groupby("recording_id").n.sum().reindex(table.index, fill_value=0)
    assert (kept == want).all()


def test_ten_thousand_recordings_would_take_two_minutes_of_two_processors_and_two_gigabytes(scanned, cost, recordings):
    "A part of them does, where some seconds are for imports"
    part = 1215/10_000
    assert set(cost) == {"scan", "audit", "synthesize"} and all(seconds < 10 + part*2*120 and gib < 1 for seconds, gib in cost.values()), cost
    table, begun = scan("stetho-mini", recordings).iloc[::10], time.process_time()
    assert len(spectra(table, PROFILES["mini"])) == len(table) and time.process_time() - begun < 2 + len(table)/10_000*2*120


def test_audit_finds_the_recordings_clean(scanned, meta):
    card = json.loads((scanned.cwd/"data_card.json").read_text())
    assert card["recordings"] == 1215 and set(card["sources"]) == SOURCES and card["without_verdict"] == (meta.binary == "").sum() == 58


def test_pairs_cover_the_tasks_and_every_recording_with_a_verdict(pairs, table):
    assert set(pairs.task) == set(TASKS) and len(pairs) >= 6_000
    assert set(pairs.recording_ids.explode()) >= set(table[table.binary.notna()].recording_id)
    assert set(pairs[pairs.task == "detection"].recording_ids.explode()) >= set(table[table.findings.map(len) > 0].recording_id)
    counts = pairs.groupby(["task", "dataset"]).size().unstack(fill_value=0)
    assert (counts.drop("location")[["circor", "kauh", "sprsound", "hlscmds"]] > 0).all(axis=None) and counts.cinc2016.gt(0).to_dict() == {t: t in ("classification", "safety") for t in TASKS}  # CinC 2016 gives a verdict and a quality


def test_every_answer_reads_back_as_its_labels(pairs, table):
    assert all(faults(p.response, p.evidence) == () and is_right(p.response, p.evidence) for p in pairs.itertuples())
    for p in pairs.itertuples():
        said = json.loads(p.evidence)["recordings"]
        assert [(r["recording_id"], r["binary"]) for r in said] == [(i, table.binary[i] if pd.notna(table.binary[i]) else None) for i in p.recording_ids]
        assert all(set(r["findings"] or ()) == set(table.findings[r["recording_id"]]) for r in said)


def test_planted_errors_are_found_and_faithful_answers_let_through(pairs):
    found = detection(plant(pairs, 60))
    assert found.errors.sum() >= 300 and len(found) == len(ERRORS) and (found.errors >= 20).all()
    assert (found.accepted == found.errors).all() and found.found.sum() >= .97*found.errors.sum() and (found.recall >= .9).all(), found


def test_comparison_has_two_recordings_of_one_split_and_the_others_one(pairs, table):
    count = pairs.recording_ids.map(len)
    assert (count == 1 + ((pairs.task == "comparison") | pairs.pair_id.str.contains(":loudest:"))).all()
    for first, second in pairs[pairs.task == "comparison"].recording_ids:
        assert first != second and (table.loc[first, ["split", "source", "domain"]] == table.loc[second, ["split", "source", "domain"]]).all()


def test_no_question_names_its_dataset(pairs):
    names = "|".join(SOURCES) + "|cinc|physionet|hls-cmds|sjtu|stetho-?mini"
    assert not pairs.instruction.str.contains(names, case=False).any()


def test_front_end_reads_real_files_and_hears_what_librosa_hears(table):
    p = PROFILES["mini"]
    front = log_mel(p)
    for path in table.path.iloc[::40]:
        features = recording_features(path, p, front)
        assert features.shape[1] == p.n_mels and 1 <= len(features) <= p.max_windows and features.isfinite().all()
        wave = load_audio(path, p.sample_rate)
        theirs = librosa.power_to_db(librosa.feature.melspectrogram(y=wave.astype(np.float64), sr=p.sample_rate, n_fft=p.n_fft, hop_length=p.hop, n_mels=p.n_mels, fmin=p.fmin, fmax=p.fmax), amin=1e-10, top_db=None)
        assert np.abs(front(torch.from_numpy(wave)).numpy() - theirs).max() < 1e-4, path


@pytest.fixture(scope="module")
def part(recordings, meta, tmp_path_factory):
    "Two training recordings of every source and verdict and one of every other split, in the layout of the whole"
    folder = tmp_path_factory.mktemp("part")/"stetho-part"
    rank = meta.groupby(["source", "split", "binary"]).cumcount()
    chosen = meta[rank < 1 + (meta.split == "train")].reset_index()
    for name in chosen.file:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(recordings/name, folder/name)
    chosen.to_csv(folder/"metadata.csv", index=False)
    events = pd.read_csv(recordings/"events.csv")
    events[events.recording_id.isin(chosen.recording_id)].to_csv(folder/"events.csv", index=False)
    return folder


def test_first_stages_run_on_real_recordings_and_say_whose_they_are(stetholm, part):
    before = listing(part)
    done = stetholm("reproduce", "--profile", "smoke", "--recordings", part, "--until", "instructions")
    assert done.returncode == 0, done.stderr
    lines, run = done.stdout.splitlines(), stetholm.runs/"smoke-stetho-part"
    assert "recordings of stetho-part" in lines[0] and "recordings of stetho-part" in lines[-1] and "synthetic" not in done.stdout.lower()
    for name in ("audit", "exploration", "instructions"): assert all((run/m).exists() for m in STAGES[name].makes)
    table, pairs = pd.read_parquet(run/"recordings.parquet"), pd.read_parquet(run/"stethobench.parquet")
    assert len(table) == len(pd.read_csv(part/"metadata.csv")) == 36 and set(table.source) == SOURCES and set(pairs.split) == {"train", "val", "test"} and set(pairs.task) == set(TASKS)
    assert not (run/"phantom").exists() and listing(part) == before
    assert table.sha256.tolist() == [file_hash(path) for path in table.path]
