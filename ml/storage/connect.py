"""Opens the object store that the environment names."""

from ml.errors import ConfigError
from ml.settings import Settings, load_settings
from ml.storage.artifacts import ArtifactStore
from ml.storage.s3 import S3Store


def open_artifact_store(settings: Settings | None = None) -> ArtifactStore:
    """The artifact store of this process, its buckets made if they are not there.

    Raises:
        ConfigError: the environment names no endpoint, or no keys for it.
        StorageUnavailableError: the endpoint does not answer.
    """
    settings = settings or load_settings()
    if settings.s3_endpoint is None:
        raise ConfigError(
            "no object store is known here: MILLSTREAM_S3_ENDPOINT is not set. Start the local stack with `make up`, "
            "or set it, with MILLSTREAM_S3_ACCESS_KEY and MILLSTREAM_S3_SECRET_KEY, to any S3 endpoint"
        )
    if settings.s3_access_key is None or settings.s3_secret_key is None:
        raise ConfigError(f"there are no credentials for {settings.s3_endpoint}; set MILLSTREAM_S3_ACCESS_KEY and MILLSTREAM_S3_SECRET_KEY")
    objects = S3Store(
        settings.s3_endpoint,
        settings.s3_access_key.get_secret_value(),
        settings.s3_secret_key.get_secret_value(),
        region=settings.s3_region,
        ca_file=settings.s3_ca_file,
    )
    store = ArtifactStore(objects, settings.bucket_prefix)
    store.ensure_buckets()
    return store
