"""A model card: what an adapter is, what loads it, how it was made, ready to publish."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptkit.detect import families
from adaptkit.errors import WrongUsage
from adaptkit.files.provenance import history
from adaptkit.keymap import algorithms

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from adaptkit.ops.inspect.run import Report

__all__ = ["card"]

# what a reader wants to know of a training, by kohya's names
_TRAINING = {
    "ss_sd_model_name": "base model",
    "ss_base_model_version": "base version",
    "ss_num_train_images": "images",
    "ss_num_epochs": "epochs",
    "ss_steps": "steps",
    "ss_resolution": "resolution",
    "ss_unet_lr": "learning rate",
    "ss_text_encoder_lr": "learning rate of the text encoder",
    "ss_optimizer": "optimizer",
    "ss_lr_scheduler": "schedule",
    "ss_seed": "seed",
}
_MODEL = {
    "modelspec.author": "author",
    "modelspec.license": "license",
    "modelspec.date": "date",
    "modelspec.usage_hint": "usage",
}
_TAGS = 20


def card(report: Report) -> str:
    """The card of an inspected adapter in Markdown, with the front matter of model hubs.

    Only what the file says or was measured on it; WrongUsage for anything but an adapter.
    """
    record = report.record
    if report.error is not None or record["kind"] != "adapter":
        raise WrongUsage("a card describes one adapter", hint="`adaptkit inspect` says what it is")
    return "\n".join(_lines(record)) + "\n"


def _lines(record: Mapping[str, Any]) -> Iterator[str]:
    said, family = record["metadata"], record["family"]
    title = said.get("modelspec.title") or Path(record["path"]).stem
    yield from ("---", "tags:", *(f"- {name}" for name in _labels(record)), "---", "")
    yield f"# {_plain(title)}"
    yield ""
    if said.get("modelspec.description"):
        yield from (_plain(said["modelspec.description"]), "")
    kinds = " and ".join(algorithms()[name].title for name in record["algorithms"])
    known = families()[family].title if family else "a model of an unknown family"
    yield f"An adapter ({kinds}) for {known}, in {record['format']} keys."
    yield ""
    if phrase := said.get("modelspec.trigger_phrase"):
        yield from ("## Trigger", "", f"`{_plain(phrase)}`", "")
    yield from _facts(record)
    yield from _hosts(record)
    yield from _made(said)


def _labels(record: Mapping[str, Any]) -> Iterator[str]:
    yield from record["algorithms"]
    if record["family"]:
        yield record["family"]


def _facts(record: Mapping[str, Any]) -> Iterator[str]:
    ranks = ", ".join(f"{rank} ({count} modules)" for rank, count in record["ranks"].items())
    parts = ", ".join(f"{part} {count}" for part, count in record["components"].items())
    scales = ", ".join(f"{scale} ({count})" for scale, count in record["scales"].items())
    yield from ("## The file", "", "| | |", "| --- | --- |")
    for name, value in (
        ("modules", parts),
        ("ranks", ranks),
        ("scales at strength 1", scales),
        ("parameters", f"{record['parameters']:,}"),
        ("numbers", ", ".join(record["dtypes"])),
        ("bytes", f"{record['bytes']:,}"),
        ("SHA-256", record.get("sha256", "")),
        ("‖ΔW‖", f"{record['norm']:.4g}" if record.get("norm") else ""),
    ):
        if value:
            yield f"| {name} | {value} |"
    yield ""


def _hosts(record: Mapping[str, Any]) -> Iterator[str]:
    if not record["loads_in"]:
        return
    words = {True: "yes", False: "no", None: "not measured"}
    yield from ("## Loads in", "", "| host | loads | |", "| --- | --- | --- |")
    for host, loads in record["loads_in"].items():
        yield f"| {host} | {words[loads]} | {_plain(record['why'].get(host, ''))} |"
    yield ""


def _made(said: Mapping[str, str]) -> Iterator[str]:
    training = [(name, said[key]) for key, name in (_MODEL | _TRAINING).items() if said.get(key)]
    records = [one for one in history(said) if isinstance(one, dict)]
    if not training and not records:
        return
    yield from ("## How it was made", "")
    if training:
        yield from ("| | |", "| --- | --- |")
        yield from (f"| {name} | {_plain(value)} |" for name, value in training)
        yield ""
    for one in records:
        more = ", ".join(f"{k} {v}" for k, v in one.items() if isinstance(v, str | int | float))
        yield f"- {_plain(more)}"
    if records:
        yield ""
    tags = _tags(said)
    if tags:
        yield from ("Most frequent tags of the training: " + ", ".join(map(_plain, tags)) + ".", "")


def _tags(said: Mapping[str, str]) -> list[str]:
    found: Counter[str] = Counter()
    try:
        folders = json.loads(said.get("ss_tag_frequency", "{}"))
    except (ValueError, RecursionError):
        return []
    for folder in folders.values() if isinstance(folders, dict) else ():
        if isinstance(folder, dict):
            found.update({str(k).strip(): n for k, n in folder.items() if isinstance(n, int)})
    return [tag for tag, _ in found.most_common(_TAGS)]


def _plain(text: object) -> str:
    """Untrusted text in one line, without what Markdown and HTML would take for their own."""
    line = " ".join(str(text).split())
    line = "".join(letter for letter in line if letter.isprintable())
    return line.replace("<", "&lt;").replace("|", "\\|").replace("`", "'")
