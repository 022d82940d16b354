"""A domain's quality report (`moa.workspace.domains.check`) as text for a terminal and as one self-contained HTML file.

Rows may contain any text, so all text is escaped. The page has no script and loads nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from textwrap import indent
from typing import Any

from moa.core.text import shorten, table
from moa.reports import html

BAR = 24       # characters of the widest bar in the text
BLOCKS = " ▏▎▍▌▋▊▉█"   # eighths of a character
# Key in `tokens`, and name.
LENGTHS = (("prompt", "prompt"), ("completion", "answer"), ("row", "whole row"))
# Names of the languages that are none.
LANGUAGES = {"short": "too short to tell", "unsure": "no natural language, or unsure"}


# Parts of both the text and the page.

def _counts(report: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """(name, count, remark) for each outcome of the rows: read, kept, rejected and so on."""
    rows = report["rows"]
    near = rows.get("near_duplicates", 0)
    return [("read", rows["read"], ""), ("kept", rows["kept"], " · ".join(f"{split} {rows[split]:,}" for split in (
                "train", "validation", "test"))),
            ("rejected", rows["rejected"], ""), ("copies", rows["duplicates"] - near, "of another row, word for word"),
            ("near-duplicates", near, f"{rows.get('straddling', 0):,} of them on two sides")]


def _bins(tokens: Mapping[str, Any], part: str) -> list[tuple[str, int]]:
    """(label, count) of a histogram's bins, from the first to the last one that is not empty."""
    edges, counts = tokens["edges"], tokens[part]["counts"]
    filled = [index for index, count in enumerate(counts) if count] or [0]
    return [(str(edges[index]) if edges[index] + 1 == edges[index + 1] else f"{edges[index]}-{edges[index + 1] - 1}",
             counts[index]) for index in range(filled[0], filled[-1] + 1)]


def _rejections(report: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """(reason, number of rows, file and line of the first one)."""
    rejections = []
    for each in report["rejected"]:
        example = each["example"]
        rejections.append((each["reason"], each["count"], f"{example['file']}:{example['line']}" if example else ""))
    return rejections


def _neighbours(report: Mapping[str, Any]) -> tuple[str, list[tuple[str, float]]]:
    """A sentence on the rows that look like another domain's, and (domain, accuracy of telling the two apart)."""
    across = report["across"]
    if (neighbours := across["neighbours"]) is None:
        return "No other domain is prepared, so there is nothing to compare with.", []
    missing = f" Not prepared yet: {', '.join(across['not_prepared'])}." if across["not_prepared"] else ""
    return (f"{neighbours['count']:,} of {neighbours['sampled']:,} sampled rows look like another domain's.{missing}",
            list(neighbours["told_apart"].items()))


# Text.

def text(report: Mapping[str, Any]) -> str:
    """The quality report as text for a terminal. Warnings come last, because a terminal shows the end."""
    parts = [_table(((name, f"{count:,}", remark) for name, count, remark in _counts(report)), right=[1])]
    if report["redacted"]:
        parts.append("redacted: " + ", ".join(f"{count:,} {kind}" for kind, count in report["redacted"].items()))
    if rejections := _rejections(report):
        parts.append("Rejected\n" + _table(((reason, f"{count:,}", f"first at {place}")
                                            for reason, count, place in rejections), right=[1]))
    for part, name in LENGTHS:
        values = report["tokens"][part]
        if "mean" in values:
            parts.append(f"Tokens of the {name}: half up to {values['p50']:.0f}, 95% up to {values['p95']:.0f}, "
                         f"longest {values['max']:,}\n" + _histogram(_bins(report["tokens"], part)))
    turns, answers = report["turns"], report["answers"]
    parts.append(f"Conversations: {turns['several']:.1%} of several turns, {turns['system']:.1%} with a system "
                 f"message\nAnswers: {answers['different']:,} different, the most frequent in "
                 f"{answers['largest_group']:,} rows, {answers['short']:,} of one token or none, "
                 f"{answers['blank']:,} blank")
    parts += [f"{title}\n" + _table(((f"{each['count']:,}", f"{each['share']:.1%}", shorten(each["text"], 80))
                                     for each in answers[key]), right=[0, 1])
              for key, title in (("most_frequent", "Most frequent answers"), ("openings", "Answers that begin alike"))
              if answers[key]]
    shares = report["languages"]["shares"]
    parts.append(f"Languages of {report['languages']['sampled']:,} questions: " +
                 ", ".join(f"{LANGUAGES.get(name, name)} {share:.0%}" for name, share in shares.items()))
    if "across" in report:
        parts.append(_across_text(report))
    if report.get("power"):
        parts.append(f"The gate: {report['power']}")
    if report.get("promise"):
        parts.append(f"The router: {report['promise']}")
    warnings = [f"! {warning}" for warning in report["warnings"]] or ["Nothing stands out."]
    return "\n\n".join([f"Domain {report['domain']}", *parts, "\n".join(warnings)])


def _across_text(report: Mapping[str, Any]) -> str:
    """The comparison with other domains, as text."""
    across, (sentence, apart) = report["across"], _neighbours(report)
    near = across["near_duplicates"]
    lines = [f"Other domains: {across['duplicates']['count']:,} rows in common, "
             f"{near['across_domains']['count']:,} nearly so; across splits {near['across_splits']['count']:,} nearly "
             f"the same ({near['compared']:,} rows compared)", sentence]
    if apart:
        lines.append("Told apart from\n" + _table(((name, f"{accuracy:.0%}") for name, accuracy in apart), right=[1]))
    lines += [f"  like {each['looks_like']}: {shorten(each['text'], 90)}"
              for each in (across["neighbours"] or {"examples": []})["examples"]]
    return "\n".join(lines)


def _table(rows: Iterable[Sequence[str]], right: Sequence[int]) -> str:
    return indent(table(list(rows), right), "  ")


def _histogram(bins: Sequence[tuple[str, int]]) -> str:
    most = max(max(count for _, count in bins), 1)
    width, digits = max(len(label) for label, _ in bins), len(f"{most:,}")
    return "\n".join(f"  {label:>{width}}  {count:>{digits},}  {_bar(count / most)}".rstrip() for label, count in bins)


def _bar(share: float) -> str:
    """A bar of block characters; `share` of 1 has the full width."""
    eighths = max(round(share * BAR * 8), 1 if share else 0)
    return "█" * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")


# HTML.

def render(report: Mapping[str, Any]) -> str:
    """Render the quality report as one HTML page."""
    body = "".join([_tiles(report), html.warned(report["warnings"]), _length_section(report),
                    _rejection_section(report), _answer_section(report), _language_section(report),
                    _across_section(report), _evidence_section(report)])
    return html.frame(f"{report['domain']}: label quality", report["domain"], "Label quality before training", body)


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write the page of the quality report to `path` atomically. Raises UsageError where it cannot be written."""
    html.write(path, render(report))


def _tiles(report: Mapping[str, Any]) -> str:
    tiles = [*_counts(report), *([("redacted", sum(report["redacted"].values()), ", ".join(
        f"{kind} {count:,}" for kind, count in report["redacted"].items()))] if report["redacted"] else [])]
    return html.tiles((name, f"{count:,}", remark) for name, count, remark in tiles)


def _length_section(report: Mapping[str, Any]) -> str:
    plots = []
    for part, name in LENGTHS:
        values = report["tokens"][part]
        if "mean" in values:
            plots.append(f"<div><h3>{escape(name)}</h3>{_columns(_bins(report['tokens'], part))}"
                         f'<p class="soft">median {values["p50"]:.0f}, 95% up to {values["p95"]:.0f}, longest '
                         f'{values["max"]:,} tokens</p></div>')
    turns = report["turns"]
    sentence = (f"{turns['several']:.1%} of the conversations have several turns; {turns['system']:.1%} bring a system "
            "message.")
    return html.section("Lengths in tokens", f'<div class="three">{"".join(plots)}</div><p>{escape(sentence)}</p>')


def _rejection_section(report: Mapping[str, Any]) -> str:
    rejections, near = _rejections(report), report["near_duplicates"]["examples"]
    examples = [(each["example"]["reason"], f"{each['example']['file']}:{each['example']['line']}",
                 shorten(each["example"]["text"], 100)) for each in report["rejected"] if each["example"]]
    parts = [html.bars([(reason, count) for reason, count, _ in rejections]) if rejections
             else '<p class="soft">No row was rejected.</p>', html.table(("reason", "first at", "text"), examples)]
    if near:
        parts += ["<h3>Near-duplicates</h3>", html.table(("left out, from", "like a row of", "text"), (
            (each["split"], each.get("of_split", each["split"]), shorten(each["text"], 100)) for each in near))]
    return html.section("Rejected and repeated", *parts)


def _answer_section(report: Mapping[str, Any]) -> str:
    answers = report["answers"]
    sentence = (f"{answers['different']:,} different answers; the most frequent stands in {answers['largest_group']:,} "
            f"rows; {answers['short']:,} have one token or none, {answers['blank']:,} say nothing.")
    parts = [f"<p>{escape(sentence)}</p>"]
    for key, title in (("most_frequent", "Most frequent"), ("openings", "Beginning alike")):
        if answers[key]:
            bars = html.bars([(shorten(each["text"], 44), each["count"]) for each in answers[key]])
            parts += [f"<h3>{title}</h3>", bars]
    return html.section("Answers", *parts)


def _language_section(report: Mapping[str, Any]) -> str:
    languages = report["languages"]
    return html.section("Languages", f'<p class="soft">Of {languages["sampled"]:,} sampled questions.</p>',
                        html.bars([(LANGUAGES.get(name, name), share) for name, share in languages["shares"].items()]))


def _across_section(report: Mapping[str, Any]) -> str:
    """The section of the comparison with other domains; empty where the report has none."""
    if "across" not in report:
        return ""
    across, (sentence, apart) = report["across"], _neighbours(report)
    near, looks = across["near_duplicates"], (across["neighbours"] or {"examples": []})["examples"]
    parts = [f"<p>{escape(sentence)}</p>"]
    if apart:
        parts += ["<h3>How well the neighbours tell them apart (50% is chance)</h3>", html.bars(apart, most=1.0)]
    parts.append(html.table(("looks like", "text"),
                            ((each["looks_like"], shorten(each["text"], 100)) for each in looks)))
    shared = html.table(("also in", "split here / there", "text"), (
        (each["domain"], f"{each['split']} / {each['other_split']}", shorten(each["text"], 100))
        for each in across["duplicates"]["examples"]))
    alike = html.table(("nearly the same in", "similarity", "here", "there"), (
        (f"{each['domain']} {each['other_split']}", each["similarity"], shorten(each["text"], 100),
         shorten(each["other_text"], 100))
        for kind in ("across_domains", "across_splits") for each in near[kind]["examples"]))
    if shared or alike:
        parts += ["<h3>Rows in common</h3>", shared, alike]
    return html.section("Beside the other domains", *parts)


def _evidence_section(report: Mapping[str, Any]) -> str:
    """What so many rows let the gate and the router tell; empty where the report does not say."""
    said = [(who, report[key]) for who, key in (("The gate", "power"), ("The router", "promise")) if report.get(key)]
    return html.section("What so many rows can show", *(f"<p>{escape(f'{who}: {sentence}')}</p>"
                                                        for who, sentence in said)) if said else ""


def _columns(bins: Sequence[tuple[str, int]]) -> str:
    """A histogram as SVG: one column for each bin, with its label below where there is room."""
    width, height, foot = 320, 150, 18
    most, step = max(max(count for _, count in bins), 1), width / len(bins)
    every = -(-len(bins) * 52 // width)   # bins for each label, which takes 52 units
    shapes = []
    for index, (label, count) in enumerate(bins):
        column_height = max((height - foot - 14) * count / most, 1 if count else 0)
        shapes.append(f'<rect x="{index * step + 1:.1f}" y="{height - foot - column_height:.1f}" '
                      f'width="{max(step - 2, 1):.1f}" height="{column_height:.1f}" rx="2">'
                      f'<title>{escape(label)}: {count:,}</title></rect>')
        if index % every == 0:
            shapes.append(f'<text x="{(index + 0.5) * step:.1f}" y="{height - 4}" text-anchor="middle">'
                          f'{escape(label)}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(shapes)}</svg>'
