"Files as users have them, the front end on real recordings against librosa, the cache of features, and what augmentations draw"
import dataclasses
import shlex
import struct
import time
import tracemalloc

import librosa
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from stetholm.core.config import PROFILES, StethoError
from stetholm.core.files import file_hash
from stetholm.data.fingerprints import measure_sounds
from stetholm.data.recordings import audio_header
from stetholm.model.processor import StethoLMFeatureExtractor
from stetholm.sound import features
from stetholm.sound.audio import load_audio, log_mel, recording_features, recording_windows
from stetholm.sound.augmentations import DEGRADATIONS, augment, degrade
from stetholm.sound.features import FeatureCache, make_features
from stetholm.sound.reading import AudioFile, AudioNote, read_audio

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
    monkeypatch.setattr(soundfile, "SoundFile", lambda *_, **__: pytest.fail("a recording was read again"))
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
                                               ("cut.flac", lambda raw: raw[:3000], "cut short"), ("cut.mp3", lambda raw: raw[:len(raw)//2], "cut short"), ("text.mp3", lambda raw: b"hello", "not a readable audio file"), ("text.ogg", lambda raw: b"hello", "not a readable audio file")])
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


# files as users have them

def sound(seconds=10., rate=8000, seed=0):
    "Noise that comes and goes"
    t = np.arange(int(seconds*rate))/rate
    return (.2*np.random.default_rng(seed).standard_normal(len(t))*(1.1 + np.sin(2*np.pi*t))).clip(-.9, .9).astype(np.float32)


def every_reader(path):
    "(seconds, notes) of the scan, the hash and notes of the audit, the windows of training and of a question: one function reads them all"
    seconds, _, notes = audio_header(path)
    measures, = measure_sounds([path])
    windows = recording_windows(path, SMOKE)
    extract = StethoLMFeatureExtractor(*(getattr(SMOKE, f) for f in ("sample_rate", "n_mels", "fmin", "fmax", "n_fft", "hop", "window_s", "max_windows")))
    if notes:
        with pytest.warns(AudioNote) as warned: asked = extract(path)
        assert [str(w.message) for w in warned] == [f"{path}: {note}" for note in notes]
    else: asked = extract(path)
    assert measures.notes == notes and torch.equal(asked, log_mel(SMOKE)(torch.from_numpy(windows)))
    return seconds, notes, measures, windows


def patched(raw, riff=None, data=None):
    "A WAV file with other lengths in its header"
    at = raw.index(b"data") + 4
    if riff is not None: raw = raw[:4] + struct.pack("<I", riff) + raw[8:]
    return raw if data is None else raw[:at] + struct.pack("<I", data) + raw[at + 4:]


STREAMS = {"ffmpeg": (2**32 - 1, 2**32 - 1), "sox": (0x7FFFF024, 0x7FFFF000), "arecord": (0x80000024, 0x80000000), "largest int": (2**31 - 1, 2**31 - 1), "rounded down": (2**32 - 1, 0xFFFF0000),
           "zeros": (0, 0), "stopped at once": (36, 0), "endless and zero": (2**32 - 1, 0)}

@pytest.mark.parametrize("kind", [dict(subtype="PCM_24"), dict(subtype="FLOAT"), dict(subtype="PCM_U8", format="WAVEX"), dict(subtype="IMA_ADPCM")], ids=lambda k: k["subtype"])
@pytest.mark.parametrize("name", STREAMS)
def test_all_of_a_stream_is_read_whatever_its_header_says(tmp_path, name, kind):
    good, path = tmp_path/"good.wav", tmp_path/"stream.wav"
    channels = 1 if "ADPCM" in kind["subtype"] else 2
    soundfile.write(good, np.stack([sound(3)]*channels, 1), 8000, **kind)
    path.write_bytes(patched(good.read_bytes(), *STREAMS[name]))
    with AudioFile(path) as f, AudioFile(good) as g:
        assert np.array_equal(f.read(), g.read()) and g.notes == [] and len(f.notes) == 1 and "announces" in f.notes[0]


def test_the_length_of_the_file_as_that_of_the_samples(tmp_path):
    soundfile.write(tmp_path/"a.wav", sound(3), 8000)
    raw = (tmp_path/"a.wav").read_bytes()
    for length in (len(raw), len(raw) - 8):
        (tmp_path/"b.wav").write_bytes(patched(raw, data=length))
        seconds, notes, *_ = every_reader(tmp_path/"b.wav")
        assert seconds == 3 and len(notes) == 1


@pytest.mark.parametrize("format", ["WAV", "WAVEX", "RF64"])
@pytest.mark.parametrize("lost", [2, 46, 1000, 40_000])
def test_a_copy_that_was_interrupted_is_refused(tmp_path, format, lost):
    path = tmp_path/"a.wav"
    soundfile.write(path, sound(3), 8000, format=format)
    assert audio_header(path) == (3., {"sample_rate": 8000}, [])
    path.write_bytes(path.read_bytes()[:-lost])
    for reader in (audio_header, read_audio, lambda p: recording_windows(p, SMOKE)):
        with pytest.raises(StethoError, match="cut short"): reader(path)
    assert measure_sounds([path]) == [None]


@pytest.mark.parametrize("format", ["W64", "AIFF", "CAF", "AU"])
def test_other_containers_are_read_as_before(tmp_path, format):
    soundfile.write(tmp_path/"a", sound(3), 8000, format=format)
    assert np.array_equal(read_audio(tmp_path/"a")[0], soundfile.read(tmp_path/"a", dtype="float32")[0])


def test_what_follows_the_announced_end_is_told(tmp_path):
    path = tmp_path/"a.wav"
    soundfile.write(path, sound(3), 8000)
    path.write_bytes(path.read_bytes() + (10_000*np.ones(24_000)).astype("<i2").tobytes())
    seconds, notes, *_ = every_reader(path)
    assert seconds == 3 and "3.0 s follow" in notes[0]


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("rate, channels", [(44_100, 1), (16_000, 2), (8000, 1)])
def test_an_mp3_that_does_not_say_its_length_is_read_to_its_end(tmp_path, mode, rate, channels):
    path, wave = tmp_path/"a.mp3", sound(12, rate)*(np.arange(12*rate) < 4*rate) + sound(12, rate, 1)/50
    soundfile.write(path, np.stack([wave]*channels, 1), rate, bitrate_mode=mode, compression_level=.5)
    whole, notes, *_ = every_reader(path)
    raw = path.read_bytes()
    at = next(i for i in range(4, len(raw)) if raw[i:i + 2] == raw[:2] and raw[i + 2] & 12 == raw[2] & 12)  # the frame after the one that has the length
    path.write_bytes(b"ID3\x03\0\0\0\0\0\x0a" + bytes(10) + raw[at:] + b"TAG".ljust(128))
    seconds, counted, *_ = every_reader(path)
    assert whole == 12 and notes == [] and 12 <= seconds < 12.3 and len(counted) == 1 and "counted" in counted[0]


def test_a_file_of_another_kind_says_what_it_is_and_how_to_convert_it(tmp_path):
    marks = {"memo.m4a": (b"\0\0\0\x20ftypM4A \0\0\0\0", "m4a"), "memo.mp4": (b"\0\0\0\x20ftypisom", "MPEG-4"), "a.3gp": (b"\0\0\0\x18ftyp3gp5", "3GP"), "a.amr": (b"#!AMR\n", "AMR"), "a.webm": (b"\x1aE\xdf\xa3", "WebM"),
             "a.wma": (b"0&\xb2u\x8ef\xcf\x11\xa6\xd9", "wma"), "a.aac": (b"\xff\xf1\x50\x80\x02\x1f\xfc", "AAC"), "my clip.wav": (b"\0\0\0\x20ftypM4A ", "m4a")}
    for name, (mark, kind) in marks.items():
        (tmp_path/name).write_bytes(mark + bytes(3000))
        for reader in (audio_header, read_audio):
            with pytest.raises(StethoError, match=f"it is .*{kind}") as refused: reader(tmp_path/name)
            command = str(refused.value).split("`")[1]
            assert shlex.split(command) == ["ffmpeg", "-i", str(tmp_path/name), str(tmp_path/("my clip-converted.wav" if name == "my clip.wav" else f"{name.split('.')[0]}.wav"))]
    (tmp_path/"pointer.wav").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 80044\n")
    with pytest.raises(StethoError, match="git lfs pull"): read_audio(tmp_path/"pointer.wav")


def test_channels_that_differ_are_not_averaged_by_any_reader(tmp_path):
    path, left = tmp_path/"a.wav", sound(12, 4000)
    t = np.arange(len(left))/4000
    others = {"cancels": -left, "is silent": 0*left, "is an ECG": .9*np.sin(2*np.pi*1.1*t)**31, "is a room": sound(12, 4000, 1)/3}
    for name, right in others.items():
        for order, used in (((left, right), 1), ((right, left), 2 if name != "cancels" else 1)):
            soundfile.write(path, np.stack(order, 1), 4000, subtype="FLOAT")
            seconds, notes, measures, windows = every_reader(path)
            assert len(notes) == 1 and f"channel {used} alone" in notes[0], name
            assert np.array_equal(read_audio(path)[0], order[used - 1].astype(np.float32)) and measures.peak > .5
            assert np.array_equal(windows[0], order[used - 1].astype(np.float32)[:20_000])


def test_channels_of_one_sound_are_averaged_as_before(tmp_path):
    path, wave = tmp_path/"a.wav", sound(12)
    both = np.stack([wave, .5*wave + .02*sound(12, seed=1)], 1)
    soundfile.write(path, both, 8000, subtype="FLOAT")
    assert every_reader(path)[1] == [] and np.array_equal(read_audio(path)[0], both.astype(np.float32).mean(1))


@pytest.mark.report("24 h at 4 kHz")
def test_memory_and_reading_do_not_grow_with_the_length_of_a_recording(tmp_path, monkeypatch):
    def peak(f):
        tracemalloc.start()
        f()
        try: return tracemalloc.get_traced_memory()[1]
        finally: tracemalloc.stop()
    paths = {}
    for minutes in (4, 16):
        paths[minutes] = tmp_path/f"{minutes}.wav"
        soundfile.write(paths[minutes], np.stack([np.resize(sound(60, 5000), minutes*60*5000)]*2, 1), 5000)
    for read in (lambda p: recording_windows(p, SMOKE), lambda p: measure_sounds([p]), audio_header):
        read(paths[4])
        assert peak(lambda: read(paths[16])) < 1.2*peak(lambda: read(paths[4])) + 2e6
    read, counted = soundfile.SoundFile.read, []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **how: counted.append(n) or read(self, n, **how))
    recording_windows(paths[16], SMOKE)
    assert sum(counted) < 150*5000, "of 16 minutes the two that the channels are compared by, and the windows"


def test_windows_of_a_long_recording_are_those_of_the_whole(tmp_path):
    for rate, tolerance in ((4000, 0), (8000, 1e-6), (44_100, 1e-6), (2000, 1e-6)):
        path, wave = tmp_path/f"{rate}.wav", np.resize(sound(7, rate), 200*rate + 123)
        soundfile.write(path, wave, rate)
        size = int(SMOKE.window_s*SMOKE.sample_rate)
        assert abs(recording_windows(path, SMOKE) - features.windows(load_audio(path, SMOKE.sample_rate), size, SMOKE.max_windows)).max() <= tolerance


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
