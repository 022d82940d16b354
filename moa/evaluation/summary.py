"""The summary of an evaluation as text, for terminals and as Markdown. No stage's code digest covers this module: it is
wording.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from moa.core import text
from moa.evaluation import promises

NAMES = {"base": "base", "routed": "routed", "forced": "label forced"}
LEFT = "left to the base (95 % limit, promise)"


def table(summary: dict[str, Any]) -> str:
    """The figures of `moa.evaluation.evaluate.summarise` by domain and system, then those of routing.

    The last column is of the test rows that the router left to the base: their share, the most that fresh prompts are
    left at 95 % confidence, and what the router promises. Evaluations from before these were recorded have none.
    """
    routing = summary["routing"]
    by_domain, promised = routing.get("by_domain") or {}, routing.get("promises")
    rows = [("domain", "system", "loss", "perplexity", "score", *([LEFT] if by_domain else []))]
    for domain, systems in summary["domains"].items():
        for system, figures in systems.items():
            left = abstention_text(by_domain.get(domain), (promised or {}).get(domain)) if system == "routed" else ""
            rows.append((domain if system == "base" else "", NAMES[system], f"{figures['loss']:.3f}",
                         f"{figures['perplexity']:.2f}", f"{figures['score']:.3f}", *([left] if by_domain else [])))
    calibration = f", calibration error {routing['ece']:.1%}" if "ece" in routing else ""
    lines = [text.table(rows, right=range(2, 5)),
             f"routing accuracy {routing['accuracy']:.1%}, abstention {routing['abstention']:.1%}{calibration}"]
    if remark := promise_remark(promised):
        lines.append(remark)
    return "\n".join(lines)


def abstention_text(measured: Mapping[str, Any] | None, promise: Mapping[str, Any] | None) -> str:
    """Such as "1.8% (8.1%, 0.95%)": the share of test rows left to the base, its upper limit, and the promise."""
    if measured is None:
        return ""
    return (f"{measured['share']:.1%} ({measured['limit']:.1%}, "
            f"{'-' if promise is None else format(promise['share'], '.2%')})")


def promise_remark(promised: Mapping[str, Any] | None) -> str:
    """That the router never abstains, or which domains have too few groups for what was asked; otherwise empty.

    `promised` is that of the mixture's manifest; None = a router from before promises.
    """
    if promised is None:
        return ""
    share = promises.wanted(promised)
    if share is None:
        return promises.NEVER
    return promises.too_few({domain: each["groups"] for domain, each in promised.items()}, share)


def reliability_cells(bins: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """`moa.evaluation.routing.reliability` as the cells of a table, its head first."""
    return [("confidence", "mean", "right", "95 % interval", "rows"),
            *((f"{each['low']:.0%} to {each['high']:.0%}", f"{each['confidence']:.1%}", f"{each['right']:.1%}",
               f"{each['interval'][0]:.1%} to {each['interval'][1]:.1%}", f"{each['rows']:,}") for each in bins)]


def markdown(summary: dict[str, Any]) -> str:
    """The summary as the file report.md: the table, and how far the router's confidence can be relied on."""
    parts = [f"```\n{table(summary)}\n```\n"]
    if bins := summary["routing"].get("reliability"):
        cells = text.table(reliability_cells(bins), right=range(1, 5))
        parts.append(f"How often the router's best guess is right, by its confidence:\n\n```\n{cells}\n```\n")
    return "\n".join(parts)
