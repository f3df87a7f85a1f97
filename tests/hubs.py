"""A local server that answers for the files of a hub as huggingface.co does."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants as constants
import pytest

__all__ = ["served"]

GATED = "gated"


@contextlib.contextmanager
def served(files: Mapping[str, str], cache: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve `files` (ORG/NAME/FILE → content, or `GATED`) as the hub; yields the paths that were asked for."""
    asked: list[str] = []
    names = {name.rpartition("/")[0] for name in files}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            repository, _, file = self.path.lstrip("/").partition("/resolve/main/")
            asked.append(f"{repository}/{file}")
            content = files.get(f"{repository}/{file}")
            if content is None or content == GATED:
                error = "GatedRepo" if content else "EntryNotFound" if repository in names else "RepoNotFound"
                self.send_response(403 if content else 404)
                self.send_header("X-Error-Code", error)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            data = content.encode()
            self.send_response(200)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"  # as HF_ENDPOINT sets it when the library is imported
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()
