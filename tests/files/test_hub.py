"""hf://owner/repo/file: a hub on this machine, its cache, and what is not there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from adaptkit.errors import AdaptkitError, UnreadableFile
from adaptkit.files import hub
from tests.cli.test_cli import adaptkit, process

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LORA = "lora-kohya.safetensors"


class Hub:
    """A server with the files of one repository, `anna/styles`; it counts what is fetched."""

    def __init__(self, files: dict[str, bytes]) -> None:
        held, fetched = files, []

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def log_message(self, *_: object) -> None:
                pass

            def _answer(self, *, body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                found = re.fullmatch(r"/anna/styles/resolve/(\w+)/(.+)", path)
                if found and found[1] not in ("main", COMMIT):
                    return self._refuse("RevisionNotFound")
                if found and found[2] in held:
                    data = held[found[2]]
                    if body:
                        fetched.append(found[2])
                    return self._send(data, body=body)
                if found:
                    return self._refuse("EntryNotFound")
                if path.startswith("/api/models/anna/styles"):
                    listed = [
                        {"type": "file", "path": n, "size": len(d), "oid": "0", "rfilename": n}
                        for n, d in held.items()
                    ]
                    whole = {"id": "anna/styles", "sha": COMMIT, "siblings": listed}
                    tree = "/tree/" in path
                    return self._send(json.dumps(listed if tree else whole).encode(), body=body)
                return self._refuse("RepoNotFound", 401 if "secret" in path else 404)

            def _send(self, data: bytes, *, body: bool) -> None:
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def _refuse(self, code: str, status: int = 404) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        self.fetched: list[str] = fetched
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Path]]:
    tiny = Path(__file__).parents[2] / "fixtures" / "tiny"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": []}
    found = Hub(
        {
            "style.safetensors": (tiny / LORA).read_bytes(),
            "peft/adapter_model.safetensors": (tiny / "lora-peft.safetensors").read_bytes(),
            "peft/adapter_config.json": json.dumps(config).encode(),
            "README.md": b"# styles",
        }
    )
    yield found, tmp_path_factory.mktemp("hub")
    found.close()


def at(served: tuple[Hub, Path], *arguments: object, cwd: Path | None = None, **more: str):  # type: ignore[no-untyped-def]
    server, cache = served
    settings = {
        "HF_ENDPOINT": server.address,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": "1",
    }
    return process(*arguments, cwd=cwd, **(settings | more))


def test_a_file_of_the_hub_is_read_through_its_cache(
    served: tuple[Hub, Path], tiny: Path, tmp_path: Path
) -> None:
    server, cache = served
    address = "hf://anna/styles/style.safetensors"
    first = at(served, "convert", address, "--skip", "te", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    # beside nothing: in the folder where the command was given, not in the cache
    (made,) = tmp_path.iterdir()
    assert made.name.startswith("style-")
    shutil.copy(tiny / LORA, tmp_path / "style.safetensors")
    own = adaptkit(
        "convert", tmp_path / "style.safetensors", "--skip", "te", "-o", tmp_path / "own"
    )
    assert own.returncode == 0
    assert (tmp_path / "own").read_bytes() == made.read_bytes()
    assert server.fetched == ["style.safetensors"]
    again = at(served, "inspect", address, "--json", HF_HUB_OFFLINE="1")
    assert json.loads(again.stdout)["files"][0]["family"] == "sd1"
    assert server.fetched == ["style.safetensors"]
    held = {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    refused = at(served, "metadata", address, "--set", "a=b", HF_HUB_OFFLINE="1")
    assert refused.returncode == 1
    assert "give -o FILE" in refused.stderr
    assert {p: p.read_bytes() for p in cache.rglob("*") if p.is_file()} == held


def test_the_configuration_of_peft_comes_along(served: tuple[Hub, Path]) -> None:
    done = at(
        served, "inspect", f"hf://anna/styles@{COMMIT}/peft/adapter_model.safetensors", "--json"
    )
    record = json.loads(done.stdout)["files"][0]
    assert (record["format"], record["scales"]) == ("peft", {"0.5": 80})


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("hf://anna/styles/stile.safetensors", ("no stile.safetensors", "did you mean style.saf")),
        ("hf://anna/styles", ("a repository, not a file", "its weights: ")),
        ("hf://anna/styles@v9/style.safetensors", ("no such revision",)),
        ("hf://nobody/nothing/x.safetensors", ("no such repository", "check the name")),
        ("hf://styles", ("no such address", "hf://owner/repo/file")),
    ],
)
def test_what_is_not_there_is_said(
    served: tuple[Hub, Path], address: str, words: tuple[str, ...]
) -> None:
    done = at(served, "convert", address, "--to", "comfy", "--dry-run")
    assert done.returncode == 1
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_network_or_the_extra_it_is_said(
    served: tuple[Hub, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = at(served, "inspect", "hf://anna/styles/other.safetensors", HF_HUB_OFFLINE="1")
    assert "not in the cache, and the hub cannot be reached" in done.stderr
    assert len(done.stderr.splitlines()) == 2
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(AdaptkitError, match="needs huggingface_hub") as caught:
        hub.local("hf://anna/styles/style.safetensors")
    assert caught.value.hint == 'pip install "adaptkit[hub]"'
    with pytest.raises(UnreadableFile, match="no such address"):
        hub.local(Path("hf://styles"))  # a path object drops a slash
    assert hub.local("C:/hf.safetensors") == Path("C:/hf.safetensors")


PYTHON = """
from pathlib import Path
import adaptkit as ak
from adaptkit.ops import batch
address = "hf://anna/styles/style.safetensors"
with ak.open(address) as style:
    print(style.family, len(style))
    style.convert(to="comfy", output="m.safetensors").close()
    try:
        style.convert(to="comfy", output="hf://anna/styles/x.safetensors")
    except ak.AdaptkitError as error:
        print(error)
print(ak.inspect(address)[0].record["family"])
recipe = Path("recipe.toml")
recipe.write_text(
    '[[job]]\\ncommand = "convert"\\nadapter = "' + address + '"\\nto = "comfy"\\n'
    'output = "n.safetensors"\\n'
)
print(batch.run(batch.plan(recipe, batch.Options(jobs=0))).count("done"))
print(Path("m.safetensors").read_bytes() == Path("n.safetensors").read_bytes())
"""


def test_python_and_recipes_take_addresses_too(served: tuple[Hub, Path], tmp_path: Path) -> None:
    server, cache = served
    env = {**os.environ, "HF_ENDPOINT": server.address, "HF_HUB_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", PYTHON],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines() == [
        "sd1 104",
        "an output is a file on this machine",
        "sd1",
        "1",
        "True",
    ], done.stderr
