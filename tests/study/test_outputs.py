"The study's notebooks show the published run, and nothing of this or anybody's machine"
import json
import re

import pytest
from conftest import REPO

from stetholm.core.config import STAGES

NOTEBOOKS = {s.stem: REPO/f"nbs/study/{s.stem}.ipynb" for s in STAGES.values()}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_those_of_the_published_run(name):
    notebook = json.loads(NOTEBOOKS[name].read_text())
    published = json.loads((REPO/"figures/metrics.json").read_text())["run"]
    assert notebook["metadata"].get("run") == published, f"stale: make outputs RUN=… (published run {published})"
    assert any(c.get("outputs") for c in notebook["cells"])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_hold_no_sound_no_path_and_no_error(name):
    notebook = json.loads(NOTEBOOKS[name].read_text())
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    text = json.dumps([{k: v for k, v in (o.get("data") or o).items() if not k.startswith("image/")} for o in outputs])
    assert not re.search(r"data:audio|<audio|/home/|/root/|/tmp/|site-packages|Traceback", text) and all(o["output_type"] != "error" for o in outputs)
    assert NOTEBOOKS[name].stat().st_size < 1_000_000


def test_results_have_their_tables_and_figures():
    def kinds(name): return [k for c in json.loads(NOTEBOOKS[STAGES[name].stem].read_text())["cells"] for o in c.get("outputs", []) for k in o.get("data", {})]
    assert kinds("evaluation").count("text/html") >= 7
    assert kinds("figures").count("image/png") >= 10
    assert "image/png" in kinds("alignment") and "image/png" in kinds("sft") and "image/png" in kinds("dpo")
