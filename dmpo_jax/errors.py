"""User errors: their message is printed without a traceback.

Every other exception is a bug in this package or a library, and shows its traceback.
"""

import contextlib
import errno
import re
import sys
from collections.abc import Iterator

# Errors of the system that only a person can resolve: a full disk, a missing permission.
_NEEDS_A_PERSON = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)

_UNPRINTABLE = re.compile(r"[\0-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

INTERRUPTED = 130  # exit status of shells for Ctrl-C
STOPPED = "stopped; the same command resumes"
STOPPED_ANEW = "stopped; the same command starts over"


class UserError(ValueError):
    """A problem that the user can fix.

    The message says what was needed, what was given and what to change.
    """


class MissingPackageError(UserError, ImportError):
    """A missing optional dependency; the message says how to install it."""


class MissingFileError(UserError, FileNotFoundError):
    """A missing file or folder that the user named."""


def printable(text: str, keep: str = "\n\t") -> str:
    """Escapes control characters and lone surrogates, as `\\x1b`: a data set's text may have them.

    keep: of these characters, those that stay as they are.
    """
    return _UNPRINTABLE.sub(lambda c: c[0] if c[0] in keep else _escaped(c[0]), text)


def _escaped(text: str) -> str:
    return text.encode("unicode_escape").decode()


def message_of(error: BaseException) -> str:
    """Returns the message of a user error; '' for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _NEEDS_A_PERSON:
        # Of a copy, filename2 is the file that could not be written.
        return f"{error.filename2 or error.filename or 'a file'}: {error.strerror}"
    return ""


@contextlib.contextmanager
def in_words(stopped: str = STOPPED) -> Iterator[None]:
    """Ends the process on Ctrl-C and on user errors, with a message in place of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if message := message_of(error):
            sys.exit(message)
        raise
