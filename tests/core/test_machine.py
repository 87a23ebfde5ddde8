"Machines as they are: other locales, homes that cannot be written, kernels of other Pythons"
import ast
import json
import os
import sys
from pathlib import Path

import pytest

from stetholm.core.code import package_folder
from stetholm.core.compute import home_variables, kernel_manager
from stetholm.core.config import PROFILES, StethoError
from stetholm.core.files import cache_folder, files_below, writable
from stetholm.core.run import Run, reproduce_command


def without_encoding(tree):
    "Lines of calls that read or write text in whatever encoding the locale has"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call): continue
        given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        name = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
        is_text = name in ("read_text", "write_text") or given.get("text") is True
        mode = [c.value for a in node.args[1:] for c in ast.walk(a) if isinstance(c, ast.Constant)]
        is_text |= isinstance(node.func, ast.Name) and name == "open" and not any("b" in str(m) for m in mode)
        if is_text and "encoding" not in given: yield node.lineno


def test_the_check_of_encodings_finds_what_it_looks_for():
    found = without_encoding(ast.parse('open(p)\nopen(p, "w")\nopen(p, "ab" if a else "wb")\nopen(p, encoding="utf-8")\np.read_text()\np.write_text("b")\nsubprocess.run(w, text=True)\nImage.open(p)'))
    assert sorted(found) == [1, 2, 5, 6, 7]


@pytest.mark.report("`LC_ALL=")
def test_every_text_is_read_and_written_as_utf8():
    assert [f"{f.name} line {n}" for f in package_folder().rglob("*.py") for n in without_encoding(ast.parse(f.read_text(encoding="utf-8")))] == []


@pytest.mark.report("HOME read-only")
def test_a_home_that_cannot_be_written_is_spared(monkeypatch, tmp_path):
    monkeypatch.delenv("STETHOLM_CACHE", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("HOME", "/dev/null/nobody")
    spared = home_variables()
    assert {"MPLCONFIGDIR", "IPYTHONDIR"} <= set(spared) and all(v.startswith(f"{tmp_path}/stetholm-") for v in spared.values()) and "HOME" not in spared
    monkeypatch.setattr(os.path, "expanduser", lambda p: p)  # as for a user who has no home
    assert home_variables()["HOME"].startswith(str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)  # nor can the installation be written
    monkeypatch.setenv("STETHOLM_CACHE", "/scratch/me")
    assert home_variables()["NUMBA_CACHE_DIR"] == "/scratch/me/numba"


@pytest.mark.report("HOME read-only")
def test_a_cache_that_cannot_be_written_names_its_variable(monkeypatch):
    for variable in ("STETHOLM_CACHE", "XDG_CACHE_HOME"): monkeypatch.delenv(variable, raising=False)
    with pytest.raises(StethoError, match="/proc/stetholm cannot be written .*set STETHOLM_CACHE"): writable(Path("/proc/stetholm"), "STETHOLM_CACHE")
    def none(): raise RuntimeError("Could not determine home directory.")
    monkeypatch.setattr(Path, "home", none)
    with pytest.raises(StethoError, match="no home folder: set STETHOLM_CACHE"): cache_folder()
    monkeypatch.setenv("STETHOLM_CACHE", "/scratch/x")
    assert cache_folder() == Path("/scratch/x")


@pytest.mark.report("`JUPYTER_PATH`")
def test_the_kernel_is_that_of_this_python(monkeypatch, tmp_path):
    other = tmp_path/"kernels/python3/kernel.json"
    other.parent.mkdir(parents=True)
    other.write_text(json.dumps({"argv": ["/opt/conda/bin/python", "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "Python 3", "language": "python"}))
    for variable in ("JUPYTER_PATH", "JUPYTER_DATA_DIR"): monkeypatch.setenv(variable, str(tmp_path))
    assert kernel_manager().kernel_spec.argv[0] == sys.executable


@pytest.mark.report("run names and values with blanks")
def test_a_command_can_be_pasted():
    run = Run(Path("runs/it's new"), PROFILES["mini"], "/data/heart & lung")
    assert reproduce_command(run, "--until", "sft").endswith("""--run 'it'"'"'s new' --recordings '/data/heart & lung' --until sft""")


def test_many_links_to_each_other_are_walked_once(tmp_path):
    "Every folder has a link to each of the others: as many ways as there are orders of twelve"
    names = [f"d{i}" for i in range(12)]
    for n in names:
        (tmp_path/n).mkdir()
        (tmp_path/n/"x.wav").write_text(n)
        for other in names: (tmp_path/n/f"to_{other}").symlink_to(tmp_path/other)
    found = [p for p in files_below(tmp_path) if p.is_file()]
    assert {tmp_path/n/"x.wav" for n in names} <= set(found) and len(found) <= 24
