"""Trains a tiny model on 16 pairs and writes its losses and weights: `train_tiny.py FOLDER BATCH ACCUMULATION [DROPOUT_PERCENT [KILL_AFTER [PREFERENCES]]]`, alone or under `accelerate launch`"""
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from stetholm.train import finetuning
from stetholm.model.backbones import assemble, tiny
from stetholm.core.config import PROFILES
from stetholm.train.mdpo import train_mdpo, preference_rows
from stetholm.model.encoder import new_encoder
from stetholm.train.lora import lora

P = replace(PROFILES["smoke"], sft_train_encoder=False, sft_part_tokens=60)  # two parts a batch of four


class Noises:
    "Two windows of noise for each recording"
    def windows(self, i): return 2
    def __getitem__(self, i): return torch.randn(2, 64, 313, generator=torch.Generator().manual_seed(int(i)))*10 - 50


def build():
    "A tiny model whose encoder stays as it is, and its 16 pairs"
    words = ["wheeze", "crackle", "murmur", "stridor"]
    pairs = pd.DataFrame([dict(pair_id=f"p{i}", recording_ids=[str(i)], instruction="Describe it." if i % 3 else "What do you hear in this recording?", response=f"I hear a {words[i % 4]}.") for i in range(16)])
    torch.manual_seed(0)
    lm = assemble(*tiny([*pairs.instruction, *pairs.response]), new_encoder(P), P)
    lm.model.requires_grad_(False)
    lm.model.model.audio_encoder.eval().standardise(Noises(), range(16))
    return lm, pairs


def preferred(pairs):
    "Preference pairs of the same questions, the word after the right one rejected, and a table of their recordings: every one a patient of its own"
    table = pd.DataFrame(dict(split="train", domain="lung", binary=["normal", "abnormal"]*8, patient_id=pairs.pair_id, findings=[[]]*16, recording_id=[str(i) for i in range(16)])).set_index("recording_id", drop=False)
    return pairs.assign(chosen=pairs.response, rejected=np.roll(pairs.response, -1)), table


def main(folder, batch, accumulation, dropout=0, kill_after=0, preferences=0):
    "Train with so many percent of LoRA dropout; with `kill_after`, die at the end of that step as under kill -9; with `preferences`, by mDPO"
    if kill_after:
        def die(self, args, state, control, **kw):
            if state.global_step == kill_after: os.kill(os.getpid(), signal.SIGKILL)
        finetuning.ProgressReport.on_step_end = die
    lm, pairs = build()
    if preferences:
        rows = preference_rows(*preferred(pairs), lm.processor, Noises(), 200, 0)
        model, log = train_mdpo(lm, rows, rows.select(range(4)), Noises(), replace(P, dpo_steps=6, dpo_lr=1e-2, dpo_batch=batch, dpo_accumulation=accumulation, dpo_evaluations=3, sft_lora_dropout=dropout/100), folder/"trainer")
    else:
        rows = finetuning.training_rows(pairs, lm.processor, Noises(), 200)
        model, log = finetuning.train_sft(lm, rows, rows, Noises(), P, folder/"trainer", 6, 1e-2, batch, accumulation, lora(replace(P, sft_lora_dropout=dropout/100), ["projector"]))
    if int(os.environ.get("RANK", 0)) == 0:
        log.to_csv(folder/"log.csv", index=False)
        save_file({n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}, folder/"trained.safetensors")


if __name__ == "__main__": main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
