"The layers: no import goes upward, and a stage's key changes with the code that it imports and with nothing else"
import re
import shutil

import pytest

from stetholm.core.code import LAYERS, code_hash, import_closure, imported, module_files, package_folder, upward
from stetholm.core.config import STAGES


def test_no_import_goes_upward():
    assert upward() == []


def test_every_module_lies_in_a_layer():
    assert {m.split(".")[0] for m in module_files()} == set(LAYERS)


def test_the_library_sees_no_run():
    "Only `core.run` itself, the study and the commands may name a run"
    files = module_files()
    offenders = [m for m, path in files.items() if m.split(".")[0] not in ("study", "cli") and m != "core.run"
                 and (re.search(r"\brun:\s*Run\b", path.read_text()) or re.search(r"import .*\bRun\b", path.read_text()))]
    assert offenders == []


@pytest.fixture
def package(tmp_path):
    "A copy of the package whose modules a test may edit"
    return shutil.copytree(package_folder(), tmp_path/"stetholm")


def rerun(package, module, edit):
    "The stages whose key changes when the text of a module is edited"
    def keys(folder): return {s: code_hash(f"study.{s}", package=folder) for s in STAGES}
    edited = shutil.copytree(package, package.parent/"edited")
    path = module_files(edited)[module]
    before = path.read_text()
    path.write_text(edit(before))
    assert path.read_text() != before
    was, now = keys(package), keys(edited)
    return [s for s in STAGES if was[s] != now[s]]


EDITED = {  # module: the stages that import it, directly or through others
    "data.card": ["audit", "figures"],
    "bench.quality": ["figures"],
    "sound.audio": ["exploration", "alignment", "sft", "preferences", "dpo", "evaluation", "figures"],
}


@pytest.mark.parametrize("module", EDITED)
def test_a_docstring_or_a_comment_reruns_no_stage(package, module):
    edit = lambda text: re.sub(r'\n    "', '\n    "In other words: ', text, count=1) + "\n# a comment\n"
    assert rerun(package, module, edit) == []


@pytest.mark.parametrize("module", EDITED)
def test_a_line_of_code_reruns_the_stages_that_import_it_and_no_other(package, module):
    assert rerun(package, module, lambda text: text + "\nADDED = 1\n") == EDITED[module]


def test_imports_inside_functions_count(tmp_path):
    for name, text in {"core/a.py": "X = 1\n", "core/b.py": "def f():\n    from stetholm.core.a import X\n    return X\n",
                       "core/c.py": "import stetholm.core.b\nimport core.a\n"}.items():
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text(text)
    assert imported("core.b", module_files(tmp_path)) == {"core.a"}
    assert imported("core.c", module_files(tmp_path)) == {"core.b"}


def test_importing_the_package_is_instant_and_its_model_is_there(tmp_path):
    import subprocess
    import sys
    code = "import time; t = time.perf_counter(); import stetholm; assert time.perf_counter() - t < .1; from stetholm import StethoLM; print(StethoLM)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "StethoLM" in done.stdout, done.stderr
