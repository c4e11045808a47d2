"""Sends an export to the Hugging Face hub: a check of the login, a list of files, one commit."""

import logging
import os
import re
from typing import TYPE_CHECKING, NamedTuple

from etils import epath

from dmpo_jax import diffusers_io, storage
from dmpo_jax.diffusers_io.folders import one_line
from dmpo_jax.errors import UserError
from dmpo_jax.export import model_card

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOG = logging.getLogger(__name__)
INDEX = "model_index.json"
_WEIGHTS = re.compile(r"(?P<stem>[\w.-]*?)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


class Parcel(NamedTuple):
    """An export as it is sent. files: path in the repository -> bytes. card: its README.md."""

    folder: epath.Path
    repository: str
    files: dict[str, int]
    card: str


def check_repository(name: str) -> None:
    """Raises UserError unless a name is one of a hub repository, `org/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        fault = "" if "/" in name else "the user or organisation is missing"
    except HFValidationError as error:
        fault = str(error)
    if fault:
        raise UserError(f"--push must be a hub repository, ORG/NAME, but got {name!r}: {fault}")


def log_in(repository: str) -> "HfApi":
    """Returns a client of the hub that is logged in. Sends nothing but the token.

    The hub client finds the token itself: HF_TOKEN, or what `hf auth login` has stored.

    Raises:
        UserError: there is no token, the hub refuses it, it may not write to the repository, or
            the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi(library_name="dmpo_jax")
    ask = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
    try:
        account = api.whoami()
    except LocalTokenNotFoundError:
        raise UserError(f"--push={repository} needs a login of the hub: {ask}") from None
    except Exception as error:  # of the network, or a refusal
        raise UserError(
            f"--push={repository}: {api.endpoint} does not accept the login "
            f"({one_line(error)}): {ask}, and check the network"
        ) from error
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise UserError(
            f"--push={repository}: the token {token.get('displayName', '')!r} may only read: {ask}"
        )
    owner = repository.partition("/")[0]
    names = [account["name"], *(one["name"] for one in account.get("orgs", []))]
    # A fine-grained token need not list all organisations that it may write to.
    if token.get("role") == "write" and owner.lower() not in map(str.lower, names):
        raise UserError(
            f"--push={repository}: {account['name']} is logged in, who may write to "
            f"{', '.join(names)}, not to {owner}: change --push, or log in as another user"
        )
    return api


def pack(folder: epath.PathLike, repository: str) -> Parcel:
    """Lists what is sent of an export, and makes its card name the repository.

    Of a pipeline: model_index.json, the parts that it names, and README.md. Of adapters: their
    file and README.md. All else in the folder stays.

    Raises:
        UserError: the folder is no complete export of this package, or holds a link that leads
            out of it.
    """
    path = epath.Path(folder)
    if storage.is_remote(path):
        raise UserError(f"--push sends a local folder, but got {path}: choose a local --out")
    card = path / model_card.FILE
    text = card.read_text() if card.is_file() else ""
    if f"- {model_card.TAG}\n" not in text.partition("\n---\n")[0] + "\n":
        raise UserError(
            f"{path} holds no export with a model card of this package: make one with "
            f"dmpo-jax convert --checkpoint=WORKDIR --out={path}"
        )
    text = text.replace(f'"{model_card.HERE}"', f'"{repository}"')
    files = {model_card.FILE: len(text.encode())}
    for file in _weights(path):
        if not os.path.realpath(file).startswith(os.path.realpath(path) + os.sep):
            raise UserError(
                f"{file} is a link to {os.path.realpath(file)}, outside of {path}, and would be "
                "published: put a copy in its place"
            )
        files[str(file.relative_to(path))] = file.stat().length
    return Parcel(path, repository, files, text)


def _weights(path: epath.Path) -> list[epath.Path]:
    """Returns all files of an export but its card."""
    pipeline, adapters = path / INDEX, path / diffusers_io.LORA_FILE
    if pipeline.exists() == adapters.exists():
        there = "both" if pipeline.exists() else "neither"
        raise UserError(
            f"{path} should hold either a pipeline ({INDEX}) or adapters "
            f"({diffusers_io.LORA_FILE}), but holds {there}: export to a folder of its own"
        )
    if adapters.exists():
        return [adapters]
    found = [pipeline]
    for name, kind in diffusers_io.read_json(pipeline).items():
        if name.startswith("_") or not isinstance(kind, list) or None in kind:
            continue
        inside = sorted((path / name).iterdir()) if (path / name).is_dir() else []
        files = [file for file in inside if file.is_file() and not file.name.startswith(".")]
        if not files:
            raise UserError(f"{path} is incomplete: {INDEX} names {name}: export it again")
        found += files
    return found


def described(parcel: Parcel) -> str:
    """Returns the files with their sizes, and the card, as `--push_dry_run` prints them."""
    width = max(map(len, parcel.files))
    lines = [f"  {name:<{width}}  {size:>14,}" for name, size in parcel.files.items()]
    total = sum(parcel.files.values())
    return "\n".join(
        [
            f"{parcel.folder} -> {parcel.repository}: {len(lines)} files, {total:,} bytes",
            *lines,
            f"\n{model_card.FILE}:\n",
            parcel.card,
        ]
    )


def send(api: "HfApi", parcel: Parcel) -> tuple[str, bool]:
    """Sends an export in one commit; the repository is made if it is not there, private.

    Returns:
        (address of the repository, whether it is private).

    Raises:
        UserError: the hub refused, or the connection was lost.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.errors import RepositoryNotFoundError

    repository = parcel.repository
    try:
        try:
            about = api.model_info(repository)
            there, private = [one.rfilename for one in about.siblings or []], bool(about.private)
        except RepositoryNotFoundError:
            api.create_repo(repository, private=True)
            there, private = [], True
        files = {name: str(parcel.folder / name) for name in parcel.files}
        added = [
            CommitOperationAdd(name, parcel.card.encode() if name == model_card.FILE else file)
            for name, file in files.items()
        ]
        old = stale(parcel, there)
        if old:
            LOG.info("the commit deletes weights that these replace: %s", ", ".join(old))
        deleted = [CommitOperationDelete(name) for name in old]
        api.create_commit(
            repository, [*deleted, *added], commit_message="Export, by dmpo-jax convert --push"
        )
    except Exception as error:  # of the network, or a refusal, by half a dozen libraries
        raise UserError(
            f"sending {parcel.folder} to {repository} failed "
            f"({one_line(error)}{_cause(error)}). The export is complete; to send it again: "
            f"dmpo-jax convert --out={parcel.folder} --push={repository}"
        ) from error
    return f"{api.endpoint}/{repository}", private


def _cause(error: Exception) -> str:
    """Returns the message of the error that a library's own hides, to follow that one's."""
    return f" {one_line(error.__cause__)}" if isinstance(error.__cause__, Exception) else ""


def stale(parcel: Parcel, there: list[str]) -> list[str]:
    """Returns files in a repository that hold the same weights cut into other files.

    A loader could prefer them to those that are sent. there: the repository's files.
    """

    def stem(name: str) -> tuple[str, str] | None:
        folder, _, file = name.rpartition("/")
        found = _WEIGHTS.fullmatch(file)
        return (folder, found["stem"]) if found else None

    sent = {stem(name) for name in parcel.files} - {None}
    return [name for name in there if stem(name) in sent and name not in parcel.files]
