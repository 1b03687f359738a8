"""Downloads that continue where they were interrupted."""

import hashlib
import os
import time
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from huggingface_hub.utils.sha import sha_fileobj
from tqdm import tqdm

from nanodoge.options import one_line

TRIES, WAIT, TIMEOUT = 6, 1.0, (10, 60)  # attempts; seconds before the second; to connect, and between two bytes


def retry(attempt: Callable, address: str) -> Any:
    """What attempt() returns, called again WAIT, 2 WAIT, 4 WAIT, ... seconds after a network error. Raises ValueError
    after TRIES errors, and for one that stays (404)."""
    for failures in range(1, TRIES + 1):
        try:
            return attempt()
        except (requests.RequestException, zlib.error) as error:
            status = getattr(getattr(error, "response", None), "status_code", 0)
            if failures == TRIES or (400 <= status < 500 and status not in (408, 416, 429)):
                raise ValueError(f"{address}: {one_line(error)} (run again to continue)") from None
            time.sleep(WAIT * 2 ** (failures - 1))


def download(url: str, cache: str | Path, quiet: bool = False) -> Path:
    """The path of the downloaded file. It has that name only once it is complete and its hash is right."""
    address, _, digest = url.partition("#sha256=")
    name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(unquote(urlsplit(address).path)).name}"
    path, part = Path(cache, name), Path(cache, name + ".part")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        retry(partial(download_rest, address, part, quiet), address)
        with open(part, "rb") as file:
            is_right = not digest or sha_fileobj(file).hex() == digest
        if not is_right:
            part.unlink()
            raise ValueError(f"{address}: the file's sha256 is not the {digest} that was asked for")
        os.replace(part, path)
    return path


def download_rest(url: str, part: Path, quiet: bool) -> None:
    """Appends to `part` what it still lacks. Raises RequestException for what another attempt may cure.

    `Range` asks for the bytes from here on (status 206); `If-Range` for all of them (status 200) if the file has
    changed since. A server that knows neither also sends everything with 200. So 200 means: start again.
    """
    have = part.stat().st_size if part.exists() else 0
    version = part.with_name(part.name + ".version")  # what the server calls the version that `part` begins
    headers = {"Accept-Encoding": "identity"}  # or the length would be that of a compressed stream
    if have:
        known = version.read_text(encoding="utf-8") if version.exists() else ""
        headers |= {"Range": f"bytes={have}-", "If-Range": known or None}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        is_rest = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status_code == 416 or (response.status_code == 206 and not is_rest):
            part.unlink()  # it is not the beginning of this file
            raise requests.ConnectionError(f"the server cannot continue after {have:,} bytes")
        response.raise_for_status()
        have = have if is_rest else 0
        total = have + int(response.headers.get("Content-Length", 0))
        tag = response.headers.get("ETag", "W/")  # a weak tag, W/..., does not promise the same bytes
        version.write_text(response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag, encoding="utf-8")
        bar = tqdm(desc=part.stem, total=total or None, initial=have, unit="B", unit_scale=True, disable=quiet or None)
        with bar, open(part, "ab" if have else "wb") as file:
            for block in response.iter_content(1 << 16):
                file.write(block)
                bar.update(len(block))
    if part.stat().st_size < total:
        raise requests.ConnectionError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")
    version.unlink()
