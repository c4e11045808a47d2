"""Files, local or on object storage: atomic writes."""

from etils import epath


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file so that a reader finds the old content or all of the new."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
