"A model that is published without its base, and what asks it"
import dataclasses
import json
import shutil

import numpy as np
import soundfile
import torch

from stetholm.cli.main import ask, publish
from stetholm.core.config import PROFILES
from stetholm.core.files import cache_folder
from stetholm.model.backbones import SMOLLM2, assemble, load_backbone
from stetholm.model.encoder import new_encoder
from stetholm.model.shipped import WEIGHTS


def test_publish_ships_the_model_of_a_run_and_ask_uses_it_where_nothing_was_trained(smoke_run, tmp_path, monkeypatch, capsys):
    run, checkout, clip = tmp_path/"runs/best", tmp_path/"checkout", str(tmp_path/"clip.wav")
    shutil.copytree(smoke_run.folder, run, ignore=shutil.ignore_patterns("dpo", "sft", "aligned", "text_only", "features", ".trainer"))
    monkeypatch.setenv("STETHOLM_RUNS", str(tmp_path/"runs"))
    where = dict(to=str(checkout/"figures"), models=str(checkout/"data/models"))
    publish("best", **where)
    assert "its base is tiny, and users have smollm2-135m-instruct" in capsys.readouterr().out and not (checkout/"data/models").exists()

    profile = dataclasses.replace(PROFILES["mini"], alignment_projector="mlp", alignment_prefix_tokens=4, alignment_audioset=False)
    torch.manual_seed(0)
    lm = assemble(*load_backbone(SMOLLM2, torch.float32), new_encoder(profile), profile)
    with torch.no_grad(): lm.model.model.language_model.layers[9].mlp.up_proj.weight += .1*torch.randn(1536, 4) @ torch.randn(4, 576)
    lm.save_pretrained(run/"dpo")
    note = json.loads((run/"run.json").read_text())
    (run/"run.json").write_text(json.dumps(note | {"profile": note["profile"] | {"name": "mini", "language_model": SMOLLM2}}))
    publish("best", **where)
    mini = checkout/"data/models/mini"
    said, card = capsys.readouterr().out, (mini/"README.md").read_text()
    assert f"model dpo in {mini}" in said and "rank 16 of 16" in said and (mini/WEIGHTS).stat().st_size < 24e6
    assert "Not for clinical use" in card and "from stetholm import load" in card and "at rank 16" in card
    assert not any(str(folder) in f.read_text() for folder in (cache_folder(), tmp_path) for f in mini.glob("*.json"))

    soundfile.write(clip, .1*np.random.default_rng(0).standard_normal(40_000), 8_000)
    question = "Is this heart sound normal or abnormal?"
    expected = lm.ask(clip, question)
    monkeypatch.setenv("STETHOLM_RUNS", str(tmp_path/"none"))
    monkeypatch.setattr("stetholm.cli.main.package_folder", lambda: checkout/"stetholm")
    ask([clip, question])
    *text, p, origin = capsys.readouterr().out.splitlines()
    assert "\n".join(text)[:100] == expected["text"][:100] and abs(float(p.split()[1]) - expected["p_abnormal"][0]) < .02
    assert origin.startswith("shipped model dpo of run best (profile mini, trained on phantom); ")
