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

    bridge_url: str | None = Field(default=None, description="base URL of the event bridge; filled in by the local stack")
    bridge_token: SecretStr | None = Field(default=None, description="secret of the event bridge; made by the local stack")
    debounce_seconds: float = Field(default=30, ge=0, description="events of one model within this time after a started run are one change")
    cool_down_seconds: float = Field(default=600, ge=0, description="shortest time between two runs of one model that events asked for")
    retrain_minutes_per_day: float = Field(default=240, gt=0, description="run time per model and 24 hours that events may use")
    dataset_poll_seconds: float = Field(default=60, gt=0, description="how often the event bridge lists the datasets bucket itself")

    prediction_log_share: float = Field(default=1.0, ge=0, le=1, description="share of predictions that are logged; 0 switches the log off")
    prediction_log_rows_per_hour: int = Field(default=10_000, ge=0, description="most predictions logged per model and hour")
    prediction_log_days: float = Field(default=30, gt=0, description="how long logged predictions and feedback are kept")

    prefect_database_url: SecretStr | None = Field(
        default=None, description="postgresql+asyncpg://user:password@host:port/database; SQLite in the state folder when not set"
    )
    prefect_port: int | None = Field(default=None, ge=1, le=65535, description="port of the Prefect server and UI; a free one by default")
    predictor_port: int | None = Field(default=None, ge=1, le=65535, description="port of the predictor; a free one by default")
    bridge_port: int | None = Field(default=None, ge=1, le=65535, description="port of the event bridge; a free one by default")
    notify_urls: SecretStr | None = Field(
        default=None, description="where to tell of failed and rejected runs and of drift: Apprise URLs, separated by spaces"
    )


@lru_cache(maxsize=1)
def load_settings() -> Settings:
    """The settings of this process. Call `load_settings.cache_clear()` after changing the environment."""
    silence_telemetry()
    return Settings()
