"""Images from the web, and hostile servers: private addresses by every road, broken answers, bombs, and bytes that drip."""

import contextlib
import datetime
import gzip
import http.server
import io
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image

from rayalign.formats.records import RecordError
from rayalign.images import fetch as fetching
from rayalign.images import urls
from rayalign.images.fetch import fetch_images
from rayalign.images.urls import is_public
from rayalign.storage import Store

PUBLIC = "93.184.216.34"


def _png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 1), (255, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


PNG = _png()


def fetch(*refs: str) -> list[bytes]:
    return fetch_images(refs, folder=Store.at("/nowhere"), image_root=None, allow_urls=True)


def failure(*refs: str) -> RecordError:
    with pytest.raises(RecordError) as caught:
        fetch(*refs)
    assert caught.value.field == "images"
    return caught.value


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        server.seen.append((self.headers["Host"], self.path))
        first = server.first.get(self.path)
        status, headers, body = first.pop(0) if first else server.answers.get(self.path, (404, {}, b""))
        time.sleep(server.delay)
        with contextlib.suppress(OSError):  # a client that hung up
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


class Server(http.server.HTTPServer):
    """On the loopback address. `answers` maps a path to (status, headers, body), each sent after `delay` seconds, and `first`
    to answers that come once each before; `seen` lists the requests; `hosts` the addresses of a name, one list a time that it
    is resolved, the last for good."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {"/a.png": (200, {}, PNG)}
        self.first: dict[str, list[tuple[int, dict[str, str], bytes]]] = {}
        self.seen: list[tuple[str, str]] = []
        self.delay = 0.0
        self.hosts: dict[str, list[list[str]]] = {"example.org": [[PUBLIC]]}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A handshake that the client breaks off is nothing to print."""

    def resolve(self, host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        times = self.hosts.get(host, [[host]])
        addresses = times.pop(0) if len(times) > 1 else times[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def public(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server as if it had a public address, and the names that it is told of; no other address is ever connected to."""
    monkeypatch.setattr(urls, "FIRST_WAIT_SECONDS", 1e-3)
    monkeypatch.setattr(socket, "getaddrinfo", server.resolve)
    monkeypatch.setattr(socket.socket, "connect", connect_to(server.server_address))
    return server


def connect_to(place: Any) -> Callable[..., None]:
    """What stands in for socket.connect: the public address lies at `place`."""
    connect = socket.socket.connect

    def connect_here(sock: socket.socket, address: Any) -> None:
        assert address[0] == PUBLIC
        connect(sock, place)

    return connect_here


PRIVATE_HOSTS = [
    "127.0.0.1",
    "localhost",
    "[::1]",
    "0.0.0.0",
    "2130706433",
    "[::ffff:127.0.0.1]",
    "169.254.169.254",
    "10.0.0.1",
    "[fe80::1]",
    "[64:ff9b::7f00:1]",
    "224.0.0.1",
]


@pytest.mark.parametrize("host", PRIVATE_HOSTS)
def test_private_addresses_are_refused_without_a_connection(server: Server, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was tried"))
    error = failure(f"http://{host}:{server.server_port}/a.png")
    assert error.reason == "image URL refused"
    assert str(error).endswith("which is no public address")
    assert server.seen == []


NOT_PUBLIC = {
    "unspecified": ["0.0.0.0", "0.1.2.3", "::"],
    "loopback": ["127.0.0.1", "127.255.0.1", "::1"],
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fd00:ec2::254"],
    "link-local": ["169.254.169.254", "fe80::1", "fe80::1%eth0", "febf::1"],
    "site-local": ["fec0::1", "feff::1"],
    "shared by a provider's customers": ["100.64.0.1", "100.100.100.200", "100.127.255.255"],
    "services of clouds": ["168.63.129.16", "192.0.0.192"],
    "protocols": ["192.0.0.1", "192.0.0.9", "192.0.0.170", "192.88.99.1", "2001:1::1", "2001:20::1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "benchmarks": ["198.18.0.1", "198.19.255.255", "2001:2::1"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"],
    "reserved": ["240.0.0.1", "255.255.255.255", "4000::1", "100::1", "5f00::1"],
    "IPv4 in IPv6, mapped": ["::ffff:127.0.0.1", "::ffff:8.8.8.8"],
    "IPv4 in IPv6, translated": ["::ffff:0:127.0.0.1", "::ffff:0:8.8.8.8"],
    "IPv4 in IPv6, compatible": ["::127.0.0.1"],
    "IPv4 in IPv6, NAT64": ["64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::10.0.0.1"],
    "IPv4 in IPv6, 6to4": ["2002:7f00:1::1", "2002:a9fe:a9fe::"],
    "IPv4 in IPv6, Teredo": ["2001::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2"],
}


@pytest.mark.parametrize("address", [address for kind in NOT_PUBLIC.values() for address in kind])
def test_only_a_single_machine_reachable_from_anywhere_is_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", PUBLIC, "100.63.255.255", "100.128.0.1", "172.32.0.1", "2606:2800:220:1::1", "2a00:1450::1"]
)
def test_addresses_of_the_open_internet_are_public(address: str) -> None:
    assert is_public(address)


def test_a_name_with_one_private_address_is_refused(public: Server) -> None:
    public.hosts["example.org"] = [[PUBLIC, "192.168.0.7"]]
    error = failure("http://example.org/a.png")
    assert str(error) == "images: example.org is 192.168.0.7, which is no public address"
    assert public.seen == []


def test_an_image_of_a_public_address_is_fetched(public: Server) -> None:
    public.answers["/a%20b.png?x=1"] = (200, {"Content-Length": str(len(PNG))}, PNG)
    assert fetch("http://example.org/a.png", "http://example.org:8080/a b.png?x=1") == [PNG, PNG]
    assert public.seen == [("example.org", "/a.png"), ("example.org:8080", "/a%20b.png?x=1")]


def test_a_name_that_becomes_private_after_the_check_is_not_asked_again(public: Server) -> None:
    public.hosts["example.org"] = [[PUBLIC], ["127.0.0.1"]]
    assert fetch("http://example.org/a.png") == [PNG]
    assert public.hosts["example.org"] == [["127.0.0.1"]]  # resolved once
    assert str(failure("http://example.org/a.png")) == "images: example.org is 127.0.0.1, which is no public address"


def test_redirects_are_followed_and_each_is_checked(public: Server) -> None:
    public.answers["/1"] = (302, {"Location": "/a.png"}, b"")
    assert fetch("http://example.org/1") == [PNG]
    public.hosts["metadata.internal"] = [["169.254.169.254"]]
    for target in (
        "http://127.0.0.1/x",
        "http://[::1]/x",
        "http://metadata.internal/x",
        "//metadata.internal/x",
        "https://metadata.internal/x",
        "file:///etc/passwd",
        "http://user@example.org/x",
        "http://@example.org/",
    ):
        public.answers["/2"] = (301, {"Location": target}, b"")
        assert failure("http://example.org/2").reason == "image URL refused"
    public.answers["/3"] = (307, {"Location": "/3"}, b"")
    assert str(failure("http://example.org/3")) == "images: http://example.org/3: more than 5 redirects"


def test_a_redirect_to_a_name_that_becomes_private_is_refused(public: Server) -> None:
    public.hosts["example.org"] = [[PUBLIC], ["10.0.0.1"]]
    public.answers["/1"] = (302, {"Location": "/a.png"}, b"")
    assert str(failure("http://example.org/1")) == "images: example.org is 10.0.0.1, which is no public address"
    assert public.seen == [("example.org", "/1")]


def test_proxies_of_the_environment_are_not_used(public: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch("http://example.org/a.png") == [PNG]


def test_responses_without_an_image_say_why(public: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    public.answers["/500"] = (500, {}, b"")
    public.answers["/304"] = (304, {}, b"")
    public.answers["/302"] = (302, {}, b"")
    public.answers["/cut"] = (200, {"Content-Length": "999"}, b"x")
    public.answers["/chunk"] = (200, {"Transfer-Encoding": "chunked"}, b"5\r\nx")
    public.answers["/big"] = (200, {}, b"x" * 200_000)
    monkeypatch.setattr(fetching, "MAX_IMAGE_BYTES", 100_000)
    paths = ("none", "500", "304", "302", "cut", "chunk", "big")
    found = [failure(f"http://example.org/{path}") for path in paths]
    failed = "image URL failed"
    assert [error.reason for error in found] == ["image missing", *[failed] * 5, "image too large"]
    assert str(found[1]) == "images: http://example.org/500: HTTP 500"
    assert str(found[4]) == "images: http://example.org/cut: cut off after 1 bytes"


CUT = (200, {"Content-Length": str(len(PNG))}, PNG[:20])


@pytest.mark.parametrize("answer", [(status, {}, b"") for status in (429, 500, 502, 503, 504)] + [CUT])
def test_a_server_in_trouble_is_asked_again(public: Server, answer: tuple[int, dict[str, str], bytes]) -> None:
    public.first["/a.png"] = [answer] * 2
    assert fetch("http://example.org/a.png") == [PNG]
    assert len(public.seen) == 3
    public.first["/a.png"] = [answer] * 3
    assert failure("http://example.org/a.png").reason == "image URL failed"
    assert len(public.seen) == 6


def test_a_connection_that_is_reset_is_made_again(public: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    connect, failures = socket.socket.connect, [ConnectionResetError(104, "reset"), ConnectionRefusedError(111, "refused")]

    def fail_first(sock: socket.socket, address: Any) -> None:
        if failures:
            raise failures.pop()
        connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", fail_first)
    assert fetch("http://example.org/a.png") == [PNG]
    assert not failures


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_an_answer_that_will_not_change_is_not_asked_for_again(public: Server, status: int) -> None:
    public.answers["/a.png"] = (status, {}, b"")
    failure("http://example.org/a.png")
    assert len(public.seen) == 1


@pytest.mark.parametrize(("number", "times"), [(socket.EAI_NONAME, 1), (socket.EAI_AGAIN, 3)])
def test_a_name_that_does_not_exist_is_not_asked_for_again(
    public: Server, monkeypatch: pytest.MonkeyPatch, number: int, times: int
) -> None:
    asked = []

    def nowhere(host: str, *_: Any, **__: Any) -> Any:
        asked.append(host)
        raise socket.gaierror(number, "no address")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    assert failure("http://example.org/a.png").reason == "image URL failed"
    assert len(asked) == times


def test_no_wait_goes_past_the_time_of_a_record(public: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "FIRST_WAIT_SECONDS", 100)
    public.answers["/a.png"] = (503, {}, b"")
    assert str(failure("http://example.org/a.png")) == "images: http://example.org/a.png: HTTP 503"
    assert len(public.seen) == 1


def test_a_compressed_body_is_refused_and_never_unpacked(public: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip.compress(bytes(10_000_000))
    public.answers["/bomb"] = (200, {"Content-Encoding": "gzip"}, bomb)
    monkeypatch.setattr("zlib.decompressobj", lambda *_: pytest.fail("it was unpacked"))
    words = "images: http://example.org/bomb: sent as gzip, which was not asked for"
    assert str(failure("http://example.org/bomb")) == words


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://[",
        "http://example.org:99999999/",
        "http://a..b/",
        "http://example.org/\r\nX: y",
        "http://example.org\\@127.0.0.1/",
        "http://\ud800/",
        f"http://{'a' * 300}/",
        "https://u@example.org/",
    ],
)
def test_broken_urls_are_errors_of_their_record(public: Server, url: str) -> None:
    assert failure(url).reason in ("image URL refused", "image URL failed", "image missing")


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\nX: ",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e7\r\n",
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_server_that_drips_is_hung_up_on(
    monkeypatch: pytest.MonkeyPatch, certificate: Callable[[str], ssl.SSLContext], start: bytes, scheme: str
) -> None:
    monkeypatch.setattr(fetching, "URL_SECONDS", 0.3)
    context = certificate("example.org") if scheme == "https" else None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = {"example.org": PUBLIC}
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, *_, **__: [(2, 1, 6, "", (here.get(host, host), port))])
        monkeypatch.setattr(socket.socket, "connect", connect_to(listener.getsockname()))
        done = threading.Event()

        def drip() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                stream = context.wrap_socket(connection, server_side=True) if context else connection
                with stream:
                    stream.recv(1000)
                    stream.sendall(start)
                    for _ in range(200):
                        stream.sendall(b"x")
                        if done.wait(0.02):
                            return

        thread = threading.Thread(target=drip)
        thread.start()
        began = time.monotonic()
        assert failure(f"{scheme}://example.org/a.png").reason == "image URL failed"
        assert time.monotonic() - began < 2
        done.set()
        thread.join()


def test_all_urls_of_a_record_share_one_limit_of_time(public: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    public.delay = 0.3
    monkeypatch.setattr(fetching, "URL_SECONDS", 0.7)
    assert fetch("http://example.org/a.png") == [PNG]
    error = failure(*["http://example.org/a.png"] * 9)
    assert error.reason == "image URL failed"
    assert len(public.seen) <= 1 + 3


@pytest.fixture
def certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ssl.SSLContext]:
    """Makes a server's side of TLS with a certificate for a name, which this process then trusts."""

    def make(name: str, *, trusted: bool = True) -> ssl.SSLContext:
        key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
        alternative: x509.GeneralName = x509.DNSName(name)
        with contextlib.suppress(ValueError):
            alternative = x509.IPAddress(ipaddress.ip_address(name))
        signed = (
            x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
            .sign(key, hashes.SHA256())
        )
        file, key_file = tmp_path / "certificate.pem", tmp_path / "key.pem"
        file.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        monkeypatch.setenv("SSL_CERT_FILE", str(file) if trusted else "/nowhere")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(file, key_file)
        return context

    return make


def serve_tls(server: Server, context: ssl.SSLContext) -> Sequence[str | None]:
    """Wraps a server's socket; the names that clients ask for."""
    asked: list[str | None] = []
    context.sni_callback = lambda _, name, __: asked.append(name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return asked


def test_https_is_verified_with_the_name_in_the_url(public: Server, certificate: Callable[..., ssl.SSLContext]) -> None:
    asked = serve_tls(public, certificate("example.org"))
    assert fetch("https://example.org/a.png") == [PNG]
    assert asked == ["example.org"]
    assert public.seen == [("example.org", "/a.png")]
    public.hosts["other.org"] = [[PUBLIC]]
    error = failure("https://other.org/a.png")
    assert error.reason == "image URL failed"
    assert "certificate is not valid for 'other.org'" in str(error)
    assert len(public.seen) == 1


def test_an_address_in_an_https_url_must_be_in_the_certificate(
    public: Server, certificate: Callable[..., ssl.SSLContext]
) -> None:
    serve_tls(public, certificate(PUBLIC))
    assert fetch(f"https://{PUBLIC}/a.png") == [PNG]
    assert "certificate is not valid for 'example.org'" in str(failure("https://example.org/a.png"))


def test_a_certificate_of_nobody_known_is_refused(public: Server, certificate: Callable[..., ssl.SSLContext]) -> None:
    serve_tls(public, certificate("example.org", trusted=False))
    error = failure("https://example.org/a.png")
    assert error.reason == "image URL failed"
    assert "certificate verify failed" in str(error)
    assert public.seen == []
