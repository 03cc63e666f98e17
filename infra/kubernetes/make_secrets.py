"""Writes the Secrets of each program to `secrets/` beside this file, for Kustomize.

`python3 infra/kubernetes/make_secrets.py` needs the standard library alone. Four of the files have
Prefect's password, and two the password of each database.
"""

import os
import secrets
import sys
from base64 import urlsafe_b64encode
from pathlib import Path

__all__ = ["FOLDER", "generated", "main"]

FOLDER = Path(__file__).parent / "secrets"


def generated() -> dict[str, dict[str, str]]:
    """Return new secrets as environment variables, by program."""
    mlflow, prefect = secrets.token_urlsafe(30), secrets.token_urlsafe(30)
    auth = f"trans-peft:{secrets.token_urlsafe(30)}"
    return {
        "postgres": {
            "POSTGRES_PASSWORD": secrets.token_urlsafe(30),
            "MLFLOW_PASSWORD": mlflow,
            "PREFECT_PASSWORD": prefect,
        },
        "mlflow": {
            "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://mlflow:{mlflow}@postgres/mlflow",
            # A Fernet key.
            "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": (
                urlsafe_b64encode(secrets.token_bytes(32)).decode()
            ),
        },
        "prefect": {
            "PREFECT_API_DATABASE_CONNECTION_URL": (
                f"postgresql+asyncpg://prefect:{prefect}@postgres/prefect"
            ),
            "PREFECT_SERVER_API_AUTH_STRING": auth,
        },
        "bridge": {
            "PREFECT_API_AUTH_STRING": auth,
            "BRIDGE_MLFLOW_SECRETS": secrets.token_urlsafe(30),
            "BRIDGE_S3_TOKENS": secrets.token_urlsafe(30),
        },
        "worker": {"PREFECT_API_AUTH_STRING": auth},
        "flow-run": {"PREFECT_API_AUTH_STRING": auth},
        "redis": {"REDIS_PASSWORD": secrets.token_urlsafe(30)},
    }


def main(folder: Path = FOLDER) -> int:
    """Write one file per program, readable for its owner only. Refuse a folder with such files."""
    found = sorted(path.name for path in folder.glob("*.env"))
    if found:
        sys.stderr.write(
            f"{folder} has secrets: {', '.join(found)}\n"
            "  expected: no files, because passwords are the same in several of them\n"
            "  do:       change a secret in its files, or delete all files to generate new ones\n"
        )
        return 1
    folder.mkdir(mode=0o700, exist_ok=True)
    for program, variables in generated().items():
        path = folder / f"{program}.env"
        text = "".join(f"{name}={value}\n" for name, value in variables.items())
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
    sys.stdout.write(f"wrote the secrets of {len(generated())} programs to {folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
