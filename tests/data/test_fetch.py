"Fetching against a server on loopback that misbehaves, archives that mean harm, and published weights"
import functools
import hashlib
import http.server
import io
import tarfile
import threading
import time
import zipfile

import pytest
from typer.testing import CliRunner

from stetholm.cli.data_commands import data
from stetholm.cli.main import _check_machine
from stetholm.core.config import AUDIOSET, StethoError
from stetholm.core.files import audioset_file
from stetholm.core.run import open_run
from stetholm.data.fetch import BLOCK_BYTES, BY_HAND, DOWNLOADS, Download, download, fetch, fetch_weights, unpack
from stetholm.data.sources import SOURCES

BODY = bytes(range(256))*4000


class Server(http.server.BaseHTTPRequestHandler):
    "Serves `files`; `cuts` of its answers stop in the middle, and with `ranges` it goes on where asked"
    def __init__(self, shop, *args):
        self.shop = shop
        super().__init__(*args)
    def log_message(self, *args): pass

    def do_GET(self):
        body = self.shop["files"].get(self.path)
        asked = self.headers.get("Range")
        self.shop["asked"].append((self.path, asked))
        if body is None: return self.send_error(404)
        start = int(asked[6:-1]) if asked and self.shop["ranges"] else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        rest = body[start:]
        if self.shop["cuts"] > 0:
            self.shop["cuts"] -= 1
            rest = rest[:len(rest)//2]
        self.wfile.write(rest)


@pytest.fixture
def shop():
    "What the server has, how it misbehaves, and what it was asked"
    shop = {"files": {"/a.bin": BODY}, "cuts": 0, "ranges": True, "asked": []}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, shop))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shop["url"] = f"http://127.0.0.1:{server.server_port}"
    yield shop
    server.shutdown()
    server.server_close()


def packed(kind="zip", **files):
    "An archive's bytes"
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            for name, text in files.items(): z.writestr(name, text)
    else:
        with tarfile.open(fileobj=out, mode="w:gz") as t:
            for name, text in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(text)
                t.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def whole_blocks(n): return n//BLOCK_BYTES*BLOCK_BYTES


def test_a_whole_file(shop, tmp_path):
    path = download(Download(f"{shop['url']}/a.bin", "a.bin", f"sha256:{hashlib.sha256(BODY).hexdigest()}"), tmp_path)
    assert path.read_bytes() == BODY and [p.name for p in tmp_path.iterdir()] == ["a.bin"] and shop["asked"] == [("/a.bin", None)]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_goes_on_where_it_was_if_the_server_can(shop, tmp_path, ranges):
    shop |= {"cuts": 2, "ranges": ranges}
    assert download(Download(f"{shop['url']}/a.bin", "a.bin"), tmp_path, wait_s=.01).read_bytes() == BODY
    first = whole_blocks(len(BODY)//2)
    second = first + whole_blocks((len(BODY) - first)//2)
    assert [asked for _, asked in shop["asked"]] == ([None, f"bytes={first}-", f"bytes={second}-"] if ranges else [None, f"bytes={first}-", f"bytes={first}-"])


def test_a_connection_that_stays_cut_keeps_what_came_for_the_next_time(shop, tmp_path):
    shop["cuts"] = 2
    first = whole_blocks(len(BODY)//2)
    kept = first + whole_blocks((len(BODY) - first)//2)
    with pytest.raises(StethoError, match=rf"cut off after 2 tries .*{kept} bytes are kept in a.bin.part: run the same command again"): download(Download(f"{shop['url']}/a.bin", "a.bin"), tmp_path, attempts=2, wait_s=.01)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin.part"]
    assert download(Download(f"{shop['url']}/a.bin", "a.bin"), tmp_path).read_bytes() == BODY and shop["asked"][-1] == ("/a.bin", f"bytes={kept}-")


def test_a_part_that_is_complete_or_stale(shop, tmp_path):
    (tmp_path/"a.bin.part").write_bytes(BODY)
    assert download(Download(f"{shop['url']}/a.bin", "a.bin"), tmp_path).read_bytes() == BODY
    (tmp_path/"b.bin.part").write_bytes(BODY + b"more")
    shop["files"]["/b.bin"] = BODY
    assert download(Download(f"{shop['url']}/b.bin", "b.bin"), tmp_path, wait_s=.01).read_bytes() == BODY


def test_a_wrong_checksum_leaves_nothing(shop, tmp_path):
    with pytest.raises(StethoError, match="a.bin is not the file that was expected .*sha256:00"): download(Download(f"{shop['url']}/a.bin", "a.bin", "sha256:" + "0"*64), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file(shop, tmp_path):
    with pytest.raises(StethoError, match="none.zip cannot be downloaded .404"): download(Download(f"{shop['url']}/none.zip", "none.zip"), tmp_path)
    with pytest.raises(StethoError, match="could not be reached in 1 tries .ConnectionError"): download(Download("http://127.0.0.1:9/a.zip", "a.zip"), tmp_path, attempts=1)


@pytest.mark.report("TLS or proxy")
def test_a_certificate_or_a_proxy_that_fails_is_told_at_once(shop, tmp_path, monkeypatch):
    begun, secure = time.monotonic(), shop["url"].replace("http:", "https:")
    with pytest.raises(StethoError, match="no secure connection to .*set REQUESTS_CA_BUNDLE"): download(Download(f"{secure}/a.bin", "a.bin"), tmp_path)
    monkeypatch.setenv("no_proxy", "")
    for variable, url in (("https_proxy", "https://example.org/a.bin"), ("http_proxy", "http://example.org/a.bin")):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
        with pytest.raises(StethoError, match=r"cannot be reached through the proxy .*check HTTPS_PROXY"): download(Download(url, "a.bin"), tmp_path)
    monkeypatch.setenv("http_proxy", "http://")
    with pytest.raises(StethoError, match=r"cannot be downloaded .*: check HTTPS_PROXY"): download(Download("http://example.org/a.bin", "a.bin"), tmp_path)
    assert shop["asked"] == [] and list(tmp_path.iterdir()) == [] and time.monotonic() - begun < 10, "tries that wait seconds for each other"


def test_a_dataset_is_fetched_once_and_scanned(shop, tmp_path, capsys):
    shop["files"] |= {"/d.zip": packed(**{"x/labels.csv": "a,b\n", "x/y/1.txt": "one"}), "/e.tar.gz": packed("tar", **{"z.txt": "two"})}
    want = (Download(f"{shop['url']}/d.zip", "d.zip"), Download(f"{shop['url']}/e.tar.gz", "e.tar.gz"), Download(f"{shop['url']}/a.bin", "a.bin"))
    with pytest.raises(StethoError, match="--accept-licence") as refused: fetch(SOURCES["kauh"], tmp_path/"kauh", downloads=want)
    assert "CC-BY-4.0" in str(refused.value) and refused.value.exit_code == 2 and not (tmp_path/"kauh").exists() and not shop["asked"]
    assert fetch(SOURCES["kauh"], tmp_path/"kauh", True, want) == ["a.bin", "d", "e", "fetched.json"]
    assert (tmp_path/"kauh/d/x/y/1.txt").read_text() == "one" and (tmp_path/"kauh/e/z.txt").read_text() == "two" and "CC-BY-4.0" in capsys.readouterr().out
    n = len(shop["asked"])
    fetch(SOURCES["kauh"], tmp_path/"kauh", True, want)
    assert len(shop["asked"]) == n == 3 and not list(tmp_path.rglob("*.part"))


def test_a_file_that_changed_at_its_publisher_is_refused(shop, tmp_path):
    want = (Download(f"{shop['url']}/a.bin", "a.bin"),)
    fetch(SOURCES["kauh"], tmp_path, True, want)
    (tmp_path/"a.bin").unlink()
    shop["files"]["/a.bin"] = BODY + b"!"
    with pytest.raises(StethoError, match="not the file that was expected"): fetch(SOURCES["kauh"], tmp_path, True, want)


def evil(kind, how):
    "A tar or zip with one bad member"
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("good.txt", "good")
            if how == "bomb": z.writestr("big", bytes(300 << 20))
            elif how == "link":
                info = zipfile.ZipInfo("link")
                info.external_attr = 0o120777 << 16
                z.writestr(info, "/etc")
            elif how == "case": z.writestr("GOOD.txt", "other")
            else: z.writestr({"up": "../evil.txt", "absolute": "/tmp/evil.txt", "backslash": "..\\evil.txt", "drive": "C:/evil.txt"}[how], "evil")
    else:
        with tarfile.open(fileobj=out, mode="w:gz") as t:
            info = tarfile.TarInfo({"up": "a/../../evil.txt", "absolute": "/evil.txt"}.get(how, "bad"))
            if how in ("link", "hard"): info.type, info.linkname = tarfile.SYMTYPE if how == "link" else tarfile.LNKTYPE, "/etc/passwd"
            if how == "device": info.type = tarfile.CHRTYPE
            t.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize("kind, how, why", [("zip", "up", "leads out"), ("zip", "absolute", "leads out"), ("zip", "backslash", "leads out"), ("zip", "drive", "leads out"), ("zip", "link", "is a link"), ("zip", "case", "is there twice"),
    ("zip", "bomb", "claims to hold"), ("tar", "up", "leads out"), ("tar", "absolute", "leads out"), ("tar", "link", "is a link"), ("tar", "hard", "is a link"), ("tar", "device", "is a device")])
def test_a_malicious_archive_writes_nothing(shop, tmp_path, kind, how, why):
    name = "a.zip" if kind == "zip" else "a.tar.gz"
    shop["files"][f"/{name}"] = evil(kind, how)
    with pytest.raises(StethoError, match=why): fetch(SOURCES["kauh"], tmp_path/"in/kauh", True, (Download(f"{shop['url']}/{name}", name),))
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {f"in/kauh/.downloads/{name}"}


@pytest.mark.parametrize("cut", [.3, .7, .98])
def test_a_damaged_archive(tmp_path, cut):
    import os
    for name, body in (("a.zip", packed(**{f"{i}": os.urandom(2000).hex() for i in range(20)})), ("a.tar.gz", packed("tar", **{f"{i}": os.urandom(2000).hex() for i in range(20)}))):
        (tmp_path/name).write_bytes(body[:int(cut*len(body))])
        with pytest.raises(StethoError, match="damaged|not a whole"): unpack(tmp_path/name, tmp_path/"out")
    assert not (tmp_path/"out").exists() and len(list(tmp_path.iterdir())) == 2


def test_every_dataset_can_be_fetched_or_says_how_to_get_it(stetholm):
    assert set(DOWNLOADS) | set(BY_HAND) == set(SOURCES) and not set(DOWNLOADS) & set(BY_HAND)
    assert all(d.url.startswith("https://") for ds in DOWNLOADS.values() for d in ds)
    for words, code, said in ((("mimic",), 2, "unknown dataset"), (("circor",), 2, "ODC-BY-1.0"), (("tr", "--accept-licence"), 1, "Download All")):
        done = stetholm("data", "fetch", *words)
        assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr and not list(stetholm.cwd.iterdir())


# weights

@pytest.fixture
def weights(shop, tmp_path, monkeypatch):
    "The server publishes them, and the cache is empty"
    shop["files"]["/mn04.pt"] = BODY
    published = AUDIOSET._replace(url=f"{shop['url']}/mn04.pt", sha256=hashlib.sha256(BODY).hexdigest())
    for module in ("core.files", "data.fetch"): monkeypatch.setattr(f"stetholm.{module}.AUDIOSET", published)
    monkeypatch.setenv("STETHOLM_CACHE", str(tmp_path/"cache"))
    monkeypatch.setenv("STETHOLM_RUNS", str(tmp_path/"runs"))
    return tmp_path/"cache/weights/mn04.pt"


def data_weights(*words):
    "`data weights`: exit code and what it said"
    done = CliRunner().invoke(data, ["weights", *map(str, words)])
    assert done.exception is None or isinstance(done.exception, StethoError), done.exception
    return getattr(done.exception, "exit_code", 0), f"{done.output}{done.exception or ''}"


def test_weights_are_downloaded_once_and_resumed(shop, weights):
    shop["cuts"] = 1
    code, said = data_weights()
    assert code == 0 and weights.read_bytes() == BODY and str(weights) in said and [asked for _, asked in shop["asked"]] == [None, f"bytes={whole_blocks(len(BODY)//2)}-"]
    assert f"{AUDIOSET.title}: 4.1 MB from {shop['url']}/mn04.pt" in said and "MIT, Copyright (c) 2022 Florian Schmid" in said and "arXiv 2211.04772" in said and AUDIOSET.homepage in said
    code, said = data_weights()
    assert code == 0 and "here already" in said and str(weights) in said and len(shop["asked"]) == 2
    assert [p.name for p in weights.parent.iterdir()] == ["mn04.pt"]


def test_weights_are_taken_from_a_copy(shop, weights, tmp_path):
    copy = tmp_path/"copy.pt"
    copy.write_bytes(BODY[:-1])
    for given in (copy, tmp_path, tmp_path/"nowhere"):
        code, said = data_weights("--from", given)
        assert code > 0 and str(given) in said and "stetholm data weights --from FILE" in said and not weights.parent.exists()
    copy.write_bytes(BODY)
    code, said = data_weights("--from", copy)
    assert code == 0 and weights.read_bytes() == BODY and str(weights) in said and not shop["asked"]


@pytest.mark.parametrize("served, match", [(b"other", "is not the file that was expected"), (None, "404")])
def test_other_weights_than_the_published_ones_are_not_kept(shop, weights, served, match):
    shop["files"]["/mn04.pt"] = served
    code, said = data_weights()
    assert code == 1 and match in said and said.endswith("stetholm data weights --from FILE") and not list(weights.parent.iterdir())


def test_a_publisher_of_weights_that_does_not_answer(weights, monkeypatch):
    monkeypatch.setattr("stetholm.data.fetch.AUDIOSET", AUDIOSET._replace(url="http://127.0.0.1:9/mn04.pt"))
    with pytest.raises(StethoError, match="could not be reached in 1 tries .*stetholm data weights --from FILE$"): fetch_weights(attempts=1)


def test_weights_are_found_in_the_cache_or_beside_the_recordings(weights, tmp_path, capsys):
    clips, beside = tmp_path/"shared/clips", tmp_path/"shared/weights/mn04.pt"
    with pytest.raises(StethoError, match="starts from AudioSet-trained mn04 .*: stetholm data weights"): audioset_file([clips])
    for file in (weights, beside):
        file.parent.mkdir(parents=True)
        file.write_bytes(BODY)
    assert audioset_file([clips]) == weights and not capsys.readouterr().out
    weights.write_bytes(b"damaged")
    with pytest.raises(StethoError, match="is not the file that was published .*: stetholm data weights"): audioset_file([clips])
    weights.unlink()
    assert audioset_file([tmp_path/"elsewhere/table.parquet", clips]) == beside and f"{beside}, beside the recordings" in capsys.readouterr().out


def test_a_damaged_file_in_the_cache_is_replaced(weights):
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"damaged")
    assert data_weights()[0] == 0 and weights.read_bytes() == BODY


def test_the_study_looks_for_weights_before_its_first_stage(shop, weights, capsys):
    network = {"alignment_network": "residual+mobilenet", "alignment_audioset": True}
    run = open_run("smoke", overrides=network)
    with pytest.raises(StethoError, match="stetholm data weights"): _check_machine(run, ["audit", "alignment"], False)
    _check_machine(run, ["audit", "sft"], False)
    _check_machine(open_run("smoke", overrides=network | {"alignment_network": "residual"}), ["alignment"], False)
    assert not capsys.readouterr().out and not shop["asked"]
    _check_machine(open_run("smoke", overrides=network | {"alignment_audioset": False}), ["alignment"], False)
    assert "the mobilenet starts from scratch" in capsys.readouterr().out and not shop["asked"]
    _check_machine(run, ["audit", "alignment"], True)
    said = capsys.readouterr().out
    assert weights.is_file() and "licence: MIT" in said and "4.1 MB" in said and shop["url"] in said
    _check_machine(run, ["audit", "alignment"], False)
