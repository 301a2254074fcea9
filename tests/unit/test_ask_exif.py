"""scripts/ask_exif.py against an answer of the service's form, served on the loopback."""

from __future__ import annotations

import http.client
import json
import runpy
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from bokehflux.photos.readers import read_answers

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "ask_exif.py"))
ANSWER = {
    "photo": {
        "id": "53000000001", "secret": "0", "server": "65535", "farm": 66, "camera": "Canon EOS 6D",
        "exif": [
            {"tagspace": "IFD0", "tagspaceid": 0, "tag": "Make", "label": "Make",
             "raw": {"_content": "Canon"}},
            {"tagspace": "IFD0", "tagspaceid": 0, "tag": "Orientation", "label": "Orientation",
             "raw": {"_content": "Rotate 90 CW"}},
            {"tagspace": "ExifIFD", "tagspaceid": 0, "tag": "FNumber", "label": "Aperture",
             "raw": {"_content": "2.8"}, "clean": {"_content": "f/2.8"}},
            {"tagspace": "ExifIFD", "tagspaceid": 0, "tag": "FocalLength", "label": "Focal Length",
             "raw": {"_content": "50.0 mm"}, "clean": {"_content": "50 mm"}},
        ],
    },
    "stat": "ok",
}  # fmt: skip
"""In the form in which the service answers flickr.photos.getExif."""
KEY = "not-a-real-key"


class Service:
    """Answers in a given order; then the recorded one."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self.next: list[tuple[int, Any]] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
                service.asked.append(query)
                code, answer = service.next.pop(0) if service.next else (200, ANSWER)
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(code)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Service]:
    monkeypatch.setenv("FLICKR_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    found = Service()
    yield found
    found.server.shutdown()
    found.server.server_close()


def run(service: Service, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    command = ["ask_exif.py", "links.txt", "--every-s", "0", "--service", service.url, *words]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr("time.sleep", lambda _: None)
    return SCRIPT["main"]()


def links(*lines: str) -> None:
    Path("links.txt").write_text("\n".join(lines))


def test_answers_are_kept_and_nobody_is_asked_twice(service: Service, monkeypatch: Any) -> None:
    links("53000000001", "https://live.staticflickr.com/65535/53000000002_0123abcdef_b.jpg", "53000000001",
          "", "https://www.flickr.com/photos/someone/53000000003/", "123")  # fmt: skip
    service.next = [(200, ANSWER), (200, {"stat": "fail", "code": 2, "message": "Permission denied"})]
    assert run(service, monkeypatch, "--newer-than", "20000000000") == 0
    assert [query["photo_id"] for query in service.asked] == ["53000000001", "53000000002", "53000000003"]
    assert {query["method"] for query in service.asked} == {"flickr.photos.getExif"}
    assert {query["api_key"] for query in service.asked} == {KEY}
    kept = Path("exif.jsonl").read_text()
    assert [json.loads(line)["stat"] for line in kept.splitlines()] == ["ok", "permission denied", "ok"]
    assert KEY not in kept
    found = read_answers(Path("exif.jsonl"))
    assert found["53000000001"].f_number == 2.8 and found["53000000001"].focal_mm == 50
    assert found["53000000002"].f_number is None

    Path("exif.jsonl").write_text(kept[: kept.rindex("{") + 20])  # killed while it wrote
    assert len(read_answers(Path("exif.jsonl"))) == 2
    assert run(service, monkeypatch, "--newer-than", "20000000000") == 0
    assert [query["photo_id"] for query in service.asked[3:]] == ["53000000003"]
    assert Path("exif.jsonl").read_text() == kept


def test_a_busy_service_is_asked_again(service: Service, monkeypatch: Any) -> None:
    links("53000000001")
    unavailable = {"stat": "fail", "code": 105, "message": "Service currently unavailable"}
    service.next = [(429, {}), (503, b"<html>"), (200, unavailable), (200, b"not json")]
    assert run(service, monkeypatch) == 0
    assert len(service.asked) == 5 and len(read_answers(Path("exif.jsonl"))) == 1


@pytest.mark.parametrize(("answers", "says"), [
    ([(200, {"stat": "fail", "code": 100, "message": "Invalid API Key"})], "Invalid API Key (code 100)"),
    ([(403, {})], "HTTP 403"), ([(500, {})] * 5, "stays busy (HTTP 500): run the command again later"),
])  # fmt: skip
def test_what_ends_the_work(
    service: Service, answers: Any, says: str, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    links("53000000001", "53000000002")
    service.next = answers
    assert run(service, monkeypatch) == 1
    said = capsys.readouterr().err
    assert says in said and KEY not in said
    assert Path("exif.jsonl").read_text() == ""


PHOTO: dict[str, Any] = {"stat": "ok", "photo": {"id": "1"}}


@pytest.mark.parametrize("answer", [
    [], "words", 3, None, {}, {"stat": "ok"}, PHOTO, PHOTO | {"photo": []},
    {"stat": "ok", "photo": {"exif": 1}},
    {"stat": "fail", "code": [1]}, {"stat": "fail"},
])  # fmt: skip
def test_answers_in_another_form_end_the_work_in_words(
    service: Service, answer: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    links("53000000001")
    service.next = [(200, answer)]
    assert run(service, monkeypatch) == 1
    assert "ask_exif: error: the service " in capsys.readouterr().err
    assert Path("exif.jsonl").read_text() == ""


@pytest.mark.parametrize("body", [b"[" * 100_000, b"\xff\xfe", b""])
def test_what_is_cut_or_garbled_is_asked_again(service: Service, body: bytes, monkeypatch: Any) -> None:
    links("53000000001")
    service.next = [(200, body)]
    assert run(service, monkeypatch) == 0 and len(service.asked) == 2


def test_a_connection_that_breaks_off_is_tried_again(service: Service, monkeypatch: Any) -> None:
    links("53000000001")
    real, calls = SCRIPT["json"].load, []

    def cut(response: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise http.client.IncompleteRead(b"half")
        return real(response)

    monkeypatch.setattr(SCRIPT["json"], "load", cut)
    assert run(service, monkeypatch) == 0 and len(calls) == 2


@pytest.mark.parametrize(("name", "data"), [
    ("exif.jsonl", b'{"id": 3}\n'), ("exif.jsonl", b"a diary\nof mine\n"), ("exif.jsonl", b"[1]\n"),
    ("exif.jsonl", b"no line at all"), ("exif.jsonl", b'{"mine": 1}'),
    ("links.txt", b"\xff\xfe\x00"), ("links.txt", "\u00b2".encode()),
])  # fmt: skip
def test_files_of_another_kind_are_left_as_they_are(
    service: Service, name: str, data: bytes, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    links("53000000001")
    Path(name).write_bytes(data)
    assert run(service, monkeypatch) == 1
    assert f"ask_exif: error: {name}" in capsys.readouterr().err
    assert Path(name).read_bytes() == data and not service.asked


@pytest.mark.parametrize(("flag", "value"), [("--every-s", "nan"), ("--every-s", "-1"), ("--every-s", "inf"),
                                             ("--service", "ftp://x"), ("--service", "flickr")])  # fmt: skip
def test_flags_that_cannot_be(service: Service, flag: str, value: str, monkeypatch: Any) -> None:
    links("53000000001")
    with pytest.raises(SystemExit):
        run(service, monkeypatch, f"{flag}={value}")


def test_rate(service: Service, monkeypatch: Any) -> None:
    """No faster than it was asked to be."""
    links("1", "2", "3")
    waited: list[float] = []
    monkeypatch.setattr(sys, "argv", ["ask_exif.py", "links.txt", "--service", service.url])
    monkeypatch.setattr("time.sleep", waited.append)
    assert SCRIPT["main"]() == 0
    assert len(waited) == 3 and all(0.5 < wait <= 1 for wait in waited)


def test_bad_lists_and_no_key(service: Service, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    links("1", "https://example.org/photo")
    assert run(service, monkeypatch) == 1
    assert "links.txt, line 2: expected a photo id" in capsys.readouterr().err and not service.asked
    monkeypatch.delenv("FLICKR_API_KEY")
    with pytest.raises(SystemExit):
        run(service, monkeypatch)
    assert "set FLICKR_API_KEY" in capsys.readouterr().err
