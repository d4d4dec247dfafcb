"""The OpenAPI document is true: schemathesis makes requests from it, good and bad, and no answer is off it."""

from __future__ import annotations

import pytest

schemathesis = pytest.importorskip("schemathesis")

import hypothesis  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from serving import Server, Start  # noqa: E402

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
]
SETTINGS = hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)


def examine(server: Server, settings: hypothesis.settings) -> int:
    """Requests made."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    made = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        takes = operation.body or operation.query
        modes = list(schemathesis.GenerationMode) if takes else [schemathesis.GenerationMode.POSITIVE]
        for mode in modes:

            @hypothesis.given(case=operation.as_strategy(mode))
            @settings
            def ask(case: schemathesis.Case) -> None:
                nonlocal made
                made += 1
                case.call_and_validate(checks=CHECKS, timeout=30)

            ask()
    return made


def test_answers_are_on_the_document(start: Start) -> None:
    assert examine(start("--max-tokens", "8"), SETTINGS) > 200


@pytest.mark.slow
def test_answers_are_on_the_document_at_length(start: Start) -> None:
    assert examine(start("--max-tokens", "8"), hypothesis.settings(SETTINGS, max_examples=1000)) > 5000


def test_every_path_is_described(plain: Server) -> None:
    _, document = plain.ask("GET", "/openapi.json")
    assert document["openapi"].startswith("3.1")
    posts = {path: one["post"] for path, one in document["paths"].items() if "post" in one}
    assert set(posts) == {"/v1/completions", "/v1/chat/completions", "/v1/contexts", "/v1/contexts/{name}/fork"}
    assert all("application/json" in one["requestBody"]["content"] for one in posts.values())
    assert all("422" not in one["responses"] for methods in document["paths"].values() for one in methods.values())
