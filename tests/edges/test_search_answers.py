"""An answer that MLflow's server does not give is an error, and never an empty registry."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from trans_peft.edges.mlflow_client import Tracking
from trans_peft.edges.mlflow_search import FoundModel, FoundVersion, Page, all_pages, page_of
from trans_peft.errors import StoreError

MODELS = [
    {"registered_models": [{"nom": 1}]},
    {"registered_models": [{"name": 1}]},
    {"registered_models": [{"name": "a", "tags": [{"k": "v"}]}]},
    {"registered_models": [{"name": "a", "tags": [{"key": "k", "value": {}}]}]},
    {"registered_models": [{"name": "a", "tags": "abc"}]},
    {"registered_models": [{"name": "a", "aliases": [{"alias": "serving", "version": "one"}]}]},
    {"registered_models": [{"name": "a", "latest_versions": [{"version": None}]}]},
    {"registered_models": {"name": "a"}},
    {"registered_models": None},
    {"registered_models": 7},
    {"registered_models": ["a"]},
    {"registered_models": [], "next_page_token": 7},
    {"model_versions": []},
    {"error": "x"},
    {"error": "x", "next_page_token": ""},
    {"status": "ok"},
    [],
    "ok",
    None,
]


@pytest.mark.parametrize("answer", MODELS, ids=json.dumps)
def test_an_answer_of_another_shape_is_an_error_of_the_store(answer):
    with pytest.raises(StoreError, match="has another shape") as caught:
        page_of(answer, "registered-models")
    assert len(str(caught.value)) < 700


def test_an_answer_has_the_fields_that_mlflow_leaves_out_if_they_are_empty():
    assert page_of({}, "registered-models") == page_of({}, "model-versions") == []
    assert page_of({"next_page_token": "t"}, "model-versions").token == "t"
    models = {"registered_models": [{"name": "a"}], "new_field": 1}
    assert page_of(models, "registered-models") == [FoundModel("a", {}, {}, 0)]
    versions = {"model_versions": [{"name": "a", "version": 3, "tags": [{"key": "k"}]}]}
    assert page_of(versions, "model-versions") == [FoundVersion("a", "3", "", "", {"k": ""})]


def test_pages_that_name_each_other_as_the_next_end_with_an_error():
    def search(token):
        page = Page()
        page.token = {None: "a", "a": "b", "b": "a"}[token]
        return page

    with pytest.raises(StoreError, match="has another shape"):
        all_pages(search)


@contextmanager
def answering(*answers):
    """Yield the URL of a server with these answers, and the client's port for each of them."""
    left, ports = [*answers], []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections, as MLflow's server does

        def do_GET(self):
            body = left.pop(0)
            ports.append(self.client_address[1])
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", ports
        finally:
            server.shutdown()
            thread.join()


def test_each_page_is_read_through_a_connection_of_its_own():
    pages = [
        {"registered_models": [{"name": "a"}], "next_page_token": "1"},
        {"registered_models": [{"name": "b"}], "next_page_token": "2"},
        {"registered_models": [{"name": "c"}]},
    ]
    check = b"{}"
    with answering(check, *(json.dumps(page).encode() for page in pages)) as (url, ports):
        found = Tracking(url).models({})
    assert [model.name for model in found] == ["a", "b", "c"]
    assert len(set(ports[1:])) == len(pages)


@pytest.mark.parametrize("answer", [b"", b"OK", b"<html>sign in</html>", b"[", b"\xff"])
def test_an_answer_that_is_not_json_is_an_error_of_the_store(answer):
    check = b"{}"
    with (
        answering(check, answer) as (url, _),
        pytest.raises(StoreError, match="has another shape") as caught,
    ):
        Tracking(url).models({})
    assert len(str(caught.value)) < 700
