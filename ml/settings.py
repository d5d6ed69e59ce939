"""Endpoints, credentials and folders: what differs between machines, from the environment only.

Nothing here ever enters a run's config, so a saved run holds no secret.
"""

import os
from functools import lru_cache
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

REPOSITORY_ROOT = Path(__file__).resolve().parent.parent

# Dependencies that phone home unless told otherwise. Set before any of them is imported.
TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def silence_telemetry() -> None:
    """Turn off the telemetry of every dependency, for this process and its children."""
    os.environ.update(TELEMETRY_OFF)


class Settings(BaseSettings):
    """Read from `MILLSTREAM_*` environment variables.

    Without `MILLSTREAM_S3_ENDPOINT` the local stack starts an embedded object store and fills in the
    three `s3_*` values; with it, any S3-compatible endpoint is used through the same client.
    """

    model_config = SettingsConfigDict(env_prefix="MILLSTREAM_", frozen=True, extra="ignore")

    state_dir: Path = Field(default=REPOSITORY_ROOT / ".millstream", description="local state: embedded services, work folders, reports")
    s3_endpoint: str | None = Field(default=None, description="host:port, or http(s)://host:port")
    s3_access_key: SecretStr | None = None
    s3_secret_key: SecretStr | None = None
    s3_region: str = "us-east-1"
    s3_ca_file: Path | None = Field(default=None, description="private CA for https endpoints")
    bucket_prefix: str = "millstream-"
    threads_per_process: int = Field(default=1, ge=1, description="math threads of a serving process")
    predictor_url: str | None = Field(default=None, description="base URL of the running predictor; filled in by the local stack")


@lru_cache(maxsize=1)
def load_settings() -> Settings:
    """The settings of this process. Call `load_settings.cache_clear()` after changing the environment."""
    silence_telemetry()
    return Settings()
