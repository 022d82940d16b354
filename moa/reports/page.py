"""The workspace's report as one self-contained HTML file: scores, routing, curves, data, lineage.

It shows the facts of `moa.reports.facts` and computes none itself: each section's function returns what
templates/report.html shows of it, as plain data, or None for no section.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moa.core.text import SHORT_DIGEST
from moa.evaluation.gate import verdict_of
from moa.evaluation.summary import NAMES, promise_remark, reliability_cells
from moa.reports import changed_hands, html
from moa.reports.facts import verdicts, wear
from moa.reports.svg import Dot, Line, Node, colour_class, curves, flow, reliability, whiskers

Facts = Mapping[str, Any]
COUNTS = ("read", "kept", "rejected", "duplicates", "train", "validation", "test")
# Name, key and colour of an expert's learning curves.
CURVES = (("training", "train_loss", 0), ("validation", "validation_loss", 1))
# Name, key, colour and `broad` of the curves by level. One is broad, because the two may coincide.
LEVELS = (("agreement with the router's choice", "agreement", 3, True), ("accuracy", "accuracy", 1, False))


def render(facts: Facts) -> str:
    """Render the report as one HTML page; `facts` is the result of `moa.reports.facts.gather`."""
    return html.render(
        "report.html", title=f"{facts['name']}: report", heading=facts["name"],
        subtitle=f"Mixture-of-LoRAs, {facts['made_at']}", tiles=_tiles(facts), trouble=facts["registry_trouble"],
        scores=_scores(facts), routing=_routing(facts), changed_hands=changed_hands.section(facts.get("changed_hands")),
        gates=_gates(facts), learning=_learning(facts), data=_data(facts), lineage=_lineage(facts))


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


def _tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """Large figures (name, value, remark): champion, domains, routing of the newest mixture, size of the base."""
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
    return tiles


# Scores.

def _scores(facts: Facts) -> Facts | None:
    """Scores by domain and system, as plots and as a table; None before the first evaluation."""
    measured = _measured(facts)
    if not measured:
        return None
    # The base is the same model for both mixtures, so it is shown once.
    systems = [(f"{key}/{system}", mixture, each["scores"], system) for key, mixture, each in measured
               for system in ("base", "forced", "routed") if (key, system) != ("challenger", "base")
               or len(measured) == 1]
    colours = {key: number for number, (key, *_) in enumerate(systems)}
    two_mixtures = len(measured) > 1
    legend = [(colour_class(colours[key]), NAMES[system] if system == "base" or not two_mixtures
               else f"{mixture}, {NAMES[system]}") for key, mixture, _, system in systems]
    plots = {figure: whiskers([(domain, list(_dots(systems, colours, domain, figure)))
                               for domain in _domains(measured)]) for figure in ("loss", "score")}
    return {"legend": legend, **plots, "table": _score_table(systems, measured)}


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


def _score_table(systems: Sequence[tuple[str, str, Facts, str]],
                 measured: Sequence[tuple[str, str, Facts]]) -> html.Table:
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

def _gates(facts: Facts) -> list[Facts]:
    """The gate's comparisons and decision for each release on the page."""
    found: list[Facts] = []
    for _, name, each in _measured(facts):
        if decision := each.get("gate"):
            against = f"against version {decision['against']}" if decision.get("against") else "without an incumbent"
            comparisons = html.table(("domain", "measure", "verdict", "difference", "pairs"), (
                (comparison["domain"], comparison["measure"],
                 comparison["verdict"] + (", better" if comparison["better"] else ""),
                 html.with_interval(comparison["difference"], comparison["interval"], "+"), comparison["rows"])
                for comparison in verdicts(decision)))
            looks = wear(decision)
            found.append({"title": f"{name}: {verdict_of(decision)}, {against}", "reason": decision["reason"],
                          "table": comparisons, "looks": looks and f"{looks[0].upper()}{looks[1:]}."})
    return found


# Learning, data, lineage.

def _learning(facts: Facts) -> list[Facts]:
    """The learning curve of each expert, None where it has none, and a remark."""
    found: list[Facts] = []
    for domain, each in facts["domains"].items():
        if (expert := each["expert"]) is None:
            continue
        if not expert["curve"]:
            why = "imported: it was trained elsewhere" if expert["imported"] else "no curve was kept"
            found.append({"domain": domain, "drawing": None, "remark": why})
            continue
        lines = [Line(name, [(epoch["step"], epoch[key]) for epoch in expert["curve"] if epoch.get(key) is not None],
                      colour) for name, key, colour in CURVES]
        best = f"kept: epoch {expert['best_epoch']}" if expert["best_epoch"] is not None else ""
        loss = f", validation loss {expert['best_loss']:.3f}" if expert["best_loss"] is not None else ""
        before = f"; continues {_expert_of(parent)}" if (parent := expert["parent"]) else ""
        found.append({"domain": domain, "drawing": curves(lines), "remark": best + loss + before})
    return found


def _expert_of(parent: Mapping[str, str]) -> str:
    """A parent expert in words: its domain, where that is known, and its digest."""
    return f"the expert{' of ' + parent['domain'] if parent['domain'] else ''} {parent['digest'][:SHORT_DIGEST]}"


def _data(facts: Facts) -> Facts | None:
    """Numbers of rows and warnings of each corpus, and what the router promises; None without corpora."""
    rows, warnings = [], []
    for domain, each in facts["domains"].items():
        if each["quality"]:
            rows.append((domain, *(int(each["quality"]["rows"].get(key, 0)) for key in COUNTS),
                         len(each["quality"]["warnings"])))
            warnings += [(domain, warning) for warning in each["quality"]["warnings"]]
    if not rows:
        return None
    return {"counts": html.table(("domain", *COUNTS, "warnings"), rows),
            "warnings": html.table(("domain", "what deserves a look"), warnings),
            "promises": facts.get("promises", ()), "has_router": bool(facts["mixture"]["router"])}


def _lineage(facts: Facts) -> Facts:
    """A graph from the base to the release, and whether an edge of it is not current."""
    nodes, edges = _graph(facts)
    return {"drawing": flow(("base", "corpora", "experts", "mixture", "release"), nodes, edges),
            "outdated": any(not current for *_, current in edges)}


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


# Routing.

def _routing(facts: Facts) -> list[Facts]:
    """How the router of each evaluated mixture did; the workspace's router stands in where facts have none."""
    found: list[Facts] = []
    for _, name, each in _measured(facts):
        router, figures = each.get("router") or facts["mixture"]["router"], each["routing"]
        text = ", ".join(f"{title} {figures[key]:.1%}" for title, key in (
            ("accuracy", "accuracy"), ("abstention", "abstention"), ("calibration error", "ece")) if key in figures)
        rule = f"; rule {router['rule']}, reading {_read(router)}" if {"rule", "layer"} <= router.keys() else ""
        found.append({"name": name, "summary": text + rule, "matrix": _matrix(figures.get("confusion", {})),
                      "tax": _tax(each["tax"]), "abstention": _abstention(figures, router),
                      "reliability": _reliability(figures), "levels": _levels(router)})
    return found


def _read(router: Facts) -> str:
    """The levels that the router's rule reads, in words."""
    return {"early": f"level {router['layer']}", "last": "the last level"}.get(router["rule"], "every level")


def _matrix(confusion: Mapping[str, Mapping[str, int]]) -> Facts | None:
    """The confusion matrix: rows by domain, columns by the router's best guess, each cell with its share of the row."""
    if not confusion:
        return None
    guesses = list(dict.fromkeys(guess for counts in confusion.values() for guess in counts))
    lines = []
    for domain, counts in confusion.items():
        total = sum(counts.values()) or 1
        lines.append((domain, [{"count": html.shown(counts.get(guess, 0)), "share": counts.get(guess, 0) / total,
                                "right": guess == domain} for guess in guesses]))
    return {"guesses": guesses, "lines": lines}


def _tax(by_domain: Mapping[str, Facts]) -> html.Table:
    """The routing tax, by domain (`moa.reports.facts.tax`)."""
    return html.table(("routing tax", "loss, routed - forced", "metric, forced - routed"), (
        (domain, html.with_interval(each["loss"], each["loss_interval"], "+"),
         html.with_interval(each["score"], each["score_interval"], "+")) for domain, each in by_domain.items()))


def _abstention(figures: Facts, router: Facts) -> Facts | None:
    """How many test rows of each domain were left to the base, beside the router's promise; None if not measured."""
    by_domain = figures.get("by_domain")
    if not by_domain:
        return None
    promised = router.get("promises", figures.get("promises"))
    none = {"share": None, "groups": "-", "more": "-"}
    rows = []
    for domain, each in by_domain.items():
        promise = (promised or {}).get(domain, none)
        at_most = "-" if promise["share"] is None else f"{promise['share']:.2%}"
        rows.append((domain, each["rows"], each["groups"], each["abstained"], each["share"], each["limit"], at_most,
                     promise["groups"], promise["more"]))
    head = ("domain", "rows", "groups", "left to the base", "share", "at most (95 %)", "promised at most",
            "from groups", "more groups wanted")
    return {"table": html.table(head, rows), "remark": promise_remark(promised)}


def _reliability(figures: Facts) -> Facts | None:
    """How often the router is right at each confidence, as a plot and a table; None where it was not measured."""
    bins = figures.get("reliability")
    if not bins:
        return None
    head, *rows = reliability_cells(bins)
    return {"drawing": reliability(bins), "table": html.table(head, rows)}


def _levels(router: Facts) -> Facts | None:
    """The accuracy of each level's head alone, as a plot and a table; None where it was not measured."""
    levels = router.get("levels") or []
    if not levels:
        return None
    read = {"early": router.get("layer"), "last": levels[-1]["level"]}.get(router.get("rule", ""))
    lines = [Line(name, [(level["level"], level[key]) for level in levels], colour, broad)
             for name, key, colour, broad in LEVELS]
    count = router.get("validation_rows")
    rows = ((f"{level['level']}{' (read)' if level['level'] == read else ''}", level["accuracy"], level["agreement"])
            for level in levels)
    return {"legend": [(colour_class(colour), name) for name, _, colour, _ in reversed(LEVELS)],
            "drawing": curves(lines, "level", ".1%", 900, read), "read": read, "layers": len(levels),
            "prompts": f"{count:,}" if isinstance(count, int) else None,
            "table": html.table(("level", "accuracy", "agreement"), rows)}
