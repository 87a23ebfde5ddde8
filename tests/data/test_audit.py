"The audit on real recordings: what the fingerprints find among changed copies, what the pack holds, and the metadata for machines"
import json

import numpy as np
import pandas as pd
import pytest
import soundfile

from stetholm.data.checks import audit_sounds, audit_table
from stetholm.data.fingerprints import CHANGES, bit_error_rate, fingerprint, measure_sounds, precision_recall, similar_pairs
from stetholm.phantom.patients import make_phantom
from stetholm.data.recordings import RECORDINGS, write_table
from stetholm.data.sources import scan


@pytest.fixture(scope="module")
def pack(recordings): return scan("stetho-mini", recordings)


def load(path):
    wave, rate = soundfile.read(path, dtype="float32")
    return wave - wave.mean(), rate


def test_changed_copies_of_real_recordings_are_found_and_nothing_else(pack):
    chosen = pd.concat([g.sample(25, random_state=0) for source, g in pack.groupby("source") if source != "hlscmds"])  # a manikin plays one stored sound again and again
    waves, rates = zip(*map(load, chosen.path))
    measured = precision_recall(list(waves), list(rates)).set_index("change")
    print("\n", measured.round(3))
    assert set(measured.index) == set(CHANGES) and (measured.planted == 100).all()
    assert measured.precision.min() >= .98 and measured.recall.mean() >= .95 and measured.recall.min() >= .85


def test_a_large_collection_is_compared_in_blocks_with_the_same_result(pack, monkeypatch):
    some = pack[pack.source.isin(["hlscmds", "kauh"])]
    prints = [h.fingerprint for h in measure_sounds(some.path)]
    together = similar_pairs(prints)
    monkeypatch.setattr("stetholm.data.fingerprints.BLOCK", 15_000)
    in_blocks = similar_pairs(prints)
    assert len(together) > 50 and sum(map(len, prints)) > 10*15_000
    both = together.merge(in_blocks, on=["first", "second"])
    assert len(both) == len(together)  # the rarer the words of a block, the more of them vote: blocks may find more, never less


def test_one_breath_through_three_filters_is_one_recording(recordings):
    folder = recordings.parent/"layouts/KAUH/Audio Files"
    names = {p.name.split("_")[0]: p for p in folder.glob("*.wav")}
    keys = [f"{f}P{n}" for n in (1, 60) for f in "BDE"] + ["BP21", "BP108", "BP111"]
    found = similar_pairs([h.fingerprint for h in measure_sounds([names[k] for k in keys])])
    assert {(keys[p.first], keys[p.second]) for p in found.itertuples()} >= {("BP1", "DP1"), ("BP1", "EP1"), ("DP1", "EP1"), ("BP60", "DP60"), ("BP60", "EP60"), ("DP60", "EP60")}
    assert all(keys[p.first][2:] == keys[p.second][2:] for p in found.itertuples())


def test_the_pack_is_clean_but_for_a_manikin_that_plays_one_sound_again(pack):
    faults = pd.concat([audit_table(pack), audit_sounds(pack)])
    print("\n", faults.groupby(["severity", "kind"]).size())
    assert not len(faults[faults.severity == "error"]), faults[faults.severity == "error"].detail.tolist()
    double = faults[faults.kind.str.contains("near-duplicate|identical")]
    assert len(double) and all(i.startswith("hlscmds_") for pair in double.recordings for i in pair)


def test_unrelated_sounds_share_half_their_bits():
    rng = np.random.default_rng(0)
    a, b = (fingerprint(rng.standard_normal(40_000).astype(np.float32), 4000) for _ in range(2))
    assert abs(bit_error_rate(a, b) - .5) < .02 and bit_error_rate(a, a) == 0 and len(a) == (20_000 - 512)//32 + 1 - 4
    assert (fingerprint(np.zeros(100, np.float32), 2000).size, len(similar_pairs([])), len(similar_pairs([a, b]))) == (0, 0, 0)
    shifted = similar_pairs([a, a[100:]])
    assert shifted.offset_s.tolist() == [1.6] and shifted.bit_error_rate.tolist() == [0.]


def test_audit_command_writes_a_card_and_croissant_that_validates(tmp_path, stetholm):
    make_phantom(tmp_path/"phantom", 24, 0)
    table = scan("phantom", tmp_path/"phantom")
    write_table(table, tmp_path/"r.parquet", RECORDINGS)
    done = stetholm("data", "audit", "r.parquet", "-o", "card")
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "clean", done.stdout + done.stderr
    texts = {n: (tmp_path/"card"/n).read_text() for n in ("data_card.md", "data_card.html", "data_card.json", "croissant.json", "faults.json")}
    assert not [n for n, text in texts.items() if str(tmp_path) in text]
    card = json.loads(texts["data_card.json"])
    assert card["recordings"] == len(table) and sum(s["recordings"] for s in card["sources"].values()) == len(table) and f"| {table.source.iloc[0]} |" in texts["data_card.md"]
    mlcroissant = pytest.importorskip("mlcroissant") if not __import__("os").environ.get("CI") else __import__("mlcroissant")
    described = mlcroissant.Dataset(jsonld=json.loads(texts["croissant.json"]))
    assert not described.metadata.ctx.issues.errors and {f.name for f in described.metadata.record_sets[0].fields} >= {"recording_id", "findings", "licence", "split"}


def test_audit_command_fails_on_an_error_and_names_it(tmp_path, stetholm):
    make_phantom(tmp_path/"phantom", 24, 0)
    table = scan("phantom", tmp_path/"phantom")
    train, test = table.index[table.split == "train"][0], table.index[table.split == "test"][0]
    wave, rate = soundfile.read(table.path[train])
    soundfile.write(table.path[test], .3*wave[4000:20000], rate)
    again = scan("phantom", tmp_path/"phantom")
    write_table(again, tmp_path/"r.parquet", RECORDINGS)
    done = stetholm("data", "audit", "r.parquet", "-o", "card")
    assert done.returncode == 1 and "error: 1 near-duplicate across splits" in done.stdout and table.recording_id[train] in done.stdout and "Traceback" not in done.stderr
    assert json.loads((tmp_path/"card/faults.json").read_text())[0]["severity"] == "error"
