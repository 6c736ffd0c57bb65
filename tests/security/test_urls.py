"""URLs in records: only where a recipe allows them, only to public addresses, and within limits of size and time."""

import gzip
import io
import json
import socket
import threading
import time

import pytest
from PIL import Image

from tinyllava.config import DataSpec
from tinyllava.config.read import load_recipe
from tinyllava.data.images import open_image
from tinyllava.data.sample import SampleError
from tinyllava.data.sources import open_source
from tinyllava.downloads import PRIVATE, is_public, read_url

BUFFER = io.BytesIO()
Image.new("RGB", (8, 8), (255, 0, 0)).save(BUFFER, "PNG")
PNG = BUFFER.getvalue()


def announce(body: bytes, *more: str, status: str = "200 OK", length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *more, "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.fixture
def serve():
    """Start a server that gives each connection to a function `answer(connection, request)`. Returns its address."""
    servers = []

    def start(answer) -> str:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=handle, args=(connection,), daemon=True).start()

        def handle(connection: socket.socket) -> None:
            with connection:
                try:
                    answer(connection, connection.recv(1 << 16))
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def private(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(PRIVATE, "1")


NOT_PUBLIC = """
127.0.0.1 127.8.8.8 0.0.0.0 10.1.2.3 172.16.0.1 172.31.255.255 192.168.1.1 169.254.169.254 100.64.0.1 224.0.0.1
239.1.1.1 240.0.0.1 255.255.255.255 192.0.2.1 198.18.0.1 198.51.100.1 203.0.113.1 :: ::1 ::ffff:127.0.0.1
::ffff:8.8.8.8 ::127.0.0.1 fe80::1 fe80::1%eth0 fc00::1 fd12::1 fec0::1 ff02::1 2001:db8::1 2002:7f00:1::
64:ff9b::127.0.0.1 64:ff9b::10.0.0.1 2001:0:7f00:1::1 100::1
"""
SPELLINGS = "127.0.0.1 localhost 127.1 2130706433 0x7f000001 0177.0.0.1 0 [::1] [::ffff:127.0.0.1] LOCALHOST"
SPELLINGS += " %3127.0.0.1 %6cocalhost 127.0.0.%31"  # urllib decodes them
ODD = """
http://user:hunter2@127.0.0.1/a.png http:// http://[ http://x:99999999/ http:///a http://\x00/ https://a\x00b/
http://u:hunter2@[ HTTP://me:hunter2@localhost:1/ http://%00/
"""


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700::1", "64:ff9b::8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize("host", SPELLINGS.split())
def test_no_spelling_of_this_machine_is_contacted(serve, monkeypatch, host):
    monkeypatch.delenv(PRIVATE, raising=False)
    contacts = []
    port = serve(lambda connection, request: contacts.append(request)).rpartition(":")[2]
    with pytest.raises(SampleError, match=r"not a public one|cannot be loaded") as error:
        open_image(f"http://{host}:{port}/a.png")
    assert contacts == [] and error.value.kind == "unreadable_image"


def test_a_private_address_is_allowed_by_the_environment(serve, private):
    address = serve(lambda connection, _: connection.sendall(announce(PNG)))
    assert open_image(f"{address}/a.png").size == (8, 8)
    assert open_image(f"{address}/кот 1.png?q=ä b").size == (8, 8)


def test_every_redirect_is_checked(serve, monkeypatch, private):
    contacts = []
    inside = serve(lambda connection, request: contacts.append(request))
    port = inside.rpartition(":")[2]
    answer = announce(b"", f"Location: {inside}/x", status="302 Found")
    outside = serve(lambda connection, _: connection.sendall(answer))
    # The redirecting server stands for a public one: only its own port counts as public here.
    known = socket.getaddrinfo
    monkeypatch.setattr("tinyllava.downloads.is_public", lambda address: address == "127.0.0.1" and lookups[-1] != port)
    lookups = []

    def look_up(host, looked_port, *args, **kwargs):
        lookups.append(str(looked_port))
        return known(host, looked_port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.delenv(PRIVATE)
    with pytest.raises(OSError, match="not a public one"):
        read_url(f"{outside}/a.png")
    assert contacts == []


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x/", "data:image/png,x", "//"])
def test_a_redirect_to_another_scheme_is_refused(serve, private, target):
    address = serve(lambda connection, _: connection.sendall(announce(b"", f"Location: {target}", status="301 Moved")))
    with pytest.raises(OSError, match=r"expected http|not a URL|more than 5 redirects"):
        read_url(address)


def test_endless_redirects_end(serve, private):
    contacts = []

    def answer(connection, request):
        contacts.append(request)
        connection.sendall(announce(b"", "Location: /again", status="307 Temporary"))

    with pytest.raises(OSError, match="more than 5 redirects"):
        read_url(serve(answer))
    assert len(contacts) == 6


def drip(connection, start: bytes) -> None:
    connection.sendall(start)
    while True:
        connection.sendall(b"x")
        time.sleep(0.02)


@pytest.mark.parametrize(
    "start", [b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: ", b"HTTP/1", b""]
)
def test_a_slow_server_is_left_at_the_time_limit(serve, private, start):
    address, begin = serve(lambda connection, _: drip(connection, start)), time.monotonic()
    with pytest.raises(TimeoutError, match=r"longer than 0\.4 seconds"):
        read_url(address, seconds=0.4)
    assert time.monotonic() - begin < 5


def test_the_size_is_limited_whether_announced_or_not(serve, private):
    def chunked(connection, _):
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while True:
            connection.sendall(b"8000\r\n" + bytes(0x8000) + b"\r\n")

    def endless(connection, _):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(bytes(1 << 15))

    for answer in (chunked, endless, lambda connection, _: connection.sendall(announce(b"", length=10**12))):
        with pytest.raises(OSError, match=r"more than 0\.2 MB"):
            read_url(serve(answer), size=200_000)


BROKEN = {
    "early end": announce(b"short", length=99),
    "no HTTP": b"garbage\r\n\r\n",
    "nothing": b"",
    "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "cut chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\nabc",
    "long line": b"HTTP/1.1 200 " + b"x" * 70_000,
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
    "404": announce(b"x" * 9, status="404 Not Found"),
    "500": announce(b"secret payload", status="500 \x1b[31mred"),
    "no target": announce(b"", status="302 Found"),
    "gzip": announce(gzip.compress(bytes(10**6)), "Content-Encoding: gzip"),
    "not an image": announce(b"<html>"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_answer_is_an_error_that_names_the_url(serve, private, name):
    address = serve(lambda connection, _: connection.sendall(BROKEN[name]))
    with pytest.raises(SampleError, match="image ") as error:
        open_image(f"{address}/a.png")
    assert error.value.kind == "unreadable_image"
    assert "payload" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize("url", ODD.split())
def test_odd_urls_are_errors_that_tell_no_password(url, private):
    with pytest.raises(SampleError, match="cannot be loaded") as error:
        open_image(url)
    assert "hunter2" not in str(error.value)


def test_a_proxy_does_not_open_the_own_network(serve, monkeypatch):
    """The proxy itself may be private. What is asked of it is checked all the same."""
    contacts = []

    def answer(connection, request):
        contacts.append(request)
        connection.sendall(announce(PNG))

    monkeypatch.delenv(PRIVATE, raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", serve(answer))
    with pytest.raises(OSError, match="not a public one"):
        read_url("http://127.0.0.1:9/a.png")
    assert contacts == []
    assert read_url("http://8.8.8.8/a.png") == PNG  # through the proxy: nothing leaves this machine
    assert contacts[0].startswith(b"GET http://8.8.8.8/a.png")


# -- recipes -----------------------------------------------------------------------------------------------------------


def write_data(folder, image: str):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    path = folder / "data.json"
    path.write_text(json.dumps([{"id": "a", "image": image, "conversations": turns}]))
    return str(path)


def test_a_record_names_a_url_only_where_its_recipe_allows_it(tmp_path, serve, private):
    address = serve(lambda connection, _: connection.sendall(announce(PNG)))
    path = write_data(tmp_path, f"{address}/a.png")
    refused, allowed = (open_source(DataSpec(path=path, urls=urls), tmp_path).roots for urls in (False, True))
    with pytest.raises(SampleError, match=r"is a URL\. `urls: true` beside its `path:`"):
        open_image(f"{address}/a.png", refused)
    assert open_image(f"{address}/a.png", allowed).size == (8, 8)


def test_the_hash_of_a_recipe_without_urls_is_that_of_earlier_versions():
    key = "stages.finetune.data.0.urls"
    plain, same, other = (load_recipe("quickstart", each) for each in ([], [f"{key}=false"], [f"{key}=true"]))
    assert plain.compute_hash() == same.compute_hash() != other.compute_hash()
    assert "urls" not in plain.to_yaml()
