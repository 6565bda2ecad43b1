"""Kinds whose tensors mean what PEFT's configuration says."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from adaptkit.errors import NotRepresentable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from adaptkit.algorithms._restated import Restated
    from adaptkit.algorithms._stored import Facts, Shapes

__all__ = ["CONFIG_HINT", "Configured", "Unsettled", "Wanted"]

CONFIG_HINT = (
    "PEFT saves adapter_config.json beside adapter_model.safetensors: put both in one folder, and "
    "name the folder"
)


class Unsettled(NotRepresentable):
    """The configuration is missing that says what tensors mean."""


class Wanted(NamedTuple):
    """What a file says of one module beside its tensors.

    `config` is PEFT's configuration, None without one. `shapes` are those of its tensors. `listed`
    tells whether a field of the configuration names the module.
    """

    config: Mapping[str, object] | None
    shapes: Shapes
    listed: Callable[[str], bool]


class Configured:
    """A kind may need fields of PEFT's configuration (`settings`) to know what its tensors mean.

    `shared` are roles whose tensors are stored once for all modules, by the name that follows the
    model's (`base_model.vera_A`).
    """

    # field → what PEFT takes for it where an older configuration does not have it
    settings: ClassVar[Mapping[str, object]] = MappingProxyType({})
    shared: ClassVar[Mapping[str, str]] = MappingProxyType({})
    drawn_whole: ClassVar[bool] = False  # these are as large as the largest layer, or drawn so
    caveat: ClassVar[str] = ""  # what no file of this kind tells

    # PEFT's configuration is written again, with what `restated` gives in place of its fields
    peft_kept: ClassVar[bool] = False
    peft_only: ClassVar[bool] = False  # and no other format holds the kind
    linear: ClassVar[bool] = False  # `times` is exact, also where ΔW depends on the weight

    @classmethod
    def settled(cls, facts: Facts, wanted: Wanted) -> Facts:
        """Facts completed by what the file says beside tensors; Unsettled if it does not say it."""
        return facts

    @classmethod
    def resettled(cls, facts: Facts, like: Facts) -> Facts:
        """Facts of shapes alone, with what `like` knows of the same module beside its tensors."""
        if not (cls.settings or cls.peft_only or like.settings):
            return facts
        scale = like.scale if cls.peft_only else facts.scale
        return replace(facts, scale=scale, settings=like.settings, rows=facts.rows or like.rows)

    @classmethod
    def restated(cls, modules: Sequence[Restated]) -> dict[str, Any]:
        """The fields of PEFT's configuration that the modules tell, where it is written again.

        NotRepresentable if they differ in what it states once for all.
        """
        return {}

    @classmethod
    def beside(cls, facts: Facts, rows: int, columns: int) -> Facts:
        """Facts completed by the most rows and columns of the layers that the file changes."""
        return facts

    @classmethod
    def changes_bias(cls, facts: Facts) -> bool:
        """Whether the tensors of a weight change its layer's bias too, see `on_bias`."""
        return False

    def on_bias(self, weight: Tensor) -> Any:  # Weights, which are built on this class
        """The weights of what these do to the layer's bias (..., rows, 1).

        `weight` (..., rows, columns) is that of the layer before any adapter, in float32 or wider.
        """
        raise NotImplementedError

    @classmethod
    def stated(cls, wanted: Wanted) -> dict[str, object]:
        """The values of `settings`; Unsettled without a configuration."""
        if wanted.config is None:
            raise Unsettled(
                f"what {getattr(cls, 'title', '')} tensors mean is in adapter_config.json "
                f"({', '.join(cls.settings)}), which is missing",
                hint=CONFIG_HINT,
            )
        return {name: wanted.config.get(name, usual) for name, usual in cls.settings.items()}
