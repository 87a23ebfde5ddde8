"The front end on real recordings against librosa, how fast it is, the cache of features, and what augmentations draw"
import dataclasses
import time

import librosa
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from stetholm.sound import features
from stetholm.sound.audio import load_audio, log_mel, read_audio, recording_features, recording_windows
from stetholm.sound.features import FeatureCache
from stetholm.sound.augmentations import DEGRADATIONS, augment, degrade
from stetholm.core.config import PROFILES, StethoError
from stetholm.core.files import file_hash
from stetholm.sound.features import make_features

SMOKE, MINI, PAPER = (PROFILES[n] for n in ("smoke", "mini", "paper"))


def theirs(wave, p, **more):
    "librosa's log-mel in the precision of `wave`"
    mel = librosa.feature.melspectrogram(y=wave, sr=p.sample_rate, n_fft=p.n_fft, hop_length=p.hop, n_mels=p.n_mels, fmin=p.fmin, fmax=p.fmax)
    return librosa.power_to_db(mel, **more)


@pytest.fixture(scope="module")
def clips(recordings):
    "Eight recordings of each of the five sources"
    table = pd.read_csv(recordings/"metadata.csv", dtype=str)
    return [recordings/f for _, g in table.groupby("source") for f in g.sample(8, random_state=0).file]


@pytest.mark.parametrize("p", [MINI, PAPER], ids=lambda p: p.name)
def test_front_end_is_librosas_on_whole_real_recordings(clips, p):
    front, worst, lowest = log_mel(p), 0., 0.
    assert len(clips) == 40
    for path in clips:
        wave = load_audio(path, p.sample_rate)
        ours, exact = front(torch.from_numpy(wave)).numpy(), theirs(wave.astype(np.float64), p, top_db=None)
        worst, lowest = max(worst, abs(ours - exact).max()), min(lowest, exact.min())
        assert abs(ours - exact).max() < 1e-4, path
        assert abs(ours - theirs(wave, p, top_db=None)).max() < 1e-4, path
        assert abs(np.maximum(ours, ours.max() - 80) - theirs(wave, p)).max() < 1e-4, path
    print(f"\n{p.name}: largest difference {worst:.1e} dB, lowest level {lowest:.1f} dB")
    assert lowest < -80, "the comparison reaches down to the empty bands"


@pytest.mark.parametrize("p", [MINI, PAPER], ids=lambda p: p.name)
def test_a_batch_gives_the_same_bytes_as_one_by_one(clips, p):
    front, waves = log_mel(p), [recording_windows(path, p) for path in clips[::5]]
    together = front(torch.from_numpy(np.concatenate(waves))).numpy()
    alone = np.concatenate([front(torch.from_numpy(w[None])).numpy() for window in waves for w in window])
    assert together.dtype == np.float32 and together.tobytes() == alone.tobytes()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_front_end_is_the_same_on_a_gpu(clips):
    wave = torch.from_numpy(np.concatenate([recording_windows(path, MINI) for path in clips]))
    front = log_mel(MINI)
    assert (front(wave) - front.cuda()(wave.cuda()).cpu()).abs().max() < 1e-4


@pytest.mark.timed
def test_front_end_is_fast(clips):
    "160 ten-second clips at the mini front end on two cores, and librosa called clip by clip, in one run; clips a second of the best of twenty-five turns, as a machine shared with others slows now the one, now the other; with a pause before each, as BLAS threads go on spinning after librosa"
    waves = np.stack([np.resize(load_audio(path, MINI.sample_rate), 10*MINI.sample_rate) for path in clips]*4)
    front, threads = log_mel(MINI), torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    try:
        seconds = {"ours": [], "librosa": []}
        for _ in range(26):
            for name, f in {"ours": lambda: front(torch.from_numpy(waves)), "librosa": lambda: [theirs(w, MINI) for w in waves]}.items():
                time.sleep(.3)
                begun = time.perf_counter()
                f()
                seconds[name].append(time.perf_counter() - begun)
    finally: torch.set_num_threads(threads)
    ours, librosas = (len(waves)/min(s[1:]) for s in seconds.values())
    print(f"\n{ours:.0f} clips/s, librosa {librosas:.0f}: {ours/librosas:.1f} times as fast")
    assert ours >= 200 and ours >= 5*librosas


@pytest.fixture
def table(tmp_path):
    "Five noises of 3 to 23 seconds, the second and last the same, as a recordings table"
    rows = []
    for i, seconds in enumerate((3, 7, 11, 23, 7)):
        path = tmp_path/f"{i}.wav"
        soundfile.write(path, .1*np.random.default_rng(seconds).standard_normal(8000*seconds), 8000)
        rows.append({"recording_id": f"r{i}", "path": str(path), "sha256": file_hash(path)})
    return pd.DataFrame(rows)


def made(table, p, tmp_path, name):
    "Features in a folder of that name and what was said"
    said = []
    return make_features(table, p, tmp_path/name, tmp_path/"cache", report=said.append), said[0]


def test_second_run_reads_the_cache_and_no_recording(table, tmp_path, monkeypatch):
    first, said = made(table, SMOKE, tmp_path, "first")
    assert said == "features: 0 recordings out of the cache, 4 made"
    monkeypatch.setattr(soundfile, "read", lambda *_, **__: pytest.fail("a recording was read again"))
    monkeypatch.setattr(torch.fft, "rfft", lambda *_: pytest.fail("features were made again"))
    second, said = made(table, SMOKE, tmp_path, "second")
    assert said == "features: 4 recordings out of the cache, 0 made"
    assert file_hash(tmp_path/"first") == file_hash(tmp_path/"second") and second.rows == first.rows == {"r0": (0, 1), "r1": (1, 3), "r2": (3, 6), "r3": (6, 9), "r4": (9, 11)}


def test_features_are_those_of_each_recording_alone(table, tmp_path):
    features, _ = made(table, SMOKE, tmp_path, "features")
    for r in table.itertuples(): assert torch.equal(features[r.recording_id], recording_features(r.path, SMOKE).half().float())


def test_renamed_recording_is_known_and_a_changed_one_is_not(table, tmp_path):
    made(table, SMOKE, tmp_path, "first")
    assert made(table.assign(recording_id=table.recording_id + "x"), SMOKE, tmp_path, "renamed")[1].endswith(" 0 made")
    wave, rate = read_audio(table.path[0])
    soundfile.write(table.path[0], wave/2, rate)
    assert made(table.assign(sha256=[file_hash(p) for p in table.path]), SMOKE, tmp_path, "changed")[1].endswith(" 1 made")


@pytest.mark.parametrize("change", [{"fmax": 1900.}, {"n_mels": 48}, {"hop": 80}, {"window_s": 4.}, {"max_windows": 2}, {"sample_rate": 8000}, {"n_fft": 512}, {"fmin": 50.}], ids=lambda c: next(iter(c)))
def test_another_front_end_never_reads_these_features(table, tmp_path, change):
    made(table, SMOKE, tmp_path, "first")
    p = dataclasses.replace(SMOKE, **change)
    assert made(table, p, tmp_path, "changed")[1].endswith(" 4 made")
    assert made(table, dataclasses.replace(p, sft_steps=1), tmp_path, "again")[1].endswith(" 0 made")


def test_changed_code_never_reads_these_features(table, tmp_path, monkeypatch):
    made(table, SMOKE, tmp_path, "first")
    def windows(wave, size, max_windows): return np.resize(wave, size)[None]
    monkeypatch.setattr(features, "windows", windows)
    assert made(table, SMOKE, tmp_path, "changed")[1].endswith(" 4 made")


@pytest.mark.parametrize("damage", [lambda raw: raw[:-100], lambda raw: b"", lambda raw: raw[:5000] + b"?" + raw[5001:], lambda raw: b"text"], ids=["cut", "empty", "one byte", "text"])
def test_damaged_features_are_made_again_and_it_is_said(table, tmp_path, damage):
    made(table, SMOKE, tmp_path, "first")
    path = FeatureCache(SMOKE, tmp_path/"cache").path(table.sha256[1])
    good = path.read_bytes()
    path.write_bytes(damage(good))
    with pytest.warns(UserWarning, match="damaged"): assert made(table, SMOKE, tmp_path, "again")[1].endswith(" 1 made")
    assert path.read_bytes() == good and file_hash(tmp_path/"first") == file_hash(tmp_path/"again")


def test_interrupted_run_keeps_what_it_has_made_and_leaves_nothing_half_written(table, tmp_path, monkeypatch):
    put, calls = FeatureCache.put, []
    def stop(self, *args):
        calls.append(args)
        if len(calls) == 3: raise KeyboardInterrupt
        put(self, *args)
    monkeypatch.setattr(FeatureCache, "put", stop)
    with pytest.raises(KeyboardInterrupt): made(table, SMOKE, tmp_path, "first")
    monkeypatch.undo()
    assert not (tmp_path/"first").exists() and not [p for p in tmp_path.rglob("*") if ".part." in p.name]
    assert made(table, SMOKE, tmp_path, "second")[1] == "features: 2 recordings out of the cache, 2 made"


def test_unreadable_recording_is_named(table, tmp_path):
    (tmp_path/"2.wav").write_text("hello")
    with pytest.raises(StethoError, match="2.wav is not a readable audio file"): made(table, SMOKE, tmp_path, "first")


@pytest.mark.parametrize("name, damage, why", [("empty.wav", lambda raw: b"", "is empty"), ("text.wav", lambda raw: b"hello", "not a readable audio file"), ("cut.wav", lambda raw: raw[:3000], "cut short"),
                                               ("cut.flac", lambda raw: raw[:3000], "not a readable audio file"), ("text.mp3", lambda raw: b"hello", "not a readable audio file"), ("text.ogg", lambda raw: b"hello", "not a readable audio file")])
def test_bad_file_is_refused_in_one_line(tmp_path, name, damage, why):
    path = tmp_path/name
    soundfile.write(path, .1*np.random.default_rng(0).standard_normal(8000), 8000)
    assert len(read_audio(path)[0]) == 8000
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(StethoError, match=why) as refused: read_audio(path)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def test_samples_that_are_not_numbers_are_refused(tmp_path):
    wave = np.zeros(100, np.float32)
    wave[50] = np.inf
    soundfile.write(tmp_path/"inf.wav", wave, 8000, subtype="FLOAT")
    with pytest.raises(StethoError, match="not numbers"): read_audio(tmp_path/"inf.wav")


@pytest.fixture
def gradient():
    "Two equal log-mel windows in which no two neighbours are alike"
    return (torch.arange(64.)[:, None] - torch.arange(100.)/4).expand(2, -1, -1) - 40


def drawn(seed=0): return torch.Generator().manual_seed(seed)


def span(changed):
    at = changed.nonzero().flatten().tolist()
    return (at[0], at[-1]) if at else None


def test_augmentations_of_training_draw_what_they_always_drew(gradient):
    "Committed results were trained with these: another order of draws would change them all"
    tilted = torch.tensor([-0.044922, 3.218660])[:, None, None]*torch.linspace(-.5, .5, 64)[:, None]
    changed = (augment(gradient, drawn()) - gradient - tilted).abs() > 1e-3
    assert [span(c.all(0)) for c in changed] == [(30, 30), (62, 63)] and [span(c.all(1)) for c in changed] == [(27, 31), (35, 43)]


def test_degradations_draw_what_they_always_drew(gradient):
    changed = {k: degrade(gradient, k, drawn(), gradient.flip(-1)) != gradient for k in DEGRADATIONS}
    assert [(span(c), c.sum().item()) for c in (changed["crop"].float().mean(1) > .9)] == [((7, 21), 15), ((10, 27), 18)]
    assert [c.sum().item() for c in (changed["mask"].float().mean(2) > .9)] == [10, 11] and [c.sum().item() for c in (changed["remove"].float().mean(1) > .9)] == [89, 95]
    assert torch.allclose(degrade(gradient, "noise", drawn())[:, 0, 0], torch.tensor([18.162678, 14.487097]), atol=1e-3)
