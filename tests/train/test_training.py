"Training: what moves, what a step is made of, and that a kill, accumulation or a second process change nothing"
import copy
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from conftest import TWO_PROCESSES
from stetholm.train import finetuning
from stetholm.sound.audio import recording_features
from stetholm.core.config import StethoError
from stetholm.model.encoder import ColaHead, new_encoder
from stetholm.train.pretraining import cola_loss, pretrain
from stetholm.model.lm import answer
from stetholm.model.lm import StethoLM
from stetholm.model.processor import StethoLMProcessor
from stetholm.train.lora import lora
from stetholm.train.finetuning import Collator, train_sft, last_checkpoint, trainer_settings, training_rows
from train_tiny import P, Noises, build

SCRIPT = Path(__file__).with_name("train_tiny.py")


def train(folder, *words, launch=()):
    "The script in a process of its own"
    folder.mkdir(exist_ok=True)
    return subprocess.run([sys.executable, *launch, str(SCRIPT), str(folder), *map(str, words)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"})


def trained(folder, *words, **more):
    "Folder of a run of the script that came to its end"
    done = train(folder, *words, **more)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def log(folder): return pd.read_csv(folder/"log.csv")


def same(a, b, within):
    "Losses and trained weights are equal to `within`"
    assert len(log(a)) == len(log(b)) > 6
    for column in ("loss", "eval_loss"): np.testing.assert_allclose(log(a)[column], log(b)[column], atol=within)
    one, other = (load_file(f/"trained.safetensors") for f in (a, b))
    assert one.keys() == other.keys()
    for name in one: torch.testing.assert_close(one[name], other[name], atol=within, rtol=0, msg=name)


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path):
    unbroken = trained(tmp_path/"unbroken", 4, 2, 10)  # with dropout, so that the state of the random numbers counts
    killed = train(tmp_path/"killed", 4, 2, 10, 3)
    assert killed.returncode == -signal.SIGKILL and Path(last_checkpoint(tmp_path/"killed/trainer")).name == "checkpoint-2"
    done = train(tmp_path/"killed", 4, 2, 10)
    assert done.returncode == 0 and "step 3/6" in done.stdout and "step 2/6" not in done.stdout, done.stderr[-3000:]
    same(unbroken, tmp_path/"killed", 1e-6)


def test_a_checkpoint_that_was_cut_short_is_not_gone_on_from(tmp_path):
    for step, whole in ((2, True), (10, True), (12, False)):
        (tmp_path/f"checkpoint-{step}").mkdir()
        if whole: (tmp_path/f"checkpoint-{step}/trainer_state.json").write_text("{}")
    assert Path(last_checkpoint(tmp_path)).name == "checkpoint-10" and last_checkpoint(tmp_path/"none") is None


def test_two_processes_learn_what_one_learns(tmp_path):
    same(trained(tmp_path/"one", 4, 2), trained(tmp_path/"two", 4, 1, launch=TWO_PROCESSES), 1e-4)


@pytest.fixture
def threads():
    "Sets how many threads torch has, until the test is over"
    was = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(was)


def test_parts_of_a_batch_and_recordings_encoded_once_change_nothing(tmp_path, monkeypatch, threads):
    def learn(name, part_tokens, cores=1):
        threads(cores)
        lm, pairs = build()
        rows, passes = training_rows(pairs, lm.processor, Noises(), 200), []
        frames = type(lm.model.model.audio_encoder).frames
        monkeypatch.setattr(type(lm.model.model.audio_encoder), "frames", lambda self, mel: passes.append(len(mel)) or frames(self, mel))
        model, log = train_sft(lm, rows, rows, Noises(), replace(P, sft_part_tokens=part_tokens), tmp_path/name, 6, 1e-2, 8, peft_config=lora(P, ["projector"]), augmented=False)
        monkeypatch.undo()
        return log[["loss", "eval_loss"]].to_numpy(), [q.detach() for q in model.parameters() if q.requires_grad], sum(passes)
    (whole, weights, once), (parts, others, _), (beside, mine, _), (anew, equal, _) = learn("whole", 0), learn("parts", 1), learn("beside", 150, 3), learn("anew", 150, 3)
    assert torch.get_num_threads() == 3 and all(torch.equal(a, b) for a, b in zip(mine, equal)), "side by side, and the same every time"
    monkeypatch.setattr(finetuning, "EmbeddedFeatures", lambda encoder, features, ids: features)
    again, kept, often = learn("again", 0)
    for losses, learnt in ((parts, others), (beside, mine), (again, kept)):
        np.testing.assert_allclose(whole, losses, atol=1e-4)
        for a, b in zip(weights, learnt): torch.testing.assert_close(a, b, atol=1e-3, rtol=0)
    assert once < often


def cola(rows):
    "Loss of some rows of a batch of eight, and the modules whose gradients it gives"
    torch.manual_seed(0)
    modules, (a, b) = torch.nn.ModuleList([torch.nn.Linear(12, 16), ColaHead(16, 8)]), torch.randn(2, 8, 12)
    torch.nn.init.normal_(modules[1].bilinear.weight)  # so that a wrong pair costs something
    return cola_loss(modules[1](modules[0](a[rows]), modules[0](b[rows]))), modules


def _half(rank, meeting, out):
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    loss, modules = cola(slice(4*rank, 4*rank + 4))
    loss.backward()
    mean = [t/2 for t in (loss.detach(), *(p.grad for p in modules.parameters()))]
    for t in mean: dist.all_reduce(t)
    if rank == 0: torch.save(mean, out)
    dist.destroy_process_group()


def test_cola_s_negatives_are_those_of_all_processes(tmp_path):
    mp.spawn(_half, (tmp_path/"meeting", tmp_path/"mean.pt"), nprocs=2)
    loss, modules = cola(slice(None))
    loss.backward()
    for one, other in zip((loss.detach(), *(p.grad for p in modules.parameters())), torch.load(tmp_path/"mean.pt"), strict=True): torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_only_projector_and_lora_move(tmp_path):
    lm, pairs = build()
    before = {n: t.clone() for n, t in lm.model.state_dict().items()}
    rows = training_rows(pairs, lm.processor, Noises(), 200)
    model, _ = train_sft(lm, rows, rows, Noises(), P, tmp_path, 2, 1e-2, 8, peft_config=lora(P, ["projector"]))
    after = model.merge_and_unload().state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved and all("language_model.layers" in n or ".projector." in n for n in moved), sorted(moved)
    layers = {n for n in before if "language_model.layers" in n and n.endswith("proj.weight")}
    assert layers <= moved and any(".projector." in n for n in moved)


def test_gradient_reaches_encoder_projector_and_lora_and_nothing_else():
    from peft import get_peft_model
    lm, pairs = build()
    model = get_peft_model(lm.model, lora(P, ["projector", "audio_encoder"])).train()
    batch = Collator(lm.processor, Noises())([training_rows(pairs, lm.processor, Noises(), 200)[i] for i in range(4)])
    for n, t in model.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(t, std=.02)  # as they are after a step: at first they are zero, and nothing reaches A
    model(**batch).loss.backward()
    reached = {n for n, t in model.named_parameters() if t.grad is not None and t.grad.abs().sum() > 0}
    assert all("lora_" in n or "modules_to_save" in n for n in reached), sorted(reached)
    for part in ("lora_A", "lora_B", "projector.modules_to_save", "audio_encoder.modules_to_save"): assert any(part in n for n in reached), part
    assert not any("audio_encoder" in n and "lora_" in n for n in reached)


def test_in_bfloat16_encoder_and_projector_work_in_float32(tmp_path):
    lm, pairs = build()
    for part in (lm.model.model.language_model, lm.model.lm_head): part.to(torch.bfloat16)
    seen = {}
    for name, part in (("convolution", next(m for m in lm.model.model.audio_encoder.modules() if isinstance(m, torch.nn.Conv2d))), ("projector", lm.model.model.projector), ("layer", lm.model.model.language_model.layers[0].mlp)):
        part.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, set()).add(out.dtype))
    rows = training_rows(pairs, lm.processor, Noises(), 200)
    _, log = train_sft(lm, rows, rows, Noises(), replace(P, dtype="bfloat16"), tmp_path, 6, 1e-2, 8, peft_config=lora(P, ["projector"]))
    assert seen == {"convolution": {torch.float32}, "projector": {torch.float32}, "layer": {torch.bfloat16}}
    assert log.eval_loss.dropna().iloc[-1] < log.loss.dropna().iloc[0]


def test_fault_01_a_question_is_answered_alone_as_in_a_batch():
    lm, pairs = build()
    lm.model.eval()
    questions = ["Describe it.", "What do you hear in this recording, and what does it point to?", "Describe it.", "Why?"]
    heard, mute = [[Noises()[str(i)]] for i in range(4)], lm.processor.tokenizer.all_special_ids
    together = answer(lm.model, lm.processor, lm.processor(questions, heard), 12, suppress_tokens=mute)
    assert together == [answer(lm.model, lm.processor, lm.processor(q, h), 12, suppress_tokens=mute)[0] for q, h in zip(questions, heard)] and len(set(together)) > 1
    with torch.no_grad(): last, alone = (torch.cat([lm.model(**lm.processor(*asked), logits_to_keep=1).logits[:, -1] for asked in batches]) for batches in ([(questions, heard)], zip(questions, heard)))
    torch.testing.assert_close(last, alone, atol=1e-4, rtol=0)


def test_fault_03_a_long_pair_is_refused_by_name_and_not_cut():
    lm, pairs = build()
    rows = training_rows(pairs, lm.processor, Noises(), 200)
    longest = max(len(r["input_ids"]) for r in rows)
    assert len(training_rows(pairs, lm.processor, Noises(), longest)) == len(pairs)
    with pytest.raises(StethoError, match=r"pair p\d+ has \d+ tokens, more than sft_max_tokens"): training_rows(pairs, lm.processor, Noises(), longest - 1)


def test_fault_04_the_template_s_end_of_turn_is_learnt_and_nothing_of_the_prompt():
    lm, pairs = build()
    for row, pair in zip(training_rows(pairs, lm.processor, Noises(), 200), pairs.itertuples()):
        learnt = [t for t in row["labels"] if t != -100]
        assert learnt[-1] == lm.processor.end_of_turn and lm.processor.tokenizer.decode(learnt[:-1]) == pair.response
        assert lm.processor.end_of_turn in lm.model.generation_config.eos_token_id
    tokenizer = copy.deepcopy(lm.processor.tokenizer)  # Gemma's turns, too, end with another token than its texts
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|system|>")
    assert StethoLMProcessor(lm.processor.feature_extractor, tokenizer).answer_ids("I hear a wheeze.")[-1] == tokenizer.convert_tokens_to_ids("<|system|>") != tokenizer.eos_token_id


def test_fault_05_the_model_hears_what_the_encoder_was_trained_on(tmp_path):
    lm, _ = build()
    soundfile.write(tmp_path/"clip.wav", .1*np.random.default_rng(0).standard_normal(44100*7), 44100)
    assert torch.equal(recording_features(tmp_path/"clip.wav", P), lm.processor.feature_extractor(tmp_path/"clip.wav"))


@pytest.mark.parametrize("change", [lambda w: w.pop("model.projector.mlp.1.weight"), lambda w: w.update(left_over=torch.zeros(1)), lambda w: w.update({"model.projector.mlp.1.weight": torch.zeros(3, 3)})], ids=["missing", "left over", "another size"])
def test_fault_05_a_model_is_loaded_whole_or_not_at_all(tmp_path, change):
    lm, _ = build()
    lm.save_pretrained(tmp_path)
    assert StethoLM.from_pretrained(tmp_path)
    weights = load_file(tmp_path/"model.safetensors")
    change(weights)
    save_file(weights, tmp_path/"model.safetensors", {"format": "pt"})
    with pytest.raises((StethoError, RuntimeError), match="not loaded in part|size mismatch|mismatched|MISMATCH"): StethoLM.from_pretrained(tmp_path)


def test_fault_05_an_encoder_that_was_not_trained_says_so(capsys):
    table = pd.DataFrame(dict(recording_id=["0", "1"], split="train", domain=["heart", "lung"], binary="normal", findings=[[], []]))
    pretrain(new_encoder(P), Noises(), table, replace(P, alignment_objective="random"))
    assert "UNTRAINED" in capsys.readouterr().out


def test_fault_06_training_recordings_are_changed_and_validation_recordings_are_not():
    lm, pairs = build()
    rows = [training_rows(pairs, lm.processor, Noises(), 200)[i] for i in range(4)]
    plain, augmented = Collator(lm.processor, Noises()), Collator(lm.processor, Noises(), 0)
    first, again = augmented(rows)["input_features"], augmented(rows)["input_features"]
    augmented.epoch = 1
    later = augmented(rows)["input_features"]
    assert torch.equal(plain(rows)["input_features"][0, 0], Noises()["0"]) and torch.equal(first, again)
    assert all(not torch.equal(a, b) for x in (plain(rows)["input_features"], later) for a, b in zip(first, x))


def test_fault_07_every_window_is_heard():
    lm, _ = build()
    lm.model.eval()
    mel = Noises()["3"]
    other = mel.clone()
    other[-1] = Noises()["4"][0]
    with torch.no_grad(): a, b = (lm.model(**lm.processor("Describe it.", [x])).logits[:, -1] for x in (mel, other))
    assert not torch.allclose(a, b, atol=1e-4)


def test_fault_08_two_recordings_differ_from_either_alone_and_from_each_other_swapped():
    lm, _ = build()
    lm.model.eval()
    x, y = Noises()["5"], Noises()["6"]
    with torch.no_grad(): said = [lm.model(**lm.processor("Compare the two.", heard)).logits[:, -1] for heard in ([x, y], [y, x], [x, x], [x])]
    for i in range(4):
        for j in range(i): assert not torch.allclose(said[i], said[j], atol=1e-4), (i, j)


def test_fault_09_the_dataset_has_no_say_in_the_prompt():
    lm, pairs = build()
    one, other = (training_rows(pairs.assign(dataset=d, domain=o), lm.processor, Noises(), 200) for d, o in (("kauh", "lung"), ("circor", "heart")))
    assert one["input_ids"] == other["input_ids"]


def test_fault_10_a_broken_batch_stops_the_run(tmp_path):
    lm, pairs = build()
    rows = training_rows(pairs, lm.processor, Noises(), 200)

    class Lost(Noises):
        "One recording cannot be had"
        def __getitem__(self, i):
            if i == "7": raise StethoError("no features of recording '7'")
            return super().__getitem__(i)
    with pytest.raises(StethoError, match="recording '7'"): train_sft(lm, rows, rows, Lost(), P, tmp_path, 4, 1e-2, 8, peft_config=lora(P, ["projector"]))


def test_fault_11_logits_are_computed_on_answer_positions_only(monkeypatch):
    lm, pairs = build()
    batch, seen = Collator(lm.processor, Noises())([training_rows(pairs, lm.processor, Noises(), 200)[i] for i in range(8)]), []
    linear, words = torch.nn.functional.linear, lm.model.lm_head.out_features

    def validation(x, weight, bias=None):
        out = linear(x, weight, bias)
        if out.shape[-1] == words: seen.append(out.numel()//words)
        return out
    monkeypatch.setattr(torch.nn.functional, "linear", validation)
    for frozen in (False, True):
        lm.model.lm_head.requires_grad_(not frozen)
        seen.clear()
        lm.model(**batch)
        assert sum(seen) == int((batch["labels"] != -100).sum())


def test_fault_13_training_is_seeded_and_stays_on_this_machine(tmp_path):
    def once(name, seed):
        lm, pairs = build()
        rows = training_rows(pairs, lm.processor, Noises(), 200)
        model, log = train_sft(lm, rows, rows, Noises(), replace(P, seed=seed), tmp_path/name, 3, 1e-2, 4, peft_config=lora(P, ["projector"]), augmented=False)
        return log.loss.dropna().tolist()
    assert once("one", 0) == once("again", 0) != once("other", 1)
    settings = trainer_settings(P, tmp_path/"one", 3)
    assert settings["report_to"] == "tensorboard" and settings["output_dir"] == str(tmp_path/"one") and list((tmp_path/"one").rglob("events.out.tfevents.*"))
