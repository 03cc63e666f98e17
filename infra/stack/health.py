"""Health checks that make a client's request to each program."""

from typing import Any

import boto3
import httpx
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from infra.stack.settings import BUCKETS, StackSettings
from trans_peft.domain.conventions import WORK_POOL
from trans_peft.errors import StoreError

__all__ = ["create_buckets", "is_healthy"]


def is_healthy(name: str, settings: StackSettings) -> bool:
    """Whether the program of this name answers within 5 s."""
    urls = settings.urls
    try:
        with httpx.Client(timeout=5, trust_env=False) as http:
            match name:
                case "s3":
                    return bool(_s3(settings, attempts=1).list_buckets())
                case "mlflow":
                    return http.get(f"{urls['mlflow']}/health").is_success
                case "prefect":
                    return http.get(f"{urls['prefect']}/api/health").is_success
                case "ui":
                    return http.get(f"{urls['ui']}/health").is_success
                case "exporter":
                    return http.get(f"{urls['exporter']}/metrics").is_success
                case "bridge":
                    return http.get(f"{urls['bridge']}/ready").is_success
                case _:
                    pool = f"{urls['prefect']}/api/work_pools/{WORK_POOL}"
                    answer = http.post(
                        f"{pool}/workers/filter", json={}, auth=settings.prefect_auth
                    ).raise_for_status()
                    return any(worker["status"] == "ONLINE" for worker in answer.json())
    except (httpx.HTTPError, BotoCoreError, ClientError):
        return False


def create_buckets(settings: StackSettings) -> None:
    """Create the missing buckets. StoreError."""
    client = _s3(settings, attempts=8)
    try:
        existing = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        for bucket in BUCKETS:
            if bucket not in existing:
                client.create_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError) as error:
        raise StoreError(
            "the buckets could not be created in the S3 server",
            found=error,
            do=f"read {settings.logs / 's3.log'}",
        ) from error


def _s3(settings: StackSettings, attempts: int) -> Any:
    return boto3.Session().client(
        "s3",
        endpoint_url=settings.urls["s3"],
        aws_access_key_id=settings.secrets.s3_access_key,
        aws_secret_access_key=settings.secrets.s3_secret_key,
        region_name="us-east-1",
        config=Config(
            connect_timeout=2,
            read_timeout=5,
            proxies={},
            retries={"total_max_attempts": attempts},
        ),
    )
