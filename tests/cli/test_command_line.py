"Every command as a user meets it: what it prints, what it leaves, and how it fails"
import json
import os
import resource
import shlex
import shutil
import time

import numpy as np
import pandas as pd
import pytest
import soundfile

from stetholm.cli.main import ask, newest_model
from stetholm.core.config import AUDIOSET, STAGES, StethoError
from stetholm.model.processor import StethoLMProcessor
from stetholm.phantom.patients import make_phantom
from stetholm.score.scores import KEY, LOWER_IS_BETTER, MEAN_OF_SOURCES
from stetholm.data.sources import SOURCES

STEREO, LONG = "stereo.wav", "long.wav"


@pytest.fixture
def clips(stetholm):
    "A second of 44.1 kHz stereo and 40 seconds of 8 kHz, in the command's folder"
    rng = np.random.default_rng(0)
    soundfile.write(stetholm.cwd/STEREO, .1*rng.standard_normal((44_100, 1)).repeat(2, 1), 44_100)
    soundfile.write(stetholm.cwd/LONG, .1*rng.standard_normal(320_000), 8_000)
    return stetholm


@pytest.fixture
def pack(tmp_path):
    "A folder of recordings in the layout of stetho-mini"
    return make_phantom(tmp_path/"pack", 10, 0)


def refused(done, code, *words):
    "A failure told in one line: its exit code and what the line must name"
    assert done.returncode == code, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(str(w) in lines[0] for w in words), done.stderr


# help

@pytest.mark.timed
def test_help_names_every_command_within_half_a_second(stetholm):
    def timed():
        begun = time.perf_counter()
        done = stetholm("--help")
        return time.perf_counter() - begun, done
    tries = [timed() for _ in range(3)]
    said = " ".join(tries[0][1].stdout.split())
    assert [word for word in ("reproduce", "stages", "ask", "data", "synthesize", "evaluate", "score", "publish", "Not for clinical use") if word not in said] == []
    assert min(seconds for seconds, _ in tries) < .5


@pytest.mark.parametrize("command", ["reproduce", "stages", "ask", "data", "data list", "data pack", "data weights", "data manifest", "data scan", "data join", "data audit", "synthesize", "evaluate", "answer", "score", "ablate", "objectives", "publish"])
def test_every_command_has_help(stetholm, command):
    done = stetholm(*command.split(), "--help")
    assert done.returncode == 0 and f"stetholm {command}" in done.stdout and not done.stderr


def test_stages_lists_every_stage_in_order(stetholm):
    done = stetholm("stages")
    said = done.stdout.splitlines()
    assert done.returncode == 0
    assert [line.split()[:2] for line in said if not line.startswith(" ")] == [[str(s.number), name] for name, s in STAGES.items()]
    assert all(s.stem in done.stdout and ", ".join(s.makes) in done.stdout for s in STAGES.values())


def test_data_list_names_every_dataset_with_its_terms(stetholm):
    done = stetholm("data", "list")
    assert done.returncode == 0
    lines = {line.split()[0]: line for line in done.stdout.splitlines()[1:] if not line.startswith(" ")}
    assert set(lines) == set(SOURCES) and len(lines) == 14
    for key, s in SOURCES.items(): assert lines[key].endswith(s.licence) and s.role in lines[key] and f" {s.recordings or '?'} " in lines[key] and s.homepage in done.stdout


# wrong use

WRONG = {
    "profile": ("reproduce --profile huge", "unknown profile 'huge'"),
    "field": ("reproduce --set speed=9", "unknown profile key 'speed'"),
    "field's type": ("reproduce --set sft_steps=many", "'sft_steps' wants int, not 'many'"),
    "no value": ("reproduce --set sft_steps", "key=value"),
    "first stage": ("reproduce --from train", "unknown stage 'train'"),
    "last stage": ("reproduce --until train", "unknown stage 'train'"),
    "stages reversed": ("reproduce --from dpo --until sft", "'dpo' comes after 'sft'"),
    "stage before": ("reproduce --profile smoke --from sft", "--from audit"),
    "run name": ("reproduce --profile smoke --run ../elsewhere", "plain folder name"),
    "recordings": ("reproduce --recordings nowhere", "nowhere"),
    "recordings without their option": ("reproduce mini", "what is 'mini'? recordings are given by --recordings"),
    "dataset": ("data scan mimic .", "unknown dataset 'mimic'"),
    "empty folder": ("data scan stetho-mini .", "metadata.csv"),
    "no folder": ("data scan stetho-mini nowhere", "no folder at nowhere"),
    "no table to audit": ("data audit nowhere.parquet", "nowhere.parquet"),
    "synthesize into a csv": ("synthesize nowhere.parquet -o pairs.csv", "pairs.csv"),
    "no table to synthesize": ("synthesize nowhere.parquet", "nowhere.parquet"),
    "no predictions": ("score nowhere.jsonl", "nowhere.jsonl"),
    "no verdicts": ("score nowhere.jsonl --verdicts nowhere.csv", "nowhere.csv"),
    "a judge without a name": ("score nowhere.jsonl --endpoint http://localhost", "--model"),
    "no run to answer for": ("answer Qwen/Qwen2-Audio-7B-Instruct --run nowhere", "nowhere"),
    "no run to evaluate": ("evaluate --run nowhere", "nowhere"),
    "no run to publish": ("publish --run nowhere", "nowhere"),
    "no clip there": ("ask clip.wav what? --model nowhere", "no audio file at clip.wav"),
    "no clip": ("ask what?", "one or two audio files"),
    "three clips": ("ask a.wav b.wav c.wav what?", "not 3"),
    "organ": ("ask a.wav what? --organ liver", "--organ is heart or lung, not 'liver'"),
    "other organ": ("ask a.wav heart? --organ lung", "the question names the heart, and --organ the lung"),
}

@pytest.mark.parametrize("line, match", WRONG.values(), ids=list(WRONG))
def test_wrong_use_is_refused_in_one_line(stetholm, line, match):
    refused(stetholm(*line.split()), 2, match)


@pytest.mark.parametrize("line, match", [("frobnicate", "No such command 'frobnicate'"), ("reproduce --speed 9", "No such option: --speed"), ("score", "Missing argument")])
def test_mistyped_command_is_refused_with_its_usage(stetholm, line, match):
    done = stetholm(*line.split())
    said = done.stderr.splitlines()
    assert done.returncode == 2 and said[0].startswith("Usage: stetholm") and match in said[-1] and "Traceback" not in done.stderr


def test_refused_command_leaves_no_run(stetholm):
    for line in ("--set sft_steps=many", "--from train", "--recordings nowhere", "--profile huge"): stetholm("reproduce", *line.split())
    assert not stetholm.runs.exists()


def test_debug_shows_a_traceback(stetholm):
    done = stetholm("reproduce", "--profile", "huge", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr and "unknown profile 'huge'" in done.stderr


# recordings

def test_scan_audit_and_synthesize_follow_each_other(stetholm, pack):
    scanned = stetholm("data", "scan", "phantom", pack)
    assert scanned.returncode == 0 and scanned.stdout.startswith("20 recordings of 10 patients"), scanned.stderr
    table = pd.read_parquet(stetholm.cwd/"recordings.parquet")
    assert len(table) == 20 and set(table.licence) == {"CC0-1.0"}

    audited = stetholm("data", "audit", "recordings.parquet")
    assert audited.returncode == 0 and audited.stdout.startswith("# Data card of recordings\n\n20 recordings of 10 patients"), audited.stderr
    assert audited.stdout.endswith("note: 1 split with one verdict, the first: every verdict in split val is normal: scores such as AUROC need both\nno errors\n")
    kept = stetholm("data", "audit", "recordings.parquet", "-o", "card")
    assert kept.returncode == 0 and kept.stdout.startswith("20 recordings; data_card.json") and kept.stdout.endswith("no errors\n"), kept.stderr
    assert json.loads((stetholm.cwd/"card/data_card.json").read_text())["recordings"] == 20 and (stetholm.cwd/"card/data_card.md").read_text().strip() in audited.stdout

    made = stetholm("synthesize", "recordings.parquet", "--per-task", "2", "-o", "bench.parquet")
    pairs = pd.read_parquet(stetholm.cwd/"bench.parquet")
    assert made.returncode == 0 and made.stdout.startswith(f"{len(pairs)} pairs over 8 tasks from 20 of 20 recordings"), made.stderr
    assert pairs[pairs.task.isin(["reporting", "reasoning"])].groupby(["task", pairs.recording_ids.str[0]]).size().eq(2).all() and pairs.pair_id.is_unique
    assert stetholm("synthesize", "recordings.parquet", "--per-task", "2", "--workers", "2", "-o", "again.parquet").returncode == 0
    pd.testing.assert_frame_equal(pd.read_parquet(stetholm.cwd/"again.parquet"), pairs)
    carded = stetholm("synthesize", "recordings.parquet", "--card", "card", "-o", "carded.parquet")
    assert carded.returncode == 0 and {"stethobench_card.md", "stethobench_card.html", "stethobench_croissant.json"} <= {p.name for p in (stetholm.cwd/"card").iterdir()}, carded.stderr
    for out, holds in (("bench.jsonl", "bench.jsonl"), ("bench", "bench/recordings/test.parquet")):
        again = stetholm("synthesize", "recordings.parquet", "-o", out)
        assert again.returncode == 0 and (stetholm.cwd/holds).is_file() and again.stdout.endswith(f"in {out}\n"), again.stderr
    assert "exists already" in stetholm("synthesize", "recordings.parquet", "-o", "bench").stderr


def test_synthesize_lists_the_pairs_that_fail_their_check_and_writes_the_rest(stetholm, pack):
    assert stetholm("data", "scan", "phantom", pack).returncode == 0
    table = pd.read_parquet(stetholm.cwd/"recordings.parquet")
    table.assign(site=["space 5", *table.site[1:]]).to_parquet(stetholm.cwd/"odd.parquet")
    made = stetholm("synthesize", "odd.parquet", "--per-task", "2", "-o", "b.parquet")
    listed, kept = pd.read_csv(stetholm.cwd/"b.bad.csv"), pd.read_parquet(stetholm.cwd/"b.parquet")
    assert made.returncode == 1 and f"{len(listed)} pairs fail their check and are left out (" in made.stdout and "listed in b.bad.csv; the first: " in made.stdout and "Traceback" not in made.stderr
    assert list(listed) == ["pair_id", "kind", "question", "answer", "evidence", "why"] and listed.pair_id.str.startswith(f"{table.recording_id[0]}:").all() and not set(listed.pair_id) & set(kept.pair_id)
    assert stetholm("synthesize", "recordings.parquet", "--per-task", "2", "-o", "b.parquet").returncode == 0 and not (stetholm.cwd/"b.bad.csv").exists()


def test_audit_refuses_a_patient_in_two_splits(stetholm, pack):
    assert stetholm("data", "scan", "phantom", pack).returncode == 0
    table = pd.read_parquet(stetholm.cwd/"recordings.parquet")
    table.loc[table.index[table.split == "train"][0], "split"] = "val"
    table.to_parquet(stetholm.cwd/"recordings.parquet")
    patient = table.patient_id[table.split == "val"].iloc[0]
    audited = stetholm("data", "audit", "recordings.parquet", "-o", "card")
    assert audited.returncode == 1 and f"error: 1 patient across splits, the first: patient {patient} is in splits train and val: a patient belongs to one split" in audited.stdout and "Traceback" not in audited.stderr


def test_audit_refuses_a_table_that_is_not_one_of_recordings(stetholm):
    (stetholm.cwd/"text.parquet").write_text("hello")
    refused(stetholm("data", "audit", "text.parquet"), 2, "text.parquet is not a readable parquet table")
    pd.DataFrame({"recording_id": ["a"]}).to_parquet(stetholm.cwd/"other.parquet")
    refused(stetholm("data", "audit", "other.parquet"), 2, "other.parquet", "no column source")


def test_audit_names_a_column_that_does_not_belong(stetholm, pack):
    assert stetholm("data", "scan", "phantom", pack).returncode == 0
    pd.read_parquet(stetholm.cwd/"recordings.parquet").assign(colour="red").to_parquet(stetholm.cwd/"recordings.parquet")
    refused(stetholm("data", "audit", "recordings.parquet"), 2, "recordings.parquet", "colour")


def test_scan_names_the_row_of_a_faulty_file(stetholm, pack):
    clip = sorted((pack/"audio").iterdir())[3]
    clip.write_bytes(b"")
    refused(stetholm("data", "scan", "stetho-mini", pack), 2, clip.name, "metadata.csv row")
    assert not (stetholm.cwd/"recordings.parquet").exists()


# scores

def test_score_repeats_the_scores_of_the_run(stetholm, smoke_run):
    folder = smoke_run.folder
    done = stetholm("score", folder/"predictions.jsonl", "--verdicts", folder/"verdicts.csv", "-o", "scores.csv", "--differences", "differences.csv", "--resamples", "200")
    assert done.returncode == 0 and done.stderr == ""
    again, was = (t.set_index(KEY).sort_index() for t in (pd.read_csv(stetholm.cwd/"scores.csv"), pd.read_parquet(folder/"scores.parquet")))
    pd.testing.assert_frame_equal(again, was, check_dtype=False, atol=1e-5)
    for model in ("text_only", "sft", "dpo"):
        value = was.value[model, "all", "all", "ood", "clinical accuracy"]
        assert [f"{value:.3f}" in line for line in done.stdout.splitlines() if line.split()[:3] == [model, "ood", "all"] and "clinical accuracy" in line and MEAN_OF_SOURCES not in line] == [True]
    apart = pd.read_csv(stetholm.cwd/"differences.csv").set_index(["first", "second", *KEY[1:]])
    assert np.isclose(apart.value["prior", "dpo", "all", "all", "ood", "clinical accuracy"], was.value["dpo", "all", "all", "ood", "clinical accuracy"] - was.value["prior", "all", "all", "ood", "clinical accuracy"], atol=1e-5)


def test_score_gives_full_marks_to_the_references(stetholm, smoke_run):
    rows = pd.read_json(smoke_run.folder/"predictions.jsonl", lines=True)
    rows[rows.model == "dpo"].drop(columns="p_abnormal").assign(generated=rows.response).to_json(stetholm.cwd/"right.jsonl", orient="records", lines=True)
    done = stetholm("score", "right.jsonl", "-o", "scores.csv")
    assert done.returncode == 0, done.stderr
    scores = pd.read_csv(stetholm.cwd/"scores.csv")
    less = scores.metric.isin(LOWER_IS_BETTER)
    assert scores[~less].value.gt(.999).all() and scores[less].value.eq(0).all() and less.any() and set(scores.model) == {"dpo"} and set(scores.distribution) == {"in_domain", "ood"}
    assert set(scores[scores.metric == "clinical accuracy"].value) == {1}


def test_score_takes_another_system_s_answers_and_counts_what_is_odd(stetholm, smoke_run):
    asked = pd.read_json(smoke_run.folder/"predictions.jsonl", lines=True).drop_duplicates("pair_id")
    lines = [{"pair_id": i, "generated": "Normal."} for i in asked.pair_id[1:]]
    (stetholm.cwd/"always_normal.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*lines, lines[0], {"pair_id": "elsewhere", "generated": ""}]))
    done = stetholm("score", "always_normal.jsonl", "--questions", smoke_run.folder/"predictions.jsonl", "-o", "scores.csv")
    assert done.returncode == 0, done.stderr
    assert f"{len(asked)} answers; 1 missing; 1 duplicated; 1 unknown" in done.stdout
    scores = pd.read_csv(stetholm.cwd/"scores.csv").set_index(KEY)
    assert scores.n.xs(("always_normal", "all", "all"), level=KEY[:3]).xs("clinical accuracy", level="metric").sum() == (asked.task != "safety").sum()
    assert (scores.value.xs("findings recall", level="metric") == 0).all()


BAD_PREDICTIONS = {
    "broken line": (lambda rows: [json.dumps(rows[0]), json.dumps(rows[1])[:-20]], "bad.jsonl line 2 is not valid JSON"),
    "no column": (lambda rows: [json.dumps({k: v for k, v in r.items() if k != "evidence"}) for r in rows], "the questions lack evidence"),
    "unknown task": (lambda rows: [json.dumps(r | {"task": "prognosis"}) for r in rows], "prognosis"),
    "no lines": (lambda rows: [], "bad.jsonl holds no predictions"),
}

@pytest.mark.parametrize("change, match", BAD_PREDICTIONS.values(), ids=list(BAD_PREDICTIONS))
def test_score_says_what_is_wrong_with_predictions(stetholm, smoke_run, change, match):
    rows = [json.loads(line) for line in (smoke_run.folder/"predictions.jsonl").read_text().splitlines()]
    (stetholm.cwd/"bad.jsonl").write_text("".join(line + "\n" for line in change(rows)))
    refused(stetholm("score", "bad.jsonl"), 2, match)


# ask

@pytest.mark.report("a question of 300 bytes")
def test_ask_about_one_clip_prints_answer_probability_and_run(clips, smoke_run):
    question = "Is there a wheeze? The patient, a carpenter of 64 years, has coughed since spring." + " He smokes."*20
    assert len(question) > 255, "no file has so long a name"
    done = clips("ask", STEREO, question, "--model", smoke_run.folder/"dpo")
    assert done.returncode == 0 and done.stderr == ""
    *answer, probability, organ, origin = done.stdout.splitlines()
    assert "".join(answer).strip() and probability.endswith(STEREO) and organ.startswith("taken for ") and organ.endswith("--organ")
    assert probability.startswith("P(abnormal) ") and 0 <= float(probability.split()[1]) <= 1
    assert "dpo of run smoke-phantom (profile smoke, trained on phantom)" in origin and "not for clinical use" in origin


def test_ask_about_two_clips_takes_the_newest_model_and_gives_a_probability_for_each(clips, smoke_run):
    for name, profile in (("best", "mini"), ("smoke-later", "smoke")):
        shutil.copytree(smoke_run.folder/"dpo", clips.runs/name/"dpo")
        note = json.loads((smoke_run.folder/"run.json").read_text())
        (clips.runs/name/"run.json").write_text(json.dumps(note | {"profile": note["profile"] | {"name": profile}}))
    done = clips("ask", STEREO, LONG, "Which one is abnormal?")
    assert done.returncode == 0 and "model dpo of run best (profile mini" in done.stdout, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("P(abnormal) ")] == [STEREO, LONG]


def test_ask_puts_the_organ_into_a_question_that_leaves_it_open(tmp_path, smoke_run, monkeypatch, capsys):
    asked, prompt_ids = [], StethoLMProcessor.prompt_ids
    def recorded(processor, question, windows=(1,)):
        asked.append(question)
        return prompt_ids(processor, question, windows)
    monkeypatch.setattr(StethoLMProcessor, "prompt_ids", recorded)
    soundfile.write(tmp_path/STEREO, .1*np.random.default_rng(0).standard_normal(8_000), 8_000)
    for question, organ, leads in (("Normal?", "heart", ["Heart sounds. "]), ("Normal?", "lung", ["Lung sounds. "]),
                                   ("Normal?", None, ["Heart sounds. ", "Lung sounds. "]), ("Is this lung sound normal?", "lung", [""])):
        asked.clear()
        ask([str(tmp_path/STEREO), question], str(smoke_run.folder/"dpo"), organ)
        assert asked[0] in [lead + question for lead in leads]
        assert ("taken for" in capsys.readouterr().out) == (organ is None)


@pytest.mark.report("`make smoke` after a real run")
def test_the_newest_run_of_the_largest_profile_answers_and_smoke_only_when_named(tmp_path, monkeypatch):
    monkeypatch.setenv("STETHOLM_RUNS", str(tmp_path))
    monkeypatch.setattr("stetholm.cli.main.package_folder", lambda: tmp_path/"checkout/stetholm")
    def trained(run, kind, profile, at):
        (tmp_path/run/kind).mkdir(parents=True)
        (tmp_path/run/kind/"config.json").write_text("{}")
        os.utime(tmp_path/run/kind/"config.json", (at, at))
        (tmp_path/run/"run.json").write_text(json.dumps({"stages": {}, "profile": {"name": profile}}))
    trained("try", "dpo", "smoke", 900)
    with pytest.raises(StethoError, match="no trained model in .*profile smoke are random, and answer only when named.*none in .*data/models.*--model"): newest_model()
    (tmp_path/"checkout/data/models/mini").mkdir(parents=True)
    (tmp_path/"checkout/data/models/mini/config.json").write_text("{}")
    assert newest_model() == tmp_path/"checkout/data/models/mini"
    trained("a", "sft", "mini", 500)
    trained("b", "dpo", "mini", 400)
    assert newest_model() == tmp_path/"a/sft"
    trained("c", "sft", "paper", 100)
    trained("try again", "dpo", "smoke", 999)
    assert newest_model() == tmp_path/"c/sft"


BAD_CLIPS = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "text": (lambda p: p.write_text("hello"), "is not a readable audio file"),
    "missing": (lambda p: None, "no audio file at"),
    "without samples": (lambda p: soundfile.write(p, np.zeros(0), 8_000), "holds no samples"),
    "of a phone": (lambda p: p.write_bytes(b"\0\0\0\x1cftypM4A \0\0\0\0" + bytes(999)), "it is MPEG-4 audio, m4a; convert it with `ffmpeg -i bad.wav bad-converted.wav`"),
    "silent": (lambda p: soundfile.write(p, np.zeros((9_000, 2)), 8_000), "is digital silence: nothing can be said about it"),
}

def half_an_mp3(path):
    soundfile.write(path.with_suffix(".mp3"), .1*np.random.default_rng(0).standard_normal(80_000), 8_000)
    path.write_bytes(path.with_suffix(".mp3").read_bytes()[:20_000])

def test_ask_tells_what_is_unusual_about_a_clip(clips, smoke_run):
    wave = .1*np.random.default_rng(0).standard_normal(40_000)
    soundfile.write(clips.cwd/"opposite.wav", np.stack([wave, -wave], 1), 8_000)
    soundfile.write(clips.cwd/"left.wav", wave, 8_000)
    raw = (clips.cwd/"left.wav").read_bytes()
    (clips.cwd/"stream.wav").write_bytes(raw[:40] + b"\xff"*4 + raw[44:])
    done = clips("ask", "opposite.wav", "stream.wav", "Which one is abnormal?", "--model", smoke_run.folder/"dpo")
    notes, one = done.stderr.splitlines(), [line.split()[1] for line in done.stdout.splitlines() if line.startswith("P(abnormal) ")]
    assert done.returncode == 0 and len(notes) == 2 and one[0] == one[1], "the left channel is the other clip"
    assert notes[0].startswith("note: opposite.wav: its 2 channels differ") and "all 80,000 are read" in notes[1]


def test_scan_keeps_what_is_unusual_and_refuses_what_ask_refuses(clips, smoke_run):
    wave = .1*np.random.default_rng(0).standard_normal(40_000)
    for i in range(3): soundfile.write(clips.cwd/f"{i}.wav", (i + 1)*wave/3, 8_000)
    raw = (clips.cwd/"0.wav").read_bytes()
    (clips.cwd/"0.wav").write_bytes(raw[:4] + b"\x24\xf0\xff\x7f" + raw[8:40] + b"\0\xf0\xff\x7f" + raw[44:])
    (clips.cwd/"3.m4a").write_bytes(b"\0\0\0\x1cftypM4A \0\0\0\0" + bytes(999))
    half_an_mp3(clips.cwd/"4.wav")
    (clips.cwd/"t.csv").write_text("path,labels,domain\n0.wav,normal,heart\n1.wav,murmur,heart\n2.wav,normal,heart\n3.m4a,normal,heart\n4.wav,normal,heart\n")
    refused(clips("data", "scan", "folder", "."), 2, "row 5", "m4a", "ffmpeg -i")
    asked = clips("ask", "4.wav", "Is there a murmur?", "--model", smoke_run.folder/"dpo")
    assert asked.returncode == 2 and "4.wav is cut short" in asked.stderr.splitlines()[-1]  # after a line of the decoder's own
    done = clips("data", "scan", "folder", ".", "--skip-bad")
    assert done.returncode == 0 and "recordings with a fault that was mended: 1 unusual audio file (folder_0: its header announces" in done.stdout, done.stderr
    assert "cut short" in pd.read_csv(clips.cwd/"recordings.bad.csv").fault[1]
    table = pd.read_parquet(clips.cwd/"recordings.parquet")
    assert table.duration_s.tolist() == [5.]*3


@pytest.mark.parametrize("make, match", BAD_CLIPS.values(), ids=list(BAD_CLIPS))
def test_ask_names_the_clip_it_cannot_read(clips, smoke_run, make, match):
    make(clips.cwd/"bad.wav")
    refused(clips("ask", STEREO, "bad.wav", "What is heard?", "--model", smoke_run.folder/"dpo"), 2, "bad.wav", match)


def test_ask_refuses_what_is_not_a_question(clips, smoke_run):
    refused(clips("ask", STEREO, LONG, "--model", smoke_run.folder/"dpo"), 2, "the question is missing")
    refused(clips("ask", STEREO, " ", "--model", smoke_run.folder/"dpo"), 2, "the question is empty")


def test_ask_refuses_a_folder_without_a_model(clips):
    refused(clips("ask", STEREO, "What is heard?", "--model", "nowhere"), 2, "no model at nowhere")


# reproduce

def test_reproduce_stops_before_its_first_stage_without_the_weights_it_wants(stetholm):
    stetholm.environment["STETHOLM_CACHE"] = str(stetholm.cwd/"cache")
    refused(stetholm("reproduce", "--profile", "smoke", "--set", "alignment_network=mobilenet", "--set", "alignment_audioset=true"), 2, AUDIOSET.title, "stetholm data weights")
    assert not stetholm.runs.exists()


def test_run_of_other_recordings_is_refused(stetholm, smoke_run, pack):
    stetholm.environment["STETHOLM_RUNS"] = str(smoke_run.runs)
    before = (smoke_run.folder/"run.json").read_bytes()
    refused(stetholm("reproduce", "--profile", "smoke", "--run", "smoke-phantom", "--recordings", pack), 2, "smoke-phantom", "other recordings (phantom)")
    assert (smoke_run.folder/"run.json").read_bytes() == before


def told(done, stage):
    "A stage's failure: what failed, where the notebook is, and the words of the command that goes on"
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    what, notebook, command = done.stderr.splitlines()
    assert what.startswith(f"error: stage {stage} failed in cell ")
    start = "go on with: stetholm "
    assert command.startswith(start)
    return what, notebook.removeprefix("executed notebook: "), shlex.split(command.removeprefix(start))


def test_broken_recording_stops_the_run_and_the_command_told_goes_on(stetholm, pack):
    clip = sorted((pack/"audio").iterdir())[0]
    sound = clip.read_bytes()
    clip.write_text("hello")
    pack = pack.rename(pack.with_name("my pack"))
    clip = pack/"audio"/clip.name
    what, html, command = told(stetholm("reproduce", "--profile", "smoke", "--recordings", pack, "--run", "it's new", "--until", "audit"), "audit")
    run = stetholm.runs/"it's new"
    assert f"{clip} is not a readable audio file" in what and f"of {STAGES['audit'].stem}.ipynb" in what
    assert html == str(run/f"notebooks/{STAGES['audit'].stem}.html") and clip.name in (run/f"notebooks/{STAGES['audit'].stem}.html").read_text()
    assert not any((run/m).exists() for m in STAGES["audit"].makes) and not [p for p in run.rglob("*") if ".part." in p.name]

    clip.write_bytes(sound)
    done = stetholm(*command, "--until", "audit")
    assert done.returncode == 0 and all((run/m).exists() for m in STAGES["audit"].makes), done.stderr


@pytest.mark.report("`LC_ALL=")
def test_a_run_needs_no_home_no_locale_and_no_kernel_that_jupyter_knows(stetholm, tmp_path):
    other = tmp_path/"jupyter/kernels/python3/kernel.json"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "Python 3", "language": "python"}))
    make_phantom(tmp_path/"T\u00f6ne \u2661", 10, 0)
    stetholm.environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": "/dev/null/nobody", "JUPYTER_PATH": str(tmp_path/"jupyter"), "STETHOLM_RUNS": "runs"}
    done = stetholm("reproduce", "--profile", "smoke", "--recordings", "T\u00f6ne \u2661", "--until", "audit", encoding="utf-8")
    assert done.returncode == 0 and "recordings of T\u00f6ne \u2661" in done.stdout, done.stdout + done.stderr
    made = stetholm.runs/"smoke-T\u00f6ne \u2661"
    assert all((made/m).exists() for m in STAGES["audit"].makes) and "T\u00f6ne \u2661" in (made/"run.json").read_text(encoding="utf-8")


@pytest.mark.report("HOME read-only")
def test_a_folder_for_runs_that_cannot_be_written_is_told_before_the_first_stage(stetholm):
    stetholm.environment["STETHOLM_RUNS"] = "/proc/runs"
    refused(stetholm("reproduce", "--profile", "smoke"), 2, "/proc/runs/smoke-phantom cannot be written", "set STETHOLM_RUNS to a folder that can")


def test_folder_without_recordings_stops_the_run(stetholm, tmp_path):
    (tmp_path/"bare").mkdir()
    what, _, _ = told(stetholm("reproduce", "--profile", "smoke", "--recordings", tmp_path/"bare"), "audit")
    assert f"no recordings in {tmp_path/'bare'}" in what and not (stetholm.runs/"smoke-bare/recordings.parquet").exists()


def test_run_on_a_full_disk_says_so_and_goes_on_when_there_is_room(stetholm):
    command, most = ("reproduce", "--profile", "smoke", "--until", "audit"), 24 << 10
    full = stetholm(*command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
    run = stetholm.runs/"smoke-phantom"
    what, _, command_told = full.stderr.splitlines()
    assert full.returncode == 1 and what.startswith("error: stage audit failed in ") and "File too large" in what and str(run) in what
    assert command_told.startswith("go on with: stetholm reproduce --profile smoke")
    assert not [m for m in STAGES["audit"].makes if (run/m).exists()] and not [p for p in run.rglob("*") if ".part." in p.name]
    done = stetholm(*command)
    assert done.returncode == 0 and all((run/m).exists() for m in STAGES["audit"].makes), done.stderr


def test_scanned_tables_are_joined_and_the_study_runs_on_them(stetholm):
    for seed, name in ((0, "a"), (1, "b")):
        make_phantom(stetholm.cwd/name, 24, seed)
        assert stetholm("data", "scan", "phantom", name, "-o", f"{name}.parquet").returncode == 0
    refused(stetholm("data", "join", "a.parquet", "a.parquet"), 2, "named twice")
    refused(stetholm("data", "join", "a.parquet", "b.parquet"), 2, "is in a.parquet and in b.parquet")
    for t in "ab":
        table = pd.read_parquet(stetholm.cwd/f"{t}.parquet")
        table[["recording_id", "patient_id"]] = table[["recording_id", "patient_id"]] + t
        table.to_parquet(stetholm.cwd/f"{t}.parquet", index=False)
    assert "96 recordings of 2 sources" in stetholm("data", "join", "a.parquet", "b.parquet", "-o", "all.parquet").stdout
    done = stetholm("reproduce", "--profile", "smoke", "--recordings", "all.parquet", "--until", "audit")
    assert done.returncode == 0 and "recordings of all" in done.stdout, done.stderr
    assert len(pd.read_parquet(stetholm.runs/"smoke-all/recordings.parquet")) == 96
    refused(stetholm("reproduce", "--profile", "smoke", "--recordings", "some.parquet"), 2, "no folder of recordings")


def test_an_unknown_ablation_is_refused_before_anything_is_trained(stetholm):
    done = stetholm("ablate", "--profile", "smoke", "--only", "no ears")
    assert done.returncode == 2 and "unknown variant 'no ears': choose among as it is" in done.stderr and not stetholm.runs.exists()


def test_objectives_are_compared_only_where_there_are_pairs(stetholm):
    refused(stetholm("objectives", "--profile", "smoke"), 1, "run 'smoke-phantom' has no preference pairs to go on from (stage audit is missing or out of date): stetholm reproduce --profile smoke --run smoke-phantom --until preferences")
