"""What the text about a file of MLflow's says: missing, refused, or no answer."""

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from mlflow.exceptions import MlflowException

from trans_peft.edges.mlflow_client import Tracking, mapped_errors
from trans_peft.errors import AccessError, NotFoundError, StoreError

WHERE = "The following failures occurred while downloading one or more artifacts from s3://b:\n"


def boto(code, operation="HeadObject"):
    return ClientError({"Error": {"Code": code, "Message": "as the test says"}}, operation)


TEXTS = [
    (boto("404"), NotFoundError),
    (boto("NoSuchKey", "GetObject"), NotFoundError),
    ("404 Client Error: NOT FOUND for url: http://mlflow/x", NotFoundError),
    ("404 GET https://storage.googleapis.com/b/o/x: No such object", NotFoundError),
    ("The specified blob does not exist.\nErrorCode:BlobNotFound", NotFoundError),
    (boto("403"), AccessError),
    (boto("AccessDenied", "GetObject"), AccessError),
    (boto("ExpiredToken", "GetObject"), AccessError),
    ("403 Client Error: Forbidden for url: http://mlflow/x", AccessError),
    (NoCredentialsError(), AccessError),
    (boto("NoSuchBucket", "GetObject"), StoreError),
    (boto("500"), StoreError),
    (boto("SlowDown", "GetObject"), StoreError),
    (EndpointConnectionError(endpoint_url="http://s3"), StoreError),
    ("500 Server Error", StoreError),
]


@pytest.mark.parametrize(("text", "kind"), TEXTS, ids=range(len(TEXTS)))
def test_the_text_about_a_download_decides_what_failed(text, kind):
    with pytest.raises(kind) as caught, mapped_errors("http://mlflow"):
        raise MlflowException(f"{WHERE}##### File x #####\n{text}")
    assert type(caught.value) is kind


@pytest.mark.parametrize(("text", "kind"), [t for t in TEXTS if isinstance(t[0], Exception)])
def test_an_error_of_the_store_s_own_client_is_translated_likewise(text, kind):
    with pytest.raises(kind) as caught, mapped_errors("http://mlflow"):
        raise text
    assert type(caught.value) is kind


def test_a_missing_file_beside_one_that_did_not_arrive_is_no_missing_file():
    text = f"{WHERE}##### File x #####\n{boto('404')}\n##### File y #####\n{boto('500')}"
    with pytest.raises(StoreError), mapped_errors("http://mlflow"):
        raise MlflowException(text)


@pytest.mark.servers
def test_a_missing_file_in_a_bucket_is_not_found(servers, unique, tmp_path):
    tracking = Tracking(servers.mlflow_url)
    uri = f"s3://{servers.bucket}/{unique}/adapter"
    with pytest.raises(NotFoundError) as caught, mapped_errors(servers.mlflow_url):
        tracking._download(uri, str(tmp_path))
    assert type(caught.value) is NotFoundError
