"""Which errors are for the user: their message is printed, without a traceback.

Every other exception is a bug, ours or a library's, and shows its traceback.
"""

import errno

# What the system refuses until a person acts: the disk is full, or the file is not ours.
_NEEDS_A_PERSON = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)


class UserError(ValueError):
    """A problem that the user can fix. The message says what was needed, what came and what
    to change."""


class MissingPackageError(UserError, ImportError):
    """An optional dependency is not installed; the message says how to install it."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


def message_of(error: BaseException) -> str:
    """The message of an error that is for the user; '' where it is a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _NEEDS_A_PERSON:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return ""
