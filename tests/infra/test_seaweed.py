"""The S3 server of the stack and of the tests: only its S3 port is open, with credentials."""

import boto3
import psutil
import pytest

from infra.stack import seaweed
from tests.infra.unauthenticated import SECRET, answers_without_credentials, ports_of, speaks_grpc

pytestmark = pytest.mark.servers


@pytest.fixture
def weed(servers):
    """The process of the session's S3 server."""
    port = servers.s3_url.rpartition(":")[2]
    (found,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if f"-s3.port={port}" in (process.info["cmdline"] or [])
    ]
    return found


def option(process, name):
    (value,) = [w.partition("=")[2] for w in process.cmdline() if w.startswith(f"-{name}=")]
    return value


def test_no_port_reads_or_writes_a_bucket_without_credentials(servers, weed):
    s3 = boto3.Session().client("s3")
    s3.put_object(Bucket="bases", Key="secret/x.txt", Body=SECRET)
    s3.put_object(Bucket="bases", Key="secret/big", Body=SECRET * 500_000)  # in several chunks
    ports = ports_of([weed])
    assert {int(option(weed, name)) for name in seaweed.INNER_PORTS} < ports
    assert answers_without_credentials(ports, "bases") == []
    assert s3.get_object(Bucket="bases", Key="secret/x.txt")["Body"].read() == SECRET
    assert s3.get_object(Bucket="bases", Key="secret/big")["Body"].read() == SECRET * 500_000


def test_grpc_requires_the_certificate_of_the_server(weed, tmp_path):
    """Neither no certificate nor one of another authority is accepted."""
    tls = f"{option(weed, 'dir')}/tls"
    other = tmp_path / "tls"
    other.mkdir()
    seaweed._make_certificate(other)
    for name in seaweed.INNER_PORTS:
        if name.endswith(".grpc"):
            port = int(option(weed, name))
            assert speaks_grpc(port, (f"{tls}/cert.pem", f"{tls}/key.pem")), name
            assert not speaks_grpc(port, (other / "cert.pem", other / "key.pem")), name
            assert not speaks_grpc(port), name


def test_only_the_owner_can_read_the_configuration(tmp_path):
    ports = dict.fromkeys(seaweed.INNER_PORTS, 1)
    command = seaweed.command(tmp_path, port=2, inner_ports=ports, credentials=("key", "word"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "s3.json", "security.toml", "ca.pem", "cert.pem", "key.pem"
    }  # fmt: skip
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    assert not any("word" in part for part in command)


def test_keys_and_certificate_are_new_at_every_start(tmp_path):
    ports = dict.fromkeys(seaweed.INNER_PORTS, 1)

    def made():
        seaweed.command(tmp_path, port=2, inner_ports=ports, credentials=("key", "word"))
        return {p.name: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    first, second = made(), made()
    assert [name for name in first if first[name] == second[name]] == ["s3.json"]
