"A whole run: what it leaves, what it skips the next time, and that neither chance nor a kill changes its results"
import json
import os
import random
import re
import shutil
import signal
import time

import pandas as pd
import psutil
import pytest
from huggingface_hub import ModelCard

from stetholm.core.config import AUDIOSET, STAGES
from stetholm.core.files import file_hash
from stetholm.core.run import run_note
from stetholm.report.model_card import SHOWN, model_card

MODELS = ("aligned", "sft", "text_only", "dpo")


def ran(process):
    "The stages that a command ran, of those that it went through"
    said = re.findall(r"^\[\d+/\d+\] (\w+): (.*)$", process.stdout, re.M)
    return [name for name, what in said if what != "up to date"]


def test_run_says_first_and_last_that_it_is_synthetic(smoke_run):
    lines = smoke_run.process.stdout.splitlines()
    assert "SYNTHETIC" in lines[0] and "SYNTHETIC" in lines[-1]
    assert str(smoke_run.folder) in lines[-1] and ran(smoke_run.process) == list(STAGES)


@pytest.mark.timed
def test_run_takes_less_than_150_seconds(smoke_run):
    assert smoke_run.seconds < 150


def test_run_says_how_long_is_left(smoke_run):
    left = re.findall(r"cell \d+/\d+, about (\d+) min left", smoke_run.process.stdout)
    assert len(left) > 50 and left[-1] == "0"


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
def test_stage_leaves_its_artefacts_and_notebook(smoke_run, stage):
    assert [m for m in stage.makes if not (smoke_run.folder/m).exists()] == []
    notebook = json.loads((smoke_run.folder/f"notebooks/{stage.stem}.ipynb").read_text())
    code = [c for c in notebook["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    assert all(c["execution_count"] for c in code) and any(c["outputs"] for c in code)
    assert "smoke-phantom" in "".join(next(c for c in code if "injected-parameters" in c["metadata"]["tags"])["source"])
    html = (smoke_run.folder/f"notebooks/{stage.stem}.html").read_text()
    assert html.rstrip().endswith("</html>") and stage.name in html


def test_run_json_says_how_the_run_was_made(smoke_run):
    note = json.loads((smoke_run.folder/"run.json").read_text())
    assert note["profile"]["name"] == "smoke" and note["recordings"]["data"] == "phantom"
    assert all(re.match(r"\d+\.\d+", v) for v in note["versions"].values()) and {"python", "torch", "stetholm"} <= set(note["versions"])
    assert list(note["stages"]) and set(note["stages"]) == set(STAGES)
    for name, stage in note["stages"].items():
        assert 0 < stage["seconds"] < smoke_run.seconds and 0 < stage["peak_gib"] < 8
        assert stage["made"] == {m: file_hash(smoke_run.folder/m) for m in STAGES[name].makes}
    assert sum(s["seconds"] for s in note["stages"].values()) < smoke_run.seconds


def test_run_leaves_nothing_half_written(smoke_run):
    assert [p for p in smoke_run.folder.rglob("*") if ".part." in p.name] == []


def test_metrics_say_that_they_are_synthetic(smoke_run):
    for path in ("metrics.json", "figures/metrics.json"):
        assert json.loads((smoke_run.folder/path).read_text())["synthetic"] is True


@pytest.mark.parametrize("model", ["sft", "text_only", "dpo"])
def test_models_carry_a_card_with_the_run_s_numbers(smoke_run, model):
    card, metrics = ModelCard.load(smoke_run.folder/model/"README.md"), json.loads((smoke_run.folder/"metrics.json").read_text())
    assert sorted(r.metric_value for r in card.data.eval_results) == sorted(s["value"] for s in metrics["scores"] if s["model"] == model and s["dataset"] == "all" and (s["over"], s["metric"]) in SHOWN)
    assert "Not for clinical use" in card.text and "SYNTHETIC" in card.text


def test_a_card_names_the_weights_that_the_encoder_started_from(smoke_run, monkeypatch):
    assert AUDIOSET.title not in model_card(smoke_run.folder, "dpo")
    monkeypatch.setattr("stetholm.report.model_card.run_note", lambda folder: run_note(folder) | {"weights": [AUDIOSET._asdict()]})
    assert f"AudioSet-trained mn04 (EfficientAT, MIT), SHA-256 `{AUDIOSET.sha256}`" in model_card(smoke_run.folder, "dpo")


@pytest.fixture
def copied(stetholm, smoke_run):
    "The command beside a copy of the smoke run, which a test may change"
    shutil.copytree(smoke_run.runs, stetholm.runs)
    return stetholm


@pytest.mark.timed
def test_second_time_everything_is_up_to_date(copied, smoke_run):
    begun = time.perf_counter()
    again = copied("reproduce", "--profile", "smoke")
    assert again.returncode == 0 and again.stdout.count(": up to date") == len(STAGES) and ran(again) == []
    assert time.perf_counter() - begun < 5


def test_changed_evaluation_field_reruns_evaluation_and_figures_only(copied, smoke_run):
    changed = copied("reproduce", "--profile", "smoke", "--set", "evaluation_bootstrap=50")
    assert changed.returncode == 0, changed.stderr
    assert ran(changed) == ["evaluation", "figures"]
    run = copied.runs/"smoke-phantom"
    assert json.loads((run/"run.json").read_text())["profile"]["evaluation_bootstrap"] == 50
    assert pd.read_parquet(run/"scores.parquet").value.equals(pd.read_parquet(smoke_run.folder/"scores.parquet").value)


def test_from_reruns_a_stage_that_is_up_to_date(copied, smoke_run):
    again = copied("reproduce", "--profile", "smoke", "--from", "figures")
    assert again.returncode == 0, again.stderr
    assert ran(again) == ["figures"]
    assert file_hash(copied.runs/"smoke-phantom/figures") == file_hash(smoke_run.folder/"figures")


def test_refused_command_leaves_the_run_as_it_was(copied, smoke_run):
    done = copied("reproduce", "--profile", "smoke", "--set", "sft_steps=3", "--from", "figures")
    assert done.returncode == 2 and "--from sft" in done.stderr
    assert (copied.runs/"smoke-phantom/run.json").read_bytes() == (smoke_run.folder/"run.json").read_bytes()


def test_from_names_the_profile_of_a_run_that_was_made_with_another(copied, smoke_run):
    done = copied("reproduce", "--run", "smoke-phantom", "--from", "figures")
    assert done.returncode == 2 and "--profile smoke" in done.stderr and "--from audit" not in done.stderr


def test_fault_14_a_run_that_was_trained_on_a_test_recording_is_not_scored(copied):
    run = copied.runs/"smoke-phantom"
    table, note = pd.read_parquet(run/"recordings.parquet"), run/"trained_on/alignment.json"
    stolen = table.recording_id[table.split == "test"].iloc[0]
    note.write_text(json.dumps([*json.loads(note.read_text()), stolen]))
    done = copied("reproduce", "--profile", "smoke", "--from", "evaluation")
    assert done.returncode == 1 and "stage alignment was trained on test recording" in done.stderr


def working_cell(folder, stage):
    "The announcement of the cell in which a stage's notebook does the stage's work"
    cells = json.loads((folder/f"notebooks/{STAGES[stage].stem}.ipynb").read_text())["cells"]
    at, = (i for i, c in enumerate(cells, 1) if c["cell_type"] == "code" and f"= {stage}(this)" in "".join(c["source"]))
    return f"  {stage}, cell {at}/{len(cells)}"


@pytest.fixture(scope="module")
def interrupted(stetholm_in, smoke_run):
    "The smoke run once more under another name: killed at work on a stage of the middle, then started again"
    shell, chance = stetholm_in("killed"), random.Random(0)
    stage, lines = chance.choice(["alignment", "sft", "preferences", "dpo"]), chance.randrange(2)
    command = ("reproduce", "--profile", "smoke", "--run", "again")
    process, begins = shell.start(*command), working_cell(smoke_run.folder, stage)
    with process.stdout:
        for line in process.stdout:
            if line.startswith(begins): break
        for _ in range(lines): process.stdout.readline()
        kernel = psutil.Process(process.pid).children(recursive=True)  # in a session of its own: it would finish a short stage before it misses its parent
        os.killpg(process.pid, signal.SIGKILL)
        for p in kernel: p.kill()
    assert process.wait() == -signal.SIGKILL and kernel
    return stage, shell(*command), shell.runs/"again"


def test_killed_run_goes_on_with_the_stage_it_was_in(interrupted):
    stage, process, _ = interrupted
    assert process.returncode == 0, process.stdout + process.stderr
    names = list(STAGES)
    assert ran(process) == names[names.index(stage):]


def table(path, run):
    "A table of a run, without what names the run or times it"
    rows = (pd.read_json(path, lines=True) if path.suffix == ".jsonl" else pd.read_parquet(path)).drop(columns="seconds", errors="ignore")
    return rows.assign(path=rows.path.str.removeprefix(str(run))) if "path" in rows else rows


def test_equal_runs_give_equal_tables(smoke_run, interrupted):
    _, _, again = interrupted
    names = sorted(p.name for kind in ("*.parquet", "*.jsonl") for p in smoke_run.folder.glob(kind))
    assert set(names) == {m for s in STAGES.values() for m in s.makes if m.endswith((".parquet", ".jsonl"))}
    for name in names:
        pd.testing.assert_frame_equal(table(smoke_run.folder/name, smoke_run.folder), table(again/name, again), check_exact=True, obj=name)


@pytest.mark.parametrize("model", [*MODELS, "encoder"])
def test_equal_runs_give_equal_weights(smoke_run, interrupted, model):
    _, _, again = interrupted
    assert (smoke_run.folder/model/"model.safetensors").read_bytes() == (again/model/"model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["metrics.json", "data_card.json"])
def test_equal_runs_give_equal_numbers(smoke_run, interrupted, name):
    _, _, again = interrupted
    assert (smoke_run.folder/name).read_bytes() == (again/name).read_bytes()


def test_equal_runs_give_equal_figures(smoke_run, interrupted):
    _, _, again = interrupted
    here, there = ({f.name: f.read_bytes() for f in (run/"figures").iterdir()} for run in (smoke_run.folder, again))
    assert here.keys() == there.keys()
    assert {name for name in here if here[name] != there[name]} <= {"cost.json"}  # seconds and memory
