"""Downloads an image of a record over http(s), from public addresses only; `fetch` calls it where URLs are allowed.

A record's URL is hostile input: without these checks it could make a worker query the cluster's own services. HTTP and TLS are
urllib3's, one connection a request: such a connection takes the address to connect to and the name to verify apart, so that the
address that was checked is the one that is used, and it knows neither redirects nor proxies of the environment. (requests and
httpx resolve names by themselves, and read proxies from the environment.) What no library has is a limit for a whole request,
however slowly the server sends; that is `_hang_up`.
"""

import contextlib
import http.client
import ipaddress
import re
import socket
import threading
import time
from urllib.parse import urljoin

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError, SSLError
from urllib3.util import Url, parse_url

from rayalign.formats.records import RecordError

TIMEOUT_SECONDS = 10
"""For a connection, and for each wait for bytes."""

ATTEMPTS = 3
FIRST_WAIT_SECONDS = 0.5
"""The wait after the first failure of a request; the next is twice as long. Fewer attempts than for storage: a dead host drops
a record, and does not end the run."""

STATUS_MAY_PASS = (429, 500, 502, 503, 504)

MAX_REDIRECTS = 5
BLOCK_BYTES = 2**16
HEADERS = {"User-Agent": "rayalign", "Accept": "image/*", "Accept-Encoding": "identity"}
PORTS = {"http": 80, "https": 443}

IPV6_UNICAST = ipaddress.IPv6Network("2000::/3")
"""What is given out for the open Internet. Outside of it lie also all forms of wrapped IPv4 but the two below."""

NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            "100.64.0.0/10",  # shared by the customers of a provider; clouds' services
            "168.63.129.16/32",  # Azure's services for a virtual machine
            "192.0.0.0/24",  # protocols; Oracle Cloud's services
            "192.88.99.0/24",  # relays from 6to4
            "2001::/23",  # protocols, among them Teredo, which wraps IPv4
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which wraps IPv4
            "3fff::/20",  # documentation
        ),
    )
)
"""Networks that `ipaddress`, of some version of Python, takes for global."""


class _MayPass(Exception):
    """What failed may work at the next attempt: a server or network in trouble."""


def fetch_url(url: str, *, max_bytes: int, deadline: float) -> bytes:
    """The body of a URL, read until `deadline` (of time.monotonic, seconds) at the latest, and asked for again where a server
    or network fails.

    Raises RecordError; each redirect is checked like the first address.
    """
    wait = FIRST_WAIT_SECONDS
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _follow(url, max_bytes=max_bytes, deadline=deadline)
        except _MayPass as problem:
            if attempt == ATTEMPTS or time.monotonic() + wait >= deadline:
                raise _failed(url, str(problem)) from None
        time.sleep(wait)
        wait *= 2
    raise AssertionError("the last attempt returns or raises")


def _follow(url: str, *, max_bytes: int, deadline: float) -> bytes:
    """The body of a URL, over redirects. Raises RecordError, and _MayPass."""
    target = url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            found = _get(target, deadline=deadline, max_bytes=max_bytes)
            if isinstance(found, bytes):
                return found
            target = urljoin(target, found)
    except (OSError, http.client.HTTPException, HTTPError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        if time.monotonic() >= deadline:
            raise _failed(url, "the time for a record's URLs was over") from None
        words = str(error) or type(error).__name__
        if _is_lasting(error):
            raise _failed(url, words) from None
        raise _MayPass(words) from None
    raise _failed(url, f"more than {MAX_REDIRECTS} redirects")


def _is_lasting(error: Exception) -> bool:
    """Whether an error will be the same at the next attempt: a malformed URL, a name that is not there, a certificate."""
    if isinstance(error, socket.gaierror):
        return error.errno != socket.EAI_AGAIN
    return isinstance(error, ValueError | SSLError | http.client.InvalidURL)


def _get(url: str, *, deadline: float, max_bytes: int) -> bytes | str:
    """One request: the body, or the location that it redirects to."""
    target = parse_url(url)
    authority = re.split(r"[/\\?#]", url.partition("//")[2])[0]
    if target.scheme not in PORTS or not target.host or "@" in authority:
        raise RecordError("image URL refused", f"{url[:200]}: only http(s)://host/path, without credentials", field="images")
    with contextlib.closing(_connection(target, target.host.strip("[]"), deadline=deadline)) as connection:
        connection.connect()
        watchdog = threading.Timer(deadline - time.monotonic(), _hang_up, [connection.sock])
        watchdog.daemon = True
        watchdog.start()
        try:
            return _exchange(connection, target, url, deadline=deadline, max_bytes=max_bytes)
        finally:
            watchdog.cancel()


def _exchange(connection: HTTPConnection, target: Url, url: str, *, deadline: float, max_bytes: int) -> bytes | str:
    headers = {"Host": target.netloc or "", **HEADERS}
    connection.request("GET", target.request_uri, headers=headers, preload_content=False, enforce_content_length=False)
    with contextlib.closing(connection.getresponse()) as response:
        if location := response.get_redirect_location():
            return location
        if response.status in (404, 410):
            raise RecordError("image missing", f"{url[:200]}: HTTP {response.status}", field="images")
        if response.status in STATUS_MAY_PASS:
            raise _MayPass(f"HTTP {response.status}")
        if response.status != 200:
            raise _failed(url, f"HTTP {response.status}")
        if (encoding := response.headers.get("Content-Encoding", "identity")).lower() != "identity":
            raise _failed(url, f"sent as {encoding[:20]}, which was not asked for")
        content = bytearray()
        while block := response.read1(BLOCK_BYTES, decode_content=False):
            content += block
            if len(content) > max_bytes:
                raise RecordError("image too large", f"{url[:200]}: more than {max_bytes // 2**20} MiB", field="images")
        if response.length_remaining or time.monotonic() >= deadline:
            raise _MayPass(f"cut off after {len(content)} bytes")
    return bytes(content)


def _hang_up(sock: socket.socket) -> None:
    """Ends a request past its deadline, however slowly the server drips; the reader then sees the end of the stream."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _connection(target: Url, host: str, *, deadline: float) -> HTTPConnection:
    """The connection, not yet opened, to an address that was checked: the name is not resolved again, perhaps to another."""
    scheme = target.scheme or ""
    port = target.port or PORTS[scheme]
    address = _public_address(host, port)
    seconds = min(TIMEOUT_SECONDS, deadline - time.monotonic())
    if seconds <= 0:
        raise TimeoutError
    if scheme == "https":
        return HTTPSConnection(address, port, timeout=seconds, server_hostname=host)
    return HTTPConnection(address, port, timeout=seconds)


def _public_address(host: str, port: int) -> str:
    """The first address of a host; raises RecordError unless all of them are public."""
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    private = [address for address in addresses if not is_public(address)]
    if private or not addresses:
        raise RecordError("image URL refused", f"{host} is {', '.join(private)}, which is no public address", field="images")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open Internet: a single machine's, reachable from anywhere, and no IPv4 address in an
    IPv6 one, which could be private."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if not ip.is_global or ip.is_multicast or any(ip in network for network in NOT_PUBLIC):
        return False
    return ip.version == 4 or ip in IPV6_UNICAST


def _failed(url: str, words: str) -> RecordError:
    return RecordError("image URL failed", f"{url[:200]}: {words}", field="images")
