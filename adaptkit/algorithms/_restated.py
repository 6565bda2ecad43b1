"""The fields of a PEFT configuration that is written again, for kinds that need one to be read."""

from __future__ import annotations

from collections import Counter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from adaptkit.algorithms._stored import Facts, Shapes

__all__ = ["Restated", "by_end", "counted", "exactly", "kept", "one_for_all", "patterns"]

T = TypeVar("T")

# fields that name modules, as the model was then called, or say what the file alone tells now
NAMING = frozenset(
    {
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "rank_pattern", "alpha_pattern", "lambda_pattern", "n_frequency_pattern",
        "modules_to_save", "feedforward_modules", "target_parameters", "peft_type",
    }
)  # fmt: skip


class Restated(NamedTuple):
    """A module as PEFT's configuration speaks of it: its name in the model and what is stored."""

    name: str
    shapes: Shapes
    facts: Facts
    config: Mapping[str, object] = MappingProxyType({})  # that of its source


def kept(modules: Iterable[Restated]) -> dict[str, object]:
    """The fields of the source's configuration that name no modules.

    NotRepresentable if the sources of the modules differ in them.
    """
    found: dict[str, object] = {}
    for n, module in enumerate(modules):
        own = {name: value for name, value in module.config.items() if name not in NAMING}
        if not n:
            found = own
        elif own is not found and own != found:
            differing = sorted(k for k in own.keys() | found if own.get(k) != found.get(k))
            raise NotRepresentable(
                f"the inputs differ in what a PEFT configuration states once: {differing[0]}",
                hint="--algo lora or --algo full can hold them all",
            )
    return found


def patterns(values: Iterable[tuple[str, T]]) -> tuple[T, dict[str, T]]:
    """The most frequent value, and the other values by module."""
    listed = list(values)
    usual = Counter(value for _, value in listed).most_common(1)[0][0]
    return usual, {exactly(name): value for name, value in listed if value != usual}


def exactly(name: str) -> str:
    """The pattern of one module: `^` keeps `proj_out` from matching `blocks.0.proj_out` too.

    Source: huggingface/peft#2419.
    """
    # the modules of a text encoder may stand below `text_model.`
    return name if name.startswith("encoder.layers.") else f"^{name}"


def one_for_all(what: str, values: Iterable[T]) -> T:
    """The one value of all modules; NotRepresentable if they differ."""
    found: list[T] = []
    for value in values:
        if value not in found:  # a configuration may hold anything, also lists
            found.append(value)
    if len(found) != 1:
        listed = ", ".join(map(str, found[:4]))
        raise NotRepresentable(
            f"these modules differ in {what} ({listed}), which a PEFT configuration states once",
            hint="--algo lora or --algo full can hold them",
        )
    return found[0]


def counted(
    modules: Iterable[Restated], field: str, table: str = "", role: str = "", axis: int = 0
) -> dict[str, Any]:
    """The rank of all modules as `field`, of some as `table`; it is the length of a role's axis.

    Without `table` all must have the same one. Without `role` the rank is that of the facts.
    """
    values = [(m.name, m.shapes[role][axis] if role else m.facts.rank) for m in modules]
    if not table:
        return {field: one_for_all("rank", (value for _, value in values))}
    usual, others = patterns(values)
    return {field: usual, table: others}


def by_end(field: str, values: Mapping[str, int]) -> dict[str, Any]:
    """A number of each module as `field`, and its pattern, whose names PEFT takes as ends of names.

    Source: huggingface/peft `tuners/fourierft/model.py`, `tuners/c3a/model.py`. NotRepresentable
    where one name is the end of another that has a different number.
    """
    usual, _ = patterns(values.items())
    odd = {name: n for name, n in values.items() if n != usual}
    for name, number in values.items():
        end = next((n for key, n in odd.items() if name.endswith(f".{key}")), number)
        if end != number:
            raise NotRepresentable(
                f"PEFT cannot give {name} another {field} than the module whose name is its end",
                hint="--algo full with --base CHECKPOINT can hold them",
            )
    return {field: usual, f"{field}_pattern": odd}
