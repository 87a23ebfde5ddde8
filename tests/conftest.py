"What the tests share: the command line as a user runs it, one finished smoke run, and the recordings"
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from stetholm.core.compute import ENVIRONMENT
from stetholm.core.config import AUDIOSET

REPO = Path(__file__).resolve().parent.parent
COMMAND = Path(sys.executable).with_name("stetholm")
# Arguments of Python: `accelerate launch`, which starts several processes without MPI where it takes them for GPUs; without a GPU they talk by gloo
TWO_PROCESSES = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")

RECORDINGS = Path(os.environ.get("STETHOLM_RECORDINGS") or REPO.parent/"shared/stetho-mini")

for name, value in ENVIRONMENT.items(): os.environ.setdefault(name, value)


def pytest_configure(config):
    config.addinivalue_line("markers", "timed: how long it takes is what is tested, so nothing else may run beside it")
    config.addinivalue_line("markers", "report(row): what is tested is in the list of users' reports, in the row that has this text; `-m report` prints the list with what came out")
    if not COMMAND.exists(): raise pytest.UsageError(f"no command {COMMAND}: install the package first (make install)")


class Shell:
    "The `stetholm` command, with its own runs folder and working directory"
    def __init__(self,
        folder:Path):  # holds both
        self.runs, self.cwd = folder/"runs", folder
        self.environment = {**os.environ, "STETHOLM_RUNS": str(self.runs), "OMP_NUM_THREADS": "1"}  # one number of threads for all: sums of many threads differ in their last digits

    def __call__(self,
        *words,  # of the command line
        **more   # arguments of `subprocess.run`
    ) -> subprocess.CompletedProcess:
        "The finished command, output and errors as text"
        return subprocess.run(**self.how(words) | dict(capture_output=True) | more)

    def start(self,
        *words,  # of the command line
    ) -> subprocess.Popen:
        "The running command in a process group of its own; errors go with the output"
        return subprocess.Popen(**self.how(words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

    def how(self, words): return dict(args=[str(COMMAND), *map(str, words)], cwd=self.cwd, env=self.environment, text=True)


@pytest.fixture
def stetholm(tmp_path):
    "The command in an empty folder"
    return Shell(tmp_path)


@pytest.fixture(scope="session")
def stetholm_in(tmp_path_factory):
    "The command in an empty folder of that name, for fixtures that outlive a test"
    return lambda name: Shell(tmp_path_factory.mktemp(name))


class Finished(NamedTuple):
    "A run that was made once for all tests; they read it and leave it as it is"
    runs: Path                            # the runs folder
    folder: Path                          # the run's own
    process: subprocess.CompletedProcess  # what made it
    seconds: float                        # how long that took


@pytest.fixture(scope="session")
def smoke_run(stetholm_in):
    "The phantom at the smoke profile, every stage"
    kept = os.environ.get("STETHOLM_SMOKE")  # where an earlier pytest leaves it for a later one
    shell = Shell(Path(kept)) if kept else stetholm_in("smoke")
    note = shell.cwd/"done.json"
    if not note.is_file():
        begun = time.perf_counter()
        done = shell("reproduce", "--profile", "smoke")
        assert done.returncode == 0, done.stdout + done.stderr
        note.write_text(json.dumps([time.perf_counter() - begun, done.stdout, done.stderr]))
    seconds, out, err = json.loads(note.read_text())
    return Finished(shell.runs, shell.runs/"smoke-phantom", subprocess.CompletedProcess([], 0, out, err), seconds)


def absent(what):
    "A test without its files is skipped; the check from nothing fails"
    if os.environ.get("CI"): pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def recordings():
    "The stetho-mini pack"
    folder = RECORDINGS
    if not (folder/"metadata.csv").is_file(): absent(f"no recordings at {folder}: set STETHOLM_RECORDINGS to the folder of the stetho-mini pack")
    return folder


@pytest.fixture(scope="session")
def audioset_weights():
    "AudioSet's weights, in the folder beside the pack"
    file = RECORDINGS.parent/"weights"/AUDIOSET.file
    if not file.is_file(): absent(f"no weights at {file}: stetholm data weights, and copy the file there")
    return file


@pytest.fixture(scope="session")
def beside(recordings):
    "A folder beside the pack, by its name"
    def find(name):
        assert (recordings.parent/name/"README.md").is_file(), f"no {name} beside {recordings}"
        return recordings.parent/name
    return find


# users' reports

@pytest.fixture(scope="session")
def reports(beside):
    "Inputs from users' reports and published sets, with the list of what should come out"
    return beside("reports")


def report_rows(folder):
    "(input, expected) of each row of the list"
    cells = [[c.strip().replace("\\|", "|") for c in re.split(r"(?<!\\)\|", line.strip().strip("|"))] for line in (folder/"README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return [(c[0], c[-1]) for c in cells if c[-1] != "should be"]


@pytest.fixture
def listed(reports): return report_rows(reports)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    done = (yield).get_result()
    for mark in item.iter_markers("report"): done.user_properties.append(("row", mark.args[0]))


def pytest_terminal_summary(terminalreporter, config):
    if config.option.markexpr != "report": return
    done = [r for of in terminalreporter.stats.values() for r in of if getattr(r, "when", None) == "call" or getattr(r, "failed", False)]
    for given, expected in report_rows(RECORDINGS.parent/"reports"):
        terminalreporter.write_line(f"\n{given}\n    expected: {expected}")
        for r in done:
            about = dict(r.user_properties)
            if about.get("row", "\0") in given: terminalreporter.write_line(f"    {r.outcome}: {about.get('outcome') or r.nodeid.split('::')[1].removeprefix('test_').replace('_', ' ')}")
