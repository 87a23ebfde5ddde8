"The figures of the data: nothing lost in counting, every site on the chest, tables with next to nothing in them, and no sound in a committed notebook"
import json
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from conftest import REPO
from stetholm.data.chest import site_spots
from stetholm.data.chest import site_maps, site_table
from stetholm.core.config import PROFILES
from stetholm.data.overview import ages, cooccurrence, count, durations, examples, spectrogram
from stetholm.data.overview import composition
from stetholm.phantom.patients import make_phantom
from stetholm.data.shift import relative_to_normal, class_spectra, domain_shift, shift_map, spectra, source_accuracy
from stetholm.data.sources import scan
from stetholm.data.vocabulary import SITES, kauh_zone

P = PROFILES["smoke"]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory): return scan("phantom", make_phantom(tmp_path_factory.mktemp("phantom")/"phantom", 24, 0)).set_index("recording_id", drop=False)


@pytest.fixture(scope="module")
def mel(phantom): return spectra(phantom, P)


@pytest.fixture(scope="module")
def pack(recordings): return scan("stetho-mini", recordings).set_index("recording_id", drop=False)


def bare(table, verdict=None):
    "One source, one verdict, and nothing in any column that may be empty"
    return table.assign(source="one", distribution="in_domain", binary=pd.Series(verdict, table.index, dtype=object), findings=[[] for _ in table.index], events=[[] for _ in table.index],
                        **{c: pd.Series(None, table.index, dtype=object) for c in ("site", "diagnosis", "age", "sex", "device")})


def draw_all(table, mel):
    "Every figure, drawn with all its text"
    x = mel.to_numpy()
    figures = [composition(table), ages(table), durations(table, P), site_maps(table), class_spectra(x[:, :P.n_mels], table, P), shift_map(x, table, domain_shift(x, table)), cooccurrence(table)]
    for f in figures: f.canvas.draw()
    plt.close("all")
    return figures


def test_counts_add_up(pack):
    counts = count(pack)
    single = pack[[len({f for f in fs}) < 2 for fs in pack.findings]]
    assert counts[counts.finding == "none named"].recordings.sum() == pack.findings.map(len).eq(0).sum()
    one = count(single)
    assert one.recordings.sum() == len(single) and np.isclose(one.hours.sum(), single.duration_s.sum()/3600)
    for by in ("source", "split", "domain"): assert one.groupby(by).recordings.sum().to_dict() == single[by].value_counts().to_dict()
    assert counts.groupby("source").recordings.sum().ge(pack.source.value_counts()).all() and not counts.duplicated(["source", "split", "domain", "binary", "finding"]).any()


def test_every_site_has_a_place_on_the_chest():
    words = {w for codes in SITES.values() for w in codes.values() if w} | {kauh_zone(z, "here") for z in ("P L U", "P R L", "A U R", "P L R", "P L R L", "A L L", "P", "A R M")}
    for w in words:
        spots = site_spots(w)
        assert 1 <= len(spots) <= 2 and all(view in ("front", "back") and abs(x) <= .65 and 0 < y < 1.5 for view, x, y in spots), w
        if len(spots) == 1 and len(side := {"left", "right"} & set(w.split())) == 1 and "sternal" not in w:
            view, x, _ = spots[0]
            assert (x > 0) == (side == {"left"}) if view == "front" else (x < 0) == (side == {"left"}), w
    assert len({site_spots(w) for w in ("aortic valve area", "pulmonary valve area", "tricuspid valve area", "mitral valve area")}) == 4


def test_no_recording_is_lost_on_the_map(pack):
    sites = site_table(pack)
    assert sites.recordings.sum() == len(pack) and sites[sites.spots.isna()].recordings.sum() == pack.site.isna().sum() and sites.with_verdict.sum() == pack.binary.notna().sum()
    title = site_maps(pack)._suptitle.get_text()
    assert f"{pack.site.isna().sum()} of 1,215" in title
    plt.close("all")


def test_figures_of_the_phantom(phantom, mel):
    draw_all(phantom, mel)
    chosen = examples(phantom, mel)
    assert {phantom.split[row.recording_id] for _, row, _ in chosen} == {"train"} and {"normal heart", "normal lung"} <= {name for name, *_ in chosen} and len(chosen) <= 10
    for name, row, start in chosen:
        figure, wave = spectrogram(row, P, start, 2., name)
        assert len(wave) == 2*P.sample_rate and row.recording_id in figure.axes[0].get_title(loc="left")
        figure.canvas.draw()
    plt.close("all")


@pytest.mark.parametrize("verdict", [None, "normal", "abnormal"])
def test_figures_of_next_to_nothing(phantom, mel, verdict):
    table = bare(phantom, verdict)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        draw_all(table, mel)
    assert site_maps(table)._suptitle.get_text().endswith(f"{len(table)} of {len(table)} have no known site and are not drawn")
    plt.close("all")
    assert domain_shift(mel.to_numpy(), table).value.isna().all() and count(table).recordings.sum() == len(table)
    assert np.isnan(relative_to_normal(mel.to_numpy(), table)).all() == (verdict != "normal")
    assert len(examples(table, mel)) == (2 if verdict == "normal" else 0)


def test_shuffled_sources_cannot_be_told():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(360, 40)) + np.repeat(rng.normal(0, 2, (120, 40)), 3, 0)  # three recordings of each patient are alike
    table = pd.DataFrame({"source": np.repeat(rng.permutation(np.repeat(["a", "b", "c"], 40)), 3), "patient_id": np.repeat(np.arange(120).astype(str), 3)})
    shuffled = source_accuracy(x, table)
    assert shuffled["chance"] == pytest.approx(1/3) and abs(shuffled["accuracy"] - 1/3) < .12
    told = source_accuracy(x + 3*(table.source.to_numpy() == "a")[:, None] - 3*(table.source.to_numpy() == "b")[:, None], table)
    assert told["accuracy"] > .95


def test_no_sound_in_committed_notebooks():
    notebooks = sorted((REPO/"nbs").rglob("*.ipynb"))
    assert len(notebooks) > 70
    for path in notebooks:
        outputs = json.dumps([c.get("outputs", []) for c in json.loads(path.read_text())["cells"]])
        assert not any(t in outputs for t in ("data:audio", "<audio ", '"audio/')), path


def test_real_figures_are_committed():
    notebook = REPO/"nbs/study/1_exploration.ipynb"
    cells = json.loads(notebook.read_text())["cells"]
    outputs = json.dumps([c.get("outputs", []) for c in cells])
    assert notebook.stat().st_size < 1e6 and outputs.count('"image/png"') >= 15 and "the recordings of stetho-mini" in outputs
    assert not any("injected-parameters" in c["metadata"].get("tags", []) for c in cells)
