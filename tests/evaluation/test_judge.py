"""A judge on this machine: what it is asked, and what becomes of its replies."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from gptjax import UserError
from gptjax.__main__ import main
from gptjax.evaluation import judge as module
from gptjax.evaluation.judge import judge, number, question

ROW = {"where": "a:1", "prompt": "Add 1 and 1.", "expected": "2", "answer": "two"}
KEY = "sk-never-printed"


@pytest.fixture
def server(monkeypatch):
    """Replies in turn, the last for ever: a text, (status, headers), or bytes; `asked` keeps what came."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(module, "PAUSE_S", 0)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            here.asked.append((self.path, self.headers["Authorization"], body))
            reply = here.replies.pop(0) if len(here.replies) > 1 else here.replies[0]
            status, headers = reply if isinstance(reply, tuple) else (200, {})
            content = {"choices": [{"message": {"role": "assistant", "content": reply}}]}
            data = (
                reply if isinstance(reply, bytes) else KEY.encode() if status != 200 else json.dumps(content).encode()
            )
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    here = HTTPServer(("127.0.0.1", 0), Handler)
    here.asked, here.replies, here.url = [], ["85"], f"http://127.0.0.1:{here.server_port}/v1"
    thread = threading.Thread(target=here.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield here
    here.shutdown()
    thread.join()
    here.server_close()


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("85", 85), ("Score: 85/100", 85), (" 0.", 0), ("100%", 100), ("101", None), ("-5", None), ("\u22125", None),
        ("8.5", None), ("1,000", None), ("good", None), ("", None), ("٣", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_number(reply, score):
    assert number(reply) == score


def test_what_is_asked(server):
    server.replies = ["85", "7"]
    assert judge([ROW, ROW], server.url + "/", "m", log=print) == [85, 7]
    path, authorization, body = server.asked[0]
    assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}"
    assert body["model"] == "m" and body["temperature"] == 0
    assert all(ROW[name] in body["messages"][-1]["content"] for name in ("prompt", "expected", "answer"))
    judge([ROW], server.url, "m", key="", log=print)
    assert server.asked[-1][1] is None


def test_the_judge_sees_what_stood_before_the_question():
    assert question(ROW) == "Add 1 and 1."
    before = {
        "system": "Be brief.",
        "history": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    }
    assert question(ROW | before) == "system: Be brief.\n\nuser: Hi\n\nassistant: Ho\n\nuser: Add 1 and 1."


def test_a_reply_without_a_number_is_asked_again(server):
    server.replies = ["well", None, "90"]
    assert judge([ROW], server.url, "m", log=print) == [90]
    assert [len(body["messages"]) for _, _, body in server.asked] == [2, 4, 6]
    said, server.replies, server.asked = [], ["good"], []
    assert judge([ROW, ROW], server.url, "m", log=said.append) == [None, None]
    assert len(server.asked) == 6 and "for 2 of 2 answers" in said[0]


def test_progress(server, monkeypatch):
    monkeypatch.setattr(module, "SAY_EVERY_S", -1)
    said = []
    judge([ROW, ROW], server.url, "m", log=said.append)
    assert said == ["... 1 of 2 answers judged", "... 2 of 2 answers judged"]


@pytest.mark.parametrize("passing", [(503, {}), (429, {})])
def test_what_passes_is_tried_again(server, passing):
    server.replies = [passing, passing, "60"]
    assert judge([ROW], server.url, "m", log=print) == [60]


@pytest.mark.parametrize(
    ("reply", "tries", "says"),
    [
        ((401, {}), 1, "HTTP 401: set the environment variable OPENAI_API_KEY"),
        ((404, {}), 1, "HTTP 404: no such address, or no model 'm' there"),
        ((400, {}), 1, "HTTP 400: the server does not take the request"),
        ((302, {"Location": "http://elsewhere.invalid/"}), 1, "HTTP 302: .* not followed"),
        ((307, {"Location": "http://elsewhere.invalid/"}), 1, "HTTP 307: .* not followed"),
        ((500, {}), 3, "HTTP 500: .* 3 times in a row"),
        (b"<html>", 1, "none of OpenAI's"),
        (b'{"choices": []}', 1, "none of OpenAI's"),
        (b"[" * 100_000, 1, "none of OpenAI's"),
    ],
)
def test_refusals_say_where_and_the_way_out(server, reply, tries, says):
    server.replies = [reply]
    with pytest.raises(UserError, match=says) as error:
        judge([ROW], server.url, "m", log=print)
    assert server.url in str(error.value) and KEY not in str(error.value) and len(server.asked) == tries


def test_nobody_listens(server):
    free = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    free.server_close()
    with pytest.raises(UserError, match="is the server running"):
        judge([ROW], f"http://127.0.0.1:{free.server_port}/v1", "m", log=print)


@pytest.mark.parametrize(
    "url", ["", "localhost:1", "file:///etc/passwd", "http://", "http://u:secret@h/v1", "http://h/v1?k=secret",
            "http://h:99999/v1", "http://[h/v1", "http://h/a b", "http://h/\r\nX: y"],
)  # fmt: skip
def test_urls_of_no_use(url):
    with pytest.raises(UserError, match="the judge's URL: expected") as error:
        judge([ROW], url, "m", log=print)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("key", ["sk-secret\n", "sk secret", "sk-secrét"])
def test_a_key_that_cannot_be_sent_is_not_shown(key):
    with pytest.raises(UserError, match="set it again") as error:
        judge([ROW], "http://127.0.0.1:1", "m", key=key, log=print)
    assert "secr" not in str(error.value)


def test_compare_asks_it(server, tmp_path, capsys):
    file = tmp_path / "x.jsonl"
    file.write_text((json.dumps(ROW) + "\n") * 3)
    server.replies = ["80", "90", "no", "no", "no"]
    assert main(["compare", str(file), f"judge={server.url}", "judge_model=m"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split()[-1] == "85.000" and "1 of 3" in captured.err
    assert main(["compare", str(file), f"judge={server.url}"]) == 2
    assert "go together" in capsys.readouterr().err
    assert main(["compare", str(file), f"out={tmp_path / 'new' / 'x.md'}"]) == 0
    assert (tmp_path / "new" / "x.md").is_file()


def test_runs_that_cannot_be_compared_cost_no_judging(server, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROW | {"where": name, "nats": 1.0, "tokens": 1}) + "\n")
    files = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")]
    assert main(["compare", *files, f"judge={server.url}", "judge_model=m"]) == 2
    assert "no question in common" in capsys.readouterr().err and not server.asked
