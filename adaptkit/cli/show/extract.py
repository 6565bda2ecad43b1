"""Summary of `extract`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptkit.cli.show.text import human, percent

if TYPE_CHECKING:
    from adaptkit.cli.show.talk import Talk
    from adaptkit.ops import extract

__all__ = ["extracted"]


def extracted(talk: Talk, report: extract.Report) -> None:
    """Print the summary of an extraction."""
    same, some = report.captured_by_lora_of_same_size, report.layers_compared_with_lora
    kept = min(1.0, same or 0.0)
    share = "" if same is None else f"about {kept:.0%}" if some else percent(kept)
    rows = [
        (
            "adapter",
            f"{report.algorithm} for {report.family}, {report.format} keys, {human(report.bytes)}",
        ),
        ("modules", f"{report.modules} written, {report.unchanged} unchanged and left out"),
        (
            "captured",
            f"{percent(report.captured)} of ‖ΔW‖², relative error {report.relative_error:.3g}",
        ),
        (
            "same size",
            share
            and f"a LoRA with as many parameters would capture {share}"
            + (f", measured on {some} layers" if some else ""),
        ),
    ]
    columns = ("algorithm", "rank", "captured", "relative_error", "module")
    talk.written(report, rows, columns, report.notes)
