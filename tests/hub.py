"""A stand-in for the hub on this machine: as much of its protocol as a look or a download needs, over folders of saved models."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class StandIn(http.server.ThreadingHTTPServer):
    """Serves ``folder/owner/name`` as ``owner/name``; other revisions are in ``folder/owner/name@revision``.

    served: bytes sent of each file, ``owner/name/file``. asked: lines of requests. tokens: what came with them, by host.
    refused: owner/name -> status and the hub's own word for it, of files; of everything where the word is ``RepoNotFound``.
    ranges: whether parts of files are given. moved: an earlier name, without an owner -> owner/name, to which it is redirected.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder = folder
        self.served: Counter[str] = Counter()
        self.asked: list[str] = []
        self.tokens: set[tuple[str, str]] = set()
        self.refused: dict[str, tuple[int, str]] = {}
        self.ranges = True
        self.moved: dict[str, str] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def model(self, name: str, revision: str) -> Path | None:
        """The folder of a model's revision, which may also be its commit."""
        for folder in self.folder.glob(f"{name}*"):
            known = folder.name.partition("@")[2] or "main"
            if folder.name.partition("@")[0] == Path(name).name and revision in (known, commit(folder)):
                return folder
        return None


def commit(folder: Path) -> str:
    return hashlib.sha1(str(folder).encode()).hexdigest()


@contextmanager
def stand_in(folder: Path) -> Iterator[StandIn]:
    with StandIn(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


class _Answers(http.server.BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append(f"{self.command} {path}")
        self.server.tokens.add((self.headers["Host"].split(":")[0], self.headers.get("Authorization", "")))
        for old, new in self.server.moved.items():
            first = path.removeprefix("api/models/").split("/")[0]
            if first == old:
                return self._reply(307, b"", {"Location": self.path.replace(f"/{old}", f"/{new}", 1)})
        if not path:
            return self._reply(404, b"")  # a mirror may have nothing to show here
        if path.startswith("blobs/"):
            return self._file(path.removeprefix("blobs/"), self.server.folder / path.removeprefix("blobs/"))
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        name, revision = "/".join(parts[:2]), parts[3] if len(parts) > 3 else "main"
        status, word = self.server.refused.get(name, (0, ""))
        if status and (not api or word in ("RepoNotFound", "Busy")):
            return self._reply(status, b"", {"X-Error-Code": word, "X-Error-Message": "no"})
        if not (self.server.folder / name).is_dir():
            return self._reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        folder = self.server.model(name, revision)
        if folder is None:
            return self._reply(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if api:
            return self._reply(200, json.dumps(_told(folder, name, tree=parts[2:3] == ["tree"])).encode())
        file = folder / "/".join(parts[4:])
        if not file.is_file():
            return self._reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        known = {"X-Repo-Commit": commit(folder), "ETag": f'"{hashlib.sha1(file.read_bytes()).hexdigest()}"'}
        where = str(file.relative_to(self.server.folder))
        if file.suffix != ".safetensors":
            return self._file(where, file, known)
        known |= {"X-Linked-Size": str(file.stat().st_size), "X-Linked-ETag": known["ETag"]}
        known["Location"] = (
            f"http://localhost:{self.server.server_port}/blobs/{where}"  # another host, as large files are
        )
        return self._reply(302, b"", known)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _file(self, where: str, file: Path, headers: Mapping[str, str] = {}) -> None:
        whole = file.read_bytes()
        wanted = self.headers.get("Range") if self.server.ranges else None
        if wanted is None:
            return self._reply(200, whole, headers, where)
        begin, end = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
        part = whole[begin : end + 1]
        said = {"Content-Range": f"bytes {begin}-{begin + len(part) - 1}/{len(whole)}"}
        return self._reply(206, part, {**headers, **said}, where)

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str] = {}, where: str = "") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            if where:
                self.server.served[where] += len(body)
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _told(folder: Path, name: str, tree: bool) -> Any:
    files = [(str(path.relative_to(folder)), path.stat().st_size) for path in folder.rglob("*") if path.is_file()]
    if tree:
        return [{"type": "file", "path": file, "size": size, "oid": "0" * 40} for file, size in files]
    listed = [{"rfilename": file, "size": size} for file, size in files]
    return {"id": name, "sha": commit(folder), "siblings": listed}
