"""The service, over real sockets on loopback."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pyarrow.flight as fl
import pytest
from forked import ALWAYS, FORKS
from small_store import fill

from gstds_cache.config import SelectConfig
from gstds_cache.errors import (
    FingerprintMismatchError,
    ProducerFailedError,
    StoreUnavailableError,
    TruncatedStreamError,
    UsageError,
)
from gstds_cache.files import mapped
from gstds_cache.selection.run import BatchSelector
from gstds_cache.store.reader import EmbeddingStore
from gstds_cache.stream.flight_client import FlightSource
from gstds_cache.stream.flight_server import SelectionService
from gstds_cache.stream.hub import Hub
from gstds_cache.stream.reader import SelectionStream, open_selection
from gstds_cache.stream.security import Access, is_loopback, parse_address
from gstds_cache.stream.tickets import LIMIT, Ticket
from gstds_cache.stream.writer import write_file

CONFIG = SelectConfig(batch_size=8, epochs=30, knn=3, guidance="none", device="cpu")
TOKEN = "0123456789abcdef0123"


class Slow(BatchSelector):
    """Computes as slowly as the test says, and counts what it computed."""

    computed: list[int]
    delay, fail_at = 0.0, -1

    def run(self, start: int = 0):
        for selection in super().run(start):
            if selection.seq == self.fail_at:
                raise ZeroDivisionError("the reason")
            time.sleep(self.delay)
            type(self).computed.append(selection.seq)
            yield selection


@pytest.fixture(autouse=True)
def _slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gstds_cache.stream.flight_server.BatchSelector", Slow)
    monkeypatch.setattr(Slow, "computed", [], raising=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    where = tmp_path_factory.mktemp("flight") / "store"
    fill(where)
    return EmbeddingStore(where)


@pytest.fixture(scope="module")
def reference(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    path = tmp_path_factory.mktemp("reference") / "s.arrow"
    list(write_file(BatchSelector(store, CONFIG), path))
    with open_selection(path) as stream:
        return kept(stream)


def kept(stream: SelectionStream) -> list[list[int]]:
    return [selection.kept.tolist() for selection in stream]


class Running:
    def __init__(self, store: EmbeddingStore, folder: Path, access: Access | None = None, scheme: str = "grpc") -> None:
        self.events: list[tuple[str, dict[str, object]]] = []
        log = lambda event, **fields: self.events.append((event, fields))  # noqa: E731
        self.hub = Hub(folder, log=log)
        self.service = SelectionService(f"{scheme}://127.0.0.1:0", store, CONFIG, self.hub, access or Access(), log=log)
        self.where = f"{scheme}://127.0.0.1:{self.service.port}"

    def wait_for(self, event: str) -> dict[str, object]:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for name, fields in self.events:
                if name.startswith(event):
                    return fields
            time.sleep(0.02)
        raise AssertionError(f"no {event} in {self.events}")

    def close(self) -> None:
        self.service.stopping = True
        self.hub.stop()
        self.service.shutdown()


@pytest.fixture
def running(store: EmbeddingStore, tmp_path: Path) -> Iterator[Running]:
    with closing(Running(store, tmp_path / "selections")) as made:
        yield made


def test_a_selection_is_computed_once_and_shared_by_all_readers(running: Running, reference, monkeypatch) -> None:
    monkeypatch.setattr(Slow, "delay", 0.01)
    seen: dict[int, list[list[int]]] = {}

    def read(number: int) -> None:
        with open_selection(running.where) as stream:
            seen[number] = kept(stream)

    with open_selection(running.where) as stalled:  # this one takes the first batch, and then no more
        next(iter(stalled))
        threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
            time.sleep(0.1)  # the second and third come in the middle
        for thread in threads:
            thread.join(60)
        assert [seen[number] for number in range(3)] == [reference] * 3
        assert Slow.computed == list(range(len(reference)))
        assert len(kept(stalled)) == len(reference) - 1
    with open_selection(running.where) as later:  # now from the disk
        assert kept(later) == reference
    assert Slow.computed == list(range(len(reference)))
    assert [event for event, _ in running.events].count("computing") == 1


def test_resume_by_token_at_batches_and_epoch_ends(running: Running, reference) -> None:
    for first in (0, 1, 2, 3, 4, 31, len(reference)):  # 3 batches an epoch
        with open_selection(running.where) as stream:
            seen = [next(iter(stream)).kept.tolist() for _ in range(first)]
            token = stream.token()
        with open_selection(running.where, resume=token) as stream:
            assert stream.next_seq == first
            assert seen + kept(stream) == reference
    assert any(fields.get("start") == 31 and fields["records"] < 90 for _, fields in running.events)
    with open_selection(running.where) as stream:
        next(iter(stream))
        token = stream.token()
    with closing(FlightSource(running.where, start=token)) as source, pytest.raises(FingerprintMismatchError):
        SelectionStream(source, resume=type(token)(**{**token.as_dict(), "selection_digest": "0" * 64}))
    other = type(token)(**{**token.as_dict(), "selection_digest": "0" * 64})
    with pytest.raises(FingerprintMismatchError, match="another selection"):
        open_selection(running.where, resume=other)


def test_a_killed_reader_goes_on_by_its_token(running: Running, reference, tmp_path: Path) -> None:
    program = (
        "import json, sys, time; from gstds_cache.stream.reader import open_selection\n"
        "stream = open_selection(sys.argv[1])\n"
        "for selection in stream:\n"
        "    print(json.dumps([selection.kept.tolist(), stream.token().as_dict()]), flush=True); time.sleep(0.01)\n"
    )
    words = [FORKS.executable(), "-c", program, running.where]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=os.environ | ALWAYS) as reader:
        lines = [json.loads(reader.stdout.readline()) for _ in range(20)]
        reader.send_signal(signal.SIGKILL)
    from gstds_cache.stream.resume import ResumeToken

    with open_selection(running.where, resume=ResumeToken.parse(lines[-1][1])) as stream:
        assert [rows for rows, _ in lines] + kept(stream) == reference


def test_a_computation_ends_when_its_last_reader_leaves_and_is_taken_up_again(running: Running, reference, monkeypatch):
    monkeypatch.setattr(Slow, "delay", 0.05)
    with open_selection(running.where) as one:
        two = open_selection(running.where)
        next(iter(two))
        two.close()
        next(iter(one))
        time.sleep(0.5)
        assert not any(event.startswith("stopped") for event, _ in running.events)  # another still reads it
    running.wait_for("stopped: its last reader left")
    time.sleep(0.3)
    computed = list(Slow.computed)
    assert 0 < len(computed) < len(reference)
    monkeypatch.setattr(Slow, "delay", 0.0)
    with open_selection(running.where) as again:
        assert kept(again) == reference
    assert Slow.computed == list(range(len(reference)))  # nothing twice


def test_a_failed_computation_is_an_error_to_every_reader(running: Running, monkeypatch) -> None:
    monkeypatch.setattr(Slow, "fail_at", 5)
    with open_selection(running.where) as stream, pytest.raises(ProducerFailedError, match="the reason"):
        kept(stream)


def test_a_slow_reader_holds_no_selector(store, reference, tmp_path: Path, monkeypatch) -> None:
    files, make = [], mapped.tempfile.TemporaryFile
    monkeypatch.setattr(mapped.tempfile, "TemporaryFile", lambda **how: files.append(make(**how)) or files[-1])
    hub, selectors = Hub(tmp_path / "s"), [BatchSelector(store, CONFIG)]
    held, digest = weakref.ref(selectors[0]), selectors[0].digest
    _, batches = hub.batches(digest, selectors.pop, 0, lambda: True)
    sizes = [next(batches).num_rows]
    deadline = time.monotonic() + 20
    while (hub.running or held() is not None) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (hub.running, held(), [file.closed for file in files]) == (0, None, [True])
    assert sum(sizes + [batch.num_rows for batch in batches]) == len(reference) + 30 + 1  # epoch ends, stream end
    hub.stop()


def wait_until_idle(hub: Hub) -> None:
    deadline = time.monotonic() + 20
    while hub.running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert hub.running == 0


@pytest.mark.parametrize("end", [lambda reader: reader.close(), lambda _reader: None], ids=["closed", "dropped"])
def test_a_reader_that_leaves_before_its_first_batch_ends_its_computation(store, tmp_path, monkeypatch, end) -> None:
    monkeypatch.setattr(Slow, "delay", 0.1)  # 90 batches would take 9 s
    hub, selector = Hub(tmp_path / "s"), Slow(store, CONFIG)
    _, reader = hub.batches(selector.digest, lambda: selector, 0, lambda: True)
    assert hub.running == 1
    end(reader)
    del reader
    wait_until_idle(hub)
    assert len(Slow.computed) < 80


def test_a_stream_that_is_cancelled_before_its_first_batch_ends_its_computation(running: Running, store, monkeypatch):
    monkeypatch.setattr(Slow, "delay", 0.1)
    selector = Slow(store, CONFIG)
    _, reader = running.hub.batches(selector.digest, lambda: selector, 0, lambda: True)
    stream = running.service._send(reader, selector.digest, 0, 0.0)  # what Flight drops without asking for a batch
    del reader, stream
    wait_until_idle(running.hub)
    assert len(Slow.computed) < 80


def test_a_service_that_stops_says_so_and_keeps_what_it_has(store, tmp_path, reference, monkeypatch) -> None:
    monkeypatch.setattr(Slow, "delay", 0.05)
    with closing(Running(store, tmp_path / "s")) as first:
        stream = open_selection(first.where)
        seen = [next(iter(stream)).kept.tolist() for _ in range(4)]
        token = stream.token()
        first.service.stopping = True
        first.hub.stop()
        with pytest.raises(
            TruncatedStreamError, match=r"run goes on with `resume=True`, and a sampler with sampler.seek\("
        ):
            kept(stream)
        stream.close()
    before = list(Slow.computed)
    monkeypatch.setattr(Slow, "delay", 0.0)
    with closing(Running(store, tmp_path / "s")) as second, open_selection(second.where, resume=token) as rest:
        assert seen + kept(rest) == reference
    assert Slow.computed == list(range(len(reference)))
    assert len(before) < len(reference)


def test_listing_and_health(running: Running, reference) -> None:
    with open_selection(running.where) as stream:
        assert kept(stream) == reference
        digest = stream.header.selection_digest
    with fl.FlightClient(running.where) as client:
        deadline = time.monotonic() + 10
        while not (flights := list(client.list_flights())) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [info.total_records for info in flights] == [len(reference)]
        ticket = Ticket.parse(flights[0].endpoints[0].ticket.ticket)
        assert ticket.digest == digest
        health = json.loads(next(client.do_action("health")).body.to_pybytes())
        assert (health["status"], health["selection_digest"]) == ("serving", digest)
        info = client.get_flight_info(
            fl.FlightDescriptor.for_command(b'{"select": {"epochs": 2, "batch_size": 8, "knn": 3}}')
        )
        assert info.total_records == 6
    with open_selection(f"{running.where}/{digest[:8]}") as stream:
        assert kept(stream) == reference
    settings = {"epochs": 2, "batch_size": 8, "knn": 3, "draw": "adaptive", "schedule": "constant:0.5"}
    for reference in ("raw", "by-class"):
        ticket = Ticket(select=settings | {"reference": reference})
        stream = SelectionStream(FlightSource(running.where, ticket=ticket))
        assert stream.header.settings.get("reference", "raw") == reference
        stream.close()
    settings = {"epochs": 2, "batch_size": 8, "knn": 3, "rule": "random", "schedule": "constant:0.5"}
    stream = SelectionStream(FlightSource(running.where, ticket=Ticket(select=settings)))
    assert stream.header.settings["rule"] == "random"
    assert len(kept(stream)) == 6
    stream.close()


@pytest.mark.parametrize("order", ["permutation", "class-balanced", "window", "window:4096"])
def test_every_order_may_be_asked_for(order: str) -> None:
    assert Ticket.parse(Ticket(select={"order": order}).to_bytes()).select == {"order": order}


BAD_TICKETS = [
    (b"x" * (LIMIT + 1), "bytes, expected at most"),
    (b"{", "no JSON"),
    (b"\xff\xfe", "no JSON"),
    (b"[" * 4000, "no JSON"),
    (b"[]", "expected an object"),
    (b'{"path": "/etc/passwd"}', "unknown field 'path'"),
    (b'{"digest": "../../etc"}', "8 to 64 hexadecimal"),
    (b'{"digest": "01234567"}', "0 selections"),
    (b'{"digest": 5}', "8 to 64 hexadecimal"),
    (b'{"digest": "01234567", "select": {}}', "twice"),
    (b'{"select": {"rule": "os:system"}}', "may not be asked for"),
    (b'{"select": {"rule": "nosuch"}}', "unknown rule"),
    (b'{"select": {"schedule": "file:/etc/passwd"}}', "may not be asked for"),
    (b'{"select": {"order": "file:/etc/passwd"}}', "may not be asked for"),
    (b'{"select": {"order": "alphabetical"}}', "may not be asked for"),
    (b'{"select": {"epochs": 1e9}}', "may not be asked for"),
    (b'{"select": {"epochs": 99999999}}', "may not be asked for"),
    (b'{"select": {"batch_size": 9999}}', "only 21 rows"),
    (b'{"select": {"device": "cuda"}}', "unknown field"),
    (b'{"start": {"next_seq": 1}}', "no resume token"),
    (b'{"start": 7}', "no resume token"),
]


@pytest.mark.parametrize(
    ("data", "words"), BAD_TICKETS, ids=[data[:40].decode(errors="replace") for data, _ in BAD_TICKETS]
)
def test_a_bad_ticket_is_refused_and_the_service_goes_on(shared: Running, data: bytes, words: str) -> None:
    with fl.FlightClient(shared.where) as client:
        with pytest.raises(fl.FlightServerError) as caught:
            client.do_get(fl.Ticket(data)).read_all()
        assert words in str(caught.value)
        assert "Traceback" not in str(caught.value)
        assert json.loads(next(client.do_action("health")).body.to_pybytes())["status"] == "serving"


@pytest.fixture(scope="module")
def shared(store: EmbeddingStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with closing(Running(store, tmp_path_factory.mktemp("shared"), Access(token=None))) as made:
        yield made


def test_a_wrong_address_and_a_service_that_is_not_there(monkeypatch) -> None:
    for where in ("grpc://nowhere", "grpc://127.0.0.1:1/../x", "grpc://127.0.0.1:1/xyz"):
        with pytest.raises(UsageError, match="expected grpc://HOST:PORT"):
            open_selection(where)
    with pytest.raises(StoreUnavailableError, match="does not answer"):
        open_selection("grpc://127.0.0.1:1")


# Who is let in


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.0.1", "::", "[::]", "example.org"])
def test_other_addresses_than_loopback_need_tls_and_a_token(host: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text(TOKEN)
    for token in (None, tmp_path / "t"):
        with pytest.raises(UsageError, match="`tls_cert`, `tls_key` and `token_file`"):
            Access.from_files(host, certificate=None, key=None, token=token, client_ca=None)
    assert not is_loopback(host)
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]")))


def test_half_a_protection_is_refused(tmp_path: Path) -> None:
    none = {"certificate": None, "key": None, "token": None, "client_ca": None}
    (tmp_path / "short").write_text("abc\n")
    for change, words in (
        ({"certificate": tmp_path / "c"}, "belong together"),
        ({"client_ca": tmp_path / "c"}, "`client_ca` needs"),
        ({"token": tmp_path / "no"}, "No such file"),
        ({"token": tmp_path / "short"}, "holds no token"),
    ):
        with pytest.raises(UsageError, match=words):
            Access.from_files("127.0.0.1", **(none | change))
    for text in ("127.0.0.1", "127.0.0.1:", ":80", "127.0.0.1:99999", "127.0.0.1:x"):
        with pytest.raises(UsageError, match="HOST:PORT"):
            parse_address(text)


def test_no_token_and_a_wrong_token_are_refused(store, tmp_path, reference, monkeypatch) -> None:
    with closing(Running(store, tmp_path / "s", Access(token=TOKEN))) as running:
        with pytest.raises(UsageError, match="asks for a token"):
            open_selection(running.where)
        (tmp_path / "wrong").write_text(TOKEN[::-1])
        (tmp_path / "right").write_text(TOKEN + "\n")
        monkeypatch.setenv("GSTDS_TOKEN_FILE", str(tmp_path / "wrong"))
        with pytest.raises(UsageError, match="asks for a token"):
            open_selection(running.where)
        with fl.FlightClient(running.where) as client, pytest.raises(fl.FlightUnauthenticatedError):
            list(client.list_flights())
        with fl.FlightClient(running.where) as client, pytest.raises(fl.FlightUnauthenticatedError):
            list(client.do_action("health"))
        monkeypatch.setenv("GSTDS_TOKEN_FILE", str(tmp_path / "right"))
        with open_selection(running.where) as stream:
            assert kept(stream) == reference
        assert [fields["reason"] for event, fields in running.events if event == "refused"] == [
            "no token", "wrong token", "no token", "no token"]  # fmt: skip


def make_certificates(folder: Path) -> None:
    """A CA, and certificates of it for a server on 127.0.0.1 and for a client; a client's of a CA of its own."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)

    def sign(name: str, by=None, ca: bool = False):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer, signer = (subject, key) if by is None else (by[0].subject, by[1])
        names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca, None), critical=True)
            .add_extension(names, critical=False)
        )
        certificate = builder.sign(signer, hashes.SHA256())
        (folder / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate, key

    ca, stranger_ca = sign("ca", ca=True), sign("stranger-ca", ca=True)
    sign("server", ca)
    sign("client", ca)
    sign("stranger", stranger_ca)


def test_tls_a_token_and_client_certificates(store, tmp_path, reference, monkeypatch) -> None:
    make_certificates(tmp_path)
    (tmp_path / "token").write_text(TOKEN)
    access = Access.from_files(
        "0.0.0.0",  # what any other machine would reach is allowed with these
        certificate=tmp_path / "server.pem",
        key=tmp_path / "server.key",
        token=tmp_path / "token",
        client_ca=tmp_path / "ca.pem",
    )
    monkeypatch.setenv("GSTDS_TOKEN_FILE", str(tmp_path / "token"))
    with closing(Running(store, tmp_path / "s", access, "grpc+tls")) as running:
        certificates = {"GSTDS_TLS_CA": "ca.pem", "GSTDS_TLS_CERT": "client.pem", "GSTDS_TLS_KEY": "client.key"}

        def attempt(**changes: str | None) -> list[list[int]]:
            with monkeypatch.context() as context:
                for name, value in (certificates | changes).items():
                    context.setenv(name, str(tmp_path / value)) if value else context.delenv(name, raising=False)
                with open_selection(running.where) as stream:
                    return kept(stream)

        assert attempt() == reference
        for changes in (
            {"GSTDS_TLS_CA": "stranger-ca.pem"},
            {"GSTDS_TLS_CERT": None, "GSTDS_TLS_KEY": None},
            {"GSTDS_TLS_CERT": "stranger.pem", "GSTDS_TLS_KEY": "stranger.key"},
        ):
            with pytest.raises(StoreUnavailableError, match="does not answer"):
                attempt(**changes)
        with pytest.raises(StoreUnavailableError):
            open_selection(running.where.replace("grpc+tls", "grpc"))


# The command


def test_the_command_serves_metrics_and_stops_on_sigterm_while_a_reader_stalls(tmp_path: Path) -> None:
    fill(tmp_path / "store")
    words = [Path(sys.executable).with_name("gstds-select"), "store", "--batch-size", "8", "--knn", "3", "--epochs",
             "1000", "--rule", "random", "--serve", "127.0.0.1:0", "--metrics-port", "0"]  # fmt: skip
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(
                words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        )
        stack.callback(process.kill)
        events = []
        for line in process.stderr:
            if line.startswith("{"):
                events.append(json.loads(line))
                if events[-1]["event"] == "serving":
                    break
        where, metrics = events[-1]["location"], events[-1]["metrics"]

        def peak() -> int:
            text = urllib.request.urlopen(metrics, timeout=10).read().decode()
            assert "# TYPE gstds_streams_active gauge" in text
            return next(
                int(line.split()[1]) for line in text.splitlines() if line.startswith("gstds_peak_memory_bytes ")
            )

        stalled = open_selection(where)
        next(iter(stalled))
        with open_selection(where) as stream:
            for _ in range(500):
                next(iter(stream))
            before = peak()
            rest = kept(stream)
        assert len(rest) == 3000 - 500
        assert peak() - before < 30 << 20
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 0, errors
        names = [json.loads(line)["event"] for line in errors.splitlines() if line.startswith("{")]
        assert names[-1] == "stopped"
        assert "computed" in names
        assert "Traceback" not in errors
        stalled.close()
    assert len(list((tmp_path / "store.selections").glob("*.arrow"))) == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--serve", "0.0.0.0:0"], "--tls-cert, --tls-key and --token-file"),
        (["--serve", "127.0.0.1:0", "--out", "x"], "no --out"),
        (["--token-file", "x"], "needs --serve"),
        (["--metrics-port", "0"], "needs --serve"),
        (["--serve", "8815"], "HOST:PORT"),
    ],
    ids=str,
)
def test_flags_that_do_not_go_together(store: EmbeddingStore, words, expected, tmp_path: Path) -> None:
    from click.testing import CliRunner
    from gstds_cache.cli.select_command import main

    fill(tmp_path / "store")
    done = CliRunner().invoke(main, [str(tmp_path / "store"), "--batch-size", "8", "--knn", "3", *words])
    assert done.exit_code == 2
    assert expected in done.stderr
