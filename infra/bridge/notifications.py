"""Every shape in which a hint arrives, turned into one noun. Pure: bytes in, one of three out.

- `Notification`: something happened that reconcile should look at.
- `Ignored`: well formed, and means nothing to us; our own writes are here, or reconcile would start
  itself for ever.
- `Rejected`: whatever is tried again, it will not be right.

MLflow's webhooks (`mlflow.webhooks.types`); S3's event records as AWS sends them to SQS (directly,
through SNS, through EventBridge) and as MinIO posts them; the events of SeaweedFS's filer
(`filer_pb.EventNotification` as JSON). Keys are URL-encoded in records and nowhere else.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from urllib.parse import unquote_plus

from tasks.origin import is_delivery_id, is_plausible
from trans_peft.domain.base import Manifest
from trans_peft.domain.conventions import (
    ADAPTER_ALIAS,
    CHAMPION_ALIAS,
    CONVERTED_SUFFIX,
    RECONCILE_TAG,
    TAG_PREFIX,
)
from trans_peft.domain.names import name_problem

__all__ = [
    "Ignored",
    "Notification",
    "NotificationKind",
    "Parsed",
    "Rejected",
    "from_mlflow",
    "from_s3",
    "is_delivery_id",
]


class NotificationKind(StrEnum):
    """What a hint is about."""

    CHAMPION = "champion"  # the alias of a base was set or removed
    VERSION = "version"  # a version was registered
    APPROVAL = "approval"  # the alias of an adapter on one base was set or removed
    ASKED = "asked"  # a person set the tag that asks for it
    UPLOAD = "upload"  # a manifest was written
    START_UP = "start-up"  # the bridge itself started


@dataclass(frozen=True)
class Notification:
    """Something happened. `name` is a registered model or the URI of an upload.

    `at` is when, by the sender's clock; None where it does not say.
    """

    kind: NotificationKind
    name: str
    delivery_id: str
    alias: str = ""
    at: datetime | None = None


@dataclass(frozen=True)
class Ignored:
    """Well formed, and nothing to us."""

    why: str


@dataclass(frozen=True)
class Rejected:
    """What can never be right."""

    why: str


Parsed = Notification | Ignored | Rejected

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_KEY = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,1024}")
_ENVELOPES = 3  # SQS(SNS(EventBridge)) at most


class _RejectedError(Exception):
    pass


def from_mlflow(body: bytes, delivery_id: str) -> Parsed:
    """Return what the body of an MLflow webhook means."""
    return _judged(lambda: _mlflow(_object(body), delivery_id))


def from_s3(body: bytes, delivery_id: str, *, root_uri: str = "") -> Parsed:
    """Return what an S3 event means, in any of its shapes; uploads below `root_uri` alone count."""
    return _judged(lambda: _s3(_object(body), delivery_id, root_uri))


def _judged(parse: Callable[[], Parsed]) -> Parsed:
    try:
        return parse()
    except _RejectedError as never:
        return Rejected(str(never))


def _mlflow(document: dict[str, Any], delivery_id: str) -> Parsed:
    event = f"{document.get('entity')}.{document.get('action')}"
    data = document.get("data")
    if not isinstance(data, dict) or not all(
        isinstance(document.get(field), str) for field in ("entity", "action")
    ):
        raise _RejectedError("not a webhook of MLflow: entity, action and data are missing")
    at = _time(document.get("timestamp"))
    match event:
        case "model_version.created":
            name = _name(data)
            tags = data.get("tags") or {}
            if not isinstance(tags, dict):
                raise _RejectedError("the tags of a version are no object")
            # A version that a person copied ("Promote model") has our tags too, under another name.
            if name in (tags.get(f"{TAG_PREFIX}family"), tags.get(f"{TAG_PREFIX}adapter")):
                return Ignored("a version that this product registered")
            return Notification(NotificationKind.VERSION, name, delivery_id, at=at)
        case "model_version_alias.created" | "model_version_alias.deleted":
            name, alias = _name(data), data.get("alias")
            if not isinstance(alias, str):
                raise _RejectedError("an alias without a name")
            if alias == CHAMPION_ALIAS:
                return Notification(NotificationKind.CHAMPION, name, delivery_id, alias, at)
            if ADAPTER_ALIAS.fullmatch(alias):
                return Notification(NotificationKind.APPROVAL, name, delivery_id, alias, at)
            return Ignored("an alias that decides nothing here")
        case "model_version_tag.set":
            if data.get("key") == RECONCILE_TAG:
                return Notification(NotificationKind.ASKED, _name(data), delivery_id, at=at)
            return Ignored("a tag that decides nothing here")
    return Ignored("an event that decides nothing here")


def _name(data: dict[str, Any]) -> str:
    """Return the registered model that the event names, if a family could be called so."""
    name = data.get("name")
    if not isinstance(name, str) or name_problem("name", name):
        raise _RejectedError("no base family and no adapter can have this name")
    return name


def _s3(document: dict[str, Any], delivery_id: str, root_uri: str) -> Parsed:
    """Return the first upload among the records; a rejected record does not hide a later one."""
    nothing = "no object was written"
    rejected: _RejectedError | None = None
    for written in _written(document, _ENVELOPES):
        if isinstance(written, _RejectedError):
            rejected = rejected or written
            continue
        key, bucket, at = written
        folder, _, file = key.rpartition("/")
        uri = f"s3://{bucket}/{folder}"
        if file != Manifest.FILE_NAME:
            nothing = "a file that is no manifest"
        elif not _BUCKET.fullmatch(bucket) or not _is_plain(key):
            rejected = rejected or _RejectedError("no base can be stored under this name")
        elif folder.endswith(CONVERTED_SUFFIX):
            nothing = "the converted form of another upload"
        elif not f"{uri}/".startswith(f"{root_uri.rstrip('/')}/" if root_uri else ""):
            nothing = "not where bases are uploaded"
        else:
            return Notification(NotificationKind.UPLOAD, uri, delivery_id, at=at)
    if rejected is not None:
        raise rejected
    return Ignored(nothing)


def _is_plain(key: str) -> bool:
    segments = key.split("/")
    return (
        _KEY.fullmatch(key) is not None and len(segments) > 1 and not {"", ".", ".."} & {*segments}
    )


_Written = tuple[str, str, datetime | None]


def _written(document: dict[str, Any], envelopes: int) -> Iterator[_Written | _RejectedError]:
    """Yield key, bucket and time of each written object, or the error of a malformed record."""
    match document:
        case {"Event": "s3:TestEvent"}:  # sent once, when a notification is configured
            return
        case {"Records": [*records]}:  # S3, also inside MinIO's webhook
            for record in records:
                try:
                    yield from _record(record)
                except _RejectedError as error:
                    yield error
        case {"Type": "Notification", "Message": str(message)}:  # SNS
            if envelopes == 0:
                raise _RejectedError("too many envelopes")
            yield from _written(_object(message.encode(errors="surrogatepass")), envelopes - 1)
        case {"Type": "SubscriptionConfirmation" | "UnsubscribeConfirmation"}:
            return
        case {"source": "aws.s3", "detail-type": str(kind), "detail": {**detail}}:  # EventBridge
            if kind == "Object Created":
                yield (
                    _text(detail, "object", "key"),
                    _text(detail, "bucket", "name"),
                    _time(document.get("time")),
                )
        case {"event_type": str(), "key": str(path), "message": {**event}}:  # SeaweedFS
            yield from _filer_event(path, event)
        case _:
            raise _RejectedError("no shape of an S3 event")


def _record(record: object) -> Iterator[_Written]:
    if not isinstance(record, dict) or not isinstance(record.get("eventName"), str):
        raise _RejectedError("a record without the name of its event")
    if record["eventName"].removeprefix("s3:").startswith("ObjectCreated:"):
        encoded = _text(record, "s3", "object", "key")
        try:
            key = unquote_plus(encoded, errors="strict")
        except UnicodeError as error:
            raise _RejectedError("a key that is no UTF-8") from error
        yield key, _text(record, "s3", "bucket", "name"), _time(record.get("eventTime"))


def _filer_event(path: str, event: Mapping[Any, Any]) -> Iterator[_Written]:
    """An entry of the filer: `path` is where it was before, if it was; it says where it is."""
    entry = event.get("new_entry")
    if entry is None:
        return  # deleted
    if not isinstance(entry, dict):
        raise _RejectedError("an entry of the filer that is no object")
    parent, name = event.get("new_parent_path"), entry.get("name")
    if isinstance(parent, str) and parent and isinstance(name, str) and name:
        path = f"{parent.rstrip('/')}/{name}"
    match path.split("/", 3):
        case ["", "buckets", bucket, key] if not (
            entry.get("is_directory") or key.startswith(".uploads/")  # parts of an upload
        ):
            attributes = entry.get("attributes")
            seconds = attributes.get("mtime") if isinstance(attributes, dict) else None
            yield key, bucket, _time(seconds)


def _object(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _RejectedError("no JSON") from error
    if not isinstance(document, dict):
        raise _RejectedError("no JSON object")
    return document


def _text(value: object, *path: str) -> str:
    """Return the text at this path of a document, if it is one that can be written down."""
    for field in path:
        value = value.get(field) if isinstance(value, dict) else None
    if not isinstance(value, str):
        raise _RejectedError(f"{'.'.join(path)} is missing")
    return value


def _time(value: object) -> datetime | None:
    """Return the time that ISO 8601 or seconds since 1970 mean; None for anything else.

    A time before 2000 or after 2099 comes from a broken clock, and is None as well.
    """
    try:
        if isinstance(value, str):
            time = datetime.fromisoformat(value)
            time = time if time.tzinfo else time.replace(tzinfo=UTC)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            time = datetime.fromtimestamp(value, UTC)
        else:
            return None
    except (ValueError, OverflowError, OSError):
        return None
    return time if is_plausible(time) else None
