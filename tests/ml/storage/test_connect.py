"""From the environment to a store that works."""

from pathlib import Path

import pytest
from pydantic import SecretStr

from ml.errors import ConfigError
from ml.settings import Settings, load_settings
from ml.storage.connect import open_artifact_store
from ml.storage.s3 import S3Store
from services.object_store import ObjectStoreEndpoint
from tests.conftest import remove_bucket


def test_the_environment_leads_to_a_store_with_its_buckets(
    object_store_endpoint: ObjectStoreEndpoint, s3_store: S3Store, bucket_prefix: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MILLSTREAM_S3_ENDPOINT", object_store_endpoint.endpoint)
    monkeypatch.setenv("MILLSTREAM_S3_ACCESS_KEY", object_store_endpoint.access_key)
    monkeypatch.setenv("MILLSTREAM_S3_SECRET_KEY", object_store_endpoint.secret_key)
    monkeypatch.setenv("MILLSTREAM_BUCKET_PREFIX", bucket_prefix)
    load_settings.cache_clear()
    try:
        store = open_artifact_store()
        assert store.get_bytes(store.put_bytes(b"hello")) == b"hello"
        assert open_artifact_store().datasets_bucket == f"{bucket_prefix}datasets"
        for role in ("datasets", "runs", "registry"):
            remove_bucket(s3_store, f"{bucket_prefix}{role}")
    finally:
        load_settings.cache_clear()


@pytest.mark.parametrize("missing", ["s3_endpoint", "s3_access_key", "s3_secret_key"])
def test_a_missing_setting_is_an_error_that_names_it(missing: str, tmp_path: Path):
    values = {"s3_endpoint": "127.0.0.1:1", "s3_access_key": SecretStr("access"), "s3_secret_key": SecretStr("secret")}
    settings = Settings(state_dir=tmp_path).model_copy(update={**values, missing: None})
    with pytest.raises(ConfigError, match=f"MILLSTREAM_{missing.upper()}"):
        open_artifact_store(settings)
