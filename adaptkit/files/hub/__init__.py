"""Files of a model hub: `hf://owner/repo/file`, read through the cache of huggingface_hub."""

from __future__ import annotations

import re
import sys
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from adaptkit.errors import AdaptkitError, UnreadableFile

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

__all__ = ["from_hub", "is_address", "local"]

PREFIX = "hf://"
FORM = "hf://owner/repo/file, or hf://owner/repo@revision/file"
# a path object has one slash of the two
_WRITTEN = re.compile(r"hf:/{1,2}(?P<rest>.*)", re.DOTALL)
_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^/]+))?(?:/(?P<file>.+))?")
_WEIGHTS = (".safetensors", ".sft", ".bin", ".ckpt", ".pt", ".pth", ".gguf")
_INDEX, _PEFT = ".index.json", ("adapter_model.safetensors", "adapter_model.bin")
_SHOWN = 8  # names of files in a hint
_FETCHED: set[Path] = set()


class _Address(NamedTuple):
    repo: str
    revision: str | None
    file: str | None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{PREFIX}{self.repo}{revision}" + ("" if self.file is None else f"/{self.file}")


def local(given: str | PathLike[str]) -> Path:
    """The path of an input: itself, or where the cache holds a file of the hub.

    Raises `AdaptkitError` without huggingface_hub, `UnreadableFile` for what is not there.
    """
    found = _WRITTEN.fullmatch(str(given).replace("\\", "/"))
    if found is None or Path(given).exists():
        return Path(given)
    address = _ADDRESS.fullmatch(found["rest"])
    if address is None:
        raise UnreadableFile("no such address of a hub", file=str(given), hint=f"write {FORM}")
    path = _fetched(_Address(address["repo"], address["revision"], address["file"]))
    _FETCHED.add(path)
    return path


def is_address(given: object) -> bool:
    """Whether this is written as an address of a hub."""
    return _WRITTEN.fullmatch(str(given).replace("\\", "/")) is not None


def from_hub(path: Path) -> bool:
    """Whether a path came from the hub: an output does not belong beside it, in the cache."""
    return path in _FETCHED


def _fetched(address: _Address) -> Path:
    hub = _library()
    if address.file is None:
        raise UnreadableFile(
            "this is a repository, not a file", file=str(address), hint=_held(hub, address)
        )
    path = _download(hub, address, address.file)
    name = address.file.rpartition("/")[2]
    folder = address.file[: len(address.file) - len(name)]
    if name in _PEFT:  # PEFT's weights mean nothing without their configuration
        _download(hub, address, f"{folder}adapter_config.json")
    if name.endswith(_INDEX):
        from adaptkit.files.open import weight_map

        for shard in sorted(set(weight_map(path).values())):
            _download(hub, address, folder + shard)
    return path


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        hint = 'pip install "adaptkit[hub]"'
        raise AdaptkitError(f"{PREFIX} needs huggingface_hub", hint=hint) from error
    if not sys.stderr.isatty():
        utils: Any = huggingface_hub.utils
        utils.disable_progress_bars()
    return huggingface_hub


def _download(hub: Any, address: _Address, file: str) -> Path:
    errors, given = hub.errors, str(address)
    try:
        with _silent(hub):
            return Path(hub.hf_hub_download(address.repo, file, revision=address.revision))
    except errors.GatedRepoError as error:
        hint = "accept its terms on its page, and log in with `hf auth login`"
        raise UnreadableFile("the repository is gated", file=given, hint=hint) from error
    except errors.RepositoryNotFoundError as error:
        hint = "check the name; for a private one, log in with `hf auth login`"
        raise UnreadableFile("no such repository", file=given, hint=hint) from error
    except errors.RevisionNotFoundError as error:
        raise UnreadableFile("the repository has no such revision", file=given) from error
    except errors.LocalEntryNotFoundError as error:
        hint = "check the network; a file that was read once is read without it"
        raise UnreadableFile("not in the cache, and the hub cannot be reached", file=given,
                             hint=hint) from error  # fmt: skip
    except errors.EntryNotFoundError as error:
        near = _held(hub, address, file)
        raise UnreadableFile(f"the repository has no {file}", file=given, hint=near) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        told = (str(error).strip() or repr(error)).partition("\n")[0]
        raise UnreadableFile(f"cannot be fetched: {told}", file=given) from error


@contextmanager
def _silent(hub: Any) -> Iterator[None]:
    """What goes wrong is raised; huggingface_hub also logs it."""
    told = hub.utils.logging
    before = told.get_verbosity()
    told.set_verbosity_error()
    try:
        yield
    finally:
        told.set_verbosity(before)


def _held(hub: Any, address: _Address, wanted: str | None = None) -> str | None:
    """The nearest weight files of a repository, or the first."""
    try:
        names = hub.HfApi().list_repo_files(address.repo, revision=address.revision)
    except (hub.errors.HfHubHTTPError, OSError, ValueError):
        return None
    names = [name for name in names if name.endswith((*_WEIGHTS, _INDEX))]
    near = get_close_matches(wanted, names, n=3, cutoff=0.6) if wanted else []
    if near:
        return f"did you mean {' or '.join(near)}?"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"its weights: {', '.join(names[:_SHOWN])}{more}" if names else "it holds no weights"
