"""What every result says of how it came about."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hourglass.codec.runtime import usable_cores

_PRODUCTS = {"avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX VNNI", "avx512f": "AVX-512", "avx2": "AVX2"}
"""Of what /proc/cpuinfo calls the instructions that products are fastest with, best first."""


def head(model: str | None = None) -> dict[str, Any]:
    """The day, the machine, the versions that the figures depend on; and first the model, if they are of one."""
    packages = ("pillow", "onnxruntime", "constriction", "numpy", "hourglass-codec")
    return ({"model": model} if model else {}) | {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}{_products()}, {usable_cores()} cores",
        "versions": {name: version(name) for name in packages},
    }


def _products() -> str:
    """Speed depends on these more than on anything else; only Linux tells them in a file."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return ""
    return next((f" with {name}" for flag, name in _PRODUCTS.items() if flag in flags), "")
