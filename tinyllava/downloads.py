"""Read what a URL gives, within limits. Records, questions and remote users name URLs, and none of them is trusted.

Only http and https. A connection goes to the very address that was checked, after each redirect too, so a name that
changes its address between check and use gains nothing. $TINYLLAVA_PRIVATE_URLS=1 also allows addresses of the own
machine and network. SECURITY.md lists the limits.
"""

import ipaddress
import os
import socket
import ssl
import threading
import time
from contextlib import suppress
from functools import partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request, getproxies

SIZE = 50_000_000  # bytes; the largest photographs have about 30 MB
SECONDS = 30  # for everything, redirects included, once the name is resolved
WAIT = 10  # seconds without a byte
REDIRECTS = 5
CHUNK = 1 << 16
PRIVATE = "TINYLLAVA_PRIVATE_URLS"
SAFE = "%/:=&?~+!$,;'@()*[]-._"  # not quoted in paths and queries: they may be quoted already
UNICAST, NAT64 = ipaddress.ip_network("2000::/3"), ipaddress.ip_network("64:ff9b::/96")


def read_url(url: str, size: int = SIZE, seconds: float = SECONDS) -> bytes:
    """The content of an http(s) URL. Raises OSError, which does not repeat the URL, for everything that goes wrong."""
    limits = _Limits(seconds)
    try:
        for _ in range(1 + REDIRECTS):
            parts = _check_url(url)
            with limits.open(parts) as response:
                if response.status not in (301, 302, 303, 307, 308):
                    content = _read_body(response, size)
                    if limits.passed:  # the end was the time limit's
                        raise TimeoutError
                    return content
                url = urljoin(url, response.headers.get("Location") or "")
        raise OSError(f"it has more than {REDIRECTS} redirects")
    except (OSError, ValueError, LookupError, HTTPException) as error:
        if limits.passed:
            raise TimeoutError(f"it took longer than {seconds:g} seconds") from None
        error = getattr(error, "reason", error)  # urllib wraps the error of a connection
        if isinstance(error, OSError):
            raise error from None
        raise OSError(f"the server's answer is not valid HTTP: {type(error).__name__}") from None
    finally:
        limits.end()


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: not of this machine, its network, or a special range."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip not in NAT64:  # outside of 2000::/3 are also the IPv4 addresses that are written as IPv6
            return ip in UNICAST and not ip.is_private and ip.sixtofour is None
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class _Limits:
    """The time limit of one download, and the check of its addresses."""

    def __init__(self, seconds: float) -> None:
        self.deadline, self.passed, self.sockets = time.monotonic() + seconds, False, []
        # A timeout of a socket starts again with each byte, so a slow server could hold a connection for ever.
        self.timer = threading.Timer(seconds, self.stop)
        self.timer.daemon = True
        self.timer.start()

    def open(self, parts: SplitResult) -> HTTPResponse:
        """Ask for a URL, through the proxy of the environment if there is one. A redirect is returned as it is."""
        proxies = {scheme: proxy for scheme, proxy in getproxies().items() if scheme in ("http", "https")}
        opener = OpenerDirector()
        for handler in (ProxyHandler(proxies), _Plain(self), _Encrypted(self)):
            opener.add_handler(handler)
        return opener.open(Request(parts.geturl(), headers={"User-Agent": "tinyllava"}), timeout=WAIT)

    def make_connection(self, kind: type[HTTPConnection], host: str, *, direct: bool, **options: Any) -> HTTPConnection:
        """A connection that opens its socket by `connect` below. direct: it leads to the server, not to a proxy."""
        connection = kind(host, **options)
        connection._create_connection = partial(self.connect, direct=direct)
        return connection

    def connect(self, place: tuple[str, int], *_: object, direct: bool) -> socket.socket:
        """Connect to a host and port. Raises OSError if one of the host's addresses is not public."""
        found = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)
        if direct:
            _check_addresses(found)
        error = OSError("the name has no address")
        for family, kind, protocol, _, address in found:
            opened = socket.socket(family, kind, protocol)
            try:
                opened.settimeout(max(0.01, min(WAIT, self.deadline - time.monotonic())))
                opened.connect(address)
                opened.settimeout(WAIT)
                self.sockets.append(opened.dup())  # encryption takes the socket itself out of our hands
                if self.passed:
                    raise TimeoutError
                return opened
            except OSError as failed:
                opened.close()
                error = failed
        raise error

    def stop(self) -> None:
        """Break off all connections: the reader sees the end of the content."""
        self.passed = True
        for opened in self.sockets:
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """Release what the download took."""
        self.timer.cancel()
        for opened in self.sockets:
            opened.close()


class _Plain(HTTPHandler):
    def __init__(self, limits: _Limits) -> None:
        super().__init__()
        self.limits = limits

    def http_open(self, request: Request) -> HTTPResponse:
        return self.do_open(partial(self.limits.make_connection, HTTPConnection, direct=_is_direct(request)), request)


class _Encrypted(HTTPSHandler):
    def __init__(self, limits: _Limits) -> None:
        super().__init__()
        self.limits = limits

    def https_open(self, request: Request) -> HTTPResponse:
        connect = partial(self.limits.make_connection, HTTPSConnection, direct=_is_direct(request))
        return self.do_open(connect, request, context=ssl.create_default_context())


def _is_direct(request: Request) -> bool:
    """Whether a request goes to the server itself. If not, the server's name is checked here.

    The proxy resolves the name again, and a name may be known only to the proxy: then its own rules decide.
    """
    parts = urlsplit(request.full_url)
    is_direct = not (request.has_proxy() or request._tunnel_host)  # a host that differs can also be one in %XX
    if not is_direct:
        with suppress(socket.gaierror):
            _check_addresses(socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM))
    return is_direct


def _check_addresses(found: list[tuple]) -> None:
    for *_, address in found:
        if os.environ.get(PRIVATE) != "1" and not is_public(address[0]):
            text = f"its address {address[0]} is not a public one. {PRIVATE}=1 in the environment allows it"
            raise PermissionError(text)


def _check_url(url: str) -> SplitResult:
    """The parts of a URL with quoted path and query. Raises OSError if it is none that we read."""
    try:
        parts = urlsplit(url)
        has_credentials, _ = parts.username is not None, parts.port
    except ValueError as error:
        raise OSError(f"it is not a URL: {type(error).__name__}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise OSError(f"it leads to {parts.scheme or 'no'}://, expected http:// or https://")
    if has_credentials:
        raise OSError("it contains a user name or password: remove them, or download the image yourself")
    if "%" in parts.netloc:  # urllib, and some proxies, would decode the name after its check
        raise OSError("its host contains a %, expected a plain name or address")
    return parts._replace(path=quote(parts.path, safe=SAFE), query=quote(parts.query, safe=SAFE), fragment="")


def _read_body(response: HTTPResponse, size: int) -> bytes:
    """The content of a response. Raises OSError if the server refused, sent too much, or stopped too early."""
    if not 200 <= response.status < 300:
        raise OSError(f"the server answered {response.status}")
    content, announced = bytearray(), response.length or 0
    while announced <= size and len(content) <= size and (chunk := response.read(CHUNK)):
        content += chunk
    if max(len(content), announced) > size:
        raise OSError(f"it has more than {size / 1e6:g} MB")
    if response.length:  # what was announced and did not come
        raise OSError(f"the connection ended {response.length:,} bytes too early")
    return bytes(content)
