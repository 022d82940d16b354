"""The workspace's report as one self-contained HTML file: scores, routing, curves, data, lineage.

It shows the facts of `moa.reports.facts` and computes none itself. All text from the workspace's files is escaped.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moa.core.text import SHORT_DIGEST
from moa.evaluation.gate import verdict_of
from moa.evaluation.summary import NAMES, promise_remark, reliability_cells
from moa.reports import changed_hands, html
from moa.reports.facts import verdicts, wear
from moa.reports.svg import Dot, Line, Node, curves, flow, reliability, whiskers

Facts = Mapping[str, Any]
COUNTS = ("read", "kept", "rejected", "duplicates", "train", "validation", "test")
# Name, key, colour and `broad` of the curves by level. One is broad, because the two may coincide.
LEVELS = (("agreement with the router's choice", "agreement", 3, True), ("accuracy", "accuracy", 1, False))
STYLE = """
td,th{overflow-wrap:break-word}
td.m{text-align:center;font-variant-numeric:tabular-nums;border:1px solid var(--line);padding:6px 10px}
table.matrix{width:auto}table.matrix th{padding:6px 10px}.matrix th[scope=row]{text-align:right}
:root{--c0:#8b95a3;--c1:#3b6ea8;--c2:#1d7a5f;--c3:#b3661b;--c4:#8a4fa3;--box:#f6f8fb;--boxline:#c4cedb;--now:#eaf2fb}
@media(prefers-color-scheme:dark){:root{--c0:#8d98a7;--c1:#6b9fd8;--c2:#4fb894;--c3:#dd9450;--c4:#bd87d6;
--box:#202833;--boxline:#445061;--now:#1d3147}}
.s0{fill:var(--c0);stroke:var(--c0)}.s1{fill:var(--c1);stroke:var(--c1)}.s2{fill:var(--c2);stroke:var(--c2)}
.s3{fill:var(--c3);stroke:var(--c3)}.s4{fill:var(--c4);stroke:var(--c4)}
svg .grid{stroke:var(--line)}svg .curve{fill:none;stroke-width:2}svg .head{fill:var(--ink);font-weight:600}
svg .tight{font-size:9px}svg .broad{stroke-width:7;stroke-opacity:.35;stroke-linecap:round}
svg .mark{stroke:var(--soft);stroke-dasharray:4 4}
svg .node rect{fill:var(--box);stroke:var(--boxline)}svg .node.now rect{fill:var(--now);stroke:var(--c1)}
svg .edge{stroke:#9aa7b6;fill:none}svg .edge.old{stroke-dasharray:4 4;stroke:#c98a3a}
.key{display:flex;flex-wrap:wrap;gap:4px 16px;color:var(--soft);font-size:13px;margin:0 0 6px}
.key svg{width:12px;display:inline-block;vertical-align:-1px;margin-right:5px}
td:first-child,th:first-child,td.n{white-space:nowrap}summary{cursor:pointer;color:var(--soft);font-size:13px}
.aside{display:flex;flex-wrap:wrap;gap:12px 40px;align-items:flex-start}
.aside>*{max-width:100%}.aside>:last-child{flex:1 1 min(420px,100%)}
.square{flex:0 1 340px;min-width:240px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:24px}
.plot{overflow-x:auto}.plot svg{min-width:560px}.graph{overflow-x:auto}.graph svg{min-width:900px}
"""


def render(facts: Facts) -> str:
    """Render the report as one HTML page; `facts` is the result of `moa.reports.facts.gather`."""
    body = "".join([_tiles(facts), _trouble(facts), _scores(facts), routing(_measured(facts), facts["mixture"]),
                    changed_hands.section(facts.get("changed_hands")), _gates(facts), _learning(facts),
                    _quality(facts), _lineage(facts)])
    return html.frame(f"{facts['name']}: report", facts["name"], f"Mixture-of-LoRAs, {facts['made_at']}", body,
                      STYLE)


def write(path: Path, facts: Facts) -> None:
    """Write the report page to `path` atomically. Raises UsageError where it cannot be written."""
    html.write(path, render(facts))


def _measured(facts: Facts) -> list[tuple[str, str, Facts]]:
    """(key, name, facts) of the champion and the challenger, of each that was evaluated."""
    champion, challenger = facts["champion"], facts["challenger"]
    measured = []
    if champion and "scores" in champion:
        measured.append(("champion", f"champion (version {champion['version']})", champion))
    if challenger:
        known = f"version {challenger['version']}" if challenger.get("version") else "this workspace"
        measured.append(("challenger", f"challenger ({known})" if champion else known, challenger))
    return measured


def _tiles(facts: Facts) -> str:
    """Large figures: champion, domains, routing of the newest mixture, size of the base."""
    champion, base = facts["champion"], facts["base"]
    experts = sum(each["expert"] is not None for each in facts["domains"].values())
    tiles = [("champion", f"version {champion['version']}" if champion else "none",
              f"since {champion['since'][:10]}" if champion and champion["since"] else "nothing was released"
              if not champion else ""),
             ("domains", str(len(facts["domains"])), f"{experts} with an expert")]
    if measured := _measured(facts):
        _, name, last = measured[-1]
        tiles += [(title, f"{last['routing'][key]:.1%}", name) for title, key in (
            ("routing accuracy", "accuracy"), ("abstention", "abstention")) if key in last["routing"]]
    if base:
        tiles.append(("base", f"{(base['parameters'] or 0) / 1e6:,.0f} M" if (base["parameters"] or 0) >= 1e6 else
                      f"{base['parameters'] or 0:,}", f"parameters, {base['source']}"))
    return html.tiles(tiles)


def _trouble(facts: Facts) -> str:
    """A warning where the registry could not be read; otherwise empty."""
    error = facts["registry_trouble"]
    return html.warned([f"The champion is unknown: {error}"]) if error else ""


# Scores.

def _scores(facts: Facts) -> str:
    """The section of scores: plots and a table of loss and metric by domain and system."""
    measured = _measured(facts)
    if not measured:
        return html.section("Scores", '<p class="soft">Nothing was evaluated yet: run `moa run`.</p>')
    # The base is the same model for both mixtures, so it is shown once.
    systems = [(f"{key}/{system}", mixture, each["scores"], system) for key, mixture, each in measured
               for system in ("base", "forced", "routed") if (key, system) != ("challenger", "base")
               or len(measured) == 1]
    colours = {key: number for number, (key, *_) in enumerate(systems)}
    two_mixtures = len(measured) > 1
    legend = html.key([(colours[key], NAMES[system] if system == "base" or not two_mixtures
                        else f"{mixture}, {NAMES[system]}") for key, mixture, _, system in systems])
    plots = []
    for figure, title in (("loss", "Loss, nats per token (lower is better)"),
                          ("score", "The domain's own metric (higher is better)")):
        groups = [(domain, list(_dots(systems, colours, domain, figure))) for domain in _domains(measured)]
        plots.append(f"<div><h3>{title}</h3>{whiskers(groups)}</div>")
    return html.section("Scores", legend, f'<div class="two">{"".join(plots)}</div>', _score_table(systems, measured),
                        '<p class="soft">Lines and brackets are 95% bootstrap intervals over the test rows; the metric '
                        "is measured on the rows that were answered.</p>")


def _domains(measured: Sequence[tuple[str, str, Facts]]) -> list[str]:
    """The domains with scores in any of `_measured`, without repetition."""
    return list(dict.fromkeys(domain for _, _, each in measured for domain in each["scores"]))


def _dots(systems: Sequence[tuple[str, str, Facts, str]], colours: Mapping[str, int], domain: str,
          figure: str) -> Iterator[Dot]:
    """A dot for each system that has this figure (`loss` or `score`) of the domain."""
    for key, _, scores, system in systems:
        figures = scores.get(domain, {}).get(system)
        if figures and figures[figure] is not None:
            yield Dot(figures[figure], figures[f"{figure}_interval"], colours[key])


def _score_table(systems: Sequence[tuple[str, str, Facts, str]], measured: Sequence[tuple[str, str, Facts]]) -> str:
    """The figures of the plots as a table, with a column for the mixture where there are two."""
    rows: list[tuple[str, ...]] = []
    for domain in _domains(measured):
        for index, (_, mixture, scores, system) in enumerate(systems):
            if figures := scores.get(domain, {}).get(system):
                mixture_cell = () if len(measured) == 1 else (mixture if system != "base" else "",)
                rows.append(("" if index else domain, *mixture_cell, NAMES[system],
                             html.with_interval(figures["loss"], figures["loss_interval"]),
                             html.with_interval(figures["score"], figures["score_interval"]),
                             f"{figures['rows']} / {figures['answered']}"))
    return html.table(("domain", *(() if len(measured) == 1 else ("mixture",)), "system", "loss", "metric",
                       "rows / answered"), rows)


# The gate.

def _gates(facts: Facts) -> str:
    """The gate's comparisons and decision for each release on the page."""
    parts = []
    for _, name, each in _measured(facts):
        if decision := each.get("gate"):
            against = f"against version {decision['against']}" if decision.get("against") else "without an incumbent"
            title = f"{name}: {verdict_of(decision)}, {against}"
            parts.append(f"<h3>{escape(title)}</h3><p>{escape(decision['reason'])}</p>")
            parts.append(html.table(("domain", "measure", "verdict", "difference", "pairs"), (
                (comparison["domain"], comparison["measure"],
                 comparison["verdict"] + (", better" if comparison["better"] else ""),
                 html.with_interval(comparison["difference"], comparison["interval"], "+"), comparison["rows"])
                for comparison in verdicts(decision))))
            if looks := wear(decision):
                parts.append(f"<p>{escape(looks[0].upper() + looks[1:])}.</p>")
    return html.section("Gate", *parts) if parts else ""


# Learning, data, lineage.

def _learning(facts: Facts) -> str:
    """The section of learning curves, one plot for each expert; empty without experts."""
    plots = []
    for domain, each in facts["domains"].items():
        if (expert := each["expert"]) is None:
            continue
        if not expert["curve"]:
            why = "imported: it was trained elsewhere" if expert["imported"] else "no curve was kept"
            plots.append(f'<div><h3>{escape(domain)}</h3><p class="soft">{why}</p></div>')
            continue
        lines = [Line(name, [(epoch["step"], epoch[key]) for epoch in expert["curve"] if epoch.get(key) is not None],
                      colour) for name, key, colour in (("training", "train_loss", 0),
                                                        ("validation", "validation_loss", 1))]
        best = f"kept: epoch {expert['best_epoch']}" if expert["best_epoch"] is not None else ""
        loss = f", validation loss {expert['best_loss']:.3f}" if expert["best_loss"] is not None else ""
        before = f"; continues {_expert_of(parent)}" if (parent := expert["parent"]) else ""
        remark = escape(best + loss + before)
        plots.append(f'<div><h3>{escape(domain)}</h3>{curves(lines)}<p class="soft">{remark}</p></div>')
    if not plots:
        return ""
    return html.section("Learning curves", html.key([(0, "training loss"), (1, "validation loss")]),
                        f'<div class="three">{"".join(plots)}</div>')


def _expert_of(parent: Mapping[str, str]) -> str:
    """A parent expert in words: its domain, where that is known, and its digest."""
    return f"the expert{' of ' + parent['domain'] if parent['domain'] else ''} {parent['digest'][:SHORT_DIGEST]}"


def _quality(facts: Facts) -> str:
    """The section of data: numbers of rows and warnings of each corpus; empty without corpora."""
    rows, warnings = [], []
    for domain, each in facts["domains"].items():
        if each["quality"]:
            rows.append((domain, *(int(each["quality"]["rows"].get(key, 0)) for key in COUNTS),
                         len(each["quality"]["warnings"])))
            warnings += [(domain, warning) for warning in each["quality"]["warnings"]]
    if not rows:
        return ""
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in facts.get("promises", ()))
    return html.section("Data", html.table(("domain", *COUNTS, "warnings"), rows),
                        html.table(("domain", "what deserves a look"), warnings)
                        or '<p class="soft">Nothing stands out.</p>',
                        said and f"<h3>What the router {'promises' if facts['mixture']['router'] else 'can promise'}"
                                 f"</h3>{said}")


def _lineage(facts: Facts) -> str:
    """The section of lineage: a graph from the base to the release."""
    nodes, edges = _graph(facts)
    note = "A dashed line: what it leads to was made from another version than the present one."
    outdated = any(not current for *_, current in edges)
    drawn = flow(("base", "corpora", "experts", "mixture", "release"), nodes, edges)
    return html.section("What came from what", f'<div class="graph">{drawn}</div>',
                        f'<p class="soft">{note}</p>' if outdated else "")


def _graph(facts: Facts) -> tuple[list[Node], list[tuple[str, str, bool]]]:
    """The nodes and edges of the lineage. An edge is (key of the source, key of the result, whether it is current).

    An edge is current if the result was made from the source in its present version.
    """
    nodes, edges = [], []
    mixture, champion, base = facts["mixture"], facts["champion"], facts["base"]
    if base:
        nodes.append(Node("base", 0, base["source"], base["digest"][:SHORT_DIGEST]))
    for domain, domain_facts in facts["domains"].items():
        corpus, expert = domain_facts["corpus"], domain_facts["expert"]
        if corpus:
            nodes.append(Node(f"corpus {domain}", 1, domain, corpus["digest"][:SHORT_DIGEST]))
            edges.append(("base", f"corpus {domain}", True))
        if expert:
            origin = "imported" if expert["imported"] else f"rank {expert['rank']}"
            parent = f" from {expert['parent']['digest'][:SHORT_DIGEST]}" if expert["parent"] else ""
            nodes.append(Node(f"expert {domain}", 2, f"{domain} ({origin})", expert["digest"][:SHORT_DIGEST] + parent))
            current = corpus is not None and corpus["digest"] == expert["corpus"]
            edges.append((f"corpus {domain}", f"expert {domain}", current))
            used = {mixture["experts"].get(domain), mixture["parents"].get(domain)}
            if mixture["digest"]:
                edges.append((f"expert {domain}", "mixture", expert["digest"] in used))
    if mixture["digest"]:
        nodes.append(Node("mixture", 3, f"{len(mixture['labels'])} experts, router", mixture["digest"][:SHORT_DIGEST]))
    if champion:
        nodes.append(Node("release", 4, f"{champion['name']} {champion['version']}", champion["digest"][:SHORT_DIGEST]))
        if mixture["digest"]:
            edges.append(("mixture", "release", champion["digest"] == mixture["digest"]))
    known = {node.key for node in nodes}
    return nodes, [edge for edge in edges if {edge[0], edge[1]} <= known]


def routing(measured: Sequence[tuple[str, str, Facts]], mixture: Facts) -> str:
    """Render the section of routing for each of `measured` (key, name, facts); empty without any.

    `mixture` is the fact `mixture` of `moa.reports.facts.gather`, whose router stands in where facts have none.
    """
    parts = []
    for _, name, each in measured:
        router, figures = each.get("router") or mixture["router"], each["routing"]
        text = ", ".join(f"{title} {figures[key]:.1%}" for title, key in (
            ("accuracy", "accuracy"), ("abstention", "abstention"), ("calibration error", "ece")) if key in figures)
        rule = f"; rule {router['rule']}, reading {_read(router)}" if {"rule", "layer"} <= router.keys() else ""
        parts.append(f"<h3>{escape(name)}</h3><p>{escape(text + rule)}</p>"
                     f'<div class="aside"><div>{_matrix(figures.get("confusion", {}))}</div>'
                     f"<div>{_tax(each['tax'])}</div></div>{_abstention(figures, router)}{_reliability(figures)}"
                     f"{_levels(router)}")
    return html.section("Routing", *parts) if parts else ""


def _abstention(figures: Facts, router: Facts) -> str:
    """How many test rows of each domain were left to the base, beside the router's promise; empty if not measured."""
    by_domain = figures.get("by_domain")
    if not by_domain:
        return ""
    promised = router.get("promises", figures.get("promises"))
    none = {"share": None, "groups": "-", "more": "-"}
    rows = []
    for domain, each in by_domain.items():
        promise = (promised or {}).get(domain, none)
        at_most = "-" if promise["share"] is None else f"{promise['share']:.2%}"
        rows.append((domain, each["rows"], each["groups"], each["abstained"], each["share"], each["limit"], at_most,
                     promise["groups"], promise["more"]))
    remark = promise_remark(promised)
    table = html.table(("domain", "rows", "groups", "left to the base", "share", "at most (95 %)", "promised at most",
                        "from groups", "more groups wanted"), rows)
    return (f"<h3>Known prompts that are left to the base</h3>{table}"
            + (f"<p>{escape(remark)}</p>" if remark else ""))


def _reliability(figures: Facts) -> str:
    """How often the router is right at each confidence, as a plot and a table; empty where it was not measured."""
    bins = figures.get("reliability")
    if not bins:
        return ""
    head, *rows = reliability_cells(bins)
    return ('<h3>Reliability of the confidence</h3><div class="aside">'
            f'<div class="square">{reliability(bins)}</div><div>{html.table(head, rows)}'
            '<p class="soft">Dots: the share of test rows whose domain is the best guess, with Wilson&#x27;s intervals '
            "(95 %, as if rows were independent); below the dashed line the router is too sure. Bars: how many rows "
            "have this confidence.</p></div></div>")


def _read(router: Facts) -> str:
    """The levels that the router's rule reads, in words."""
    return {"early": f"level {router['layer']}", "last": "the last level"}.get(router["rule"], "every level")


def _levels(router: Facts) -> str:
    """The accuracy of each level's head alone, as a plot and a table; empty where it was not measured."""
    levels = router.get("levels") or []
    if not levels:
        return ""
    read = {"early": router.get("layer"), "last": levels[-1]["level"]}.get(router.get("rule", ""))
    lines = [Line(name, [(level["level"], level[key]) for level in levels], colour, broad)
             for name, key, colour, broad in LEVELS]
    note = "Level n is what enters layer n. " + (
        f"The upright line is at the level that the rule reads: {read} of {len(levels)} layers are computed for it."
        if read is not None else "The rule reads every level.")
    rows = ((f"{level['level']}{' (read)' if level['level'] == read else ''}", level["accuracy"], level["agreement"])
            for level in levels)
    table = html.table(("level", "accuracy", "agreement"), rows)
    count = router.get("validation_rows")
    prompts = f", on {count:,} validation prompts" if isinstance(count, int) else ""
    return (f"<h3>Layer agreement: each layer&#x27;s head alone{prompts}</h3>"
            + html.key([(colour, name) for name, _, colour, _ in reversed(LEVELS)])
            + f'<div class="plot">{curves(lines, "level", ".1%", 900, read)}</div><p class="soft">{escape(note)}</p>'
            + f"<details><summary>Level by level</summary>{table}</details>")


def _matrix(confusion: Mapping[str, Mapping[str, int]]) -> str:
    """The confusion matrix: rows by domain, columns by the router's best guess, shaded by the share of the row."""
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


def _tax(by_domain: Mapping[str, Facts]) -> str:
    """A table of the routing tax, by domain (`moa.reports.facts.tax`); empty without domains."""
    table = html.table(("routing tax", "loss, routed - forced", "metric, forced - routed"), (
        (domain, html.with_interval(each["loss"], each["loss_interval"], "+"),
         html.with_interval(each["score"], each["score_interval"], "+")) for domain, each in by_domain.items()))
    return table and table + '<p class="soft">Above zero, the router&#x27;s choice costs something.</p>'
