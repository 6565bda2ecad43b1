"""`inspect`: a 2,000-key file, and two folders, against the start of torch, which it must not import."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.benchmarks import measure
from tests.benchmarks.measure import PYTHON, child, median, ratio, seconds
from tests.synth import FIXTURES, Listing, load_listing, write_header_only

KEYS = 2000
SMALL_FILES, SMALL_KEYS, LARGE_FILES = 2000, 48, 50
TRAINED = {"ss_network_module": "networks.lora"}
# of the time of `python -c 'import torch'`, 1.4 s: the folders may take 2.0 s and 1.5 s
LIMITS = (0.25, 1.43, 1.07)
LOADED = (
    "import sys; from adaptkit.cli import main\n"
    "try: main()\n"
    "except SystemExit as stop: assert not stop.code, stop.code\n"
    "print('torch' in sys.modules)"
)


def write_kohya(path: Path, keys: int = KEYS) -> Path:
    """A LoRA file of exactly so many keys: SDXL in kohya's names, cut."""
    listing: Listing = load_listing(FIXTURES / "keys" / "sdxl-kohya.tsv")
    assert len(listing) >= keys
    return write_header_only(
        path, dict(list(listing.items())[:keys]), metadata={"ss_network_module": "networks.lora"}
    )


def write_folders(folder: Path, small: bool) -> dict[str, Path]:
    """Small adapters of four kinds, as a collection of styles; SDXL LoRAs of 2,166 keys each."""
    styles, large = folder / "styles", folder / "sdxl"
    styles.mkdir()
    large.mkdir()
    kinds = [
        dict(list(load_listing(FIXTURES / "keys" / f"{name}.tsv").items())[:SMALL_KEYS])
        for name in ("sd1-kohya", "flux-diffusers", "sd1-peft", "flux-kohya")
    ]
    for n in range(8 if small else SMALL_FILES):
        write_header_only(styles / f"style{n:04}.safetensors", kinds[n % 4], metadata=TRAINED)
    unet: Listing = {
        key: info
        for key, info in load_listing(FIXTURES / "keys" / "sdxl-kohya.tsv").items()
        if key.startswith("lora_unet_")
    }
    for n in range(2 if small else LARGE_FILES):
        write_header_only(large / f"style{n:02}.safetensors", unet, metadata=TRAINED)
    return {
        f"inspect FOLDER: {SMALL_FILES:,} files of {SMALL_KEYS} keys": styles,
        f"inspect FOLDER: {LARGE_FILES} files of {len(unet):,} keys": large,
    }


def run(folder: Path, console: Console, small: bool) -> list[str]:
    """Returns what was missed."""
    file = write_kohya(folder / "kohya.safetensors", 200 if small else KEYS)
    keys = 200 if small else KEYS
    jobs = {f"inspect FILE: {keys:,} keys": file, **write_folders(folder, small)}
    runs: dict[str, list[measure.Measured]] = {name: [] for name in jobs}
    theirs: list[measure.Measured] = []
    for _ in range(1 if small else 5):
        for name, path in jobs.items():
            runs[name].append(measure.adaptkit("inspect", path))
        theirs.append(measure.torch_start() if small else child(PYTHON, "-c", "import torch"))
    loaded = child(PYTHON, "-c", LOADED, "inspect", file).output.strip().splitlines()[-1]
    whole = median([m.seconds for m in theirs])
    table = Table(title=f"inspect, whole processes, median of {len(theirs)} alternating runs")
    for name in ("what", "seconds", "CPU seconds", "peak MB", "of import torch"):
        table.add_column(name, justify="left" if name == "what" else "right")
    ratios = {}
    for name, found in [*runs.items(), ('python -c "import torch"', theirs)]:
        value = median([m.seconds for m in found])
        ratios[name] = value / whole
        cpu = [m.cpu for m in found if m.cpu is not None]
        peak = max((m.peak for m in found if m.peak is not None), default=None)
        row = (seconds(value), seconds(median(cpu) if cpu else None), measure.megabytes(peak))
        table.add_row(name, *row, ratio(value, whole))
    console.print(table)
    console.print(f"torch imported by inspect: {'yes' if loaded == 'True' else 'no'}")
    missed = ["inspect imports torch"] if loaded == "True" else []
    if not small:
        missed += [
            f"{name} takes {ratios[name]:.2f} of the time of importing torch, limit {limit}"
            for name, limit in zip(jobs, LIMITS, strict=True)
            if ratios[name] > limit
        ]
    return missed
