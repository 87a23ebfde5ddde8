"Packs cut anew from their publishers' files: whole, cut off, changed, missing, killed; and several as one"
import csv
import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from typer.testing import CliRunner

from stetholm.cli.data_commands import data
from stetholm.cli.main import recordings_of
from stetholm.core.config import AUDIOSET, StethoError
from stetholm.core.run import is_current, open_run
from stetholm.data import packs
from stetholm.data.packs import PUBLISHERS, build_pack, cut, find_originals, is_whole, read_manifest, write_manifest
from stetholm.data.recordings import RECORDINGS, write_table
from stetholm.data.sources import scan
from stetholm.phantom.patients import make_phantom

REPO = Path(__file__).resolve().parents[2]
RATES = {"circor": 4000, "cinc2016": 2000, "sprsound": 8000, "kauh": 4000, "hlscmds": 4000}
PATHS = {  # the copy's, the publisher's
    "circor": [(f"data/training_data/{i}_AV.wav", f"training_data/{i}_AV.wav") for i in range(12)],
    "cinc2016": [("x/all-normal-wav/a0001.wav", "training-a/a0001.wav"), ("x/all-abnormal-wav/e00002.wav", "training-e/e00002.wav")],
    "sprsound": [("SPRSound/train_wav/4_0.2_1_p1_9.wav", "BioCAS2022/train2022_wav/4_0.2_1_p1_9.wav"), ("SPRSound/test_wav/5_9.7_0_p4_8.wav", "BioCAS2022/test2022_wav/5_9.7_0_p4_8.wav")],
    "kauh": [("CNN_Model/AudioFiles/BP8_COPD,E W,P R L ,63,M.wav", "Audio Files/BP8_COPD,E W,P R L ,63,M.wav")],
    "hlscmds": [("data/HS/HS/F_AF_A.wav", "HS/F_AF_A.wav"), ("data/LS/LS/F_CC_LLA.wav", "LS/F_CC_LLA.wav")],
}


def zipped(**files):
    "An archive's bytes"
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        for name, body in files.items(): z.writestr(name, body)
    return out.getvalue()


class Publisher(http.server.BaseHTTPRequestHandler):
    "Serves `files`; the first `cuts` answers stop in the middle, `busy` ones say so, and each takes `seconds`"
    def __init__(self, shop, *args):
        self.shop = shop
        super().__init__(*args)
    def log_message(self, *args): pass

    def do_GET(self):
        shop, asked = self.shop, self.headers.get("Range")
        shop["asked"].append(self.path)
        time.sleep(shop["seconds"])
        if shop["busy"]:
            shop["busy"] -= 1
            self.send_response(429)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = shop["files"].get(self.path)
        if body is None: return self.send_error(404)
        start = int(asked[6:-1]) if asked else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        if shop["cuts"] and len(rest) > 1000:
            shop["cuts"] -= 1
            rest = rest[:len(rest)//2]
        self.wfile.write(rest)


@pytest.fixture
def shop(tmp_path, monkeypatch):
    "Publishers on this machine, a pack that was cut from their files by hand, and its manifest"
    rng, rows, originals = np.random.default_rng(0), [], {}
    for source, paths in PATHS.items():
        for i, (copied, published) in enumerate(paths):
            rate, first = RATES[source], int(rng.integers(0, 40))  # of a clip of two seconds, in hundredths of a second
            samples, raw = rng.integers(-2**15, 2**15, 3*rate, dtype=np.int16), io.BytesIO()
            soundfile.write(raw, samples, rate, format="WAV", subtype="PCM_16")
            originals[source, published] = raw.getvalue()
            name = f"audio/{source}/{source}_{i}.flac"
            (tmp_path/"pack"/name).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(tmp_path/"pack"/name, samples[first*rate//100:first*rate//100 + 2*rate], rate, subtype="PCM_16")
            rows.append({"recording_id": f"{source}_{i}", "source": source, "patient_id": f"{source}_{i}", "domain": "lung", "site": "", "labels": "Normal", "sample_rate": rate,
                         "duration_s": "2.000", "licence": "CC-BY-4.0", "original_path": copied, "split": "train", "distribution": "in_domain", "binary": "normal", "findings": '{"a": "b, c"}', "file": name,
                         "crop_start_s": f"{first/100:.3f}", "original_duration_s": "3.000", "original_sha256": hashlib.sha256(raw.getvalue()).hexdigest()})
    with open(tmp_path/"pack/metadata.csv", "w", newline="") as f:
        table = csv.DictWriter(f, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    (tmp_path/"pack/events.csv").write_bytes(b"recording_id,start_ms,end_ms,label\r\ncircor_1,0,360,S1\r\n")
    (tmp_path/"pack/SOURCES.md").write_text("made up\n")
    monkeypatch.setattr(packs, "manifests_folder", lambda: tmp_path/"manifests")
    monkeypatch.setitem(packs.PACKS, "tiny", ("tiny",))
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path/"pack", tmp_path/"manifests/tiny")

    files = {f"/{source}/{published}": body for (source, published), body in originals.items() if not PUBLISHERS[source].archive}
    kauh, hls = ({published: body for (source, published), body in originals.items() if source == s} for s in ("kauh", "hlscmds"))
    files["/kauh/jwyy9np4gv-3.zip"] = zipped(**{"A dataset/Audio Files.zip": zipped(**kauh), "A dataset/Data annotation.xlsx": b"no table"})
    hs, ls = ({k: v for k, v in hls.items() if k.startswith(folder)} for folder in ("HS", "LS"))
    files["/hlscmds/8972jxbpmp-3.zip"] = zipped(**{"HLS-CMDS/HS.zip": zipped(**hs), "HLS-CMDS/LS.zip": zipped(**ls)})
    shop = {"files": files, "originals": originals, "cuts": 0, "busy": 0, "seconds": 0., "asked": [], "folder": tmp_path}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Publisher, shop))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shop["mirrors"] = {source: f"http://127.0.0.1:{server.server_port}/{source}/" for source in PATHS}
    yield shop
    server.shutdown()
    server.server_close()


def command(shop, *words, accept=True):
    "`data pack tiny` at the publishers of this machine: exit code and what it said"
    mirrors = [w for source, address in shop["mirrors"].items() for w in ("--mirror", f"{source}={address}")]
    done = CliRunner().invoke(data, ["pack", "tiny", *mirrors, *(["--accept-licences"] if accept else []), *map(str, words)])
    assert done.exception is None or isinstance(done.exception, (SystemExit, StethoError)), done.exception
    return getattr(done.exception, "exit_code", done.exit_code), done.output + (str(done.exception) if isinstance(done.exception, StethoError) else "")


def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def is_the_pack(folder, shop):
    "Byte for byte that which was cut by hand, with its hashes, and nothing else"
    made = files(folder)
    sums = dict(reversed(line.split("  ")) for line in made.pop("SHA256SUMS").decode().splitlines())
    return made == files(shop["folder"]/"pack") and sums == {name: hashlib.sha256(body).hexdigest() for name, body in made.items()}


MADE = Path("recordings/packs/tiny")


def test_a_pack_is_made_whole_and_made_once(shop):
    code, said = command(shop)
    assert code == 0 and "tiny in recordings/packs/tiny is whole" in said and is_the_pack(MADE, shop)
    assert sorted(shop["asked"]) == sorted(f.replace(" ", "%20") for f in shop["files"])
    code, said = command(shop)
    assert code == 0 and "is whole" in said and len(shop["asked"]) == len(shop["files"])


def test_terms_size_and_time_are_told_before_anything_is_downloaded(shop):
    code, said = command(shop, accept=False)
    assert code == 2 and "stetholm data pack tiny --accept-licences" in said and not shop["asked"] and not MADE.exists()
    for source in PATHS: assert packs.SOURCES[source].title in said and packs.SOURCES[source].citation in said and packs.SOURCES[source].homepage in said
    assert said.count("licence: CC-BY-4.0") == 5 and "19 of 19 clips" in said and "0 MB in 12 files from http://127.0.0.1" in said and "minutes at 2 MB/s. On disk: at most" in said
    assert command(shop)[1].startswith(said[said.index("CirCor DigiScope: "):].split("\n")[0])


def test_cut_connections_and_busy_servers_are_asked_again(shop):
    shop |= {"cuts": 5, "busy": 3}
    assert not len(build_pack("tiny", MADE, mirrors=shop["mirrors"], accept_licences=True, wait_s=.01)) and is_the_pack(MADE, shop)
    assert len(shop["asked"]) == len(shop["files"]) + 8


def test_a_missing_and_a_changed_file_are_named_and_the_rest_is_made(shop):
    gone, changed = "/circor/training_data/3_AV.wav", "/sprsound/BioCAS2022/test2022_wav/5_9.7_0_p4_8.wav"
    right = dict(shop["files"])
    del shop["files"][gone]
    shop["files"][changed] = right[changed][:-1] + b"!"
    code, said = command(shop)
    assert code == 1 and "2 clips are missing" in said and "circor_3: " in said and "404" in said and "sprsound_1: " in said and "not the file that was expected" in said
    assert len(list(MADE.glob("audio/*/*.flac"))) == 17 and pd.read_csv(MADE/"missing.csv").recording_id.tolist() == ["circor_3", "sprsound_1"]
    with pytest.raises(StethoError, match="metadata.csv.*is missing.*data pack"): scan("stetho-mini", MADE)
    shop["files"], shop["asked"] = right, []
    assert command(shop)[0] == 0 and is_the_pack(MADE, shop) and shop["asked"] == [gone, changed]


def test_a_damaged_clip_makes_a_whole_pack_incomplete_until_it_is_made_again(shop):
    assert command(shop)[0] == 0
    (MADE/"audio/circor/circor_5.flac").write_bytes(b"fLaC")
    shop["files"], right = {}, shop["files"]
    assert command(shop)[0] == 1 and not is_whole(MADE)
    shop["files"] = right
    assert command(shop)[0] == 0 and is_the_pack(MADE, shop)


def test_a_publisher_that_does_not_answer_is_left_alone(shop):
    shop["mirrors"]["circor"] = "http://127.0.0.1:9/"
    missing = build_pack("tiny", MADE, mirrors=shop["mirrors"], accept_licences=True, wait_s=.01, attempts=2)
    assert missing.source.tolist() == ["circor"]*12 and missing.fault.str.contains("not tried, since http://127.0.0.1:9/ does not answer").sum() >= 12 - 3 - packs.DOWNLOADS_AT_ONCE
    shop["mirrors"]["kauh"] = "http://127.0.0.1:9/"
    assert set(build_pack("tiny", "other", mirrors=shop["mirrors"], accept_licences=True, wait_s=.01, attempts=2).source) == {"circor", "kauh"}


def test_a_killed_command_goes_on_where_it_was(shop):
    shop["seconds"] = .25
    code = f"""
from pathlib import Path
from stetholm.data import packs
packs.manifests_folder = lambda: Path({str(shop['folder']/'manifests')!r})
packs.PACKS['tiny'] = ('tiny',)
packs.build_pack('tiny', 'made', mirrors={shop['mirrors']!r}, accept_licences=True)"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    begun = time.monotonic()
    def made(): return {p.name for p in Path("made").glob("audio/*/*.flac") if not p.name.startswith(".")}
    while len(made()) < 5 and process.poll() is None and time.monotonic() - begun < 60: time.sleep(.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    n = len(made())
    assert 5 <= n < 19 and not is_whole("made")
    shop |= {"seconds": 0., "asked": []}
    assert command(shop, "-o", "made")[0] == 0 and is_the_pack("made", shop) and len(shop["asked"]) == 19 - 3 - n + 2


def test_files_that_are_here_are_not_downloaded(shop):
    for (source, published), body in shop["originals"].items():
        path = Path("mine")/source/"deep down"/Path(published).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    (Path("mine")/"older").mkdir()
    (Path("mine/older/0_AV.wav")).write_bytes(b"RIFF")
    Path("mine/hls.zip").write_bytes(shop["files"]["/hlscmds/8972jxbpmp-3.zip"])
    shutil.rmtree("mine/hlscmds")
    places = [w for source in PATHS for w in ("--from", f"{source}=mine/hls.zip" if source == "hlscmds" else f"{source}=mine")]
    code, said = command(shop, *places)
    assert code == 0 and is_the_pack(MADE, shop) and not shop["asked"] and "about 0 MB, 0 minutes" in said
    shutil.rmtree(MADE)
    Path("mine/circor/deep down/7_AV.wav").write_bytes(b"another version")
    assert command(shop, *places)[0] == 0 and shop["asked"] == ["/circor/training_data/7_AV.wav"]
    shutil.rmtree(MADE)
    kauh = next(Path("mine/kauh/deep down").iterdir())
    kauh.write_bytes(b"another version")
    shop["files"], right, shop["asked"] = {}, shop["files"], []
    code, said = command(shop, *places)
    assert code == 1 and "7_AV.wav is another file than the clip was cut from" in said and f"{kauh.name} is another file" in said and said.count("404") == 2
    shop |= {"files": right, "asked": []}
    assert command(shop, *places)[0] == 0 and is_the_pack(MADE, shop) and sorted(shop["asked"]) == ["/circor/training_data/7_AV.wav", "/kauh/jwyy9np4gv-3.zip"]


@pytest.mark.parametrize("words, match", [(("--from", "circor"), "SET=VALUE"), (("--from", "circor=nowhere"), "no folder or archive of circor at nowhere"), (("--from", "icbhi=."), "nothing of 'icbhi'")])
def test_wrong_places_are_refused(shop, words, match):
    code, said = command(shop, *words)
    assert code == 2 and match in said and not shop["asked"] and not MADE.exists()


def test_a_full_disk_is_told_before_the_first_download(shop, monkeypatch):
    monkeypatch.setattr(packs.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 9, 9))
    code, said = command(shop)
    assert code == 1 and "make room" in said and not shop["asked"]


def test_an_unknown_pack_and_a_missing_manifest(shop):
    with pytest.raises(StethoError, match="unknown pack 'huge': choose one of stetho-mini"): build_pack("huge", MADE)
    with pytest.raises(StethoError, match="no manifest at"): build_pack("stetho-mini", MADE)


# a pack by name

def test_a_pack_by_name_is_made_first_and_used_again(shop, monkeypatch):
    for source in PATHS: monkeypatch.setitem(packs.PUBLISHERS, source, packs.Publisher(shop["mirrors"][source], PUBLISHERS[source].path, PUBLISHERS[source].archive))
    with pytest.raises(StethoError, match="make reproduce RECORDINGS='tiny pack' ACCEPT_LICENCES=1") as refused: recordings_of(["tiny pack"])
    assert "stetholm reproduce --recordings 'tiny pack' --accept-licences" in str(refused.value) and not shop["asked"]
    monkeypatch.setenv("STETHOLM_CACHE", "empty")
    with pytest.raises(StethoError) as told: recordings_of(["tiny"], wants_audioset=True)
    assert AUDIOSET.terms in str(told.value) and packs.SOURCES["circor"].title in str(told.value) and AUDIOSET.title not in str(refused.value)
    assert recordings_of(["tiny pack"], True) == [str(MADE), "pack"] and is_the_pack(MADE, shop)
    n = len(shop["asked"])
    assert recordings_of(["tiny"]) == [str(MADE)] and len(shop["asked"]) == n
    assert recordings_of(["tiny"], more=["pack"]) == recordings_of(["tiny", "pack"])
    assert open_run("smoke", recordings=recordings_of(["tiny", "pack"])).name == "smoke-tiny+pack"
    Path("tiny").mkdir()
    assert recordings_of(["tiny"]) == ["tiny"]


def test_a_pack_that_stays_incomplete_stops_the_study(shop, monkeypatch):
    for source in PATHS: monkeypatch.setitem(packs.PUBLISHERS, source, packs.Publisher(shop["mirrors"][source], PUBLISHERS[source].path, PUBLISHERS[source].archive))
    del shop["files"]["/cinc2016/training-a/a0001.wav"]
    with pytest.raises(StethoError, match="tiny in recordings/packs/tiny is not whole: 1 clips are missing") as failed: recordings_of(["tiny"], True)
    assert failed.value.exit_code == 1


@pytest.mark.parametrize("given, said", [
    (("RECORDINGS=../a ../b",), '--recordings "../a ../b"'), (("RECORDINGS=stetho-mini", "ACCEPT_LICENCES=1"), '--recordings "stetho-mini" --accept-licences'), (("RECORDINGS=x", "ACCEPT_LICENCES=0"), '--recordings "x"')])
def test_make_passes_recordings_and_acceptance(given, said):
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}    # `make test` runs this test, too
    done = subprocess.run(["make", "-n", "-o", ".venv/.installed", "reproduce", *given], cwd=REPO, env=outside, capture_output=True, text=True)
    assert " ".join(done.stdout.split()).endswith(f"reproduce --profile mini {said}"), done


# several as one

@pytest.fixture
def two(tmp_path):
    "Two phantom packs of different patients"
    first, second = make_phantom(tmp_path/"one", 10, 0), make_phantom(tmp_path/"two words", 10, 1)
    for name in ("metadata.csv", "events.csv"):
        table = pd.read_csv(second/name, dtype=str, keep_default_na=False)
        table.recording_id = "b_" + table.recording_id
        if "patient_id" in table: table.patient_id = "b_" + table.patient_id
        table.to_csv(second/name, index=False)
    return first, second


def test_packs_and_tables_are_joined_with_the_checks_of_one(two, tmp_path):
    (first, second), table, both = two, tmp_path/"second.parquet", tmp_path/"both.parquet"
    def join(*places):
        done = CliRunner().invoke(data, ["join", *map(str, places), "-o", str(both)])
        return done.output if done.exit_code == 0 else str(done.exception)
    write_table(scan("phantom", second), table, RECORDINGS)
    assert join(first, table).startswith("40 recordings")
    assert pd.read_parquet(both).recording_id.tolist() == [*scan("phantom", first).recording_id, *scan("phantom", second).recording_id]
    assert "named twice" in join(first, first, second)
    assert f"is in {first} and in {tmp_path/'copy'}: leave one of them out" in join(first, shutil.copytree(first, tmp_path/"copy"))
    meta = pd.read_csv(first/"metadata.csv", dtype=str, keep_default_na=False)
    patient = meta[meta.split == "train"].patient_id.iloc[0]
    other = pd.read_csv(second/"metadata.csv", dtype=str, keep_default_na=False)
    other.loc[other.split == "test", "patient_id"] = patient
    other.to_csv(second/"metadata.csv", index=False)
    assert f"patient {patient} is in train of {first} and in test of {second}" in join(first, second)


def test_the_study_takes_several_recordings(stetholm, two, monkeypatch):
    first, second = two
    done = stetholm("reproduce", "--profile", "smoke", "--recordings", f"{first} '{second}'", "--until", "audit")
    run = stetholm.runs/"smoke-one+two words"
    assert done.returncode == 0 and "recordings of one+two words" in done.stdout.splitlines()[-1], done.stderr
    note = json.loads((run/"run.json").read_text())
    assert note["recordings"]["data"] == "one+two words" and note["recordings_path"] == [str(first.resolve()), str(second.resolve())]
    assert len(pd.read_parquet(run/"recordings.parquet")) == 40
    monkeypatch.setenv("STETHOLM_RUNS", str(stetholm.runs))
    assert is_current(open_run("smoke", recordings=recordings_of([str(first), str(second)])), "audit")
    with pytest.raises(StethoError, match="made from other recordings .one.two words."): open_run("smoke", run.name, str(second))


# the manifests that are committed

def test_the_manifest_of_stetho_mini_is_of_that_pack(recordings):
    clips = read_manifest("stetho-mini")
    tables = packs._tables("stetho-mini", clips)
    assert tables["metadata.csv"] == (recordings/"metadata.csv").read_bytes() and tables["events.csv"] == (recordings/"events.csv").read_bytes() and tables["SOURCES.md"] == (recordings/"SOURCES.md").read_bytes()
    assert all(packs._is_made(recordings/clip.file, clip) for clip in clips.iloc[::25].itertuples())
    assert (clips.length/clips.sample_rate - clips.duration_s.astype(float)).abs().max() <= .0006


def test_real_files_of_publishers_are_cut_as_the_packs_are(tmp_path):
    folders = [REPO.parent/"shared"/name for name in ("layouts", "reports")]
    if not folders[0].is_dir(): pytest.skip(f"no publishers' files at {folders[0]}")
    clips = read_manifest("stetho-full").set_index("original_sha256", drop=False)
    found = 0
    for path in sorted(p for folder in folders for p in folder.rglob("*.wav")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest not in clips.index: continue
        clip = clips.loc[digest]
        assert len(cut(path.read_bytes(), clip)) == clip.length
        found += path.as_posix().endswith(f"/{clip.publisher_file}")
        assert path in find_originals(path.parents[1], {path.name}, tmp_path)[path.name]
    assert found >= 50
