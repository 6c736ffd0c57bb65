"""A model hub in this process. It answers uploads and downloads over HTTP and keeps files in memory."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "1" * 40


class Hub(BaseHTTPRequestHandler):
    """Repositories by id, each a dict of path -> bytes. Every file is committed whole (no LFS)."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def reply(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0].strip("/")
        where, _, rest = path.removeprefix("api/models/").partition("/resolve/")
        name = "/".join(where.split("/")[:2])
        files = self.server.repositories.get(name)
        if files is None:
            self.reply({"error": "Repository not found"}, 404)
        elif rest:
            content = files[rest.partition("/")[2]]
            self.send_response(200)
            headers = {
                "ETag": f'"{sha256(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Content-Length": len(content),
            }
            for header, value in headers.items():
                self.send_header(header, str(value))
            self.end_headers()
            self.wfile.write(content if body else b"")
        elif "/tree/" in path:
            self.reply([{"type": "file", "path": path, "size": len(files[path]), "oid": "0" * 40} for path in files])
        else:
            self.reply({"siblings": [{"rfilename": path} for path in files], "sha": COMMIT, "id": name})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        repositories, path = self.server.repositories, self.path.partition("?")[0]
        if self.headers.get("Authorization") != "Bearer hf_good":
            self.reply({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            repositories.setdefault(name, {})
            self.reply({"url": f"http://{self.headers['Host']}/{name}"})
        elif path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.reply({"files": [{**file, "shouldIgnore": False} for file in files]})
        elif path.endswith("/commit/main"):
            repository = repositories[path.removeprefix("/api/models/").removesuffix("/commit/main")]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repository[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply(
                {
                    "success": True,
                    "commitUrl": f"http://{self.headers['Host']}/me/tiny/commit/1",
                    "commitOid": COMMIT,
                    "pullRequestUrl": None,
                }
            )
        else:
            self.reply({}, 200 if "validate-yaml" in path else 404)


@contextmanager
def hub() -> Iterator[tuple[str, dict[str, dict[str, bytes]]]]:
    """Start a hub; yield its address and its repositories."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.repositories
    finally:
        server.shutdown()
        server.server_close()
