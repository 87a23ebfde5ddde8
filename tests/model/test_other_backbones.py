"Language models of other kinds than the one that comes along: each is used as it is meant, or refused with the remedy before anything is trained"
import json

import numpy as np
import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, MistralConfig, MixtralConfig, Phi3Config, PreTrainedTokenizerFast, T5Config

from stetholm.core.config import PROFILES, StethoError
from stetholm.model.backbones import assemble, check_backbone, load_backbone
from stetholm.model.encoder import new_encoder
from stetholm.model.lm import StethoLM, answer
from stetholm.train.lora import lora

P = PROFILES["smoke"]
SIZES = dict(vocab_size=500, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
TURNS = "{% for m in messages %}START{{ m.role }}MID{{ m.content }}STOP{% endfor %}{% if add_generation_prompt %}STARTassistantMID{% endif %}"
ALTERNATING = ("{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
               "{% if m.role == 'user' %}[ASK] {{ m.content }} [/ASK]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + TURNS


def tokenizer(template, specials, **tokens):
    "A byte-level tokenizer of at most 500 words"
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False, special_tokens=list(specials))
    raw.train_from_iterator(["Is this sound normal or abnormal? Normal: clear. Abnormal: a murmur."]*9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=list(specials), chat_template=template, **tokens)


def turns(template, start, mid, stop): return template.replace("START", start).replace("MID", mid).replace("STOP", stop)


KINDS = {  # config, tokenizer, the token that ends an answer, markers of its prompts
    "without a padding token": (LlamaConfig(**SIZES, tie_word_embeddings=False),
                                lambda: tokenizer(turns(TURNS, "<|head|>", "<|/head|>", "<|turn|>"), ["<|head|>", "<|/head|>", "<|turn|>", "<|over|>"], eos_token="<|over|>"), "<|turn|>", ["<|head|>", "<|turn|>", "<|over|>"]),
    "without a system turn": (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2., attn_logit_softcapping=5., sliding_window=16, pad_token_id=0),
                              lambda: tokenizer(turns(NO_SYSTEM, "<turn>", "\n", "</turn>"), ["<pad>", "<turn>", "</turn>", "<eos>"], pad_token="<pad>", eos_token="<eos>"), "</turn>", ["<turn>", "</turn>"]),
    "alternating roles": (MistralConfig(**SIZES, sliding_window=24, tie_word_embeddings=False),
                          lambda: tokenizer(ALTERNATING, ["<s>", "</s>"], bos_token="<s>", eos_token="</s>"), "</s>", ["[ASK]", "[/ASK]", "</s>"]),
    "fused layers": (Phi3Config(**SIZES, pad_token_id=0, tie_word_embeddings=False),
                     lambda: tokenizer(turns(TURNS, "<|", "|>", "<|end|>"), ["<|pad|>", "<|end|>"], pad_token="<|pad|>", eos_token="<|end|>"), "<|end|>", ["<|end|>", "<|user|>"]),
}


@pytest.fixture
def folder(tmp_path):
    "Save a random model of a config, and a tokenizer"
    def save(config, words=None):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        if words: words.save_pretrained(tmp_path)
        return str(tmp_path)
    return save


@pytest.mark.report("a language model without a padding token")
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_this_kind_answers_learns_and_is_saved(folder, tmp_path, kind):
    config, words, end, markers = KINDS[kind]
    name = folder(config, words())
    check_backbone(name)
    text, tokens = load_backbone(name, torch.float32)
    ids = torch.tensor([tokens("Is this sound normal?", add_special_tokens=False).input_ids])
    torch.manual_seed(1)
    lm = assemble(*load_backbone(name, torch.float32), new_encoder(P), P)
    assert torch.allclose(lm.model(input_ids=ids).logits[..., :500], text.eval()(ids).logits, atol=1e-5)

    assert lm.processor.tokenizer.decode([lm.processor.end_of_turn]) == end and lm.processor.answer_ids("Normal.")[-1] == lm.processor.end_of_turn
    for marker in markers:
        with pytest.raises(StethoError, match="structures the model's prompts"): lm.processor.prompt_ids(f"Normal? {marker} Yes.")
    assert lm.processor.prompt_ids("Is it > 3 [sic] or < 4, {a | b}?")

    wave = .1*np.random.default_rng(0).standard_normal(8000).astype("float32")
    batch = lm.processor(["Normal?", "Is there a murmur, or nothing at all?"], [[wave], [wave]])
    lm.model.train()(**batch)  # the encoder's batch norm
    lm.model.eval()
    together = answer(lm.model, lm.processor, batch, 6)
    assert together == [answer(lm.model, lm.processor, lm.processor(q, [wave]), 6)[0] for q in ("Normal?", "Is there a murmur, or nothing at all?")]
    sampled = answer(lm.model, lm.processor, batch, 6, temperatures=(1e-4, 1.))
    assert sampled[::2] == together

    lm.save_pretrained(tmp_path/"saved")
    with torch.inference_mode(): assert torch.allclose(StethoLM.from_pretrained(tmp_path/"saved").model(**batch).logits, lm.model(**batch).logits, atol=1e-5)

    layers = {n for n, m in lm.model.named_modules() if isinstance(m, nn.Linear) and ".language_model." in n}
    model = get_peft_model(lm.model, lora(P, ["projector"]))
    learning = {n.removeprefix("base_model.model.").split(".lora_A")[0] for n, q in model.named_parameters() if ".lora_A" in n}
    assert learning == layers and len(layers) >= 8
    labels = batch.input_ids.where(torch.arange(batch.input_ids.shape[1]) > 20, -100)
    model(**batch, labels=labels).loss.backward()
    assert all(q.grad is not None for n, q in model.named_parameters() if ".lora_B" in n)


def test_a_padding_token_changes_nothing_that_is_learned(folder):
    "Answers end with it, so it must not be masked there"
    config, words, end, _ = KINDS["without a padding token"]
    lm = assemble(*load_backbone(folder(config, words()), torch.float32), new_encoder(P), P)
    assert lm.processor.tokenizer.pad_token == end and lm.model.generation_config.pad_token_id == lm.processor.end_of_turn
    short, long = lm.processor(["Normal?", "Is there anything that is not normal?"], [[], []]).attention_mask.sum(1).tolist()
    assert short == len(lm.processor.prompt_ids("Normal?", ())) < long


def same_verdicts():
    "A tokenizer that reads 'Abnormal' as 'Normal'"
    words = KINDS["fused layers"][1]()
    words.backend_tokenizer.normalizer = normalizers.Replace("Abnormal", "Normal")
    return words


REFUSED = {
    "no chat template": (LlamaConfig(**SIZES), lambda: tokenizer(None, ["<e>"], eos_token="<e>"), "no chat template: choose a model that was tuned on chats"),
    "another layout": (GPT2Config(vocab_size=500, n_embd=32, n_layer=1, n_head=2), KINDS["fused layers"][1], "gpt2 is not laid out as Llama is.*--set language_model"),
    "experts": (MixtralConfig(**SIZES, num_local_experts=2), KINDS["fused layers"][1], "LoRA does not reach its weights"),
    "scaled logits": (GraniteConfig(**SIZES, logits_scaling=8.), KINDS["fused layers"][1], "it scales its logits: logits_scaling"),
    "one token for both verdicts": (LlamaConfig(**SIZES), same_verdicts, "one token: P.abnormal. cannot be read"),
}

@pytest.mark.report("a language model without a padding token")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_used_is_refused_by_its_config(folder, kind):
    config, words, match = REFUSED[kind]
    with pytest.raises(StethoError, match=match): check_backbone(folder(config, words()))


@pytest.mark.report("a language model without a padding token")
def test_a_folder_without_a_whole_model_says_what_it_is(tmp_path):
    with pytest.raises(StethoError, match="no model at .*: give a folder with its config.json"): check_backbone(str(tmp_path))
    with pytest.raises(StethoError, match="no model at /nowhere"): check_backbone("/nowhere")
    T5Config(num_layers=1, d_model=8).save_pretrained(tmp_path)
    with pytest.raises(StethoError, match="t5 is no causal language model"): check_backbone(str(tmp_path))
    (tmp_path/"adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/base", "peft_type": "LORA"}))
    with pytest.raises(StethoError, match="is a LoRA adapter of me/base: merge the two"): check_backbone(str(tmp_path))


@pytest.mark.report("a language model without a padding token")
def test_a_run_with_such_a_model_is_refused_before_its_first_stage(folder, stetholm):
    name = folder(REFUSED["no chat template"][0], REFUSED["no chat template"][1]())
    done = stetholm("reproduce", "--profile", "smoke", "--set", f"language_model={name}")
    assert done.returncode == 1 and "no chat template" in done.stderr and done.stderr.count("\n") == 1 and not stetholm.runs.exists(), done.stderr

