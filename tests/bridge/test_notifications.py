"""Parsing of payloads. Those of servers that can run here were captured from them."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.bridge.notifications import (
    Ignored,
    Notification,
    NotificationKind,
    Rejected,
    from_mlflow,
    from_s3,
    is_delivery_id,
)
from trans_peft.bases.converters import converted_uri

PAYLOADS = Path(__file__).with_name("payloads")
MANIFEST = "trans_peft_manifest.json"


def captured(name):
    return (PAYLOADS / name).read_bytes()


def mlflow(event, **data):
    entity, action = event.split(".")
    document = {"entity": entity, "action": action, "data": data}
    return from_mlflow(json.dumps(document).encode(), "d1")


def s3(document, **options):
    return from_s3(json.dumps(document).encode(), "d1", **options)


def record(key, event="ObjectCreated:Put", bucket="bases"):
    return {"eventName": event, "s3": {"bucket": {"name": bucket}, "object": {"key": key}}}


def records(key, **more):
    return {"Records": [record(key, **more)]}


def event_bridge(key, kind="Object Created"):
    detail = {"bucket": {"name": "bases"}, "object": {"key": key}}
    return {"source": "aws.s3", "detail-type": kind, "detail": detail}


def sns(document):
    return {"Type": "Notification", "MessageId": "m", "Message": json.dumps(document)}


def filer(path, **message):
    parent, _, name = path.rpartition("/")
    entry = {"name": name, "attributes": {"mtime": 1700000000}}
    event = {"new_entry": entry, "new_parent_path": parent, **message}
    return {"key": path, "event_type": "create", "message": event}


# MLflow


@pytest.mark.parametrize("action", ["created", "deleted"])
def test_a_champion_set_or_removed_is_a_notification(action):
    parsed = mlflow(f"model_version_alias.{action}", name="smol", alias="champion")
    assert parsed == Notification(NotificationKind.CHAMPION, "smol", "d1", "champion")


def test_an_alias_of_an_adapter_on_a_base_is_a_notification():
    parsed = mlflow("model_version_alias.created", name="faq", alias="on-0123456789ab", version="2")
    assert parsed == Notification(NotificationKind.APPROVAL, "faq", "d1", "on-0123456789ab")


@pytest.mark.parametrize("alias", ["serving", "on-xyz", "on-0123456789abcdef", "Champion", ""])
def test_other_aliases_are_ignored(alias):
    assert isinstance(mlflow("model_version_alias.created", name="smol", alias=alias), Ignored)


def test_a_version_that_a_user_registered_is_a_notification():
    parsed = mlflow("model_version.created", name="smol", version="1", source="s3://x", tags={})
    assert parsed == Notification(NotificationKind.VERSION, "smol", "d1")


@pytest.mark.parametrize("tag", ["trans_peft.family", "trans_peft.adapter"])
def test_the_projects_own_version_is_ignored_and_its_copy_is_a_notification(tag):
    ours = mlflow("model_version.created", name="smol", version="1", tags={tag: "smol"})
    copied = mlflow("model_version.created", name="prod", version="1", tags={tag: "smol"})
    assert isinstance(ours, Ignored)
    assert copied == Notification(NotificationKind.VERSION, "prod", "d1")


@pytest.mark.parametrize(
    "key", ["trans_peft.ready", "trans_peft.verdict", "trans_peft.outcome.on-0", "team", ""]
)
def test_other_tags_are_ignored(key):
    assert isinstance(
        mlflow("model_version_tag.set", name="smol", version="1", key=key, value="x"), Ignored
    )


def test_the_tag_that_requests_reconcile_is_a_notification():
    parsed = mlflow(
        "model_version_tag.set", name="smol", version="1", key="trans_peft.reconcile", value=""
    )
    assert parsed == Notification(NotificationKind.REQUESTED, "smol", "d1")


@pytest.mark.parametrize("event", ["prompt.created", "registered_model.created", "new.thing"])
def test_other_events_are_ignored(event):
    assert isinstance(mlflow(event, name="smol"), Ignored)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../etc/passwd", "a/b", "a:b", "models:/x", "x" * 201, "a\x00b", "a\nb"),
        *("x'; DROP TABLE model_versions; --", 'say "hi"', "`id`", "\ud800", None, 7, ["smol"]),
        *("größe 2", "模型", "{{ event.id }}", "${x}", "%s", "<b>", "latest", "on-0123456789ab"),
    ],
)
def test_a_name_that_no_family_can_have_is_rejected(name):
    assert isinstance(mlflow("model_version_alias.created", name=name, alias="champion"), Rejected)


@pytest.mark.parametrize(
    ("file", "kind", "name"),
    [
        ("mlflow_version_created.json", NotificationKind.VERSION, "smol"),
        ("mlflow_champion_created.json", NotificationKind.CHAMPION, "smol"),
        ("mlflow_champion_deleted.json", NotificationKind.CHAMPION, "smol"),
        ("mlflow_reconcile_requested.json", NotificationKind.REQUESTED, "smol"),
        ("mlflow_approval_created.json", NotificationKind.APPROVAL, "faq"),
    ],
)
def test_captured_webhooks_of_mlflow_are_parsed(file, kind, name):
    parsed = from_mlflow(captured(file), "d1")
    assert (parsed.kind, parsed.name) == (kind, name)
    assert parsed.at.tzinfo is not None


@pytest.mark.parametrize(
    "file",
    ["mlflow_serving_created.json", "mlflow_verdict_tag.json", "mlflow_our_version_created.json"],
)
def test_captured_webhooks_about_own_writes_are_ignored(file):
    assert isinstance(from_mlflow(captured(file), "d1"), Ignored)


# S3

SHAPES = {
    "sqs": records,
    "sqs, sns": lambda key: sns(records(key)),
    "sqs, eventbridge": event_bridge,
    "sqs, sns, eventbridge": lambda key: sns(event_bridge(key)),
    "minio": lambda key: {
        "EventName": "s3:ObjectCreated:Put",
        "Key": f"bases/{key}",
        **records(key, event="s3:ObjectCreated:Put"),
    },
    "seaweedfs": lambda key: filer(f"/buckets/bases/{key}"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_only_a_manifest_is_a_notification_in_every_format(shape):
    assert s3(SHAPES[shape](f"smol/v2/{MANIFEST}")) == Notification(
        NotificationKind.UPLOAD, "s3://bases/smol/v2", "d1", at=_time_of(shape)
    )
    for key in ("smol/v2/model.safetensors", f"smol/{MANIFEST}.tmp", f"smol/x{MANIFEST}"):
        assert isinstance(s3(SHAPES[shape](key)), Ignored)


def _time_of(shape):
    return datetime.fromtimestamp(1700000000, UTC) if shape == "seaweedfs" else None


@pytest.mark.parametrize(
    ("encoded", "plain"),
    [
        (f"a+b/v1/{MANIFEST}", "a b/v1"),
        (f"smol%2Fv1%2F{MANIFEST}", "smol/v1"),
        (f"gr%C3%B6%C3%9Fe/v1/{MANIFEST}", "größe/v1"),
        (f"50%25/v1/{MANIFEST}", "50%/v1"),
    ],
)
def test_only_keys_in_records_are_url_decoded(encoded, plain):
    assert s3(records(encoded)).name == f"s3://bases/{plain}"
    assert s3(event_bridge(f"{plain}/{MANIFEST}")).name == f"s3://bases/{plain}"
    assert s3(event_bridge(f"50%25/v1/{MANIFEST}")).name == "s3://bases/50%25/v1"


def test_test_events_and_confirmations_are_ignored():
    test_event = {"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "bases"}
    assert isinstance(s3(test_event), Ignored)
    assert isinstance(s3(sns(test_event)), Ignored)
    assert isinstance(s3({"Type": "SubscriptionConfirmation", "Token": "t"}), Ignored)


@pytest.mark.parametrize(
    "event", ["ObjectRemoved:Delete", "s3:ObjectAccessed:Get", "ObjectTagging:Put"]
)
def test_events_other_than_writes_are_ignored(event):
    assert isinstance(s3(records(f"smol/v1/{MANIFEST}", event=event)), Ignored)
    assert isinstance(s3(event_bridge(f"smol/v1/{MANIFEST}", kind="Object Deleted")), Ignored)


def test_one_manifest_among_several_records_is_enough():
    document = {"Records": [record("a/b.bin"), record(f"smol/v1/{MANIFEST}"), record("c/d.bin")]}
    assert s3(document).name == "s3://bases/smol/v1"


ODD_RECORDS = [
    *({}, None, 3, record("%ff"), record(f"%ff/{MANIFEST}"), record(MANIFEST)),
    *(record(f"/{MANIFEST}"), record(f"a//{MANIFEST}"), record(f"x/{MANIFEST}", bucket="b/")),
    *({"eventName": "ObjectCreated:Put"}, {"eventName": "ObjectCreated:Put", "s3": {"object": 1}}),
]


@pytest.mark.parametrize("odd", ODD_RECORDS, ids=range(len(ODD_RECORDS)))
@pytest.mark.parametrize("envelope", [lambda document: document, sns], ids=["plain", "sns"])
def test_an_invalid_record_does_not_hide_a_valid_one(odd, envelope):
    good = record(f"smol/v1/{MANIFEST}")
    for order in ([odd, good], [good, odd], [odd, record("a/b.bin"), odd, good]):
        parsed = s3(envelope({"Records": order}))
        assert parsed == Notification(NotificationKind.UPLOAD, "s3://bases/smol/v1", "d1")
    assert isinstance(s3(envelope({"Records": [odd, record("a/b.bin")]})), Rejected)


def test_uploads_outside_of_the_prefix_are_ignored():
    key = f"smol/v1/{MANIFEST}"
    assert isinstance(s3(records(key), root_uri="s3://bases/"), Notification)
    assert isinstance(s3(records(key), root_uri="s3://bases/smol"), Notification)
    assert isinstance(s3(records(key), root_uri="s3://bases/sm"), Ignored)
    assert isinstance(s3(records(key, bucket="other"), root_uri="s3://bases/"), Ignored)


def test_the_converted_form_that_ingestion_publishes_is_ignored():
    uri = converted_uri("s3://bases/internlm/v1")
    assert isinstance(s3(records(f"{uri.removeprefix('s3://bases/')}/{MANIFEST}")), Ignored)


@pytest.mark.parametrize(
    "key",
    [
        *(f"../{MANIFEST}", f"a/../../b/{MANIFEST}", f"a//b/{MANIFEST}", f"/{MANIFEST}", MANIFEST),
        *(f"a%00/{MANIFEST}", f"a%0a/{MANIFEST}", f"%ff/{MANIFEST}", f"{'k' * 1100}/{MANIFEST}"),
    ],
)
def test_an_invalid_key_is_rejected(key):
    assert isinstance(s3(records(key)), Rejected)


@pytest.mark.parametrize("bucket", ["", "UPPER", "a/b", "x" * 64, "..", "\ud800"])
def test_an_invalid_bucket_is_rejected(bucket):
    assert isinstance(s3(records(f"smol/v1/{MANIFEST}", bucket=bucket)), Rejected)


def test_parts_folders_and_deletions_of_the_filer_are_ignored():
    path = f"/buckets/bases/smol/v1/{MANIFEST}"
    folder = {"name": MANIFEST, "is_directory": True}
    for document in (
        filer(f"/buckets/bases/.uploads/1/{MANIFEST}"),
        filer(path, new_entry=folder),
        filer(path, new_entry=None, old_entry={"name": MANIFEST}),
        filer(f"/etc/{MANIFEST}"),
        filer(f"/buckets/{MANIFEST}"),
    ):
        assert isinstance(s3(document), Ignored)


def test_a_renamed_file_has_its_new_path():
    moved = filer(
        "/buckets/bases/a/v1/part",
        new_parent_path="/buckets/bases/b/v1",
        new_entry={"name": MANIFEST},
    )
    assert s3(moved).name == "s3://bases/b/v1"


@pytest.mark.parametrize(
    "file",
    [
        "seaweedfs_manifest_created.json",
        "seaweedfs_manifest_overwritten.json",
        "seaweedfs_manifest_multipart.json",
        "moto_sqs.json",
        "moto_sqs_eventbridge.json",
        "moto_sqs_sns.json",
    ],
)
def test_captured_events_about_a_manifest_are_parsed(file):
    parsed = from_s3(captured(file), "d1", root_uri="s3://bases/")
    assert parsed.kind is NotificationKind.UPLOAD
    assert parsed.name.startswith("s3://bases/a b/ö/v2")
    assert parsed.at is not None


@pytest.mark.parametrize("file", ["seaweedfs_weights_created.json", "moto_sqs_test_event.json"])
def test_captured_events_about_other_files_are_ignored(file):
    assert isinstance(from_s3(captured(file), "d1"), Ignored)


# Anything


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"null", b"[]", b"7", b'"x"', b"{", b"\xff\xfe", b"{}", b"[" * 100_000),
        *(b'{"a":' * 50_000, b"1" * 5000, b'{"Records": 3}', b'{"Records": [3]}', b"{'a': 1}"),
        *(b'{"Type": "Notification", "Message": "{"}', b'{"entity": 1, "action": 2, "data": {}}'),
    ],
    ids=range(16),
)
def test_malformed_bodies_are_rejected(body):
    assert isinstance(from_mlflow(body, "d1"), Rejected)
    assert isinstance(from_s3(body, "d1"), Rejected)


def test_the_depth_of_nested_envelopes_is_limited():
    document = records(f"a/b/{MANIFEST}")
    for _ in range(10):
        document = sns(document)
    assert isinstance(s3(document), Rejected)


words = st.sampled_from(
    [
        *("entity", "action", "data", "name", "alias", "tags", "champion", "timestamp", "key"),
        *("model_version_alias", "model_version", "model_version_tag", "created", "deleted", "set"),
        *("Records", "eventName", "ObjectCreated:Put", "s3", "bucket", "object", "eventTime"),
        *("Type", "Notification", "Message", "source", "aws.s3", "detail-type", "detail", "time"),
        *("Object Created", "event_type", "message", "new_entry", "new_parent_path", "attributes"),
        *("mtime", "Event", "s3:TestEvent", f"a/{MANIFEST}", f"/buckets/b/a/{MANIFEST}", "value"),
    ]
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | words
documents = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | st.text(), inner),
    max_leaves=25,
)
mlflow_like = st.fixed_dictionaries(
    {
        "entity": words | documents,
        "action": words | documents,
        "data": st.dictionaries(words, documents, max_size=5) | documents,
    },
    optional={"timestamp": leaves},
)
bodies = (
    st.binary()
    | documents.map(lambda document: json.dumps(document).encode())
    | mlflow_like.map(lambda document: json.dumps(document).encode())
)


@given(bodies)
def test_any_body_is_parsed_to_one_of_three_results(body):
    for parsed in (from_mlflow(body, "d1"), from_s3(body, "d1"), from_s3(body, "d1", root_uri="x")):
        assert isinstance(parsed, Notification | Ignored | Rejected)
        if isinstance(parsed, Notification):
            parsed.name.encode()
            assert parsed.at is None or parsed.at.tzinfo is not None
            json.dumps(parsed.name)


@given(st.text(min_size=1), st.sampled_from([*SHAPES]))
def test_the_uri_of_a_notification_has_no_special_segments(folder, shape):
    parsed = s3(SHAPES[shape](f"{folder}/{MANIFEST}"))
    if isinstance(parsed, Notification):
        segments = parsed.name.removeprefix("s3://").split("/")
        assert not {"", ".", ".."} & {*segments}


@given(st.text())
def test_a_delivery_id_fits_a_key_a_tag_and_a_log(text):
    if is_delivery_id(text):
        assert text.isascii() and text.isprintable() and 0 < len(text) <= 128
        assert not {" ", "/", "{", "\n"} & {*text}
