"""Looks at the PostgreSQL database of the Prefect server before it starts, since the server itself says little that helps."""

import asyncio
from typing import TYPE_CHECKING

from pydantic import SecretStr

from ml.errors import ConfigError, ServiceError

if TYPE_CHECKING:
    from sqlalchemy import URL

SETTING = "MILLSTREAM_PREFECT_DATABASE_URL"
FORM = "postgresql+asyncpg://user:password@host:port/database"
TIMEOUT_SECONDS = 10
# Prefect's own lower bound.
MIN_VERSION = 14


def check_database(url: SecretStr) -> None:
    """Log in as the server will, and look whether it may make its tables. No message shows the password.

    Raises:
        ConfigError: not a URL of the form above.
        ServiceError: nobody answers, the login is refused, or the database is of no use to Prefect; with what to do.
    """
    asyncio.run(_check(parse_database_url(url)))


def parse_database_url(url: SecretStr) -> "URL":
    """Raises ConfigError; the URL itself is never in the message."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url.get_secret_value())
    except (ArgumentError, ValueError):  # also for a port that is no number; its message shows parts of the URL
        raise ConfigError(f"{SETTING} is not a database URL; it has the form {FORM}, with @ : / in a password as %40 %3A %2F") from None
    if parsed.drivername != "postgresql+asyncpg":
        raise ConfigError(f"{SETTING} begins with {parsed.drivername!r}; it has the form {FORM}")
    if not (parsed.host and parsed.database):
        raise ConfigError(f"{SETTING} names no {'database' if parsed.host else 'host'}; it has the form {FORM}")
    return parsed


async def _check(url: "URL") -> None:
    import asyncpg

    address = f"{url.host}:{url.port or 5432}"
    where = f"the database {url.database} at {address} ({SETTING})"
    # The very arguments that the server's driver will get, ssl and the like among them.
    _, arguments = url.get_dialect()().create_connect_args(url)
    try:
        connection = await asyncpg.connect(**arguments, timeout=TIMEOUT_SECONDS)
    except (OSError, TimeoutError) as error:
        reason = str(error) or f"no answer within {TIMEOUT_SECONDS} s"
        raise ServiceError(f"{where} cannot be reached: {reason}; start PostgreSQL there, or correct the host and port") from error
    except asyncpg.InvalidCatalogNameError as error:
        raise ServiceError(f"{where} does not exist; create it: createdb -h {url.host} {url.database}") from error
    except asyncpg.InvalidAuthorizationSpecificationError as error:  # InvalidPasswordError is one
        raise ServiceError(f"{where} refused the user {url.username!r}: {error}; check user and password, and pg_hba.conf") from error
    except (asyncpg.PostgresError, asyncpg.InterfaceError, ValueError) as error:
        raise ServiceError(f"{where} refused the connection: {error}") from error
    try:
        version = connection.get_server_version()
        may_create = await connection.fetchval("SELECT has_schema_privilege(current_schema(), 'CREATE')")
        has_trigrams = await connection.fetchval("SELECT count(*) FROM pg_available_extensions WHERE name = 'pg_trgm'")
    finally:
        await connection.close()
    if version.major < MIN_VERSION:
        raise ServiceError(f"{where} is PostgreSQL {version.major}; Prefect needs {MIN_VERSION} or newer")
    if not may_create:
        raise ServiceError(
            f"{where}: the user {url.username!r} may not create tables there; make it the owner: "
            f'ALTER DATABASE "{url.database}" OWNER TO "{url.username}"'
        )
    if not has_trigrams:
        raise ServiceError(f"{where} lacks the extension pg_trgm, which Prefect needs; install PostgreSQL's contrib modules there")
