"""One appliance for one data directory: an exclusive lock on ``harli.lock`` that holds the owner's pid.

The kernel drops the lock when the process ends, however it ends, so a crash never leaves a stale one.
Knows files and locks; knows no SQL.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType

from harli_appliance.errors import ConfigError, Conflict

LOCK_FILE = "harli.lock"


class HomeLock:
    """Holds a data directory for this process from `acquire` to `release`.

    Args:
        home: the data directory; made, readable by its owner only, when it does not exist.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._path = home / LOCK_FILE
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the directory.

        Raises:
            Conflict: another appliance has it; the message names its pid.
            ConfigError: the directory cannot be made, written or locked.
        """
        try:
            self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(
                f"data directory {self._home} cannot be used: {error.strerror}; "
                "set HARLI_HOME to a folder that you can write",
                param="home",
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"data directory {self._home} cannot be locked: {error.strerror}; "
                    "set HARLI_HOME to a folder on a local disk",
                    param="home",
                ) from error
            raise Conflict(
                f"data directory {self._home} is in use by another appliance (pid {owner or 'unknown'}); "
                "stop it, or set HARLI_HOME to another folder",
                code="data_directory_in_use",
                param="home",
            ) from None
        with contextlib.suppress(OSError):  # a full disk: the lock is what counts, the pid is only told
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the directory back; does nothing when it is not held.

        The file stays: unlinking it would let two processes lock two files of the same name.
        """
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> HomeLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
