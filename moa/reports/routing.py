"""Routing on the report page: how often the router is right, layer by layer too, what it mistakes, what that costs.

Knows the keys of `moa.reports.facts` and no figures of its own.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from moa.reports import html
from moa.reports.svg import Line, curves

Facts = Mapping[str, Any]
# Name, key, colour and whether it is drawn broad: where heads are as good as the router, both go the same way.
LEVELS = (("agreement with the router's choice", "agreement", 3, True), ("accuracy", "accuracy", 1, False))


def routing(measured: Sequence[tuple[str, str, Facts]], mixture: Facts) -> str:
    """The section, for each of (key, name, facts) as `moa.reports.page` has measured them; empty without any."""
    parts = []
    for _, name, each in measured:
        router, figures = each.get("router") or mixture["router"], each["routing"]
        said = ", ".join(f"{what} {figures[key]:.1%}" for what, key in (
            ("accuracy", "accuracy"), ("abstention", "abstention"), ("calibration error", "ece")) if key in figures)
        rule = f"; rule {router['rule']}, reading {_read(router)}" if {"rule", "layer"} <= router.keys() else ""
        parts.append(f"<h3>{escape(name)}</h3><p>{escape(said + rule)}</p>"
                     f'<div class="aside"><div>{_matrix(figures.get("confusion", {}))}</div>'
                     f"<div>{_tax(each['tax'])}</div></div>{_levels(router)}")
    return html.section("Routing", *parts) if parts else ""


def _read(router: Facts) -> str:
    """The levels that the rule reads, in words."""
    return {"early": f"level {router['layer']}", "last": "the last level"}.get(router["rule"], "every level")


def _levels(router: Facts) -> str:
    """Each layer's head alone on the validation prompts, as a plot and a table; empty where nobody measured it."""
    levels = router.get("levels") or []
    if not levels:
        return ""
    read = {"early": router.get("layer"), "last": levels[-1]["level"]}.get(router.get("rule", ""))
    lines = [Line(name, [(each["level"], each[key]) for each in levels], colour, broad)
             for name, key, colour, broad in LEVELS]
    note = "Level n is what enters layer n. " + (
        f"The upright line is at the level that the rule reads: {read} of {len(levels)} layers are computed for it."
        if read is not None else "The rule reads every level.")
    rows = ((f"{each['level']}{' (read)' if each['level'] == read else ''}", each["accuracy"], each["agreement"])
            for each in levels)
    table = html.table(("level", "accuracy", "agreement"), rows)
    count = router.get("validation_rows")
    prompts = f", on {count:,} validation prompts" if isinstance(count, int) else ""
    return (f"<h3>Layer agreement: each layer&#x27;s head alone{prompts}</h3>"
            + html.key([(colour, name) for name, _, colour, _ in reversed(LEVELS)])
            + f'<div class="plot">{curves(lines, "level", ".1%", 900, read)}</div><p class="soft">{escape(note)}</p>'
            + f"<details><summary>Level by level</summary>{table}</details>")


def _matrix(confusion: Mapping[str, Mapping[str, int]]) -> str:
    """Rows by domain, columns by the router's best guess; shaded by the share of the row."""
    if not confusion:
        return ""
    guesses = list(dict.fromkeys(guess for counts in confusion.values() for guess in counts))
    head = "".join(f'<th scope="col">{escape(guess)}</th>' for guess in guesses)
    lines = []
    for domain, counts in confusion.items():
        total = sum(counts.values()) or 1
        cells = []
        for guess in guesses:
            share = counts.get(guess, 0) / total
            hue = "59,110,168" if guess == domain else "196,88,40"
            ink = ";color:#fff" if share > 0.6 else ""
            cells.append(f'<td class="m" style="background:rgba({hue},{share:.2f}){ink}">{counts.get(guess, 0):,}</td>')
        lines.append(f'<tr><th scope="row">{escape(domain)}</th>{"".join(cells)}</tr>')
    return (f'<div class="wide"><table class="matrix"><thead><tr><th>rows of \\ best guess</th>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>")


def _tax(found: Mapping[str, Facts]) -> str:
    """What routing costs against the true label, domain by domain."""
    table = html.table(("routing tax", "loss, routed - forced", "metric, forced - routed"), (
        (domain, html.with_interval(each["loss"], each["loss_interval"], "+"),
         html.with_interval(each["score"], each["score_interval"], "+")) for domain, each in found.items()))
    return table and table + '<p class="soft">Above zero, the router&#x27;s choice costs something.</p>'
