"""LLM as a judge, with a local test server: the requests, and how replies and errors are handled."""

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
    """A chat completions server. It sends `replies` in order and repeats the last one; `requests` records what it got.

    A reply is the text of an answer, (status, headers) of an error, or bytes as the whole body.
    """
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(module, "PAUSE_S", 0)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            http.requests.append((self.path, self.headers["Authorization"], body))
            reply = http.replies.pop(0) if len(http.replies) > 1 else http.replies[0]
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

    http = HTTPServer(("127.0.0.1", 0), Handler)
    http.requests, http.replies, http.url = [], ["85"], f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield http
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("85", 85), ("Score: 85/100", 85), (" 0.", 0), ("100%", 100), ("101", None), ("-5", None), ("\u22125", None),
        ("8.5", None), ("1,000", None), ("good", None), ("", None), ("٣", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_number(reply, score):
    assert number(reply) == score


def test_the_request(server):
    server.replies = ["85", "7"]
    assert judge([ROW, ROW], server.url + "/", "m", log=print) == [85, 7]
    path, authorization, body = server.requests[0]
    assert path == "/v1/chat/completions" and authorization == f"Bearer {KEY}"
    assert body["model"] == "m" and body["temperature"] == 0
    assert all(ROW[name] in body["messages"][-1]["content"] for name in ("prompt", "expected", "answer"))
    judge([ROW], server.url, "m", key="", log=print)
    assert server.requests[-1][1] is None


def test_the_judge_sees_system_message_and_history():
    assert question(ROW) == "Add 1 and 1."
    context = {
        "system": "Be brief.",
        "history": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    }
    assert question(ROW | context) == "system: Be brief.\n\nuser: Hi\n\nassistant: Ho\n\nuser: Add 1 and 1."


def test_a_reply_without_a_number_is_requested_again(server):
    server.replies = ["well", None, "90"]
    assert judge([ROW], server.url, "m", log=print) == [90]
    assert [len(body["messages"]) for _, _, body in server.requests] == [2, 4, 6]
    logged, server.replies, server.requests = [], ["good"], []
    assert judge([ROW, ROW], server.url, "m", log=logged.append) == [None, None]
    assert len(server.requests) == 6 and "for 2 of 2 answers" in logged[0]


def test_progress(server, monkeypatch):
    monkeypatch.setattr(module, "LOG_EVERY_S", -1)
    logged = []
    judge([ROW, ROW], server.url, "m", log=logged.append)
    assert logged == ["... 1 of 2 answers judged", "... 2 of 2 answers judged"]


@pytest.mark.parametrize("temporary", [(503, {}), (429, {})])
def test_temporary_errors_are_retried(server, temporary):
    server.replies = [temporary, temporary, "60"]
    assert judge([ROW], server.url, "m", log=print) == [60]


@pytest.mark.parametrize(
    ("reply", "tries", "message"),
    [
        ((401, {}), 1, "HTTP 401: set the environment variable OPENAI_API_KEY"),
        ((404, {}), 1, "HTTP 404: no such address, or no model 'm' there"),
        ((400, {}), 1, "HTTP 400: the server rejected the request"),
        ((302, {"Location": "http://elsewhere.invalid/"}), 1, "HTTP 302: .* not followed"),
        ((307, {"Location": "http://elsewhere.invalid/"}), 1, "HTTP 307: .* not followed"),
        ((500, {}), 3, "HTTP 500: .* 3 times in a row"),
        (b"<html>", 1, "not an OpenAI chat completion"),
        (b'{"choices": []}', 1, "not an OpenAI chat completion"),
        (b"[" * 100_000, 1, "not an OpenAI chat completion"),
    ],
)
def test_errors_name_the_address_and_a_remedy(server, reply, tries, message):
    server.replies = [reply]
    with pytest.raises(UserError, match=message) as error:
        judge([ROW], server.url, "m", log=print)
    assert server.url in str(error.value) and KEY not in str(error.value) and len(server.requests) == tries


def test_no_server_at_the_address(server):
    unused = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # its port is free after it is closed
    unused.server_close()
    with pytest.raises(UserError, match="is the server running"):
        judge([ROW], f"http://127.0.0.1:{unused.server_port}/v1", "m", log=print)


@pytest.mark.parametrize(
    "url", ["", "localhost:1", "file:///etc/passwd", "http://", "http://u:secret@h/v1", "http://h/v1?k=secret",
            "http://h:99999/v1", "http://[h/v1", "http://h/a b", "http://h/\r\nX: y"],
)  # fmt: skip
def test_invalid_urls(url):
    with pytest.raises(UserError, match="the judge's URL: expected") as error:
        judge([ROW], url, "m", log=print)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("key", ["sk-secret\n", "sk secret", "sk-secrét"])
def test_an_invalid_key_is_not_printed(key):
    with pytest.raises(UserError, match="set it again") as error:
        judge([ROW], "http://127.0.0.1:1", "m", key=key, log=print)
    assert "secr" not in str(error.value)


def test_compare_with_a_judge(server, tmp_path, capsys):
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


def test_the_judge_is_not_called_if_runs_cannot_be_compared(server, tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROW | {"where": name, "nats": 1.0, "tokens": 1}) + "\n")
    files = [str(tmp_path / f"{name}.jsonl") for name in ("a", "b")]
    assert main(["compare", *files, f"judge={server.url}", "judge_model=m"]) == 2
    assert "no question in common" in capsys.readouterr().err and not server.requests
