import base64

import pytest

from services.prefect_rest import open_prefect


def test_it_signs_in_as_prefects_own_client_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_KEY", raising=False)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:secret")
    with open_prefect("http://127.0.0.1:9/api/", 1) as client:
        request = client.build_request("POST", "/flow_runs/filter")
        assert str(request.url) == "http://127.0.0.1:9/api/flow_runs/filter"
        assert request.headers["Authorization"] == "Basic " + base64.b64encode(b"admin:secret").decode()
    monkeypatch.setenv("PREFECT_API_KEY", "key")
    with open_prefect("http://127.0.0.1:9/api", 1) as client:
        assert client.headers["Authorization"] == "Bearer key"


def test_without_credentials_it_sends_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_KEY", "PREFECT_API_AUTH_STRING"):
        monkeypatch.delenv(name, raising=False)
    with open_prefect("http://127.0.0.1:9/api", 1) as client:
        assert "Authorization" not in client.headers
