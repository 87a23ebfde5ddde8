"Preference pairs and mDPO on tiny models: what is learnt from, what is refused, and that the reference stays"
import contextlib
import json
import math
import signal
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from stetholm.train import mdpo
from stetholm.core.config import StethoError
from stetholm.train.mdpo import (
    OBJECTIVES, Degraded, MDPOTrainer, PreferenceCollator, block_logps, counterparts, first_loss, mdpo_loss, preference_rows,
    train_mdpo)
from stetholm.score.candidates import rank, score_candidates
from test_training import same, train, trained
from train_tiny import P, Noises, build, preferred

Q = replace(P, dpo_steps=3, dpo_lr=1e-2, dpo_batch=4, dpo_evaluations=3)


@pytest.fixture
def toy():
    "A tiny model, its preference pairs, their recordings, and the rows made of them"
    lm, pairs = build()
    pairs, table = preferred(pairs)
    return lm, pairs, table, preference_rows(pairs, table, lm.processor, Noises(), 200, 0)


def test_fault_02_the_best_answer_is_chosen_and_the_trainer_sees_it(toy, tmp_path, monkeypatch):
    lm, pairs, table, _ = toy
    said = pd.DataFrame([dict(pair_id=i, candidate=f"{w} {i}", facts=f) for i in pairs.pair_id for w, f in (("worse", .2), ("best", .9), ("worst", .1), ("good", .8))])
    ranked = pairs[["pair_id", "instruction", "recording_ids"]].merge(rank(said, {"facts": 1.}, .1), on="pair_id")
    rows, seen = preference_rows(ranked, table, lm.processor, Noises(), 200, 0), []
    decode = lambda labels: lm.processor.tokenizer.decode([t for t in labels.tolist() if t != -100], skip_special_tokens=True)
    monkeypatch.setattr(mdpo, "block_logps", lambda model, batch, was=block_logps: seen.append([decode(x) for x in batch["labels"]]) or was(model, batch))
    train_mdpo(lm, rows, rows.select(range(4)), Noises(), Q, tmp_path)
    taught = {a for batch in seen for a in zip(*np.split(np.array(batch), 3))}
    assert taught <= {(f"best {i}", f"worst {i}", f"best {i}") for i in pairs.pair_id} and len(taught) == len(pairs)


def test_a_judge_can_rank_alone(toy):
    _, pairs, _, _ = toy
    evidence = json.dumps({"asked": "findings", "recordings": [{"recording_id": "rec-1", "domain": "lung", "binary": "abnormal", "findings": ["wheeze"]}]})
    asked = pairs.assign(evidence=evidence)[:2]
    said = pd.DataFrame([dict(pair_id=i, candidate=a) for i in asked.pair_id for a in ("Wheezes.", "Crackles.", "Wheezes.")])

    def chat(talks, samples): return [json.dumps({"grade": 8 if "Answer: Crackles." in t[0]["content"] else 3}) for t in talks]
    scored = score_candidates(said, asked, chat)
    assert scored.judge.tolist() == [.3, .8, .3]*2 and (scored.facts[::3] > scored.facts[1::3].to_numpy()).all()
    assert rank(scored, {"judge": 1.}, .1).chosen.tolist() == ["Crackles."]*2 and rank(scored, {"facts": 2., "wording": 1.}, .1).chosen.tolist() == ["Wheezes."]*2
    assert score_candidates(said, asked).judge.isna().all()


def test_fault_12_only_the_third_block_hears_worse_and_the_same_sound_leaves_no_margin(toy):
    lm, _, _, rows = toy
    def blocks(worse): return PreferenceCollator(lm.processor, Noises(), worse)([rows[i] for i in range(4)])

    class Unharmed(Noises):
        "The recording itself where its degraded version is asked for"
        def __getitem__(self, key): return super().__getitem__(key[0])
    lm.model.eval()
    for worse, equal in ((Degraded(Noises(), "swap"), False), (Degraded(Noises(), "remove"), False), (Unharmed(), True)):
        batch = blocks(worse)
        heard = batch["input_features"].chunk(3)
        assert torch.equal(heard[0], heard[1]) and torch.equal(heard[0], heard[2]) == equal
        with torch.no_grad(): policy = block_logps(lm.model, batch)
        r = mdpo_loss(policy, torch.zeros_like(policy), OBJECTIVES["mdpo"])[1]
        assert ((r[0] - r[2]).abs().max() < 1e-6) == equal


def test_swapping_chosen_and_rejected_turns_the_response_term_round(toy):
    lm, pairs, table, rows = toy
    turned = preference_rows(pairs.assign(chosen=pairs.rejected, rejected=pairs.chosen), table, lm.processor, Noises(), 200, 0)
    lm.model.eval()
    def margin(rows):
        with torch.no_grad(): p = block_logps(lm.model, PreferenceCollator(lm.processor, Noises(), Degraded(Noises(), "silence"))([rows[i] for i in range(4)]))
        r = mdpo_loss(p, torch.zeros_like(p), OBJECTIVES["dpo"])[1]
        return r[0] - r[1]
    torch.testing.assert_close(margin(rows), -margin(turned), atol=1e-5, rtol=1e-5)
    assert margin(rows).abs().min() > 1e-3


def test_parts_of_a_batch_change_nothing(tmp_path):
    def learn(part_tokens):
        lm, pairs = build()
        rows = preference_rows(*preferred(pairs), lm.processor, Noises(), 200, 0)
        model, log = train_mdpo(lm, rows, rows.select(range(4)), Noises(), replace(Q, sft_part_tokens=part_tokens, dpo_batch=5), tmp_path/str(part_tokens))
        return log[["loss", "eval_loss"]].to_numpy(), [q.detach() for q in model.parameters() if q.requires_grad]
    (losses, weights), (others, learnt) = learn(0), learn(300)
    np.testing.assert_allclose(losses, others, atol=1e-4)
    for a, b in zip(weights, learnt): torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


def test_the_first_loss_is_known_and_accuracy_is_relative_to_the_reference(toy, tmp_path):
    lm, _, _, rows = toy
    _, log = train_mdpo(lm, rows, rows.select(range(4)), Noises(), replace(Q, dpo_lr=0., sft_lora_dropout=.5), tmp_path)  # dropout would tell policy and reference apart
    for column in ("loss", "eval_loss"): np.testing.assert_allclose(log[column].dropna(), first_loss(OBJECTIVES["paper"]), atol=1e-5)
    assert math.isclose(first_loss(OBJECTIVES["paper"]), 1.5*math.log(2) + 1.5*math.log1p(math.exp(.5)), rel_tol=1e-6)
    assert not log["eval_rewards/accuracy"].dropna().any(), "nothing is gained on the reference, whatever the answers' own likelihood"


def test_what_hangs_on_the_recording_is_learnt_from_it(toy, tmp_path):
    lm, _, _, rows = toy
    with contextlib.redirect_stdout(None): _, log = train_mdpo(lm, rows, rows, Noises(), replace(Q, dpo_steps=60, dpo_batch=16, dpo_objective="mdpo"), tmp_path)
    assert log["eval_rewards/audio_accuracy"].dropna().iloc[-1] == log["eval_rewards/accuracy"].dropna().iloc[-1] == 1 and (log.drift < 1e-5).all()


def test_fault_12_validation_pairs_choose_the_checkpoint(toy, tmp_path):
    lm, _, _, rows = toy
    validation = rows.select(range(4)).rename_columns({"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"})
    model, log = train_mdpo(lm, rows, validation, Noises(), replace(Q, dpo_steps=9, dpo_objective="dpo"), tmp_path)
    losses, batch = log.eval_loss.dropna().tolist(), PreferenceCollator(lm.processor, Noises(), Degraded(Noises(), Q.dpo_degradation))(list(validation))
    assert min(losses) < losses[-1], "the more is learnt, the worse for pairs the other way round"
    def logps(): return block_logps(model.eval(), batch).detach()
    with model.disable_adapter(): reference = logps()
    assert math.isclose(mdpo_loss(logps(), reference, OBJECTIVES["dpo"])[0], min(losses), rel_tol=1e-4)


def test_a_reference_that_is_not_the_sft_model_stops_the_run(toy, tmp_path, monkeypatch):
    lm, _, _, rows = toy
    monkeypatch.setattr(MDPOTrainer, "reference_logps", lambda self, batch, was=MDPOTrainer.reference_logps: was(self, batch) + 1e-3*self.state.global_step)
    with pytest.raises(RuntimeError, match="after DPO, the reference is 3.0e-03"): train_mdpo(lm, rows, rows.select(range(4)), Noises(), Q, tmp_path/"later")
    monkeypatch.setattr(MDPOTrainer, "reference_logps", lambda self, batch: torch.zeros(3, len(batch["labels"])//3))
    with pytest.raises(RuntimeError, match="before DPO"): train_mdpo(build()[0], rows, rows.select(range(4)), Noises(), Q, tmp_path/"first")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "Six steps of mDPO in a process of their own"
    return trained(tmp_path_factory.mktemp("unbroken"), 4, 1, 0, 0, 1)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path, unbroken):
    assert train(tmp_path/"killed", 4, 1, 0, 3, 1).returncode == -signal.SIGKILL
    assert "step 2/6" not in (done := train(tmp_path/"killed", 4, 1, 0, 0, 1)).stdout and done.returncode == 0, done.stderr[-3000:]
    same(unbroken, tmp_path/"killed", 1e-6)


def test_accumulated_batches_learn_what_the_larger_one_learns(tmp_path, unbroken):
    same(unbroken, trained(tmp_path/"small", 2, 2, 0, 0, 1), 1e-4)


@pytest.mark.parametrize("change, match", [
    (dict(chosen="  "), "p3 has an empty answer"), (dict(rejected=""), "p3 has an empty answer"), (dict(rejected="I hear a stridor. "), "p3 has the same answer"),
    (dict(recording_ids=["99"]), "p3 is about recording 99, which is not among the run's"), (dict(recording_ids=["15"]), "p3 is about recording 15 of a test patient"), (dict(instruction="Why? "*80), "p3 is longer than sft_max_tokens=200")], ids=["chosen", "rejected", "equal", "missing", "test", "long"])
def test_a_pair_that_cannot_be_learnt_from_is_refused_by_name(toy, change, match):
    lm, pairs, table, _ = toy
    table.loc["15", "split"] = "test"
    pairs = pairs[:15].copy()
    for k, v in change.items(): pairs.at[3, k] = v
    with pytest.raises(StethoError, match=match): preference_rows(pairs, table, lm.processor, Noises(), 200, 0)


def test_questions_without_a_pair_are_counted_and_left_out(toy):
    lm, pairs, table, rows = toy
    some = pairs.assign(outcome=["pair"]*10 + ["margin"]*3 + ["empty"]*3)
    assert preference_rows(some, table, lm.processor, Noises(), 200, 0)[:] == rows.select(range(10))[:]


def test_a_counterpart_is_another_patient_s_with_another_finding():
    table = pd.DataFrame([("a", "p", "lung", "abnormal", ["wheeze"], "train"), ("b", "p", "lung", "normal", [], "train"), ("c", "q", "lung", "abnormal", ["wheeze"], "train"), ("d", "r", "lung", "abnormal", ["crackle"], "train"),
                          ("e", "s", "lung", "normal", [], "test"), ("f", "t", "heart", "normal", [], "train")], columns=["recording_id", "patient_id", "domain", "binary", "findings", "split"]).set_index("recording_id", drop=False)
    rng = np.random.default_rng(0)
    assert {counterparts(["a"], table, rng)[0] for _ in range(20)} == {"d"}, "no normal one of another patient in training: the one with another finding"
    assert {counterparts(["b"], table, rng)[0] for _ in range(20)} == {"c", "d"}
    with pytest.raises(StethoError, match="no other patient's heart recording of split train to put in place of f"): counterparts(["f"], table, rng)


def test_only_a_swap_wants_other_patients(toy):
    lm, pairs, table, _ = toy
    alone = table.assign(patient_id="p0")
    with pytest.raises(StethoError, match="no other patient's lung recording"): preference_rows(pairs, alone, lm.processor, Noises(), 200, 0)
    rows = preference_rows(pairs, alone, lm.processor, Noises(), 200, 0, "silence")
    assert rows["other_ids"] == rows["recording_ids"] == pairs.recording_ids.tolist()


def test_rewards_are_means_over_pairs_and_not_over_batches(toy, tmp_path):
    lm, _, _, rows = toy
    validation = rows.select(range(5))  # batches of four and one
    model, log = train_mdpo(lm, rows, validation, Noises(), Q, tmp_path)
    batch = PreferenceCollator(lm.processor, Noises(), Degraded(Noises(), Q.dpo_degradation))(list(validation))
    with torch.no_grad():
        policy = block_logps(model.eval(), batch)
        with model.disable_adapter(): reference = block_logps(model, batch)
    r, best = mdpo_loss(policy, reference, OBJECTIVES["paper"])[1], log.loc[log.eval_loss.idxmin()]
    assert math.isclose(best["eval_rewards/chosen"], r[0].mean(), abs_tol=1e-4) and not math.isclose(r[0].mean(), (r[0, :4].mean() + r[0, 4])/2, abs_tol=1e-3)
    assert math.isclose(best["eval_rewards/accuracy"], (r[0] > r[1]).float().mean(), abs_tol=1e-6)


def test_an_unknown_degradation_is_refused():
    with pytest.raises(StethoError, match="unknown dpo_degradation 'reverb'"): Degraded(Noises(), "reverb")
