"""A Postgres server with the databases of MLflow and Prefect, as infra/containers creates them."""

import os
import pwd
import shutil
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg2

from infra.stack.settings import HOST
from tests.end_to_end.running_stack import wait_until

USER = "trans_peft"


@contextmanager
def postgres(port):
    """Run a server with the empty databases `mlflow` and `prefect`; yield the stack's settings.

    It runs as the user `nobody`, because Postgres refuses to run as root.
    """
    nobody = pwd.getpwnam("nobody")
    account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # pytest's folders are root's alone
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    data = folder / "data"
    initdb = ["initdb", "--auth", "trust", "--username", USER, "--encoding", "UTF8", "-D", data]
    subprocess.run(initdb, cwd=folder, check=True, stdout=subprocess.DEVNULL, **account)
    options = {
        "listen_addresses": HOST,
        "port": port,
        "unix_socket_directories": "",
        "fsync": "off",
    }
    settings = [word for name, value in options.items() for word in ("-c", f"{name}={value}")]
    with (folder / "postgres.log").open("w") as log:
        server = subprocess.Popen(
            ["postgres", "-D", data, *settings], cwd=folder, stdout=log, stderr=log, **account
        )
    try:
        wait_until(lambda: _has_databases(port))
        address = f"{USER}@{HOST}:{port}"
        yield {
            "mlflow_database": f"postgresql+psycopg2://{address}/mlflow",
            "prefect_database": f"postgresql+asyncpg://{address}/prefect",
        }
    finally:
        server.send_signal(2)  # SIGINT disconnects the clients
        server.wait(30)
        shutil.rmtree(folder)


def _has_databases(port):
    """Create the databases as soon as the server answers."""
    with suppress(psycopg2.OperationalError):
        _run(port, "postgres", "CREATE DATABASE mlflow", "CREATE DATABASE prefect")
        _run(port, "prefect", "CREATE EXTENSION pg_trgm")
        return True
    return False


def _run(port, database, *statements):
    connection = psycopg2.connect(host=HOST, port=port, user=USER, dbname=database)
    connection.autocommit = True
    try:
        for statement in statements:
            connection.cursor().execute(statement)
    finally:
        connection.close()
