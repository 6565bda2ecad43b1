"""What stored numbers mean to a reader: alpha and its source, the configuration, the weights.

Files are read through this module. Every computed tensor passes `as_read` before it is written,
and every finished file is read once more before it appears (ops/adapter_file/writer.py). So the
weights that a report measures are those that a reader finds. What cannot be honoured is a
`Problem`; one of severity `error` stops every verb but `inspect`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, isclose
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from adaptkit.algorithms.contract import ALPHA, Stated
from adaptkit.errors import AdaptkitError, NotRepresentable, WrongUsage
from adaptkit.files.limits import read_json
from adaptkit.keymap.patterns import Patterns

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from adaptkit.algorithms.contract import Facts, Shapes, Weights

__all__ = [
    "DIFFUSERS_CONFIG",
    "PEFT_CONFIG",
    "SAY",
    "AsRead",
    "Meaning",
    "Problem",
    "as_read",
    "otherwise",
    "refuse_errors",
    "states_alpha",
]

PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_CONFIG = "lora_adapter_metadata"
# PEFT subtracts what these put into the factors from the base (peft/tuners/lora/layer.py), so the
# adapter alone is not the difference; `loftq` quantises the base instead
REBASED = re.compile(r"pissa(_niter_\d+)?|olora|corda|loftq|lora_ga", re.IGNORECASE)
# those that the base weight alone determines; the others take data or a random start
TAKEN = ("pissa", "olora")
# the settings of PEFT's OFT that adaptkit computes; tensors do not show others
OFT_COMPUTED: Mapping[str, object] = MappingProxyType(
    {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "coft": False}
)
# metadata keys that state alpha and the rank for a whole file, without saying for which modules;
# not kohya's `ss_network_alpha`, which outlives every change of a file
FLAT_ALPHA = ("lora_alpha", "alpha", "network_alpha")
FLAT_RANK = ("rank", "lora_rank", "r", "network_dim", "ss_network_dim")
# they may stand behind the name of a component, or in a configuration as JSON
_SETTING = re.compile(r"(?:(?:unet|transformer|text_encoder)(?:_\d)?\.)?(\w+)")
PACKED = ("lora_config", "adapter_config")
AS_RANK = "as-rank"
SAY = "say which counts: --alpha-in VALUE, or --alpha-in as-rank"
_FLOAT32 = 1e-6  # alpha is stored as float32
_LARGEST = 1 << 53  # ranks up to here are exact as floats


class Problem(NamedTuple):
    """A fault of a file: an `error` makes it unusable, a `warning` does not."""

    severity: str
    module: str | None
    what: str
    hint: str = "`adaptkit inspect` lists the problems of a file"


def refuse_errors(problems: Iterable[Problem], path: Path) -> None:
    """NotRepresentable for the first problem of the whole file that is an error."""
    for problem in problems:
        if problem.severity == "error" and problem.module is None:
            raise NotRepresentable(problem.what, hint=problem.hint, file=path)


@dataclass(frozen=True)
class Meaning:
    """What metadata and configuration say about the tensors of a file.

    `configs` are the fields of PEFT's configuration: those of the whole file (component ""), or
    one set per component in the metadata of diffusers. `given` is an alpha that the user states,
    which counts before all others, or `as-rank`.
    """

    configs: Mapping[str, Mapping[str, object]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    given: str | None = None

    @classmethod
    def of(
        cls,
        metadata: Mapping[str, str],
        config: Mapping[str, object] | None,
        given: str | None = None,
    ) -> Meaning:
        """From PEFT's adapter_config.json if there is one, else from the metadata."""
        _check_alpha(given)
        if config is not None:
            return cls({"": config}, metadata, given)
        try:
            stored = read_json(metadata.get(DIFFUSERS_CONFIG, "{}"), DIFFUSERS_CONFIG)
        except ValueError:
            stored = {}
        parts: dict[str, dict[str, object]] = {}
        for name, value in stored.items() if isinstance(stored, dict) else ():
            component, _, key = name.rpartition(".")
            parts.setdefault(component, {})[key] = value
        return cls(parts, metadata, given)

    def alpha(self, component: str, module: str, stored: float | None) -> tuple[Stated | None, str]:
        """The alpha of a module and its source: given, tensor, metadata or none.

        `stored` is the alpha tensor of the module, which counts before any configuration.
        `module` is its name in the file.
        """
        if self.given is not None:
            return None if self.given == AS_RANK else Stated(float(self.given)), "given"
        if stored is not None:
            return Stated(stored), "tensor"
        found = self._configured(component, module)
        return found, "none" if found is None else "metadata"

    def bias_scale(self, component: str, module: str, rank: int | None) -> float:
        """What multiplies a `lora_B.bias`: what multiplies its factors, of this rank if stored.

        Source: peft/tuners/lora/layer.py, `merge`.
        """
        found = self.alpha(component, module, None)[0]
        if found is None:
            return 1.0
        rank = found.rank or rank
        if rank is None:
            return 1.0
        return found.value / (rank**0.5 if found.rank_scaled else rank)

    def problems(self) -> Iterator[Problem]:
        """What the configuration asks for that adaptkit does not compute."""
        for component, config in self.configs.items():
            where = f"{component}: " if component else ""
            yield from (Problem("error", None, where + what) for what in _unsupported(config))

    def misread(self, component: str, kind: type[Weights], shapes: Shapes, window: int) -> str:
        """Why these tensors mean something else to PEFT, whose file this is; "" if they do not."""
        config = self.configs.get(component) or self.configs.get("") or {}
        role = kind.peft_lacks.get(window)
        if not role or role not in shapes or config.get("peft_type") != kind.peft_type:
            return ""
        return otherwise(kind, role, window)

    def rebased(self, component: str, kind: type[Weights]) -> str:
        """The algorithm of LoRA factors that were trained from a part of the base; "" if none."""
        config = self.configs.get(component) or self.configs.get("") or {}
        init = config.get("init_lora_weights")
        taken = kind.low_rank and isinstance(init, str) and init.lower() in TAKEN
        return f"{kind.name}+{str(init).lower()}" if taken else ""

    def settings(self, component: str) -> Mapping[str, object] | None:
        """PEFT's configuration of a component; None without one."""
        return self.configs.get(component) or self.configs.get("")

    def listed(self, component: str, field: str, module: str) -> bool:
        """Whether a field names a module as PEFT's `feedforward_modules` does: by its end, or a
        pattern for the whole of it (`tuners/ia3/model.py`).
        """
        named = (self.settings(component) or {}).get(field)
        if isinstance(named, str):
            return Patterns([f"^({named})"]).first(module) is not None
        ends = named if isinstance(named, list) else ()
        return any(isinstance(end, str) and module.endswith(end) for end in ends)

    def contradicts(self, component: str, module: str, stored: float, rank: int) -> bool:
        """Whether a tensor and the configuration give a module two scales."""
        found = None if self.given is not None else self._configured(component, module)
        if found is None:
            return False
        scale = found.value / (rank**0.5 if found.rank_scaled else found.rank or rank)
        return not isclose(scale, stored / rank, rel_tol=_FLOAT32)

    def flat_alpha(self, ranks: Collection[int]) -> tuple[float | None, Problem | None]:
        """The alpha that the metadata states for a file without any other, and what is wrong.

        `ranks` are those of its modules. It counts if the metadata states their rank too;
        otherwise nothing tells whether it was multiplied into the weights long ago.
        """
        settings = list(_flat(self.metadata))
        stated = {key: value for key, name, value in settings if name in FLAT_ALPHA}
        if self.given is not None:
            return None, None
        if not stated:
            return None, self._outlived(ranks)
        shown = ", ".join(f"{key} = {value}" for key, value in stated.items())
        alphas = {_number(value) for value in stated.values()}
        if len(alphas) > 1:
            what = f"the metadata contradicts itself: {shown}"
            return None, Problem("error", None, what, SAY)
        (alpha,) = alphas
        known = {_number(value) for _, name, value in settings if name in FLAT_RANK}
        rooted = any(name == "use_rslora" and value == "True" for _, name, value in settings)
        if alpha is not None and known == set(ranks) and not rooted:
            what = f"alpha is {alpha:g} as the metadata says, which most hosts ignore"
            return alpha, Problem("warning", None, what)
        what = f"the metadata states {shown} without the rank of these modules; alpha = rank counts"
        return None, Problem("warning", None, f"{what}; --alpha-in states another")

    def _outlived(self, ranks: Collection[int]) -> Problem | None:
        """A warning where kohya's record of the training names an alpha that no tensor states."""
        trained = _number(self.metadata.get("ss_network_alpha", ""))
        if trained is None or set(ranks) == {trained}:
            return None
        what = (
            f"it was trained with ss_network_alpha = {trained:g}, and no tensor states alpha, so "
        )
        what += "alpha = rank counts; if it was not multiplied into the weights, --alpha-in says it"
        return Problem("warning", None, what)

    def _configured(self, component: str, module: str) -> Stated | None:
        if not self.configs:  # of most files: asked for every module
            return None
        part = component if self.configs.get(component) else ""
        config = self.configs.get(part) or {}
        usual = config.get("lora_alpha", config.get("alpha"))
        alpha = _float(self._patterned(part, "alpha_pattern", module, usual))
        if alpha is None:
            return None
        rank = self._patterned(part, "rank_pattern", module, config.get("r"))
        known = rank if isinstance(rank, int) and 0 < rank < _LARGEST else None
        return Stated(alpha, known, bool(config.get("use_rslora")))

    def _patterned(self, part: str, table: str, module: str, usual: object) -> object:
        """The value of the first pattern of a table that matches the end of a module's name."""
        patterns, values = self._tables.get((part, table), (None, ()))
        found = None if patterns is None else patterns.first(module)
        return usual if found is None else values[found]

    @cached_property
    def _tables(self) -> dict[tuple[str, str], tuple[Patterns, tuple[object, ...]]]:
        """Patterns and their values by component and table; `CorruptFile` for a wrong pattern."""
        found = {}
        for part, config in self.configs.items():
            for table in ("alpha_pattern", "rank_pattern"):
                given = config.get(table)
                if isinstance(given, dict):
                    try:
                        found[part, table] = Patterns(given), tuple(given.values())
                    except AdaptkitError as error:
                        error.message = f"{table}: {error.message}"
                        raise
        return found


def otherwise(kind: type[Weights], role: str, window: int) -> str:
    """What is wrong with a role that PEFT multiplies otherwise than all other readers.

    Of a LoKr, peft/tuners/lokr/layer.py: make_kron gives the dimensions of the window to w1 only if
    there are two.
    """
    return (
        f"PEFT multiplies {kind.roles[role].spelling} of a {window}-dimensional convolution "
        "otherwise than all other readers"
    )


def states_alpha(key: str) -> bool:
    """Whether a metadata key may state an alpha for a whole file, see `flat_alpha`."""
    found = _SETTING.fullmatch(key)
    return key in PACKED or (found is not None and found[1] in FLAT_ALPHA)


def _flat(metadata: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """(key, setting, value) of the settings that metadata state, not for single modules."""
    for key, value in metadata.items():
        if key in PACKED:
            try:
                packed = read_json(value, key)
            except ValueError:
                continue
            for name, setting in packed.items() if isinstance(packed, dict) else ():
                yield f"{key}: {name}", name, str(setting)
        elif found := _SETTING.fullmatch(key):
            yield key, found[1], value


def _check_alpha(given: str | None) -> None:
    """WrongUsage unless `--alpha-in` is a positive number or `as-rank`."""
    if given is None or given == AS_RANK:
        return
    number = _number(given)
    if number is None or not 0 < number < inf:
        raise WrongUsage(f"--alpha-in takes a number above 0 or {AS_RANK}, not {given}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _float(value: object) -> float | None:
    """A number of a configuration; infinity for an integer beyond every float."""
    if not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return inf if value > 0 else -inf


def _unsupported(config: Mapping[str, object]) -> Iterator[str]:
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in TAKEN and REBASED.fullmatch(init):
        yield (
            f"init_lora_weights = {init}: the training changed the base weights too, so the "
            "factors alone are not the difference; save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    if config.get("peft_type") != "OFT":
        return
    for name, usual in OFT_COMPUTED.items():
        if config.get(name, usual) != usual:
            yield f"{name} = {config[name]}: this kind of OFT is not supported"


class AsRead(NamedTuple):
    """Stored tensors as their reader understands them. `alpha` is None without a tensor of it."""

    weights: Weights
    facts: Facts
    shapes: dict[str, tuple[int, ...]]
    alpha: float | None


def as_read(
    kind: type[Weights],
    stored: Mapping[str, Tensor],
    *,
    batch: int = 0,
    like: Facts | None = None,
) -> AsRead:
    """Read the rounded tensors of a module by role, as the file is read.

    `batch` is the number of leading dimensions of a stack of modules. `like` are the facts of the
    module that they are made of, if its kind is the same: they know what the file says beside its
    tensors. Raises ShapeMismatch or NonFinite if a reader would refuse the tensors.
    """
    shapes = {role: tuple(tensor.shape[batch:]) for role, tensor in stored.items() if role != ALPHA}
    alpha = float(stored[ALPHA]) if ALPHA in stored else None
    facts = kind.facts(shapes, None if alpha is None else Stated(alpha))
    facts = facts if like is None else kind.resettled(facts, like)
    weights = kind.decode({role: stored[role] for role in shapes}, facts)
    return AsRead(weights, facts, shapes, alpha)
