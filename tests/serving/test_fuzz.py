"""Requests made from the server's own OpenAPI description, right and wrong ones."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from tests.serving.conftest import Serve


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
def test_no_generated_request_breaks_the_server(serve: Serve, path: str, mode: GenerationMode) -> None:
    served = serve()
    description = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    statuses = set()

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=description[path]["POST"].as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case[Any]) -> None:
        answer = case.call(timeout=10)
        statuses.add(answer.status_code)
        assert answer.status_code < 500, answer.text
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]

    ask()
    assert 400 in statuses or mode.is_positive
