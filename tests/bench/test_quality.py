"Is StethoBench a good set: every number worked out by hand on a few pairs, a planted leak found, and a card that Croissant tools read"
import json
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from stetholm.bench.card import bench_sections, faithfulness, write_bench_card
from stetholm.bench.card import measure
from stetholm.core.config import StethoError
from stetholm.bench.pairs import PAIRS
from stetholm.bench.pairs import synthesize
from stetholm.phantom.patients import make_phantom
from stetholm.bench.quality import (
    CONTEXT, PAPER, balance, beside_paper, draw_duplicates, draw_leakage, draw_lengths, draw_pair_counts, duplicates, guess,
    language, languages, near_duplicates, pair_counts, prior_leakage, verdict)
from stetholm.data.recordings import write_table
from stetholm.data.sources import scan


def pair(i, task="detection", split="train", dataset="a", instruction="What is heard?", response="Wheezes.", binary="abnormal", patient=None, **more):
    "A pair with evidence in today's layout"
    return dict(pair_id=str(i), filename=f"{i}.wav", split=split, dataset=dataset, instruction=instruction, response=response, task=task, distribution="in_domain", recording_ids=[f"r{i}"],
                patient_id=patient or f"p{i}", evidence=json.dumps([{"recording_id": f"r{i}", "binary": binary, "findings": None}]), engine="template", template=f"{task}/0") | more


def planted(n=200, told=lambda abnormal: "Which sounds are present?", seed=0):
    "Pairs of n/2 patients whose verdict `told` may put into the question"
    abnormal = np.random.default_rng(seed).integers(0, 2, n)
    return pd.DataFrame([pair(i, instruction=told(a), response="Wheezes." if a else "Clear.", binary=("normal", "abnormal")[a], patient=f"p{i//2}") for i, a in enumerate(abnormal)])


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    "StethoBench of a phantom, its recordings, its licences, and its measures"
    table = scan("phantom", make_phantom(tmp_path_factory.mktemp("phantom")/"phantom", 24, 0)).set_index("recording_id", drop=False)
    pairs = synthesize(table, 1, 0)
    return pairs, table.groupby("source").licence.unique().map(sorted).to_dict(), measure(pairs)


def test_verdict_of_both_layouts_of_evidence():
    assert verdict('[{"binary": "normal"}, {"binary": "abnormal"}]') == verdict('{"asked": "what", "recordings": [{"binary": "normal"}, {"binary": "abnormal"}]}') == "normal"
    assert verdict('[{"binary": null}]') is None and verdict('[{"recording_id": "x"}]') is None and verdict('{"asked": "safety", "recordings": []}') is None


def test_counts_beside_the_papers():
    table = pair_counts(pd.DataFrame([pair(0), pair(1), pair(2, dataset="b"), pair(3, task="safety", split="test")]))
    ours = table[table.set == "this set"].set_index(["task", "split", "source"]).pairs.to_dict()
    assert ours == {("detection", "train", "a"): 2, ("detection", "train", "b"): 1, ("safety", "test", "a"): 1} and list(table) == ["set", "task", "split", "source", "pairs"]
    wide = beside_paper(table)
    assert wide.loc["detection"].tolist() == [3, 0, 0, 3, 11_824, 1_920, 5_817, 19_561] and wide.loc["safety", "this set"].tolist() == [0, 0, 1, 1] and wide.loc["safety", ("paper", "total")] == 0
    assert wide.loc["total", "paper"].tolist() == [48_331, 4_775, 23_921, 77_027] and list(wide.index) == [*PAPER, "safety", "total"]


def test_near_duplicates_by_hand():
    long = "a loud blowing murmur that fills all of systole is heard at the apex and goes to the axilla"
    found = near_duplicates(["At 3 years: wheezes.", "at 4.5 years: WHEEZES.", long, long + " too", "Nothing.", "Clear lungs."])
    assert found == dict(n=6, distinct=5, exact=2/6, near=4/6, near_distinct=2/5)
    assert near_duplicates(["one"]) == dict(n=1, distinct=1, exact=0, near=0, near_distinct=0)
    many = near_duplicates([f"sound {i % 7} of {'abcdefg'[i % 7]*3}" for i in range(500)], max_texts=50)
    assert many["n"] == 500 and many["distinct"] == 7 and many["exact"] == many["near"] == 1


def test_duplicates_count_test_texts_that_stand_in_train():
    table = duplicates(pd.DataFrame([pair(0, response="Wheezes."), pair(1, response="A rub."), pair(2, split="test", response="Wheezes."), pair(3, split="test", response="wheezes."), pair(4, task="reporting", split="test", response="A rub.")])).set_index(["text", "task"])
    assert table.in_train.to_dict() == {("instruction", "detection"): 1, ("instruction", "reporting"): 1, ("instruction", "all"): 1, ("response", "detection"): 1/2, ("response", "reporting"): 1, ("response", "all"): 2/3}
    assert table.exact["response", "detection"] == 3/4 and table.exact["response", "reporting"] == 0 and table.exact["response", "all"] == 1
    assert duplicates(pd.DataFrame([pair(0)])).in_train.isna().all()


def test_language_by_hand():
    told = language(["The cat sat. It ran!", "The cat 3.5 once sat"])
    # words: the cat sat it ran | the cat once sat; pairs: the-cat, cat-sat, sat-it, it-ran | the-cat, cat-once, once-sat
    assert [told[k] for k in ("texts", "q1", "median", "q3", "longest", "tokens", "types", "hapax", "distinct_2")] == [2, 4.25, 4.5, 4.75, 5, 9, 6, 3/6, 6/7]
    empty = language([])
    assert empty["texts"] == empty["tokens"] == 0 and np.isnan(empty["median"]) and np.isnan(language(["?"])["distinct_2"])
    both = languages(pd.DataFrame([pair(0, response="Two words."), pair(1, task="location", response="Four words are here.")])).set_index(["text", "task"])
    assert both["median"]["response"].to_dict() == {"detection": 2, "location": 4, "all": 3}


def test_balance_by_hand():
    rows = [pair(0, binary="normal"), pair(1), pair(2), pair(3), pair(4, binary=None), pair(5, dataset="b", binary="normal"), pair(6, task="safety", binary=None)]
    table = balance(pd.DataFrame(rows)).set_index(["task", "source"])
    assert table.loc["detection", "a"].tolist() == pytest.approx([1, 3, 1, .75, -(.25*np.log2(.25) + .75*np.log2(.75))])
    assert table.loc["detection", "b"].tolist() == [1, 0, 0, 1, 0] and table.loc["safety", "a"].isna().tolist() == [False, False, False, True, True]


def test_a_leaking_question_is_found_and_a_blind_one_is_not():
    leaking = prior_leakage(planted(told=lambda a: "What causes the abnormal sounds?" if a else "What is heard here?")).set_index(["guessed", "seen", "task", "source"])
    for seen in ("instruction", "without context"): assert leaking.auroc["verdict", seen, "detection", "all"] == leaking.balanced["verdict", seen, "all", "a"] == 1 and "abnormal" in leaking.telling["verdict", seen, "all", "all"]
    assert set(leaking.n) == {200} and set(leaking.patients) == {100}
    rng = np.random.default_rng(1)
    blind = prior_leakage(planted(told=lambda a: f"{rng.choice(['What', 'Which sounds', 'Say what', 'Tell me what'])} {rng.choice(['is heard', 'do you hear', 'is present'])}?"))
    assert (blind.lo < .5).all() and blind.auroc.between(.35, .6).all() and (blind.telling == "").all()
    constant = prior_leakage(planted())
    assert (constant[["auroc", "lo", "hi", "balanced"]] == .5).all(axis=None)


def test_context_is_told_from_the_question():
    known = prior_leakage(planted(told=lambda a: f"{'72 years old, male, apex' if a else '4 years old, female, trachea'}. What do you hear in this {'heart' if a else 'lung'} sound?")).set_index(["guessed", "seen", "task", "source"])
    assert known.auroc["verdict", "instruction", "all", "all"] == 1 and known.auroc["verdict", "without context", "all", "all"] == .5
    assert CONTEXT.sub("", "0.4 years old, female, left posterior: Is this lung sound normal or abnormal?").split() == [",", ",", ":", "Is", "this", "sound", "normal", "or", "abnormal?"]


def test_guesses_of_next_to_nothing():
    for y, who in (([], []), ([1., 1.], ["a", "b"]), ([1., 0., 0.], ["a", "b", "c"])):
        told = guess(["Heard?"]*len(y), np.array(y), np.array(who))
        assert np.isnan(told["auroc"]) and told["n"] == len(y)
    few = guess(["Heard?"]*8, np.tile([0., 1.], 4), np.repeat(["a", "b"], 4))
    assert few["auroc"] == .5 and np.isnan(few["lo"]) and few["patients"] == 2
    lone = guess(["Heard?"]*11, np.array([1., 1, 0, 0, 0, 0, 0, 1, 0, 0, 1]), np.array([1, 1, 2, 0, 0, 0, 1, 2, 1, 1, 1]))  # a fold learns from one class
    assert 0 <= lone["auroc"] <= 1
    table = prior_leakage(pd.DataFrame([pair(0, binary=None), pair(1, binary=None)]))
    assert table[table.guessed == "verdict"].n.eq(0).all() and draw_leakage(table)
    plt.close("all")


def test_faithfulness_reads_answers(bench):
    pairs = bench[0].head(100)
    wrong = pairs.assign(response=pairs.response.where(pairs.index >= 50, "It is raining."), engine="another")
    both = faithfulness(pd.concat([pairs, wrong]))
    share = both.assign(right=both.pairs*both.faithful).groupby("engine")[["right", "pairs"]].sum()
    assert share.right.to_dict() == pytest.approx({"another": 50, "template": 100})


def test_figures(bench):
    tables = bench[2]
    for draw, name, axes in ((draw_pair_counts, "pair_counts", 3), (draw_duplicates, "duplicates", 2), (draw_lengths, "languages", 2), (draw_leakage, "prior_leakage", 2)):
        figure = draw(tables[name])
        figure.canvas.draw()
        assert len(figure.axes) == axes and figure._suptitle.get_text() and all(ax.get_xlabel() or name == "pair_counts" for ax in figure.axes)
    plt.close("all")


def test_bench_card_and_croissant(bench, tmp_path):
    pairs, licences, tables = bench
    write_table(pairs, tmp_path/"stethobench.parquet", PAIRS)
    made = write_bench_card(pairs, tmp_path/"stethobench.parquet", tmp_path/"card", "a phantom's StethoBench", licences, tables)
    assert made == ["stethobench_card.json", "stethobench_card.md", "stethobench_card.html", "stethobench_croissant.json"]
    texts = {n: (tmp_path/"card"/n).read_text() for n in made}
    assert not [n for n, text in texts.items() if str(tmp_path) in text] and "NaN" not in texts["stethobench_card.json"] and " nan " not in texts["stethobench_card.md"]
    card = json.loads(texts["stethobench_card.json"])
    assert sum(r["pairs"] for r in card["pair_counts"] if r["set"] == "this set") == len(pairs) and card["licences"] == licences and {*tables} <= {*card}
    for text in (texts["stethobench_card.md"], texts["stethobench_card.html"]): assert "Not for clinical use." in text and all(l in text for ls in licences.values() for l in ls) and f"{len(pairs):,}" in text
    assert [title for title, _ in bench_sections(pairs, tables, licences, "it")][-1] == "Known limits"
    mlcroissant = pytest.importorskip("mlcroissant") if not os.environ.get("CI") else __import__("mlcroissant")
    described = mlcroissant.Dataset(jsonld=json.loads(texts["stethobench_croissant.json"]))
    assert not described.metadata.ctx.issues.errors and [f.name for f in described.metadata.record_sets[0].fields] == [*PAIRS.columns] and described.metadata.license
    (tmp_path/"stethobench_croissant.json").write_text(texts["stethobench_croissant.json"])
    first = next(iter(mlcroissant.Dataset(jsonld=tmp_path/"stethobench_croissant.json").records("pairs")))
    assert first["pairs/pair_id"].decode() == pairs.pair_id[0] and [r.decode() for r in first["pairs/recording_ids"]] == pairs.recording_ids[0]
    with pytest.raises(StethoError, match="no licence is given for phantom, phantom_ood: take it from"): write_bench_card(pairs, tmp_path/"stethobench.parquet", tmp_path/"none", "it", {}, tables)
    assert not (tmp_path/"none").exists()
