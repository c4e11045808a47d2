"""A local stand-in for the hub's HTTP API, as the hub client calls it to publish a model."""

import base64
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator

TOKEN = "hf_of_the_test"
_KNOWN = re.compile(
    r"/blobs/\w+|/api/(whoami-v2|validate-yaml|repos/create|models/.*)|/.*/lfs/objects/batch"
)


class FakeHub:
    """Repositories in memory, and every request in order.

    Attributes:
        repositories: id -> {"private", "files": path -> bytes}.
        asked: (method, path) of each request that this answers.
        account: what /api/whoami-v2 answers to `TOKEN`.
        refuses: requests whose "METHOD path" this pattern matches get a 403.
    """

    def __init__(self):
        self.repositories, self.blobs, self.asked = {}, {}, []
        token = {"displayName": "test", "role": "write"}
        self.account = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": token}}
        self.refuses = "(?!)"
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, repository: str) -> dict[str, bytes]:
        return self.repositories[repository]["files"]

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, dict, dict]:
        """(status, JSON, headers)."""
        if not _KNOWN.fullmatch(path):
            return 404, {}, {}
        self.asked.append((method, path))
        if re.match(self.refuses, f"{method} {path}"):
            return 403, {"error": "refused by the test"}, {}
        if method == "PUT":
            assert path == f"/blobs/{hashlib.sha256(body).hexdigest()}"
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}, {}
        if token != TOKEN:
            return 401, {"error": "Invalid credentials"}, {}
        if path == "/api/whoami-v2":
            return 200, self.account, {}
        if path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return 200, {}, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("visibility") == "private"
            self.repositories[name] = {"private": private, "files": {}}
            return 200, {"url": f"{self.endpoint}/{name}"}, {}
        if found := re.fullmatch(r"/(\w+/\w+)\.git/info/lfs/objects/batch", path):
            return 200, {"objects": list(self._uploads(json.loads(body)["objects"]))}, {}
        found = re.fullmatch(r"/api/models/(\w+/\w+)(/preupload/main|/commit/main)?", path)
        if not found or found[1] not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if found[2] == "/preupload/main":
            return 200, {"files": [_mode(file) for file in json.loads(body)["files"]]}, {}
        if found[2] == "/commit/main":
            self._commit(found[1], [json.loads(line) for line in body.splitlines()])
            url = f"{self.endpoint}/{found[1]}/commit/{'a' * 40}"
            return 200, {"commitUrl": url, "commitOid": "a" * 40}, {}
        about = self.repositories[found[1]]
        siblings = [{"rfilename": name} for name in about["files"]]
        return 200, {"id": found[1], "private": about["private"], "siblings": siblings}, {}

    def _uploads(self, objects: list[dict]) -> Iterator[dict]:
        for one in objects:
            href = f"{self.endpoint}/blobs/{one['oid']}"
            yield {**one, "actions": {"upload": {"href": href}}}

    def _commit(self, repository: str, lines: list[dict]) -> None:
        files = dict(self.files(repository))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.repositories[repository]["files"] = files


def _mode(file: dict) -> dict:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def _any(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        status, value, headers = self.hub.answer(self.command, path, token, body)
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _any

    def log_message(self, *args) -> None:
        pass
