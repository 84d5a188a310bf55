"""One preparation at a time in a folder: two would write the same half-made files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wsis.engine.logs import write_error
from wsis.errors import InputError
from wsis.prepare.record import make_folder

LOCK = ".prepare.lock"
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if absent; the system lets go of it if this process is killed.

    Where the file system knows no locks (some network ones) nothing is held. A folder that was
    made and stays empty is removed.

    Raises:
        InputError: another process holds it, or the disk refuses.
    """
    made = not folder.exists()
    make_folder(folder)
    path = folder / LOCK
    file = _take(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is let go: whoever waits for this name makes it
        os.close(file)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _take(path: Path) -> int:
    """The open and locked file of this name, not one that its holder has removed meanwhile."""
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise write_error(path, error, 0) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise InputError(
                f"{path.parent}: another wsis data prepare is at work there; wait until it has "
                "ended, or give another --out"
            ) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(file)
                raise write_error(path, error, 0) from error
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)
