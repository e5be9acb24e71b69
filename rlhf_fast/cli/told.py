"""Print the summary that a verb ends with."""

from __future__ import annotations

from typing import Any

from rlhf_fast.runs.metric_names import spoken


def tell(result: dict[str, Any], out: str, then: str = "") -> None:
    """Print what a run measured, before and after where it did both, what it took, and what one may do next.

    result.json has all of it for programs.
    """
    summary: dict[str, Any] = result["summary"]
    notes = summary.get("notes") or []
    both = {name: value for name, value in summary.items() if f"{name}_before" in summary}
    rest = {
        name: value
        for name, value in summary.items()
        if name not in both and name != "notes" and not name.endswith("_before")
    }
    width = max(map(len, map(spoken, [*both, *rest])), default=0)
    if both:
        print(f"{'':<{width}}  {'before':>12}  {'after':>12}")
    for name, value in both.items():
        print(f"{spoken(name):<{width}}  {_shown(summary[f'{name}_before']):>12}  {_shown(value):>12}")
    for name, value in rest.items():
        if not isinstance(value, str):
            print(f"{spoken(name):<{width}}  {_shown(value):>12}")
    for name, value in rest.items():
        if isinstance(value, str):
            print(f"{spoken(name)}: {value}")
    for note in notes:
        print(f"  {note}")
    if result["phase"] == "ppo" and "heldout_score" not in summary:
        print("  (of the prompts of the first and of the last step; --heldout_data FILE measures on others)")
    print(f"{result['seconds']:.0f} s, at most {result['peak_rss_gb']:.1f} GB in memory; written to {out}")
    print(f"Report: {out}/report.html")
    if then:
        print(f"Next:   {then}")


def _shown(value: Any) -> str:
    if isinstance(value, dict) and {"mean", "low", "high"} <= value.keys():
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    return f"{round(value, 6) + 0.0:.4g}" if isinstance(value, float) else str(value)  # no -0, nor rounding errors
