"A language model's client against a server on loopback that speaks its protocol and misbehaves in every way a real one does"
import functools
import hashlib
import http.server
import json
import sqlite3
import threading
import time
from email.utils import formatdate

import numpy as np
import pandas as pd
import pytest

from stetholm.core.config import StethoError
from stetholm.bench.facts import Facts
from stetholm.bench.grammar import respond
from stetholm.bench.pairs import engine_llm
from stetholm.bench.rewriting import RETRY, read_pair, rewrite
from stetholm.core.chat import KEYS, Chat, Endpoint, Replies

SECRET = "sk-very-secret-4711"

pytestmark = pytest.mark.timed  # its waits are short


class Model(http.server.BaseHTTPRequestHandler):
    "Answers as `desk['says']` of the request says, after the faults planted in `desk['faults']`, one a request"
    def __init__(self, desk, *args):
        self.desk = desk
        super().__init__(*args)
    def log_message(self, *args): pass

    def do_POST(self):
        body, desk = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.desk
        with desk["lock"]:
            desk["asked"].append(body)
            desk["came"].append(time.monotonic())
            desk["keys"].append(self.headers.get("Authorization"))
            desk["paths"].append(self.path)
            fault = desk["faults"].pop(0) if desk["faults"] else desk["always"](body)
            desk["now"] += 1
            desk["most"] = max(desk["most"], desk["now"])
        try: self.answer(body, fault)
        except (BrokenPipeError, ConnectionResetError): pass
        finally:
            with desk["lock"]: desk["now"] -= 1

    def answer(self, body, fault):
        time.sleep(self.desk["takes"])
        if fault == "slow": time.sleep(.6)
        if isinstance(fault, tuple): return self.send(fault[0], fault[1], **fault[2])
        if fault == "no json": return self.send(200, "<html>hello")
        if fault == "no choices": return self.send(200, json.dumps({"error": "upstream"}))
        thoughts = {"finish_reason": "length", "message": {"content": None if fault == "silent thoughts" else "<think>"}}
        choice = thoughts if fault and "thoughts" in fault else {"message": {"content": None if fault == "no text" else self.desk["says"](body)}}
        said = json.dumps({"choices": [choice]} | ({} if fault == "unmetered" else {"usage": {"prompt_tokens": 100, "completion_tokens": 7}}))
        self.send(200, said[:len(said)//2] if fault == "cut" else said, length=len(said))

    def send(self, status, text, length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(text)))
        for k, v in headers.items(): self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def desk(monkeypatch, tmp_path):
    "What the model says, how it misbehaves, and what it was asked"
    for name in KEYS: monkeypatch.delenv(name, raising=False)
    desk = {"says": lambda body: f"re: {body['messages'][-1]['content']}", "faults": [], "always": lambda body: None, "takes": 0., "asked": [], "came": [], "keys": [], "paths": [], "now": 0, "most": 0, "lock": threading.Lock()}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Model, desk))
    threading.Thread(target=server.serve_forever, args=(.02,), daemon=True).start()
    desk |= {"url": f"http://127.0.0.1:{server.server_port}/v1", "cache": tmp_path/"replies.sqlite", "stop": lambda: (server.shutdown(), server.server_close())}
    yield desk
    desk["stop"]()


def client(desk, wait_s=.01, **how): return Chat(Endpoint(desk["url"], "toy", **{"tries": 3, "timeout_s": 5.} | how), desk["cache"], wait_s)


def talk(*words): return [[{"role": "user", "content": w}] for w in words]


# one request

@pytest.mark.parametrize("fault", ["slow", "cut", "no json", "no choices", "no text", (500, "broken", {}), (503, "", {"Retry_After": "0"}), (429, "{}", {}), (408, "", {}), (409, "", {}), (429, "", {"Retry_After": "soon"})])
def test_what_may_pass_is_tried_again(desk, fault):
    desk["faults"] = [fault, fault]
    chat = client(desk, timeout_s=.2)
    assert chat(talk("hello")) == ["re: hello"] and len(desk["asked"]) == 3 and desk["paths"][0] == "/v1/chat/completions"
    assert chat.usage["requests"] == 3 and chat.usage["retries"] == 2


def test_a_request_is_what_the_protocol_says(desk):
    client(desk, temperature=.2, max_tokens=9)(talk("hello"), [5])
    client(desk, seed=False)(talk("hello"))
    assert desk["asked"][0] == {"model": "toy", "messages": [{"role": "user", "content": "hello"}], "temperature": .2, "max_tokens": 9, "seed": 5} and "seed" not in desk["asked"][1] and desk["keys"] == [None, None]


@pytest.mark.parametrize("after", ["0.5", "date"])
def test_retry_after_holds_back_every_thread(desk, after):
    desk["faults"] = [(429, "", {"Retry_After": formatdate(time.time() + 1.9, usegmt=True) if after == "date" else after})]
    assert client(desk, workers=2)(talk("a")) == ["re: a"] and desk["came"][1] - desk["came"][0] >= .5
    n = len(desk["came"])
    desk["faults"] = [(503, "", {"Retry_After": "0.5"})]
    chat = client(desk, workers=1, tries=2)
    chat(talk("b", "c"))
    assert min(desk["came"][n + 1:]) - desk["came"][n] >= .5


def test_a_quota_is_not_waited_for(desk):
    desk["faults"] = [(429, "quota", {"Retry_After": "86400"})]
    with pytest.raises(StethoError, match="asks to wait 86400 s .429.*quota.*run the same command again then"): client(desk)(talk("a"))
    assert len(desk["asked"]) == 1


@pytest.mark.parametrize("status, remedy", [(401, KEYS[0]), (403, KEYS[0]), (404, "address.*/v1.*model"), (400, "model's name"), (422, "model's name"), (307, "address")])
def test_what_will_not_pass_is_final_and_named(desk, monkeypatch, status, remedy):
    monkeypatch.setenv("STETHOLM_API_KEY", SECRET + "\n")
    desk["always"] = lambda body: (status, f"no such thing for {SECRET}\n" + "x"*1000, {"Location": "/elsewhere"})
    with pytest.raises(StethoError, match=rf"{desk['url']} refused to answer .{status} .*no such thing for \*\*\* x+.*: .*{remedy}") as refused: client(desk, workers=1)(talk("a", "b", "c"))
    assert len(desk["asked"]) == 1 and desk["keys"] == [f"Bearer {SECRET}"] and refused.value.exit_code == 1
    assert SECRET not in str(refused.value) and "x"*201 not in str(refused.value) and "\n" not in str(refused.value) and refused.value.__suppress_context__ | (refused.value.__context__ is None)
    assert SECRET.encode() not in desk["cache"].read_bytes()


def test_which_key_is_sent(desk, monkeypatch, tmp_path):
    (tmp_path/"netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path/"netrc"))
    client(desk)(talk("a"))
    monkeypatch.setenv("OPENAI_API_KEY", "second")
    client(desk)(talk("b"))
    monkeypatch.setenv("STETHOLM_API_KEY", SECRET)
    client(desk)(talk("c"))
    assert desk["keys"] == [None, "Bearer second", f"Bearer {SECRET}"]
    monkeypatch.setenv("STETHOLM_API_KEY", SECRET + "\nX-Evil: 1")
    with pytest.raises(StethoError, match="STETHOLM_API_KEY holds characters") as refused: client(desk)(talk("d"))
    assert SECRET not in str(refused.value) and len(desk["asked"]) == 3


def test_an_endpoint_that_cannot_be():
    for url in ("", "localhost:8000/v1", "ftp://a/v1", "http:///v1"):
        with pytest.raises(StethoError, match="no address of a model"): Endpoint(url, "m")
    with pytest.raises(StethoError, match="more than an address") as refused: Endpoint(f"http://me:{SECRET}@a/v1", "m")
    assert SECRET not in str(refused.value)
    with pytest.raises(StethoError, match="must be positive"): Endpoint("http://a/v1", "m", workers=0)


# many

def test_many_at_once_in_order_and_never_more_than_the_workers(desk):
    desk |= {"takes": .03}
    desk["says"] = lambda body: (time.sleep(.05 if int(body["messages"][0]["content"]) % 3 == 0 else 0), f"re: {body['messages'][0]['content']}")[1]
    assert client(desk, workers=4)(talk(*map(str, range(24)))) == [f"re: {n}" for n in range(24)]
    assert 1 < desk["most"] <= 4


def test_the_rate_limit_holds_for_retries_too(desk):
    desk["faults"] = [None, (500, "", {}), None]
    chat = client(desk, workers=4, per_minute=600)
    chat(talk(*"abcd"))
    chat(talk(*"ef"))
    came = sorted(desk["came"])
    assert len(came) == 7 and came[-1] - came[0] >= 6*.1 - .02 and all(came[i + 3] - came[i] >= .28 for i in range(4))


def test_one_that_fails_stops_the_rest_soon(desk):
    desk["always"] = lambda body: (400, "too long", {}) if body["messages"][0]["content"] == "20" else (503, "", {}) if int(body["messages"][0]["content"]) > 20 else None
    begun = time.monotonic()
    with pytest.raises(StethoError, match="too long"): client(desk, workers=4, tries=6, wait_s=30.)(talk(*map(str, range(60))))
    assert time.monotonic() - begun < 3 and len(desk["asked"]) < 30
    desk["always"] = lambda body: None
    again = client(desk)
    assert again(talk(*map(str, range(20)))) == [f"re: {n}" for n in range(20)] and again.usage["requests"] == 0


def test_what_is_on_its_way_when_another_fails_comes_home(desk):
    desk["takes"] = .2
    desk["always"] = lambda body: (401, "", {}) if body["messages"][0]["content"] == "bad" else "late"
    desk["says"] = lambda body: (time.sleep(.3), "worth its price")[1]
    with pytest.raises(StethoError, match="401"): client(desk, workers=2)(talk("bad", "dear"))
    assert client(desk)(talk("dear")) == ["worth its price"] and len(desk["asked"]) == 2


def test_after_the_last_try_it_says_so_and_where_the_rest_is(desk):
    desk["always"] = lambda body: (500, "oops", {})
    with pytest.raises(StethoError, match="gave no reply in 3 tries .the last: 500 .*oops.*kept in .*replies.sqlite: run the same command again") as gone: client(desk)(talk("a"))
    assert gone.value.exit_code == 1 and len(desk["asked"]) == 3


# the cache

def test_a_run_that_was_stopped_goes_on_and_a_finished_one_needs_no_server(desk):
    words = [f"w{n} \N{HEAVY BLACK HEART} \ud83d" for n in range(12)]
    desk["always"] = lambda body: (500, "", {}) if len(desk["asked"]) > 5 else None
    with pytest.raises(StethoError, match="gave no reply"): client(desk, workers=1)(talk(*words))
    assert len(desk["asked"]) == 5 + 3
    desk["always"] = lambda body: None
    chat = client(desk)
    first = chat(talk(*words))
    assert sorted(b["messages"][0]["content"] for b in desk["asked"][8:]) == sorted(words[5:]) and chat.usage["cached"] == 5 and chat.usage["requests"] == 7
    held = hashlib.sha256(desk["cache"].read_bytes()).hexdigest()
    desk["stop"]()
    last = client(desk)
    assert last(talk(*words)) == first == [f"re: {w}" for w in words] and last.usage["requests"] == 0 and hashlib.sha256(desk["cache"].read_bytes()).hexdigest() == held
    assert [p.name for p in desk["cache"].parent.iterdir()] == ["replies.sqlite"]
    with pytest.raises(StethoError, match="gave no reply in 3 tries .the last: ConnectionError"): client(desk)(talk("another"))


def test_everything_a_reply_depends_on_is_in_its_key(desk):
    client(desk)(talk("a"))
    for how in ({"temperature": .1}, {"max_tokens": 7}): client(desk, **how)(talk("a"))
    client(desk)(talk("a"), [1])
    client(desk)([[{"role": "system", "content": "a"}]])
    Chat(Endpoint(desk["url"], "other"), desk["cache"])(talk("a"))
    assert len(desk["asked"]) == 6
    client(desk, workers=1, tries=9, price_in=3., per_minute=9999)(talk("a"))
    assert len(desk["asked"]) == 6


def test_tokens_and_cost_by_hand(desk):
    desk["faults"] = [(500, "", {}), "no text", None, None, "unmetered"]
    chat = client(desk, workers=1, price_in=2.5, price_out=10.)
    chat(talk("a", "b", "c"))
    chat(talk("a", "b", "b", "d"))
    use = chat.usage
    assert {k: v for k, v in use.items() if k not in ("seconds", "cost")} == {"requests": 6, "retries": 2, "cached": 3, "cut": 0, "prompt_tokens": 400, "completion_tokens": 28, "unmetered": 1, "cached_prompt_tokens": 300, "cached_completion_tokens": 21}
    assert use["cost"] == pytest.approx((400*2.5 + 28*10.)/1e6) and 0 < use["seconds"] < 5
    assert chat([]) == [] and chat(talk("e", "e")) == ["re: e"]*2 and chat.usage["requests"] == 7 and chat.usage["cached"] == 4


@pytest.mark.report("a reasoning model")
@pytest.mark.parametrize("fault, workers, words", [("thoughts", 1, 40), ("silent thoughts", 4, 40), ("thoughts", 3, 2)])
def test_a_model_that_only_thinks_is_told_after_a_few_replies(desk, fault, workers, words):
    desk["always"] = lambda body: fault
    few = min(words, 5)
    with pytest.raises(StethoError, match=f"toy was cut at 250 tokens in all of its first {few} replies: allow more.*--max-tokens.*instructions_max_tokens") as told:
        client(desk, workers=workers, max_tokens=250)(talk(*map(str, range(words))))
    assert told.value.exit_code == 1 and few <= len(desk["asked"]) < few + workers


def test_a_reply_that_is_cut_now_and_then_is_counted(desk):
    desk["faults"] = ["thoughts"]*4 + [None, "silent thoughts"]
    chat = client(desk, workers=1)
    assert chat(talk(*"abcdefgh")) == ["<think>"]*4 + ["re: e", "", "re: g", "re: h"] and chat.usage["cut"] == 5 and chat.usage["requests"] == 8


@pytest.mark.parametrize("how", ["text", "cut", "foreign", "row", "folder", "overwritten"])
def test_a_cache_that_is_damaged_or_something_else(desk, how):
    path = desk["cache"]
    if how == "text": path.write_text("a,b\n"*5000)
    elif how == "folder": path.mkdir()
    elif how == "foreign":
        with sqlite3.connect(path) as db: db.execute("CREATE TABLE patients (name TEXT)")
        db.close()
    else:
        client(desk)(talk(*map(str, range(60))))
        if how == "row":
            with sqlite3.connect(path) as db: db.execute("UPDATE replies SET reply = 'no json'")
            db.close()
        else:
            body = path.read_bytes()
            path.write_bytes(body[:len(body)//2] if how == "cut" else body[:5000] + b"\xff"*(len(body) - 5000))
    before, n = None if how == "folder" else path.read_bytes(), len(desk["asked"])
    with pytest.raises(StethoError, match="replies.sqlite cannot be used as a cache of replies"): client(desk)(talk(*map(str, range(60))))
    assert len(desk["asked"]) == n and (before is None or path.read_bytes() == before)


def test_two_clients_share_a_cache(desk):
    chats = [client(desk, workers=4) for _ in range(3)]
    threads = [threading.Thread(target=c, args=(talk(*map(str, range(40))),)) for c in chats]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(Replies(desk["cache"]).get({hashlib.sha256(json.dumps(["toy", m, .7, 400, 0], sort_keys=True).encode()).hexdigest() for m in talk(*map(str, range(40)))})) == 40


# rewriting

KNOWN = {"wheeze": "wheez", "crackle": "crackl", "murmur": "murmur"}


def check(text, evidence, task):
    "The families a text names, held against those of the evidence"
    known = {f for r in json.loads(evidence) for f in r["findings"]}
    heard = {f for f, stem in KNOWN.items() if stem in text.lower()}
    return [f"adds {f}" for f in sorted(heard - known)] + [f"drops {f}" for f in sorted(known - heard)]


def leaks(text, evidence): return ["leaks"] if "crackl" in text.lower() else []


def pair(n, finding, task="detection", question="What do you hear?", answer=None):
    return dict(pair_id=f"p{n}", instruction=question, response=answer or f"{finding.capitalize()}s are heard.", task=task, evidence=json.dumps([{"recording_id": f"icbhi/{n}", "binary": "abnormal", "findings": [finding]}]), recording_ids=[f"icbhi/{n}"], engine="template", template="t/0", dataset="icbhi")


def says(question, answer): return json.dumps({"instruction": question, "response": answer})


def test_a_lie_is_told_and_mended(desk):
    desk["says"] = lambda body: "Sure!\n```json\n" + says("Which sounds?", "Wheezing." if len(body["messages"]) > 2 else "Wheezing and a murmur.") + "\n```"
    pairs = pd.DataFrame([pair(0, "wheeze")], index=[17])
    out, report = rewrite(pairs, client(desk), check)
    assert out.iloc[0].to_dict() == pairs.iloc[0].to_dict() | {"instruction": "Which sounds?", "response": "Wheezing.", "engine": "llm:toy"} and out.index.tolist() == [17] and pairs.engine.tolist() == ["template"]
    assert report.to_dict("records") == [{"pair_id": "p0", "task": "detection", "attempts": 2, "accepted": True, "unchanged": False, "faults": ["adds murmur"]}]
    first, second = (b["messages"] for b in desk["asked"])
    assert [m["role"] for m in second] == ["system", "user", "assistant", "user"] and second[:2] == first and "a murmur" in second[2]["content"] and second[3]["content"] == RETRY.format(faults="adds murmur")
    assert "icbhi" not in json.dumps(first) and '\\"wheeze\\"' in json.dumps(first) and "Wheezes are heard." in first[1]["content"]


def test_one_that_always_lies_or_rambles_leaves_the_template_and_is_counted(desk):
    def model(body):
        asked = body["messages"][1]["content"]
        if '"wheeze"' in asked: return says("Which?", "A murmur.")
        if '"crackle"' in asked: return '{"instruction": "Which?", "response": "Crack'
        return says("Do you hear crackles?", "A murmur.") if len(body["messages"]) < 5 else says("Which?", "A murmur.")
    desk["says"] = model
    pairs = pd.DataFrame([pair(n, f) for n, f in enumerate(("wheeze", "crackle", "murmur", "wheeze"))])
    out, report = rewrite(pairs, client(desk), check, check_question=leaks)
    pd.testing.assert_frame_equal(out.drop(index=2), pairs.drop(index=2))
    assert out.engine.tolist() == ["template", "template", "llm:toy", "template"] and report.accepted.tolist() == [False, False, True, False] and report.attempts.tolist() == [3, 3, 3, 3] and report.unchanged.tolist() == [True, True, False, True]
    assert report.explode("faults").groupby("faults").size().to_dict() == {"adds murmur": 6, "drops wheeze": 6, "no JSON object with an instruction and a response": 3, "question: leaks": 2}
    desk["stop"]()
    last = client(desk)
    again, report_again = rewrite(pairs, last, check, check_question=leaks)
    assert last.usage["requests"] == 0
    pd.testing.assert_frame_equal(again, out)
    pd.testing.assert_frame_equal(report_again, report)


def test_pairs_that_ask_the_same_are_asked_apart_and_those_with_other_ids_are_the_same(desk):
    desk["says"] = lambda body: says("Which?", f"Wheezing, {'loudly quietly plainly'.split()[body['seed']]}.")
    out, _ = rewrite(pd.DataFrame([pair(n, "wheeze") for n in range(3)]), client(desk), check)
    assert sorted(b["seed"] for b in desk["asked"]) == [0, 1, 2] and out.response.tolist() == ["Wheezing, loudly.", "Wheezing, quietly.", "Wheezing, plainly."]


def test_from_facts_does_not_show_the_answer(desk):
    desk["says"] = lambda body: says("Which?", "Wheezing.")
    out, _ = rewrite(pd.DataFrame([pair(0, "wheeze", answer="The templated words.")]), client(desk), check, from_facts=True)
    assert "templated words" not in json.dumps(desk["asked"]) and '\\"wheeze\\"' in json.dumps(desk["asked"]) and out.response[0] == "Wheezing."


def test_a_classification_keeps_its_verdict_first(desk):
    desk["says"] = lambda body: says("Normal?", "**Abnormal**, with wheezing." if len(body["messages"]) > 2 else "This is abnormal, with wheezing.")
    out, report = rewrite(pd.DataFrame([pair(0, "wheeze", "classification", answer="Abnormal: wheezes.")]), client(desk), check)
    assert report.faults[0] == ["verdict is not the first word"] and out.response[0] == "**Abnormal**, with wheezing."


def test_a_run_over_pairs_that_is_stopped_goes_on(desk):
    desk["says"] = lambda body: says("Which?", "Wheezing." if len(body["messages"]) > 2 else "A murmur.")
    pairs = pd.DataFrame([pair(n, "wheeze", question=f"What is heard at {n}?") for n in range(10)])
    desk["always"] = lambda body: (401, "", {}) if len(desk["asked"]) > 13 else None
    with pytest.raises(StethoError, match="401"): rewrite(pairs, client(desk, workers=1), check)
    desk["always"] = lambda body: None
    chat = client(desk)
    out, report = rewrite(pairs, chat, check)
    assert chat.usage["requests"] == 20 - 13 and chat.usage["cached"] == 13 and report.accepted.all() and (report.attempts == 2).all() and (out.engine == "llm:toy").all()


def test_pairs_that_cannot_be_rewritten(desk):
    with pytest.raises(StethoError, match="pairs without evidence, task"): rewrite(pd.DataFrame([pair(0, "wheeze")]).drop(columns=["task", "evidence"]), client(desk), check)
    with pytest.raises(StethoError, match="pair p0: its evidence is no JSON"): rewrite(pd.DataFrame([pair(0, "wheeze") | {"evidence": "wheeze"}]), client(desk), check)
    out, report = rewrite(pd.DataFrame([pair(0, "wheeze")])[:0], client(desk), check)
    assert len(out) == len(report) == len(desk["asked"]) == 0 and list(report.columns) == ["pair_id", "task", "attempts", "accepted", "unchanged", "faults"]


def test_a_pair_is_found_in_whatever_surrounds_it():
    assert read_pair("ok " + says("a {b}", "c\n  d \N{EN DASH} e") + " {bye}") == ("a {b}", "c d \N{EN DASH} e")
    assert read_pair('{"pairs": [' + says("a", "b") + "]}") == ("a", "b")
    assert all(read_pair(t) is None for t in ("", "[]", "{"*3000, "[{"*3000, '{"a": ' * 3000, says("a", ""), says("a", "\x00"), says("a", "\ud83d"), says("a", 3), '{"instruction": "a", "response": "b'))


def test_the_engine_refuses_what_the_reader_refuses(desk):
    "A flipped verdict, an added finding, a dropped one and a leak are each mended; one that is always wrong keeps the grammar's answer"
    f = Facts("icbhi/1", "lung", "abnormal", ("wheeze",), "trachea", looked_for=("wheeze", "crackle"))
    answer, proof = respond("findings", [f], np.random.default_rng(0))
    pairs = pd.DataFrame([pair(n, "wheeze", question=f"What is heard, {n}?", answer=answer) | {"evidence": proof} for n in range(5)])
    lies = ["No wheezes are heard.", "Wheezes and crackles are heard.", "There are crackles.", "Wheezes, as in ICBHI 2017.", "This is normal."]
    def model(body):
        n = next(n for n in range(5) if f"heard, {n}?" in body["messages"][1]["content"])
        return says("Which sounds?", lies[n] if len(body["messages"]) == 2 or n == 4 else "High whistling sounds: wheezes.")
    desk["says"] = model
    out, report = engine_llm(pairs, client(desk))
    assert out.response.tolist() == ["High whistling sounds: wheezes."]*4 + [answer] and out.engine.tolist() == ["llm:toy"]*4 + ["template"]
    assert report.accepted.tolist() == [True]*4 + [False] and [f[0].split(":")[0] for f in report.faults] == ["polarity", "added", "added", "leak", "polarity"]
