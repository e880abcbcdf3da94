"""A bucket under faults: each test breaks real requests, and asserts that it did."""

from __future__ import annotations

import math
import os
import pickle
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from forked import FORKS
from s3_api import BUCKET, FaultProxy, S3Server, stored

from gstds_cache.errors import EXIT_INCOMPLETE, StoreUnavailableError, UsageError
from gstds_cache.files import bucket as bucket_module
from gstds_cache.files.location import Location
from gstds_cache.store import objects
from gstds_cache.store.factory import open_transport
from gstds_cache.store.objects import ObjectTransport

Faulty = tuple[str, FaultProxy]
Act = Callable[[ObjectTransport], object]


def bucket(where: str) -> ObjectTransport:
    return ObjectTransport(Location.parse(where))


OPERATIONS: dict[str, tuple[str, Act, object]] = {
    "exists": ("HEAD", lambda t: t.exists("a"), True),
    "get": ("GET", lambda t: t.get("a"), b"1"),
    "pieces": ("GET", lambda t: list(t.pieces("a")), [b"1"]),
    "get_many": ("GET", lambda t: t.get_many(["a", "a"]), [b"1", b"1"]),
    "sizes": ("GET", lambda t: t.sizes(), {"a": 1}),
    "put": ("PUT", lambda t: t.put("a", b"1"), None),
    "put_if_absent": ("PUT", lambda t: t.put_if_absent("b", b"2"), True),
    "delete": ("", lambda t: t.delete("c"), None),
}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up after a few quick tries."""
    monkeypatch.setitem(bucket_module.RETRY, "max_retries", 6)
    monkeypatch.setitem(
        bucket_module.RETRY,
        "backoff",
        {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=20), "base": 2},
    )


# What passes by itself


@pytest.mark.parametrize("action", ["slow_down", "reset", "lose"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_burst_of_faults_is_survived(faulty_s3: Faulty, operation: str, action: str) -> None:
    where, proxy = faulty_s3
    transport = bucket(where)
    transport.put("a", b"1")
    method, act, expected = OPERATIONS[operation]
    fault = proxy.inject(action, method=method, times=4)
    assert act(transport) == expected
    assert fault.hits == 4


def test_half_an_answer_is_read_again(faulty_s3: Faulty) -> None:
    where, proxy = faulty_s3
    transport = bucket(where)
    data = os.urandom(1 << 20)
    transport.put("a", data)
    fault = proxy.inject("truncate", method="GET", times=2)
    assert transport.get("a") == data
    assert fault.hits == 2


def test_get_many_reads_at_once(faulty_s3: Faulty) -> None:
    where, proxy = faulty_s3
    transport = bucket(where)
    keys = [f"k{number}" for number in range(8)]
    for key in keys:
        transport.put(key, key.encode())
    fault = proxy.inject("delay", method="GET", times=8, seconds=0.4)
    began = time.monotonic()
    assert transport.get_many(keys) == [key.encode() for key in keys]
    assert fault.hits == 8
    assert time.monotonic() - began < 8 * 0.4


def test_a_service_that_never_answers(faulty_s3: Faulty) -> None:
    where, proxy = faulty_s3
    transport = bucket(where)
    transport.put("a", b"1")
    fault = proxy.inject("slow_down", times=math.inf)
    for _, act, _ in OPERATIONS.values():
        with pytest.raises(StoreUnavailableError, match="503 Service Unavailable") as caught:
            act(transport)
        assert "run the same command again" in caught.value.hint
        assert caught.value.exit_code == EXIT_INCOMPLETE
        assert caught.value.message.startswith(where)
        assert pickle.loads(pickle.dumps(caught.value)).message == caught.value.message
    assert fault.hits >= 7 * len(OPERATIONS)


def test_nobody_listens(s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreUnavailableError, match="http://127.0.0.1:9") as caught:
        bucket(s3_prefix).get("a")
    assert "AWS_ENDPOINT_URL" in caught.value.hint


# Conditional writes


def test_the_api_of_these_tests_honours_conditions(s3_server: S3Server) -> None:
    path = f"/{BUCKET}/conditions/a"
    assert s3_server.request("PUT", path, b"1", If_None_Match="*")[0] == 200
    assert s3_server.request("PUT", path, b"2", If_None_Match="*")[0] == 412
    assert s3_server.request("GET", path) == (200, b"1")


def test_a_lost_response_is_no_conflict(faulty_s3: Faulty, s3_server: S3Server) -> None:
    where, proxy = faulty_s3
    fault = proxy.inject("lose", method="PUT")
    assert bucket(where).put_if_absent("commit", b"ours") is True
    assert fault.hits == 1
    # It was tried again and refused, on account of itself; then it was read.
    assert (proxy.count("PUT", "commit"), proxy.count("GET", "commit")) == (2, 1)
    assert stored(s3_server, where, "commit") == b"ours"


def test_every_response_is_lost(faulty_s3: Faulty, s3_server: S3Server) -> None:
    where, proxy = faulty_s3
    fault = proxy.inject("lose", method="PUT", times=math.inf)
    assert bucket(where).put_if_absent("commit", b"ours") is True
    assert fault.hits == proxy.count("PUT") == 7
    assert stored(s3_server, where, "commit") == b"ours"


def test_a_lost_response_hides_no_conflict(faulty_s3: Faulty, s3_server: S3Server) -> None:
    where, proxy = faulty_s3
    bucket(where).put("commit", b"theirs")
    fault = proxy.inject("lose", method="PUT", times=2)
    assert bucket(where).put_if_absent("commit", b"ours") is False
    assert fault.hits == 2
    assert stored(s3_server, where, "commit") == b"theirs"


def test_every_request_is_lost(faulty_s3: Faulty, s3_server: S3Server) -> None:
    where, proxy = faulty_s3
    fault = proxy.inject("reset", method="PUT", times=math.inf)
    with pytest.raises(StoreUnavailableError):
        bucket(where).put_if_absent("commit", b"ours")
    assert fault.hits == 7
    assert proxy.count("GET", "commit") == 1
    assert stored(s3_server, where, "commit") is None


def test_another_conditional_write_is_under_way(faulty_s3: Faulty, s3_server: S3Server) -> None:
    where, proxy = faulty_s3
    fault = proxy.inject("conflict", method="PUT", times=2)  # 409: nothing is there yet, and the write must be repeated
    assert bucket(where).put_if_absent("commit", b"ours") is True
    assert fault.hits == 2
    assert stored(s3_server, where, "commit") == b"ours"


def test_there_is_always_another_under_way(faulty_s3: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    where, proxy = faulty_s3
    monkeypatch.setattr(objects, "CREATE_TRIES", 3)
    fault = proxy.inject("conflict", method="PUT", times=math.inf)
    with pytest.raises(StoreUnavailableError, match="3 times"):
        bucket(where).put_if_absent("commit", b"ours")
    assert fault.hits == 3


def test_one_of_many_writers_gets_the_name(faulty_s3: Faulty, s3_server: S3Server) -> None:
    where, proxy = faulty_s3
    fault = proxy.inject("lose", method="PUT", times=4)
    contents = [str(number).encode() for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda data: bucket(where).put_if_absent("commit", data), contents))
    assert sum(results) == 1
    assert stored(s3_server, where, "commit") == contents[results.index(True)]
    assert fault.hits == 4


# The right to write


def test_several_writers_where_conditions_work(faulty_s3: Faulty) -> None:
    where, proxy = faulty_s3
    first, second = bucket(where), bucket(where)
    with first.lock(), second.lock():
        assert not first.exclusive
        assert not second.exclusive
        assert first.put_if_absent("a", b"1") is True
        assert second.put_if_absent("a", b"2") is False
    assert proxy.count("PUT", objects.PROBES) == 4
    assert first._list(None) == second._list(None)
    assert [path for path, _, _ in first._list(None)] == ["a"]


@pytest.mark.parametrize("action", ["lose", "slow_down", "reset"])
def test_faults_do_not_look_like_ignored_conditions(faulty_s3: Faulty, action: str) -> None:
    where, proxy = faulty_s3
    fault = proxy.inject(action, method="PUT", times=3)
    transport = bucket(where)
    with transport.lock():
        assert not transport.exclusive
    assert fault.hits == 3


@pytest.mark.parametrize("how", ["ignore_condition", "unknown", "disabled"])
def test_a_service_that_ignores_conditions_is_read_and_not_written(
    faulty_s3: Faulty, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    where, proxy = faulty_s3
    bucket(where).put("a", b"1")
    if how == "disabled":
        monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    elif how == "ignore_condition":
        fault = proxy.inject("ignore_condition", times=math.inf)
    else:
        fault = proxy.inject("unknown", key=objects.PROBES, times=math.inf)
    transport = bucket(where)
    with pytest.raises(UsageError, match="ignores conditional writes") as caught, transport.lock():
        pytest.fail("a writer")
    assert where in caught.value.message
    assert proxy.endpoint in caught.value.message
    assert "embed into a directory" in caught.value.hint
    assert transport.get("a") == b"1"
    assert [path for path, _, _ in transport._list(None)] == ["a"]
    if how != "disabled":
        assert fault.hits >= 1


def test_probes_of_killed_writers_are_collected(s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = bucket(s3_prefix)
    transport.put("a", b"1")
    transport._put(f"{objects.PROBES}/left", b"")
    assert transport.collect_temporaries() == 0  # it may be another writer's, at this moment
    assert transport.sizes() == {"a": 1}
    monkeypatch.setattr(objects, "PROBE_SECONDS", -60)
    assert transport.collect_temporaries() == 1
    assert [path for path, _, _ in transport._list(None)] == ["a"]


# What a person has to put right


@pytest.mark.parametrize("operation", OPERATIONS)
def test_wrong_credentials(faulty_s3: Faulty, operation: str) -> None:
    where, proxy = faulty_s3
    fault = proxy.inject("forbid", times=math.inf)
    with pytest.raises(StoreUnavailableError, match="refused access: 403") as caught:
        OPERATIONS[operation][1](bucket(where))
    assert caught.value.message.startswith(f"{where}/")
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint
    assert "AWS_SECRET_ACCESS_KEY" in caught.value.hint
    assert "test-secret" not in str(caught.value)
    assert fault.hits >= 1


def test_writing_is_forbidden(faulty_s3: Faulty) -> None:
    where, proxy = faulty_s3
    fault = proxy.inject("forbid", method="PUT", times=math.inf)
    with pytest.raises(StoreUnavailableError, match="InvalidAccessKeyId"), bucket(where).lock():
        pytest.fail("no writer")
    assert fault.hits == 1


def test_half_of_the_credentials(s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(UsageError, match="Missing AccessKeyId") as caught:
        bucket(s3_prefix).get("a")
    assert "AWS_" in caught.value.hint


def test_a_variable_that_cannot_be_meant(s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "perhaps")
    with pytest.raises(UsageError, match="perhaps") as caught:
        bucket(s3_prefix).get("a")
    assert "AWS_" in caught.value.hint


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_such_bucket(s3_prefix: str, operation: str) -> None:
    with pytest.raises(StoreUnavailableError, match="there is no bucket 'no-such-bucket' at http://127"):
        OPERATIONS[operation][1](bucket("s3://no-such-bucket/store"))


def test_no_such_bucket_to_write_to(s3_prefix: str) -> None:
    with pytest.raises(StoreUnavailableError, match="there is no bucket"), bucket("s3://none/store").lock():
        pytest.fail("no writer")


@pytest.mark.parametrize(
    "where",
    [
        "s3://",
        "s3://bucket",
        "s3://bucket/",
        "s3:///prefix",
        "s3://bucket//prefix",
        "s3://bucket/a//b",
        "s3://bucket/../other",
        "s3://bucket/a/./b",
        "s3://bucket/a?endpoint=x",
        "s3://bucket/a b",
        "s3://bucket/\u00fc",
        "s3://bucket/a\n",
        "s3://bucket/..",
        "s3://key:secret@bucket/a",
        "gs://bucket/a",
    ],
)
def test_places_that_are_none(where: str) -> None:
    with pytest.raises(UsageError, match="s3://bucket/prefix"):
        Location.parse(where)


def test_a_place_has_one_name(s3_prefix: str) -> None:
    assert open_transport(Location.parse(f"{s3_prefix}/")).location == Location.parse(s3_prefix)
    assert open_transport(Location.parse(s3_prefix.replace("s3", "S3", 1))).location == Location.parse(s3_prefix)


def test_stores_of_one_bucket_are_apart(s3_prefix: str) -> None:
    names = ("a", "a/b", "a=1,b=2", "a2")
    for name in names:
        bucket(f"{s3_prefix}/{name}").put("k", name.encode())
    for name in names:
        assert bucket(f"{s3_prefix}/{name}").get("k") == name.encode()
    assert bucket(f"{s3_prefix}/a2").sizes() == {"k": 2}
    assert bucket(f"{s3_prefix}/a").sizes() == {"k": 1, "b/k": 3}


def test_obstore_is_not_installed(s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = open_transport(Location.parse(s3_prefix))  # which needs it not
    for name in [name for name in sys.modules if name.partition(".")[0] == "obstore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "obstore", None)
    for _, act, _ in OPERATIONS.values():
        with pytest.raises(UsageError, match="need obstore") as caught:
            act(transport)
        assert caught.value.hint == "pip install 'gstds-cache[s3]'"


# Processes

ELSEWHERE = """
import os, pickle, sys
transport = pickle.loads(bytes.fromhex(sys.argv[1]))
transport.put("b", transport.get("a") + b"2")
child = os.fork()
if not child:
    try:
        transport.get("a")
    except ValueError as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


def test_another_process_and_its_forked_child(s3_prefix: str, tmp_path: Path) -> None:
    transport = bucket(s3_prefix)
    transport.put("a", b"1")
    done = FORKS.run(["-c", ELSEWHERE, pickle.dumps(transport).hex()], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert transport.get("b") == b"12"
    assert "forked" in done.stdout  # an error, where obstore would wait forever
    assert "spawn" in done.stdout


def test_what_is_pickled_holds_no_secret(s3_prefix: str) -> None:
    transport = bucket(s3_prefix)
    transport.put("a", b"1")
    pickled = pickle.dumps(transport)
    assert b"test-secret" not in pickled
    assert b"obstore" not in pickled  # the other process reads its own environment


def test_the_service_by_its_own_variable(s3_prefix: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server.endpoint)
    bucket(s3_prefix).put("a", b"1")
    assert stored(s3_server, s3_prefix, "a") == b"1"
