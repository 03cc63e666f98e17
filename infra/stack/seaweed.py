"""SeaweedFS as an S3 server that refuses requests without credentials on all its ports.

`weed server` runs five servers in one process. Its S3 port requires credentials. The master, volume
and filer ports, which are for internal use, require them only with this configuration:

- HTTP of master and filer is off, except for a status page and health checks.
- The volume server's HTTP requires a JWT, which the master signs for the S3 port.
- All gRPC ports use mutual TLS with one certificate, from an authority that signs nothing else.

Each start generates new keys, a new certificate and a new authority.
"""

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import token_urlsafe

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from infra.stack.settings import HOST

__all__ = ["INNER_PORTS", "command"]

INNER_PORTS = (
    *(f"{part}.port{kind}" for part in ("master", "volume", "filer") for kind in ("", ".grpc")),
    "s3.port.grpc",
)
"""Options of the ports for internal use."""

_PART = "trans-peft-s3-part"
_VALID = timedelta(days=3650)
_JWT_S = 60  # with SeaweedFS's 10 s, a busy machine refuses its own requests


def command(
    folder: Path,
    *,
    port: int,
    inner_ports: Mapping[str, int],
    credentials: tuple[str, str],
    volume_mb: int = 1024,
) -> list[str]:
    """Return the command of a server with its state in `folder`, and write its configuration there.

    The server has to run in `folder`. `credentials` are the access key and the secret key of the
    only identity, which has all rights. `inner_ports` has a port for each of `INNER_PORTS`. Only
    the owner can read the configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "s3.json", json.dumps(_identities(*credentials)))
    _write(folder / "security.toml", _security(folder, f"http://{HOST}:{port}"))
    options = {
        "dir": folder,
        "ip": HOST,
        "ip.bind": HOST,
        "disableHttp": "true",
        "master.peers": "none",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": volume_mb,
        "volume.max": 200,  # each bucket needs several; with 20, the third bucket answers 500
        "volume.preStopSeconds": 1,
        "filer": "true",
        "filer.disableHttp": "true",
        "filer.localSocket": folder / "filer.sock",
        "s3": "true",
        "s3.config": folder / "s3.json",
        "s3.port": port,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": folder / "s3.sock",
        **{name: inner_ports[name] for name in INNER_PORTS},
    }
    weed = Path(sys.executable).with_name("weed")
    return [str(weed), "-logtostderr", "server", *(f"-{k}={v}" for k, v in options.items())]


def _identities(access_key: str, secret_key: str) -> dict[str, object]:
    identity = {
        "name": "trans-peft",
        "credentials": [{"accessKey": access_key, "secretKey": secret_key}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    return {"identities": [identity]}


def _security(folder: Path, origin: str) -> str:
    """Return `security.toml` (`weed scaffold -config=security`), and write its certificates."""
    tls = folder / "tls"
    tls.mkdir(exist_ok=True)
    _make_certificate(tls)
    sections: dict[str, dict[str, object]] = {
        "cors.allowed_origins": {"values": origin},
        "access": {"ui": False},
        "filer.expose_directory_metadata": {"enabled": False},
        "grpc": {"ca": f"{tls}/ca.pem"},
    }
    for name in ("signing", "signing.read", "filer_signing", "filer_signing.read"):
        sections[f"jwt.{name}"] = {"key": token_urlsafe(32), "expires_after_seconds": _JWT_S}
    for part in ("master", "volume", "filer", "s3", "client"):
        sections[f"grpc.{part}"] = {
            "cert": f"{tls}/cert.pem",
            "key": f"{tls}/key.pem",
            "allowed_commonNames": _PART,
        }
    lines = []
    for section, values in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def _make_certificate(folder: Path) -> None:
    """Write a certificate for all parts, its key, and its authority."""
    authority, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = _name(f"{_PART}-authority")

    def signed(subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + _VALID)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        certificate = builder.sign(authority, hashes.SHA256())
        return certificate.public_bytes(serialization.Encoding.PEM)

    _write(folder / "ca.pem", signed(issuer, authority, ca=True))
    _write(folder / "cert.pem", signed(_name(_PART), own, ca=False))
    _write(
        folder / "key.pem",
        own.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _write(path: Path, content: str | bytes) -> None:
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
