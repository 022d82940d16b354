"""The workspace's report as one HTML file that needs nothing else: scores, routing, curves, data, lineage.

Knows the keys of `moa.report_facts` and no figures of its own. Whatever a file of the workspace said is escaped.
"""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from moa import page
from moa.plots import Dot, Line, Node, curves, flow, whiskers

Facts = Mapping[str, Any]
NAMES = {"base": "base", "forced": "label forced", "routed": "routed"}
COUNTS = ("read", "kept", "rejected", "duplicates", "train", "validation", "test")
SHORT = 12   # letters of a digest
STYLE = """
td.m{text-align:center;font-variant-numeric:tabular-nums;border:1px solid var(--line);padding:6px 10px}
table.matrix{width:auto}table.matrix th{padding:6px 10px}.matrix th[scope=row]{text-align:right}
.s0{fill:#8b95a3;stroke:#8b95a3}.s1{fill:#3b6ea8;stroke:#3b6ea8}.s2{fill:#1d7a5f;stroke:#1d7a5f}
.s3{fill:#b3661b;stroke:#b3661b}.s4{fill:#8a4fa3;stroke:#8a4fa3}
svg .grid{stroke:var(--line)}svg .curve{fill:none;stroke-width:2}svg .head{fill:var(--ink);font-weight:600}
svg .node rect{fill:#f6f8fb;stroke:#c4cedb}svg .node.now rect{fill:#eaf2fb;stroke:#3b6ea8}
svg .edge{stroke:#9aa7b6;fill:none}svg .edge.old{stroke-dasharray:4 4;stroke:#c98a3a}
.key{display:flex;flex-wrap:wrap;gap:4px 16px;color:var(--soft);font-size:13px;margin:0 0 6px}
.key svg{width:12px;display:inline-block;vertical-align:-1px;margin-right:5px}
td:first-child,th:first-child,td.n{white-space:nowrap}
.aside{display:flex;flex-wrap:wrap;gap:12px 40px;align-items:flex-start}.aside>:last-child{flex:1 1 420px}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:24px}
"""


def html(facts: Facts) -> str:
    """The report as one page."""
    body = "".join([_tiles(facts), _trouble(facts), _scores(facts), _routing(facts), _learning(facts), _quality(facts),
                    _lineage(facts)])
    return page.frame(f"{facts['name']}: report", facts["name"], f"Mixture-of-LoRAs, {facts['made_at']}", body,
                      STYLE)


def write(path: Path, facts: Facts) -> None:
    """Write the page whole. Raises UsageError where it cannot be."""
    page.write(path, html(facts))


def _measured(facts: Facts) -> list[tuple[str, str, Facts]]:
    """(key, name, facts) of the champion and the challenger, as far as they were evaluated."""
    champion, challenger = facts["champion"], facts["challenger"]
    found = []
    if champion and "scores" in champion:
        found.append(("champion", f"champion (version {champion['version']})", champion))
    if challenger:
        found.append(("challenger", "challenger (this workspace)" if champion else "this workspace", challenger))
    return found


def _tiles(facts: Facts) -> str:
    champion, base = facts["champion"], facts["base"]
    experts = sum(each["expert"] is not None for each in facts["domains"].values())
    tiles = [("champion", f"version {champion['version']}" if champion else "none",
              f"since {champion['since'][:10]}" if champion and champion["since"] else "nothing was released"
              if not champion else ""),
             ("domains", str(len(facts["domains"])), f"{experts} with an expert")]
    if measured := _measured(facts):
        _, name, last = measured[-1]
        tiles += [(what, f"{last['routing'][key]:.1%}", name) for what, key in (
            ("routing accuracy", "accuracy"), ("abstention", "abstention")) if key in last["routing"]]
    if base:
        tiles.append(("base", f"{(base['parameters'] or 0) / 1e6:,.0f} M" if (base["parameters"] or 0) >= 1e6 else
                      f"{base['parameters'] or 0:,}", f"parameters, {base['source']}"))
    return page.tiles(tiles)


def _trouble(facts: Facts) -> str:
    """What this page could not find out."""
    said = facts["registry_trouble"]
    return page.warned([f"The champion is unknown: {said}"]) if said else ""


# Scores.

def _scores(facts: Facts) -> str:
    measured = _measured(facts)
    if not measured:
        return page.section("Scores", '<p class="soft">Nothing was evaluated yet: run `moa run`.</p>')
    systems = [(f"{key}/{system}", who, each["scores"], system) for key, who, each in measured
               for system in ("base", "forced", "routed") if (key, system) != ("challenger", "base")
               or len(measured) == 1]
    colours = {key: number for number, (key, *_) in enumerate(systems)}
    both = len(measured) > 1
    legend = _key([(colours[key], NAMES[system] if system == "base" or not both else f"{who}, {NAMES[system]}")
                   for key, who, _, system in systems])
    plots = []
    for figure, title in (("loss", "Loss, nats per token (lower is better)"),
                          ("score", "The domain's own metric (higher is better)")):
        groups = [(domain, list(_dots(systems, colours, domain, figure))) for domain in _domains(measured)]
        plots.append(f"<div><h3>{title}</h3>{whiskers(groups)}</div>")
    return page.section("Scores", legend, f'<div class="two">{"".join(plots)}</div>', _score_table(systems, measured),
                        '<p class="soft">Lines and brackets are 95% bootstrap intervals over the test rows; the metric '
                        "is measured on the rows that were answered.</p>")


def _domains(measured: Sequence[tuple[str, str, Facts]]) -> list[str]:
    return list(dict.fromkeys(domain for _, _, each in measured for domain in each["scores"]))


def _dots(systems: Sequence[tuple[str, str, Facts, str]], colours: Mapping[str, int], domain: str,
          figure: str) -> Iterator[Dot]:
    for key, _, scores, system in systems:
        found = scores.get(domain, {}).get(system)
        if found and found[figure] is not None:
            yield Dot(found[figure], found[f"{figure}_interval"], colours[key])


def _score_table(systems: Sequence[tuple[str, str, Facts, str]], measured: Sequence[tuple[str, str, Facts]]) -> str:
    rows: list[tuple[str, ...]] = []
    for domain in _domains(measured):
        for place, (_, who, scores, system) in enumerate(systems):
            if found := scores.get(domain, {}).get(system):
                mixture = () if len(measured) == 1 else (who if system != "base" else "",)
                rows.append(("" if place else domain, *mixture, NAMES[system],
                             _with_interval(found["loss"], found["loss_interval"]),
                             _with_interval(found["score"], found["score_interval"]),
                             f"{found['rows']} / {found['answered']}"))
    return page.table(("domain", *(() if len(measured) == 1 else ("mixture",)), "system", "loss", "metric",
                       "rows / answered"), rows)


def _with_interval(value: float | None, bounds: Sequence[float] | None, sign: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:{sign}.3f}" + (f"  [{bounds[0]:{sign}.3f}, {bounds[1]:{sign}.3f}]" if bounds else "")


def _key(items: Sequence[tuple[int, str]]) -> str:
    return '<p class="key">' + "".join(
        f'<span><svg viewBox="0 0 12 12"><circle cx="6" cy="6" r="4.5" class="s{colour % 5}"></circle></svg>'
        f"{escape(name)}</span>" for colour, name in items) + "</p>"


# Routing.

def _routing(facts: Facts) -> str:
    parts = []
    for _, name, each in _measured(facts):
        router = each.get("router") or facts["mixture"]["router"]
        routing = each["routing"]
        said = ", ".join(f"{what} {routing[key]:.1%}" for what, key in (
            ("accuracy", "accuracy"), ("abstention", "abstention"), ("calibration error", "ece")) if key in routing)
        rule = f"; rule {router['rule']}, reading level {router['layer']}" if {"rule", "layer"} <= router.keys() else ""
        parts.append(f"<h3>{escape(name)}</h3><p>{escape(said + rule)}</p>"
                     f'<div class="aside"><div>{_matrix(routing.get("confusion", {}))}</div>'
                     f"<div>{_tax(each['tax'])}</div></div>")
    return page.section("Routing", *parts) if parts else ""


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
    return (f'<table class="matrix"><thead><tr><th>rows of \\ best guess</th>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table>")


def _tax(found: Mapping[str, Facts]) -> str:
    """What routing costs against the true label, domain by domain."""
    table = page.table(("routing tax", "loss, routed - forced", "metric, forced - routed"), (
        (domain, _with_interval(each["loss"], each["loss_interval"], "+"),
         _with_interval(each["score"], each["score_interval"], "+")) for domain, each in found.items()))
    return table and table + '<p class="soft">Above zero, the router&#x27;s choice costs something.</p>'


# Learning, data, lineage.

def _learning(facts: Facts) -> str:
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
        plots.append(f"<div><h3>{escape(domain)}</h3>{curves(lines)}<p class=\"soft\">{escape(best + loss)}</p></div>")
    if not plots:
        return ""
    return page.section("Learning curves", _key([(0, "training loss"), (1, "validation loss")]),
                        f'<div class="three">{"".join(plots)}</div>')


def _quality(facts: Facts) -> str:
    rows, warnings = [], []
    for domain, each in facts["domains"].items():
        if each["quality"]:
            rows.append((domain, *(int(each["quality"]["rows"].get(key, 0)) for key in COUNTS),
                         len(each["quality"]["warnings"])))
            warnings += [(domain, said) for said in each["quality"]["warnings"]]
    if not rows:
        return ""
    return page.section("Data", page.table(("domain", *COUNTS, "warnings"), rows),
                        page.table(("domain", "what deserves a look"), warnings)
                        or '<p class="soft">Nothing stands out.</p>')


def _lineage(facts: Facts) -> str:
    nodes, edges = _graph(facts)
    note = "A broken line: what it leads to was made from another one than the one here now."
    old = any(not now for *_, now in edges)
    return page.section("What came from what", flow(("base", "corpora", "experts", "mixture", "release"), nodes, edges),
                        f'<p class="soft">{note}</p>' if old else "")


def _graph(facts: Facts) -> tuple[list[Node], list[tuple[str, str, bool]]]:
    """Nodes by column, and edges: from, to, and whether the one was really made from the other as it is now."""
    nodes, edges = [], []
    mixture, champion, base = facts["mixture"], facts["champion"], facts["base"]
    if base:
        nodes.append(Node("base", 0, base["source"], base["digest"][:SHORT]))
    for domain, each in facts["domains"].items():
        corpus, expert = each["corpus"], each["expert"]
        if corpus:
            nodes.append(Node(f"corpus {domain}", 1, domain, corpus["digest"][:SHORT]))
            edges.append(("base", f"corpus {domain}", True))
        if expert:
            made = "imported" if expert["imported"] else f"rank {expert['rank']}"
            nodes.append(Node(f"expert {domain}", 2, f"{domain} ({made})", expert["digest"][:SHORT]))
            learned = corpus is not None and corpus["digest"] == expert["corpus"]
            edges.append((f"corpus {domain}", f"expert {domain}", learned))
            used = {mixture["experts"].get(domain), mixture["parents"].get(domain)}
            if mixture["digest"]:
                edges.append((f"expert {domain}", "mixture", expert["digest"] in used))
    if mixture["digest"]:
        nodes.append(Node("mixture", 3, f"{len(mixture['labels'])} experts, router", mixture["digest"][:SHORT]))
    if champion:
        nodes.append(Node("release", 4, f"{champion['name']} {champion['version']}", champion["digest"][:SHORT]))
        if mixture["digest"]:
            edges.append(("mixture", "release", champion["digest"] == mixture["digest"]))
    known = {node.key for node in nodes}
    return nodes, [edge for edge in edges if {edge[0], edge[1]} <= known]
