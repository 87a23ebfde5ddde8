"Adapters on real files in their publishers' layouts, against values read by hand; and every fault a user's files may have"
import hashlib
import json
import shutil
import time
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile

from stetholm.bench.pairs import all_facts, kinds_of, synthesize
from stetholm.core.config import PROFILES, StethoError
from stetholm.core.run import Run, open_run
from stetholm.data.checks import audit_sounds
from stetholm.data.recordings import RECORDINGS, Scan, read_table, write_table
from stetholm.data.sources import SOURCES, read_source, scan

KEYS = {"sprsound", "icbhi", "kauh", "circor", "cinc2016", "hlscmds", "zchsound", "hf_lung", "tr", "bmd_hs", "flusense", "stetho-mini", "folder", "phantom"}


@pytest.fixture(scope="module")
def layouts(beside):
    "A few real files of each dataset, in its publisher's own folders"
    return beside("layouts")


def rows(key, folder, **how): return scan(key, folder, **how).set_index("recording_id")
def more(row): return json.loads(row.extra)
def spans(row, label): return [(e["start_s"], e["end_s"]) for e in row.events if e["label"] == label]


def test_every_dataset_has_an_adapter_with_its_terms():
    assert set(SOURCES) == KEYS
    for s in SOURCES.values(): assert s.title and s.licence and s.homepage and s.citation and s.role in ("in_domain", "ood") and isinstance(s.redistribution, bool)
    assert {s.key for s in SOURCES.values() if s.role == "ood"} == {"tr", "cinc2016", "bmd_hs", "flusense", "hlscmds"}
    assert not any(SOURCES[k].redistribution for k in ("icbhi", "hf_lung", "bmd_hs", "flusense", "zchsound"))


def test_sprsound(layouts):
    t = rows("sprsound", layouts/"SPRSound")
    assert len(t) == 11 and t.patient_id.nunique() == 6 and (t.sample_rate == 8000).all()
    r = t.loc["sprsound_40638274_9.7_1_p2_1801"]
    assert r.findings == ["fine crackle", "wheeze"] and r.diagnosis == "other respiratory disease" and (r.age, r.sex, r.site, r.binary) == ("9.7", "Female", "left lateral", "abnormal")
    assert spans(r, "wheeze") == [(7.724, 8.323)] and spans(r, "fine crackle")[0] == (1.684, 2.772) and abs(r.duration_s - 9.216) < 1e-9 and more(r)["record"] == "CAS & DAS"
    assert pd.isna(t.loc["sprsound_40069321_15.3_0_p3_981" if "sprsound_40069321_15.3_0_p3_981" in t.index else "sprsound_40069321_15.3_0_p1_981"].binary)
    intra = t.loc["sprsound_40638274_9.7_1_p1_1696"]  # in the 2022 test folder, its patient in train
    assert intra.split in ("train", "val") and t[t.patient_id == "sprsound_40638274"].split.nunique() == 1 and more(intra)["official_split"] == "test" and "split_note" in more(intra)
    assert t.loc["sprsound_41067823_6.1_0_p2_1618"].split == t.loc["sprsound_40512331_8.1_1_p1_3548"].split == "test"


def test_kauh(layouts):
    t = rows("kauh", layouts/"KAUH")
    assert len(t) == 15 and (t.sample_rate == 4000).all()
    r = t.loc["kauh_EP1"]
    assert (r.patient_id, r.findings, r.diagnosis, r.site, r.age, r.sex) == ("kauh_1", ["wheeze"], "asthma", "posterior left lower", "70", "Male") and more(r)["filter"] == "extended (50-500 Hz)"
    assert t.loc["kauh_BP60"].diagnosis == "heart failure" and t.loc["kauh_BP60"].findings == ["crackle"] and t.loc["kauh_BP108"].site == "posterior right lower" and t.loc["kauh_BP21"].diagnosis == "bronchitis or bronchiectasis"
    same = {i: more(t.loc[i]).get("same_breath_as") for i in t.index}
    assert {"kauh_BP1", "kauh_DP1", "kauh_EP1", "kauh_DP76", "kauh_BP76"} <= set(t.index[t.split.notna()]) and t.groupby("patient_id").split.nunique().max() == 1
    assert {i: b for i, b in same.items() if b} == {f"kauh_{f}P{n}": f"kauh_{best}P{n}" for best, n, others in (("E", 1, "BD"), ("E", 60, "BD"), ("D", 76, "BE"), ("D", 77, "BE")) for f in others}
    assert "labelled otherwise" in more(t.loc["kauh_EP76"])["left_out"] and t.loc["kauh_EP76"].sha256 == t.loc["kauh_EP77"].sha256 and t.loc["kauh_EP76"].binary != t.loc["kauh_EP77"].binary


def test_renderings_of_one_breath_are_neither_compared_nor_told_as_copies(layouts):
    t = scan("kauh", layouts/"KAUH")
    pairs = synthesize(t.assign(split="train", distribution="in_domain")[t.split.notna()], 1, 0)
    patient = t.set_index("recording_id").patient_id
    compared = pairs[pairs.task == "comparison"].recording_ids
    assert len(compared) and all(patient[a] != patient[b] for a, b in compared)
    assert not audit_sounds(t).kind.str.contains("duplicate|identical").any()


def test_kauh_spells_the_pack_as_the_pack_does(layouts, recordings, tmp_path):
    meta = pd.read_csv(recordings/"metadata.csv", dtype=str, keep_default_na=False)
    meta = meta[meta.source == "kauh"].set_index("recording_id")
    soundfile.write(tmp_path/"a.wav", np.zeros(4000), 4000)
    for i, path in enumerate(meta.original_path):  # the publisher's own names, with a sound of its own each
        soundfile.write(tmp_path/path.rsplit("/", 1)[1], np.full(4000, (i + 1)/1000), 4000)
    (tmp_path/"a.wav").unlink()
    t, pack = rows("kauh", tmp_path), rows("stetho-mini", recordings)
    both = t.index
    assert len(both) == 110 == len(meta)
    for column in ("findings", "diagnosis", "age", "sex", "binary", "site"): assert [(x, y) for x, y in zip(t[column], pack.loc[both, column]) if x != y and not (pd.isna(x) is True and pd.isna(y) is True)] == [], column


def test_circor(layouts):
    t = rows("circor", layouts/"CirCor")
    assert len(t) == 16 and t.patient_id.nunique() == 4
    r = t.loc["circor_9979_TV"]
    assert (r.findings, r.binary, r.site, r.age, r.sex) == (["holosystolic murmur"], "abnormal", "tricuspid valve area", "Child", "Female") and abs(r.duration_s - 22.896) < 1e-9
    assert spans(r, "S1")[0] == (.5405, .700435) and spans(r, "systole")[0] == (.700435, .860337)
    x = more(r)
    assert (x["Systolic murmur shape"], x["Systolic murmur grading"], x["Systolic murmur pitch"], x["Systolic murmur quality"], x["Height"], x["Campaign"]) == ("Diamond", "III/VI", "High", "Harsh", "103.0", "CC2015")
    assert x["not_annotated"][0] == [0, .5405] and len(r.events) + len(x["not_annotated"]) == 35
    assert pd.isna(t.loc["circor_13918_AV"].binary) and t.loc["circor_13918_AV"].findings == [] and t.loc["circor_13918_TV"].findings == ["holosystolic murmur"]  # heard at TV only
    assert t.loc["circor_2530_MV"].binary == "normal"


def test_cinc2016(layouts):
    t = rows("cinc2016", layouts/"CinC2016")
    assert len(t) == 12 and (t.sample_rate == 2000).all() and set(t.split) == {"test"} and set(t.distribution) == {"ood"}
    assert t.binary.to_dict() == {f"cinc2016_{r}": v for r, v in dict(a0238="normal", a0336="abnormal", b0031="normal", b0033="abnormal", c0005="abnormal", c0030="normal", d0001="normal", d0014="abnormal", e00216="abnormal", e01717="normal", f0090="abnormal", f0111="normal").items()}
    r = t.loc["cinc2016_a0238"]
    assert (r.events[0]["label"], r.events[0]["start_s"], r.events[0]["end_s"]) == ("systole", 0, .099) and r.events[1]["label"] == "S2" and len(r.events) == 57 and r.events[-1]["end_s"] == r.duration_s == 9.265
    noise = t.loc["cinc2016_c0005"]
    assert [(e["label"], e["start_s"]) for e in noise.events] == [("noise", 0)] and more(noise)["database"] == "training-c"


def test_hlscmds(layouts):
    t = rows("hlscmds", layouts/"HLS-CMDS")
    assert len(t) == 8 and set(t.patient_id) == {"hlscmds_manikin_F"} and set(t.split) == {"test"}
    assert t.loc["hlscmds_HS_F_AF_A"].findings == ["atrial fibrillation"] and t.loc["hlscmds_HS_F_AF_A"].site == "apex"
    assert t.loc["hlscmds_LS_F_CC_LUA"].findings == ["coarse crackle"] and t.loc["hlscmds_LS_F_CC_LUA"].domain == "lung"


@pytest.fixture
def icbhi(layouts, tmp_path):
    "ICBHI's real text files with silent recordings of the formats it has: 4 and 44.1 kHz, 16, 24 and 32 bit"
    folder = tmp_path/"icbhi"
    shutil.copytree(layouts/"ICBHI", folder)
    kinds = [(4000, "PCM_16"), (44100, "PCM_24"), (10000, "PCM_32")]
    for i, p in enumerate(sorted((folder/"ICBHI_final_database").glob("*.txt"))):
        rate, kind = kinds[i % 3]
        soundfile.write(p.with_suffix(".wav"), .01*np.random.default_rng(i).standard_normal(20*rate), rate, subtype=kind)
    return folder


def test_icbhi(icbhi):
    t = rows("icbhi", icbhi)
    assert len(t) == 6 and t.patient_id.nunique() == 4 and set(t.sample_rate) == {4000, 44100, 10000}
    r = t.loc["icbhi_103_2b2_Ar_mc_LittC2SE"]
    assert (r.findings, r.diagnosis, r.site, r.age, r.sex, r.device) == (["wheeze"], "asthma", "anterior right", "70", "Female", "3M Littmann Classic II SE") and spans(r, "wheeze")[0] == (.364, 3.25)
    assert more(r)["bmi"] == "33" and more(r)["mode"] == "multichannel"
    r = t.loc["icbhi_101_1b1_Al_sc_Meditron"]
    assert r.diagnosis == "upper respiratory tract infection" and r.split == "test" and more(r)["official_split"] == "test" and r.site == "anterior left"
    assert t.loc["icbhi_103_2b2_Ar_mc_LittC2SE"].split in ("train", "val") and {more(x).get("subtype", "PCM_16") for x in t.itertuples()} == {"PCM_16", "PCM_24", "PCM_32"}


def test_icbhi_patients_on_both_sides_are_trained_on(icbhi):
    base = icbhi/"ICBHI_final_database"
    for side, stem in (("train", "156_2b3_Al_mc_AKGC417L"), ("test", "156_5b3_Ar_mc_AKGC417L")):
        shutil.copy(next(base.glob("*.wav")), base/f"{stem}.wav")
        soundfile.write(base/f"{stem}.wav", np.full(8000, .1 if side == "train" else .2), 4000)
        (base/f"{stem}.txt").write_text("0\t1\t0\t0\r\n1\t1\t0\t1\r\n1.5\t9\t1\t0\r\n")  # CRLF, a cycle of no length, one past the end
    listed = dict(line.split() for line in (icbhi/"ICBHI_challenge_train_test.txt").read_text().splitlines())
    assert {side for stem, side in listed.items() if stem.startswith("156_")} == {"train", "test"}
    t = rows("icbhi", icbhi)
    both = t[t.patient_id == "icbhi_156"]
    assert len(both) == 2 and both.split.nunique() == 1 and both.split.iloc[0] in ("train", "val") and more(both.iloc[0])["listed_in"] == listed[both.index[0].removeprefix("icbhi_")]
    kinds = [f["kind"] for f in more(both.iloc[0])["faults"]]
    assert kinds == ["patient on both sides of the split", "event without length", "event cut at the end"] and both.iloc[0].events[-1]["end_s"] == 2.


def test_icbhi_without_recordings_says_so(layouts):
    with pytest.raises(StethoError, match="no recordings in .*ICBHI.*wav"): scan("icbhi", layouts/"ICBHI")


def tiny(path, i, rate=4000):
    "A quarter of a second of sound that no other file has"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, .1*np.random.default_rng(i).standard_normal(rate//4), rate)


def test_all_535_recordings_of_hlscmds_by_their_published_names(layouts, tmp_path):
    names = [pd.read_csv(layouts/f"HLS-CMDS/{kind}.csv", dtype=str) for kind in ("HS", "LS", "Mix")]
    for kind in ("HS", "LS", "Mix"): shutil.copy(layouts/f"HLS-CMDS/{kind}.csv", tmp_path)
    renamed = names[1]["Lung Sound ID"].str.strip().str.replace(r"^(.)_G_", r"\1_CC_", regex=True).str.replace(r"^(.)_C_", r"\1_FC_", regex=True)
    stems = [f"HS/{s.strip()}" for s in names[0]["Heart Sound ID"]] + [f"LS/{s}" for s in renamed] + [f"Mix/{s.strip()}" for c in ("Heart Sound ID", "Lung Sound ID", "Mixed Sound ID") for s in names[2][c]]
    for i, stem in enumerate(stems): tiny(tmp_path/f"{stem}.wav", i)
    t = rows("hlscmds", tmp_path)
    assert len(t) == len(stems) == SOURCES["hlscmds"].recordings and set(t.split) == {"test"} and t.site.notna().all()
    mixed = t[t.index.str.contains("_M0")]
    assert len(mixed) == 145 and all(len(more(r)["parts"]) == 2 and more(r)["heart_sound"] and more(r)["lung_sound"] for r in mixed.itertuples())


def test_all_920_recordings_of_icbhi_by_their_published_names(layouts, tmp_path):
    for p in (layouts/"ICBHI").glob("*.*"): shutil.copy(p, tmp_path)
    listed = dict(line.split() for line in (layouts/"ICBHI/ICBHI_challenge_train_test.txt").read_text().splitlines())
    for i, stem in enumerate(listed):
        tiny(tmp_path/f"ICBHI_final_database/{stem}.wav", i)
        (tmp_path/f"ICBHI_final_database/{stem}.txt").write_text(f"0\t0.2\t{i % 2}\t{i // 2 % 2}\n")
    t = rows("icbhi", tmp_path)
    assert len(t) == len(listed) == SOURCES["icbhi"].recordings and t.patient_id.nunique() == 126 and t.diagnosis.notna().all() and t.device.nunique() == 4
    moved = {i for i in t.index if listed[i.removeprefix("icbhi_")] == "test" and t.split[i] != "test"}
    assert {i.split("_")[1] for i in moved} == {"156", "218"} and t.groupby("patient_id").split.nunique().max() == 1
    assert (t.split == "test").sum() == sum(side == "test" for side in listed.values()) - len(moved)


@pytest.mark.parametrize("key, name", [("kauh", "KAUH"), ("circor", "CirCor"), ("sprsound", "SPRSound"), ("hlscmds", "HLS-CMDS"), ("cinc2016", "CinC2016")])
def test_the_layout_may_begin_anywhere_below_the_folder(layouts, tmp_path, key, name):
    shutil.copytree(layouts/name, tmp_path/"a/b c/d")
    (tmp_path/"__MACOSX").mkdir()
    (tmp_path/"__MACOSX/._x.wav").write_bytes(b"resource fork")
    (tmp_path/".hidden.wav").write_bytes(b"")
    t, there = rows(key, tmp_path), rows(key, layouts/name)
    assert t.drop(columns="path").equals(there.drop(columns="path")) and len(t) == sum(p.suffix == ".wav" for p in (layouts/name).rglob("*"))


# what a publication has, so that everybody meets it

def kinds(table): return table.extra.map(lambda x: sorted(f["kind"] for f in json.loads(x).get("faults", []))).to_dict()
def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_every_declared_fault_says_what_where_and_since_when():
    for s in SOURCES.values():
        for f in s.faults: assert f.kind and f.what and f.where and f.since
    assert {k for k, s in SOURCES.items() if s.faults} >= {"circor", "bmd_hs", "kauh", "cinc2016", "sprsound", "icbhi", "hlscmds", "flusense"}


def test_circor_without_a_tsv_with_an_empty_one_and_with_every_state_twice(layouts, tmp_path, stetholm):
    shutil.copytree(layouts/"CirCor", tmp_path/"circor")
    states = tmp_path/"circor/training_data"
    (states/"2530_AV.tsv").rename(states/"2530.tsv")
    write(states/"2530_PV.tsv", "0\t0\t17")
    write(states/"2530_TV.tsv", 2*(states/"2530_TV.tsv").read_text())
    t, before = rows("circor", tmp_path/"circor"), rows("circor", layouts/"CirCor")
    assert len(t) == 16 and {i: k for i, k in kinds(t).items() if k} == {"circor_2530_AV": ["annotation file missing"], "circor_2530_PV": ["event without length"], "circor_2530_TV": ["event listed twice"]}
    assert t.events.map(len)[["circor_2530_AV", "circor_2530_PV"]].tolist() == [0, 0] and list(t.events["circor_2530_TV"]) == list(before.events["circor_2530_TV"])
    assert t.binary.equals(before.binary)
    done = stetholm("data", "scan", "circor", tmp_path/"circor", "-o", "r.parquet")
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith("recordings with a fault that was mended: 1 annotation file missing (circor_2530_AV: no 2530_AV.tsv); 1 event listed twice (circor_2530_TV: ")
    audit = stetholm("data", "audit", "r.parquet", "-o", "card")
    assert "note: 1 event listed twice, the first: circor_2530_TV: " in audit.stdout and "| circor | annotation file missing | 1 | the recording stays, without heart states |" in (tmp_path/"card/data_card.md").read_text()
    for p in states.glob("*.tsv"): p.unlink()
    with pytest.raises(StethoError, match="no recording in .* has its .tsv file with heart states: copy them"): scan("circor", tmp_path/"circor", skip_bad=True)


@pytest.mark.parametrize("row", ["", "patient_041,N/A,N/A,N/A,N/A,N/A,MD_041_sup_Mit\n"])
def test_bmd_hs_keeps_a_patient_without_a_row_and_without_labels(tmp_path, row):
    others = [("AS", "003", "1,0,0,0,0"), ("MD", "017", "0,1,1,0,0"), ("N", "090", "0,0,0,0,1")]
    write(tmp_path/"train.csv", "patient_id,AS,AR,MR,MS,N,recording_1\n" + "".join(f"patient_{n},{marks},{c}_{n}_sup_Mit\n" for c, n, marks in others) + row)
    write(tmp_path/"additional_metadata.csv", "patient_id,Age,Gender,Smoker,Lives\npatient_003,40-49,M,0,R\n")
    names = [f"{c}_{n}_{p}_{v}" for c, n, _ in [*others, ("MD", "041", "")] for p in ("sup", "sit") for v in ("Mit", "Tri", "Pul", "Aor")]
    for i, name in enumerate(names): tiny(tmp_path/f"train/{name}.wav", i)
    t = rows("bmd_hs", tmp_path)
    assert len(t) == 32 and t.binary.isna().sum() == 8 == sum(k == ["patient without labels"] for k in kinds(t).values()) and set(t.patient_id[t.binary.isna()]) == {"bmd_hs_041"}
    assert t.diagnosis["bmd_hs_MD_017_sit_Tri"] == "aortic regurgitation and mitral regurgitation" and t.age["bmd_hs_AS_003_sup_Mit"] == "aged 40 to 49"


def test_a_folder_that_was_unpacked_twice_counts_once(layouts, tmp_path, stetholm):
    for copy in ("SPRSound", "releases/SPRSound"): shutil.copytree(layouts/"SPRSound", tmp_path/"s"/copy)
    done = stetholm("data", "scan", "sprsound", tmp_path/"s", "-o", "r.parquet")
    assert done.stdout.startswith("11 recordings") and "11 files have the name and the bytes of another and count once" in done.stdout


def test_sprsound_of_later_releases(tmp_path):
    event = {"start": "20", "end": "200", "type": "Rhonchi"}
    for i, (stem, note) in enumerate((("00016281_3.7_1_p4_11862", {"event_annotation": [event]}), ("_0.7_1_p7_32982", {"event_annotation": []}), ("_2.50_0_p5_32683", None))):
        tiny(tmp_path/f"BioCAS2025/test2025_wav/{stem}.wav", i, 8000)
        if note: write(tmp_path/f"BioCAS2025/test2025_json/{stem}.json", json.dumps(note))
    t = rows("sprsound", tmp_path)
    assert t.findings.map(list).tolist() == [["rhonchi"], [], []] and t.binary.fillna("").tolist() == ["abnormal", "", ""] and t.site.fillna("").tolist() == ["right lateral", "", ""]
    assert kinds(t)["sprsound__2.50_0_p5_32683"] == ["annotation file missing", "patient number missing", "site code not explained"]


ICBHI_STEMS = ("101_1b1_Al_sc_Meditron", "102_1b1_Ar_sc_Meditron", "103_2b2_Ar_mc_LittC2SE", "104_1b1_Al_sc_Litt3200")

@pytest.mark.parametrize("tables", [
    {"patient_diagnosis.csv": "101,URTI\n102,Healthy\n103,Asthma\n104,COPD\n", "demographic_info.txt": "101 3 F NA 19 99\n102 0.75 F NA 9.8 73\n103 70 F 33 NA NA\n104 70 F 28.47 NA NA\n"},
    {"labels/diagnosis.csv": "patient_id,disease\n101,URTI\n102,Healthy\n103,Asthma\n104,COPD\n", "labels/demographic-info.csv": "Patient,Age,Sex,BMI,Weight,Height\n101,3.0,F,,19,99\n102,0.75,F,,9.8,73\n103,70.0,F,33,,\n104,70,F,28.47,,\n"},
    {"d.txt": "101\tURTI\r\n102\tHealthy\r\n103\tAsthma\r\n104\tCOPD", "p.txt": "101\t3\tF\tNA\t19\t99\n102\t0.75\tF\tNA\t9.8\t73\n103\t70\tF\t33\tNA\tNA\n104\t70\tF\t28.47\tNA\tNA\n"}])
@pytest.mark.report("ICBHI in the layout")
def test_icbhi_in_the_layouts_of_other_repositories(tmp_path, stetholm, tables):
    for i, stem in enumerate(ICBHI_STEMS):
        tiny(tmp_path/f"db/{stem}.wav", i)
        write(tmp_path/f"db/{stem}.txt", "0\t0.1\t0\t1\n")
    write(tmp_path/"db/filename_format.txt", "Each audio file name is divided into 5 elements\n")
    for name, text in tables.items(): write(tmp_path/"db"/name, text)
    write(tmp_path/"db/split.txt", "".join(f"{stem.replace('LittC2SE', 'AKGC417L')}\t{side}\n" for stem, side in zip(ICBHI_STEMS, ("test", "test", "train", "test"))))
    t = rows("icbhi", tmp_path/"db")
    assert t.diagnosis.tolist() == ["upper respiratory tract infection", "normal", "asthma", "COPD"] and t.age.map(float).tolist() == [3, .75, 70, 70] and set(t.sex) == {"Female"}
    assert (t.split == "test").tolist() == [True, True, False, True] and more(t.iloc[2])["bmi"] == "33" and kinds(t)[f"icbhi_{ICBHI_STEMS[2]}"] == ["another stethoscope in the split than in the name"]
    for name in tables: (tmp_path/"db"/name).unlink()
    done = stetholm("data", "scan", "icbhi", tmp_path/"db", "-o", "r.parquet")
    assert done.returncode == 0 and "no table of the diagnosis was found (" in done.stdout and "no table of the demographics was found (" in done.stdout and "of the split" not in done.stdout


@pytest.mark.report("ICBHI in the layout")
def test_cinc2016_with_its_appendix_and_its_validation_folder(layouts, tmp_path):
    folder = tmp_path/"cinc"
    shutil.copytree(layouts/"CinC2016", folder)
    bare, found = read_source("cinc2016", folder)
    assert len(found.notes) == 1 and "no Online Appendix_training set.csv was found" in found.notes[0] and bare.diagnosis.isna().all()
    for stem, kind in (("training-a/a0238", "-1"), ("training-e/e00216", "1")):
        (folder/"validation").mkdir(exist_ok=True)
        shutil.copy(folder/f"{stem}.wav", folder/"validation")
        with open(folder/"validation/REFERENCE.csv", "a") as f: f.write(f"{stem.split('/')[1]},{kind}\n")
    columns = "Challenge record name,Database,Original record name,Diagnosis,Class (-1=normal 1=abnormal),Gender,Age (year),Subject ID,Transducer site on body,Recording state,Murmurs (2=None 3=Weak 4=Strong 6=Unclear),\"Murmur Location (2=Sys,3=Dia,4=Both)\"\n"
    write(folder/"annotations/Online Appendix_training set.csv", columns + "b0031,training-b,S9f1_data,Normal,-1,M,,9,,,2,0\nb0033,training-b,S9f2_data,CAD,1,M,,9.0,,,3,4\n"
          "c0030,training-c,id43,Controls,-1,M,39,,,,,\nd0001,training-d,42463,Normal: MARS500,-1,,,,,,,\na0336,training-a,C12S4,AD,1,,,,2nd right intercostal space,,,\na0238,training-a,C12S5,Normal ,-1,,,,Left of apex ,,,\n")
    t = rows("cinc2016", folder)
    assert len(t) == 12 and not t.index.str.contains("validation").any() and set(t.patient_id[["cinc2016_b0031", "cinc2016_b0033"]]) == {"cinc2016_b_9"}
    assert t.findings.map(list)[["cinc2016_b0031", "cinc2016_b0033"]].tolist() == [[], ["murmur"]] and (more(t.loc["cinc2016_b0033"])["murmur_timing"], more(t.loc["cinc2016_b0031"])["murmur_grade"]) == ("systolic and diastolic", "none")
    assert t.diagnosis.dropna().to_dict() == {f"cinc2016_{k}": v for k, v in dict(a0238="normal", a0336="aortic disease", b0031="normal", b0033="coronary artery disease", c0030="normal", d0001="normal").items()}
    assert t.site.dropna().to_dict() == {"cinc2016_a0238": "apex", "cinc2016_a0336": "aortic valve area"} and (t.age["cinc2016_c0030"], t.sex["cinc2016_c0030"]) == ("39", "Male")
    (folder/"annotations/Online Appendix_training set.csv").rename(folder/"online_appendix_TRAINING_set.csv")
    assert rows("cinc2016", folder).equals(t)


def test_murmurs_of_cinc2016_are_facts_of_the_pack_too(tmp_path):
    labels = [("b1", "abnormal", {"murmur_grade": "strong", "murmur_timing": "diastolic"}), ("b2", "normal", {"murmur_grade": "none"}), ("b3", "abnormal", {"murmur_grade": "unclear", "murmur_timing": "systolic"}), ("a1", "normal", {})]
    header = ["recording_id", "source", "patient_id", "domain", "site", "labels", "split", "distribution", "binary", "licence", "file", "findings"]
    pack = pd.DataFrame([[f"cinc2016_{i}", "cinc2016", "", "heart", "", binary.title(), "test", "ood", binary, "ODC-BY-1.0", f"{i}.wav", json.dumps({"database": f"training-{i[0]}"} | label)] for i, binary, label in labels], columns=header)
    pack.to_csv(tmp_path/"metadata.csv", index=False)
    for n, (i, *_) in enumerate(labels): tiny(tmp_path/f"{i}.wav", n)
    known = all_facts(scan("stetho-mini", tmp_path))
    f = known["cinc2016_b1"]
    assert (f.findings, f.murmur, f.phases) == (("murmur",), (("loudness", "loud"),), (("murmur", "diastole"),)) and "character" in kinds_of(f)["detection"][1]
    assert known["cinc2016_b2"].findings == () and known["cinc2016_b3"].findings is None and known["cinc2016_a1"].findings is None


# faults

def broken(change, match): return pytest.param(change, match, id=match)

@pytest.mark.parametrize("change, match", [
    broken(lambda f: f.write_bytes(b""), "not a readable audio file"), broken(lambda f: f.write_text("hello"), "not a readable"), broken(lambda f: f.write_bytes(f.read_bytes()[:3000]), "cut short"),
    broken(lambda f: soundfile.write(f, np.zeros(0), 4000), "holds no samples"),
    broken(lambda f: f.with_suffix(".tsv").write_text("0\t1\t1\n1\ttwo\t2\n"), "row 2"), broken(lambda f: f.with_suffix(".tsv").write_text("0\t1\t9\n"), "state '9'"), broken(lambda f: f.with_suffix(".tsv").write_text("0\t1\n"), "has 2 columns, not 3"),
    broken(lambda f: f.with_suffix(".tsv").write_text("2\t1\t1\n"), "does not end after it starts"), broken(lambda f: f.rename(f.with_name("9979_XX.wav")), "9979_XX.wav"), broken(lambda f: f.rename(f.with_name("77_TV.wav")), "patient 77 is not in training_data.csv"),
])
def test_a_fault_is_one_line_and_the_rest_can_be_kept(layouts, tmp_path, stetholm, change, match):
    folder = tmp_path/"circor"
    shutil.copytree(layouts/"CirCor", folder)
    change(folder/"training_data/9979_TV.wav")
    done = stetholm("data", "scan", "circor", folder, "-o", "r.parquet")
    assert done.returncode == 2 and match in done.stderr and "--skip-bad" in done.stderr and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr and not (stetholm.cwd/"r.parquet").exists()
    kept = stetholm("data", "scan", "circor", folder, "-o", "r.parquet", "--skip-bad")
    assert kept.returncode == 0, kept.stderr
    assert "listed in r.bad.csv" in kept.stdout
    bad, table = pd.read_csv(stetholm.cwd/"r.bad.csv"), read_table(stetholm.cwd/"r.parquet", RECORDINGS)
    assert len(bad) >= 1 and match in bad.fault[0] and len(table) in (15, 16)


def test_a_broken_row_of_a_shared_table_costs_its_patient_only(layouts, tmp_path):
    folder = tmp_path/"circor"
    shutil.copytree(layouts/"CirCor", folder)
    lines = (folder/"training_data.csv").read_text().splitlines()
    (folder/"training_data.csv").write_text("\r\n".join([l.rsplit(",", 3)[0] if l.startswith("9979,") else l for l in lines]))
    with pytest.raises(StethoError, match=r"training_data.csv row 3 has 19 columns, not 22 .*mend that row"): scan("circor", folder)
    table, found = read_source("circor", folder, skip_bad=True)
    assert len(table) == 12 and {b["file"] for b in found.bad} == {"training_data.csv", *(f"training_data/9979_{v}.wav" for v in ("AV", "MV", "PV", "TV"))} and found.bad[0]["row"] == 3


def test_an_unmapped_spelling_names_file_and_value(layouts, tmp_path):
    shutil.copy(next((layouts/"KAUH/Audio Files").glob("EP1_*")), tmp_path/"EP5_Gout,E W,P L L,70,M.wav")
    with pytest.raises(StethoError, match=r"EP5_Gout.*diagnosis 'gout'"): scan("kauh", tmp_path)
    (tmp_path/"EP5_Gout,E W,P L L,70,M.wav").rename(tmp_path/"EP5_Asthma,Squawk,P L L,70,M.wav")
    with pytest.raises(StethoError, match=r"EP5_Asthma.*'Squawk'"): scan("kauh", tmp_path)


def test_a_folder_that_is_no_dataset_or_has_one_of_another_kind(layouts, tmp_path):
    (tmp_path/"notes.txt").write_text("hello")
    for key in KEYS - {"folder"}:
        with pytest.raises(StethoError, match=str(tmp_path)): scan(key, tmp_path)
    with pytest.raises(StethoError): scan("kauh", layouts/"CirCor")


def test_stereo_rates_and_depths_are_read_as_they_are(tmp_path):
    wave = .1*np.random.default_rng(0).standard_normal((8000, 2))
    for i, kind in enumerate(("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT")): soundfile.write(tmp_path/f"{i}.wav", wave*(i + 1)/9, 8000, subtype=kind)
    (tmp_path/"t.csv").write_text("path,labels,domain\n" + "".join(f"{i}.wav,normal,lung\n" for i in range(5)))
    t = scan("folder", tmp_path)
    assert t.duration_s.tolist() == [1.]*5 and [more(r)["channels"] for r in t.itertuples()] == [2]*5 and more(t.iloc[2])["subtype"] == "PCM_24"


@pytest.mark.parametrize("table, spec, match", [
    ("path,labels,domain\nno.wav,normal,lung\n", {}, r"t.csv row 2: no audio file at .*no.wav"), ("path,labels\na.wav,normal\n", {}, "row 2: domain None"), ("path,domain\na.wav,lung\n", {}, "no column labels"),
    (f"path,labels,domain\n{'long '*60}.wav,normal,lung\n", {}, "row 2: no audio file at"),
    ("path,labels,domain\n../a.wav,normal,lung\n", {}, "outside the folder"), ("path,labels,domain\na.wav,odd,lung\n", {}, "row 2.*label 'odd'"), ("path,labels,domain,site\na.wav,normal,lung,knee\n", {}, "row 2.*site 'knee'"),
    ("path,labels,domain\na.wav,normal,lung\n", {"colums": {}}, "spec has 'colums'"), ("path,labels,domain\na.wav,normal,lung\n", {"columns": {"lables": "x"}}, "maps 'lables'"), ("path,labels,domain,sex\na.wav,normal,lung,x\n", {}, "sex 'x'"),
    ("path,labels,domain\na.wav,normal,lung\na.wav,normal,lung\n", {}, "listed twice")])
def test_a_folder_of_ones_own_refuses(tmp_path, table, spec, match):
    soundfile.write(tmp_path/"a.wav", np.zeros(4000) + .1, 4000)
    (tmp_path/"t.csv").write_text(table)
    with pytest.raises(StethoError, match=match): scan("folder", tmp_path, spec=spec)


def own(folder, *names):
    "A folder with a sound of its own under each name"
    for i, name in enumerate(names):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder/name, np.full(2000, (i + 1)/99), 4000, format="WAV")
    return folder


CSV = {
    "line breaks in a cell": 'path,labels,domain,remark\r\na.wav,wheeze,lung,"""bad""\r\n\r\ncough, then"\r\nb.wav,normal,lung,\r\n',
    "a line break in the header": 'path,labels,domain,"remark\nof the nurse"\na.wav,wheeze,lung,x\nb.wav,normal,lung,y\n',
    "separators of other texts": "path,labels,domain,remark\na.wav,wheeze,lung,one\x0ctwo\x1cthree\x85four\u2029five\nb.wav,normal,lung,six\n",
    "old line ends": "path,labels,domain\ra.wav,wheeze,lung\rb.wav,normal,lung\r",
    "semicolons": 'path;labels;domain;remark\na.wav;"wheeze;wheeze";lung;1,5\nb.wav;normal;lung;"2;5"\n',
    "quoted names": '"path";"labels";"domain"\n"a.wav";"wheeze";"lung"\n"b.wav";"normal";"lung"\n',
    "tabs": "path\tlabels\tdomain\na.wav\twheeze\tlung\nb.wav\tnormal\tlung\n",
    "blanks after commas": 'path, labels, domain\na.wav, "wheeze", lung\nb.wav, normal, lung\n',
    "empty rows": ",,\npath,labels,domain\n,,\na.wav,wheeze,lung\n\nb.wav,normal,lung\n,,\n",
}

@pytest.mark.parametrize("table", CSV.values(), ids=list(CSV))
def test_every_valid_csv_is_read(tmp_path, table):
    (own(tmp_path, "a.wav", "b.wav")/"t.csv").write_bytes(table.encode())
    t = scan("folder", tmp_path)
    assert t.recording_id.tolist() == ["folder_a", "folder_b"] and t.findings.tolist() == [["wheeze"], []], t.extra.tolist()


def test_a_row_is_counted_as_a_spreadsheet_counts_it(tmp_path):
    own(tmp_path, "a.wav", "b.wav")
    head = 'path,labels,domain,remark\na.wav,wheeze,lung,"one\ntwo\nthree"\n\n'
    for rest, match in (("b.wav,odd,lung,\n", "t.csv row 4: .*label 'odd'"), ("b.wav,normal,lung\n", "t.csv row 4 has 3 columns, not 4"), ('b.wav,normal,lung,"open\nb.wav,x\n', "t.csv row 4 is no valid csv"),
                        ('b.wav,"normal"s,lung,\n', "t.csv row 4 is no valid csv")):
        (tmp_path/"t.csv").write_text(head + rest)
        with pytest.raises(StethoError, match=match): scan("folder", tmp_path)


def test_accents_in_one_form_or_the_other_are_the_same(tmp_path):
    composed, apart = "s\u00e4ugling/\u00e0.wav", "s\u00e4ugling/o\u0302.wav"  # what the folder has, of either form
    own(tmp_path, composed, unicodedata.normalize("NFD", apart), "c.wav")
    listed = [unicodedata.normalize("NFD", composed), unicodedata.normalize("NFC", apart), "c.wav"]
    patients = [unicodedata.normalize(form, "Zo\u00eb") for form in ("NFC", "NFD", "NFC")]
    (tmp_path/"t.csv").write_text("path,labels,domain,patient_id\n" + "".join(f"{f},normal,lung,{p}\n" for f, p in zip(listed, patients)), encoding="utf-8")
    t = scan("folder", tmp_path)
    assert len(t) == 3 and t.patient_id.nunique() == 1 and all(Path(p).is_file() for p in t.path)


@pytest.fixture
def linked(tmp_path):
    "A folder whose recordings lie elsewhere: one behind a link of its own, two behind that of a folder, and links that lead in circles"
    store = own(tmp_path/"store", "3f9a", "deep/b.wav", "deep/c.wav")
    folder = tmp_path/"set"
    (folder/"more").mkdir(parents=True)
    (folder/"a.wav").symlink_to("../store/3f9a")
    (folder/"more/wav").symlink_to(store/"deep")
    (folder/"more/circle").symlink_to(folder)
    (store/"deep/back").symlink_to("../..")
    (folder/"self").symlink_to("self")
    (folder/"t.csv").write_text("path,labels,domain\na.wav,normal,lung\nmore/wav/b.wav,wheeze,lung\nmore/wav/c.wav,normal,lung\n")
    return folder


def test_links_are_followed(linked):
    t = scan("folder", linked)
    assert t.path.tolist() == [str(linked/p) for p in ("a.wav", "more/wav/b.wav", "more/wav/c.wav")] and t.split.notna().all()
    assert [p.relative_to(linked).as_posix() for p in Scan(SOURCES["folder"], linked).audio()] == ["a.wav", "more/wav/b.wav", "more/wav/c.wav"]
    for way_out in ("../store/3f9a", "more/../a.wav", str(linked.parent/"store/3f9a")):
        (linked/"t.csv").write_text(f"path,labels,domain\n{way_out},normal,lung\n")
        with pytest.raises(StethoError, match="row 2: file .* lies outside the folder"): scan("folder", linked)


def test_a_link_to_nothing_is_a_fault_of_its_row(linked):
    (linked.parent/"store/3f9a").unlink()
    with pytest.raises(StethoError, match="t.csv row 2: no audio file at .*a.wav"): scan("folder", linked)
    table, found = read_source("folder", linked, skip_bad=True)
    assert len(table) == 2 and len(found.bad) == 1


def test_a_change_behind_a_link_is_another_set_of_recordings(linked, monkeypatch):
    monkeypatch.setenv("STETHOLM_RUNS", str(linked.parent/"runs"))
    def fingerprint(): return open_run("smoke", recordings=str(linked)).fingerprint
    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    def longer(path): path.write_bytes(path.read_bytes() + b"more")
    def other_target():
        (linked/"a.wav").unlink()
        own(linked.parent/"store", "77c0")
        (linked/"a.wav").symlink_to("../store/77c0")
    for change in (lambda: longer(linked.parent/"store/3f9a"), lambda: longer(linked.parent/"store/deep/b.wav"), lambda: own(linked.parent/"store/deep", "d.wav"), other_target):
        change()
        seen.append(fingerprint())
    assert len(set(seen)) == 5


def test_a_fingerprint_of_plain_files_is_that_of_names_sizes_and_tables(tmp_path):
    (tmp_path/"b").mkdir()
    (tmp_path/"b/1.wav").write_bytes(b"x"*7)
    (tmp_path/"t.csv").write_text("path\n")
    assert Run(tmp_path/"r", PROFILES["smoke"], tmp_path).fingerprint == hashlib.sha256(b"b/1.wav 7\nt.csv 5\npath\n").hexdigest()


def test_a_table_is_refused_when_it_breaks_the_schema(layouts, tmp_path):
    t = scan("kauh", layouts/"KAUH")
    for column, value in (("domain", "bowel"), ("split", "holdout"), ("sha256", "abc"), ("duration_s", -1.), ("recording_id", "kauh_EP1")):
        bad = t.copy()
        bad.loc[0, column] = value
        with pytest.raises(StethoError, match=column): write_table(bad, tmp_path/"t.parquet", RECORDINGS)
    bad = t.copy()
    bad.at[0, "findings"] = ["squawk"]
    with pytest.raises(StethoError, match="findings"): write_table(bad, tmp_path/"t.parquet", RECORDINGS)
    assert not (tmp_path/"t.parquet").exists()


@pytest.mark.timed
def test_three_thousand_recordings_scan_quickly_in_little_memory(layouts, tmp_path, stetholm):
    wave = (layouts/"KAUH/Audio Files/EP1_Asthma,I E W,P L L,70,M.wav").read_bytes()
    for i in range(1000):
        for f in "BDE": (tmp_path/f"{f}P{i}_N,N,P L U,{20 + i % 60},M.wav").write_bytes(wave + bytes([i % 251, i // 251, ord(f)]))
    code = "import sys; from stetholm.core.compute import peak_memory; from stetholm.data.sources import scan; t = scan('kauh', sys.argv[1]); print(len(t), t.split.notna().sum(), peak_memory())"
    import subprocess, sys
    begun = time.perf_counter()
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    n, used, gib = said.stdout.split()
    print(f"{seconds:.1f} s, {gib} GiB")
    assert (int(n), int(used)) == (3000, 3000) and seconds < 60 and float(gib) < 1, said.stderr
