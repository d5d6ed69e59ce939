"""Every error that Millstream raises on purpose.

    MillstreamError
    ├── BadInputError            the caller can fix it: a column, a file, a setting      exit 2
    │   ├── ConfigError          an unknown key, a value out of bounds
    │   └── DataError            the data cannot be read or cannot be learned from
    ├── StorageError             the object store refused or is not there                 exit 1
    │   ├── ObjectNotFoundError
    │   ├── DigestMismatchError  the bytes are not the bytes that were written
    │   ├── WriteConflictError   somebody else moved the object first (If-Match failed)
    │   └── StorageUnavailableError   retryable
    ├── TrainingError            a rank failed for a reason that would repeat
    │   ├── WorkerLostError      a rank was killed or went silent                         retryable
    │   └── TrainingPreempted    asked to end early; a checkpoint was saved               retryable
    ├── CompressionError         one method failed; the run goes on without it
    ├── BundleError              a bundle is damaged, or of a version this code cannot read
    ├── DeploymentError          a version did not answer as it should
    └── ServiceError             a local service did not start or died
        └── BridgeUnavailableError   the event bridge did not answer (ml.event_client)    retryable

A message says what happened, where, the value found, and what to do. `retryable` decides whether a
task is tried again; `exit_code` is what the command line returns.
"""


class MillstreamError(Exception):
    """Base of all errors raised on purpose."""

    retryable = False
    exit_code = 1


class BadInputError(MillstreamError):
    """Something the caller gave is wrong; trying again changes nothing."""

    exit_code = 2


class ConfigError(BadInputError):
    """A setting is unknown or out of bounds."""


class DataError(BadInputError):
    """The data cannot be read or cannot be learned from."""


class StorageError(MillstreamError):
    """The object store refused a call."""


class ObjectNotFoundError(StorageError):
    """There is no object under that key."""


class DigestMismatchError(StorageError):
    """The bytes read are not the bytes that were written."""


class WriteConflictError(StorageError):
    """A conditional write lost: the object changed since it was read."""


class StorageUnavailableError(StorageError):
    """The object store did not answer, or answered that it is busy."""

    retryable = True


class TrainingError(MillstreamError):
    """Training failed for a reason that would repeat."""


class WorkerLostError(TrainingError):
    """A training rank was killed or stopped reporting."""

    retryable = True


class TrainingPreempted(TrainingError):
    """A training was asked to end before it was done (SIGTERM) and saved a checkpoint; run again, it loses no step.

    `exit_code` is EX_TEMPFAIL of sysexits.h: schedulers can tell it from a failure.
    """

    retryable = True
    exit_code = 75


class CompressionError(MillstreamError):
    """One compression method failed; other variants are not affected."""


class BundleError(MillstreamError):
    """A bundle is damaged, or written by a version this code cannot read."""


class DeploymentError(MillstreamError):
    """A model version did not answer as it should."""


class ServiceError(MillstreamError):
    """A local service did not start, or died."""
