"""The errors latentrt raises on purpose.

    LatentrtError
    ├── UsageError       (ValueError)   the caller asked for something impossible; the command line exits with 2
    ├── ConfigError      (ValueError)   a checkpoint's or bundle's configuration holds what is not supported
    ├── ArtifactError                   a file is missing, truncated, changed or of another version
    ├── BackendError                    a backend cannot be used here, or failed at run time
    ├── ExportError                     a component could not be exported, or its graph is not its model
    ├── BuildError                      an engine could not be built, or is not what it should be
    └── CalibrationError                int8 ranges could not be found, or a plan does not fit its graph

Messages read `<name>: expected <x>, got <y>. <what to do>`. Anything else that escapes is a bug.
"""

from __future__ import annotations


class LatentrtError(Exception):
    """Base of every error raised on purpose."""


class UsageError(LatentrtError, ValueError):
    """The caller's request cannot be carried out as it stands."""


class ConfigError(LatentrtError, ValueError):
    """A configuration file asks for something that is not supported."""


class ArtifactError(LatentrtError):
    """An artifact is missing, damaged, or made by or for something else."""


class BackendError(LatentrtError):
    """A backend is not installed, finds no usable device, or failed."""


class DeadlineError(LatentrtError, TimeoutError):
    """A run was given up because its time was over."""


class ExportError(LatentrtError):
    """A component could not be exported, or the exported graph differs from its model."""


class BuildError(LatentrtError):
    """An engine could not be built, or is not of the precision it was asked for."""


class CalibrationError(LatentrtError):
    """Ranges could not be found, or a plan is of another graph."""
