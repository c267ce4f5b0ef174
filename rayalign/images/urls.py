"""Downloads an image of a record over http(s) from public addresses only; `images` calls it where URLs are allowed.

A record's URL is hostile input: without these checks it could make a worker query the cluster's own services.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from rayalign.formats.records import RecordError

TIMEOUT_SECONDS = 10
TOTAL_SECONDS = 60
MAX_REDIRECTS = 5
BLOCK_BYTES = 2**16
HEADERS = {"User-Agent": "rayalign", "Accept": "image/*", "Accept-Encoding": "identity"}
URL_SIGNS = "/%:=&?~+!$,;'@()*[]"
"""Characters of a URL that stay as they are; others, such as spaces and accents, are percent-encoded."""


def fetch_url(url: str, *, max_bytes: int) -> bytes:
    """The body of a URL. Raises RecordError; each redirect is checked like the first address."""
    deadline = time.monotonic() + TOTAL_SECONDS
    target = url
    try:
        for _ in range(MAX_REDIRECTS + 1):
            answer = _get(target, deadline=deadline, max_bytes=max_bytes)
            if isinstance(answer, bytes):
                return answer
            target = urljoin(target, answer[0])
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError("image URL failed", f"{url[:200]}: {error or type(error).__name__}", field="images") from None
    raise RecordError("image URL failed", f"{url[:200]}: more than {MAX_REDIRECTS} redirects", field="images")


def _get(url: str, *, deadline: float, max_bytes: int) -> bytes | tuple[str]:
    """One request: the body, or where it redirects to."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise RecordError("image URL refused", f"{url[:200]}: only http(s)://host/path, without credentials", field="images")
    connection, sock = _connect(parts, parts.hostname)
    watchdog = threading.Timer(deadline - time.monotonic(), _hang_up, [sock])
    watchdog.daemon = True
    watchdog.start()
    try:
        path = quote(parts.path or "/", safe=URL_SIGNS)
        query = f"?{quote(parts.query, safe=URL_SIGNS)}" if parts.query else ""
        connection.request("GET", path + query, headers=HEADERS)
        with connection.getresponse() as response:
            location = response.getheader("Location")
            if response.status in (301, 302, 303, 307, 308) and location:
                return (location,)
            if response.status in (404, 410):
                raise RecordError("image missing", f"{url[:200]}: HTTP {response.status}", field="images")
            if response.status != 200:
                raise RecordError("image URL failed", f"{url[:200]}: HTTP {response.status}", field="images")
            content = bytearray()
            while block := response.read1(BLOCK_BYTES):
                content += block
                if len(content) > max_bytes:
                    raise RecordError("image too large", f"{url[:200]}: more than {max_bytes // 2**20} MiB", field="images")
            if response.length or time.monotonic() > deadline:
                raise RecordError("image URL failed", f"{url[:200]}: cut off after {len(content)} bytes", field="images")
            return bytes(content)
    finally:
        watchdog.cancel()
        connection.close()


def _hang_up(sock: socket.socket) -> None:
    """Ends a transfer past its deadline, however slowly the server drips; the reader then sees the end of the stream."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _connect(parts: SplitResult, host: str) -> tuple[http.client.HTTPConnection, socket.socket]:
    """A connection to the very address that was checked, so that the name can't be resolved anew to another one."""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    sock = socket.create_connection((_public_address(host, port), port), timeout=TIMEOUT_SECONDS)
    connection = http.client.HTTPConnection(host, port)
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(host, port, context=context)
        try:
            sock = context.wrap_socket(sock, server_hostname=host)
        except BaseException:
            sock.close()
            raise
    connection.sock = sock
    return connection, sock


def _public_address(host: str, port: int) -> str:
    """The first address of a host; raises RecordError unless all of them are public."""
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    private = [address for address in addresses if not is_public(address)]
    if private or not addresses:
        raise RecordError("image URL refused", f"{host} is {', '.join(private)}, which is no public address", field="images")
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether an IP address is of the open Internet: not private, loopback, link-local, multicast, nor IPv4 wrapped in IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    wrapped = ip.version == 6 and any(ip in network for network in _WRAPPERS)
    return ip.is_global and not ip.is_multicast and not wrapped


_WRAPPERS = tuple(
    map(ipaddress.IPv6Network, ("::ffff:0:0/96", "::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))
)
