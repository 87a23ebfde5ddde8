"Answers and scores: over processes and after a kill the same, and the committed numbers out of the committed files"
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd

from conftest import COMMAND, REPO, TWO_PROCESSES
from stetholm.score.scores import KEY

FIGURES = REPO/"figures"


def answers(folder):
    return pd.read_json(folder/"predictions.jsonl", lines=True).set_index(["model", "pair_id"]).generated.sort_index()


def test_two_processes_with_other_batches_answer_as_the_run_did(stetholm, smoke_run):
    shutil.copytree(smoke_run.runs, stetholm.runs)
    command = [sys.executable, *TWO_PROCESSES, COMMAND, "evaluate", "--run", "smoke-phantom", "--set", "evaluation_batch=3"]
    done = subprocess.run(**stetholm.how(()) | dict(args=list(map(str, command))), capture_output=True)
    assert done.returncode == 0 and done.stdout.count("sft: 1/") == 2, done.stderr[-3000:]
    run = stetholm.runs/"smoke-phantom"
    pd.testing.assert_series_equal(answers(run), answers(smoke_run.folder))
    assert json.loads((run/"run.json").read_text())["profile"]["evaluation_batch"] == 3 and not list(run.glob(".trainer/evaluation-*/**/*.jsonl"))


def test_committed_answers_give_the_committed_scores(stetholm):
    done = stetholm("score", FIGURES/"predictions.jsonl.gz", "--verdicts", FIGURES/"verdicts.csv.gz", "-o", "scores.csv", "--seed", json.loads((FIGURES/"metrics.json").read_text())["seed"])
    assert done.returncode == 0, done.stderr
    was, again = (pd.read_csv(f).set_index(KEY).sort_index() for f in (FIGURES/"scores.csv", stetholm.cwd/"scores.csv"))
    assert was.index.equals(again.index) and np.allclose(was, again[was.columns], atol=1e-5, equal_nan=True)


def test_committed_table_of_the_front_page_is_of_the_committed_scores():
    scores, page = pd.read_csv(FIGURES/"scores.csv").set_index(KEY), (REPO/"README.md").read_text()
    for task, metric in (("all", "clinical accuracy"), ("mean over labels", "clinical accuracy"), ("all", "text agrees with P(abnormal)"), ("all", "names the wrong organ"), ("P(abnormal)", "AUROC")):
        s = scores.loc["dpo", task, "all", "in_domain", metric]
        assert f"{100*s.value:.1f} [{100*s.lo:.1f}, {100*s.hi:.1f}]" in page


def test_committed_files_hold_no_recording_and_name_their_licences():
    verdicts = pd.read_csv(FIGURES/"verdicts.csv.gz")
    assert verdicts.licence.notna().all() and all(f.stat().st_size < 1e6 for f in FIGURES.iterdir())
