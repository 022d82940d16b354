"""The summary of an evaluation as a table for terminals. Wording only: no stage's code digest covers this module."""

from typing import Any

NAMES = {"base": "base", "routed": "routed", "forced": "label forced"}


def table(summary: dict[str, Any]) -> str:
    """The figures of `summary` (as `moa.evaluation.evaluate.summarise` makes them): domain by system, then routing."""
    width = max(len(domain) for domain in summary["domains"])
    lines = [f"{'domain':<{width}}  {'system':<12}  {'loss':>7}  {'perplexity':>10}  {'score':>6}"]
    for domain, systems in summary["domains"].items():
        for system, figures in systems.items():
            label = domain if system == "base" else ""
            lines.append(f"{label:<{width}}  {NAMES[system]:<12}  {figures['loss']:7.3f}  {figures['perplexity']:10.2f}"
                         f"  {figures['score']:6.3f}")
    routing = summary["routing"]
    calibration = f", calibration error {routing['ece']:.1%}" if "ece" in routing else ""
    lines.append(f"routing accuracy {routing['accuracy']:.1%}, abstention {routing['abstention']:.1%}{calibration}")
    return "\n".join(lines)
