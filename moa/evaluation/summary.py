"""The summary of an evaluation as a table for terminals. No stage's code digest covers this module: it is wording."""

from typing import Any

from moa.core import text

NAMES = {"base": "base", "routed": "routed", "forced": "label forced"}


def table(summary: dict[str, Any]) -> str:
    """The figures of `moa.evaluation.evaluate.summarise` by domain and system, then those of routing."""
    rows = [("domain", "system", "loss", "perplexity", "score")]
    for domain, systems in summary["domains"].items():
        for system, figures in systems.items():
            rows.append((domain if system == "base" else "", NAMES[system], f"{figures['loss']:.3f}",
                         f"{figures['perplexity']:.2f}", f"{figures['score']:.3f}"))
    routing = summary["routing"]
    calibration = f", calibration error {routing['ece']:.1%}" if "ece" in routing else ""
    return (f"{text.table(rows, right=range(2, 5))}\n"
            f"routing accuracy {routing['accuracy']:.1%}, abstention {routing['abstention']:.1%}{calibration}")
