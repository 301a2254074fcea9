"""Ask Flickr for the EXIF data of photographs, with a key of yours, and keep the answers:

    FLICKR_API_KEY=... python scripts/ask_exif.py links.txt --output exif.jsonl

links.txt has a photo id or a link a line, as Megalith-10M lists them. An answer is one line of JSON:
{"photo_id": ..., "stat": "ok", "flickr_exif": ...}. Photographs that are gone or keep their EXIF data private
get a line as well, so nobody is asked twice: the same command goes on where it stopped. One request a second
keeps below the service's limit of 3600 an hour. `bokehflux annotate --exif exif.jsonl` joins the answers.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bokehflux.photos.readers import PHOTO_ID

SERVICE = "https://api.flickr.com/services/rest/"
REFUSALS = {1: "photo not found", 2: "permission denied"}
"""Answers about a photograph that will not change; every other refusal is about us, and ends the work."""
WAITS_S = (5, 30, 120, 600)
"""Before each further try, where the service is busy or cannot be reached."""
OURS = b'{"photo_id": "'
"""How each line of the answers begins."""


class Busy(Exception):
    """The service did not answer this time."""


def ids_in(path: Path, newer_than: int) -> Iterator[str]:
    """Photo ids in a file of ids and links, each once, above a number. Raises ValueError for other lines."""
    seen = set()
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text with a photo id or a link a line: {error}") from None
    for number, line in enumerate(lines, 1):
        word = line.strip()
        found = PHOTO_ID.search(word)
        photo_id = (found[1] or found[2]) if found else word
        if not word:
            continue
        if not re.fullmatch("[0-9]{1,30}", photo_id):
            raise ValueError(
                f"{path}, line {number}: expected a photo id or a link of Flickr, got {word!r:.80}"
            )
        if int(photo_id) > newer_than and photo_id not in seen:
            seen.add(photo_id)
            yield photo_id


def answered(path: Path) -> set[str]:
    """Ids that a file of answers holds. A last line that was cut off is taken away.

    Raises ValueError for a file of anything else, which is left as it is.
    """
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    ids = set()
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            ids.add(str(json.loads(line)["photo_id"]))
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"{path}, line {number}: not an answer of this script: {line!r:.80}") from None
    if len(whole) < len(data) and not (whole or data.startswith(OURS[: len(data)])):
        raise ValueError(f"{path}: not a file of answers of this script")
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return ids


def ask(service: str, key: str, photo_id: str) -> dict[str, Any]:
    """The answer about one photograph. Raises Busy, and ValueError where the service refuses us."""
    fields = {"method": "flickr.photos.getExif", "api_key": key, "photo_id": photo_id, "format": "json",
              "nojsoncallback": "1"}  # fmt: skip
    try:
        with urllib.request.urlopen(f"{service}?{urllib.parse.urlencode(fields)}", timeout=60) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        if error.code == 429 or error.code >= 500:
            raise Busy(f"HTTP {error.code}") from None
        raise ValueError(f"the service refuses: HTTP {error.code} {error.reason}") from None
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
        raise Busy(str(error) or type(error).__name__) from None
    match answer:
        case {"stat": "ok", "photo": {"exif": list(found)}}:
            return {"photo_id": photo_id, "stat": "ok", "flickr_exif": found}
        case {"stat": "fail", "code": int(code)} if code in REFUSALS:
            return {"photo_id": photo_id, "stat": REFUSALS[code], "flickr_exif": None}
        case {"stat": "fail", "code": 105 | 106}:  # "service currently unavailable", "write operation failed"
            raise Busy(answer.get("message", ""))
        case {"stat": "fail"}:
            raise ValueError(f"the service refuses: {answer.get('message')} (code {answer.get('code')})")
    raise ValueError(f"the service answers in another form than expected, about {photo_id}: {answer!r:.200}")


def ask_patiently(asked: Callable[[], dict[str, Any]], sleep: Callable[[float], None]) -> dict[str, Any]:
    """The answer, tried again where the service is busy. Raises ValueError when it stays so."""
    for wait_s in (*WAITS_S, None):
        try:
            return asked()
        except Busy as busy:
            if wait_s is None:
                raise ValueError(f"the service stays busy ({busy}): run the command again later") from None
            sleep(wait_s)
    raise AssertionError("unreachable")


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("links", type=Path, metavar="FILE", help="a photo id or a link a line")
    parser.add_argument("--output", type=Path, default=Path("exif.jsonl"), metavar="FILE",
                        help="where answers are kept (default: %(default)s)")  # fmt: skip
    parser.add_argument("--newer-than", type=int, default=0, metavar="ID",
                        help="leave out ids up to this one (BokehDepth: 20000000000)")  # fmt: skip
    parser.add_argument("--every-s", type=float, default=1.0, metavar="S",
                        help="seconds between two requests (default: %(default)s)")  # fmt: skip
    parser.add_argument("--service", default=SERVICE, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not 0 <= args.every_s <= 86_400:
        parser.error(f"--every-s must be between 0 and 86400 seconds, got {args.every_s:g}")
    if not args.service.startswith(("http://", "https://")):
        parser.error(f"--service must be a link that begins with http, got {args.service}")
    key = os.environ.get("FLICKR_API_KEY")
    if not key:
        parser.error(
            "set FLICKR_API_KEY to a key of yours: https://www.flickr.com/services/api/misc.api_keys.html"
        )
    try:
        done = answered(args.output)
        missing = [one for one in ids_in(args.links, args.newer_than) if one not in done]
        hours = len(missing) * args.every_s / 3600
        print(f"{len(missing)} photographs to ask about, {hours:.1f} hours at least")
        with args.output.open("a", encoding="utf-8") as file:
            for photo_id in missing:
                began = time.monotonic()
                answer = ask_patiently(lambda one=photo_id: ask(args.service, key, one), time.sleep)
                file.write(json.dumps(answer) + "\n")
                file.flush()
                time.sleep(max(0.0, args.every_s - (time.monotonic() - began)))
    except (OSError, ValueError) as error:
        print(f"ask_exif: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
