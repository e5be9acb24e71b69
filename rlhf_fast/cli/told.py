"""What a verb says when it is done."""

from __future__ import annotations

import json
from typing import Any


def tell(result: dict[str, Any], out: str) -> None:
    """Print the summary of a run's result, and what the run took."""
    print(json.dumps(result["summary"], indent=2))
    print(f"{result['seconds']:.0f} s, at most {result['peak_rss_gb']:.1f} GB in memory; written to {out}")
