"""A domain's quality report (`moa.workspace.domains.check`) as text for a terminal and as one self-contained HTML file.

The page's functions return what templates/quality.html shows, as plain data. Rows may contain any text.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moa.core.text import indented_table, shorten
from moa.reports import html, svg

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
    parts = [indented_table([(name, f"{count:,}", remark) for name, count, remark in _counts(report)], right=[1])]
    if report["redacted"]:
        parts.append("redacted: " + ", ".join(f"{count:,} {kind}" for kind, count in report["redacted"].items()))
    if rejections := _rejections(report):
        parts.append("Rejected\n" + indented_table([(reason, f"{count:,}", f"first at {place}")
                                                    for reason, count, place in rejections], right=[1]))
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
    parts += [f"{title}\n" + indented_table([(f"{each['count']:,}", f"{each['share']:.1%}", shorten(each["text"], 80))
                                            for each in answers[key]], right=[0, 1])
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
        lines.append("Told apart from\n" +
                     indented_table([(name, f"{accuracy:.0%}") for name, accuracy in apart], right=[1]))
    lines += [f"  like {each['looks_like']}: {shorten(each['text'], 90)}"
              for each in (across["neighbours"] or {"examples": []})["examples"]]
    return "\n".join(lines)


def _histogram(bins: Sequence[tuple[str, int]]) -> str:
    most = max(max(count for _, count in bins), 1)
    return indented_table([(label, f"{count:,}", _bar(count / most)) for label, count in bins], right=[0, 1])


def _bar(share: float) -> str:
    """A bar of block characters; `share` of 1 has the full width."""
    eighths = max(round(share * BAR * 8), 1 if share else 0)
    return "█" * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")


# The page.

def render(report: Mapping[str, Any]) -> str:
    """Render the quality report as one HTML page."""
    return html.render(
        "quality.html", title=f"{report['domain']}: label quality", heading=report["domain"],
        subtitle="Label quality before training", tiles=_tiles(report), warnings=report["warnings"],
        lengths=_lengths(report), turns=report["turns"], rejected=_rejected(report), answers=_answers(report),
        languages=_languages(report), across=_across(report),
        evidence=[(who, report[key]) for who, key in (("The gate", "power"), ("The router", "promise"))
                  if report.get(key)])


def write(path: Path, report: Mapping[str, Any]) -> None:
    """Write the page of the quality report to `path` atomically. Raises UsageError where it cannot be written."""
    html.write(path, render(report))


def _tiles(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Large figures: (name, value, remark)."""
    tiles = [*_counts(report), *([("redacted", sum(report["redacted"].values()), ", ".join(
        f"{kind} {count:,}" for kind, count in report["redacted"].items()))] if report["redacted"] else [])]
    return [(name, f"{count:,}", remark) for name, count, remark in tiles]


def _lengths(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The histogram of tokens of each part of a row that was measured."""
    tokens = report["tokens"]
    return [{"name": name, "drawing": svg.histogram(_bins(tokens, part)), "median": tokens[part]["p50"],
             "most": tokens[part]["p95"], "longest": html.shown(tokens[part]["max"])}
            for part, name in LENGTHS if "mean" in tokens[part]]


def _rejected(report: Mapping[str, Any]) -> dict[str, Any]:
    """Rejected rows by reason, with an example of each, and near-duplicates."""
    examples = [(each["example"]["reason"], f"{each['example']['file']}:{each['example']['line']}",
                 shorten(each["example"]["text"], 100)) for each in report["rejected"] if each["example"]]
    near = [(each["split"], each.get("of_split", each["split"]), shorten(each["text"], 100))
            for each in report["near_duplicates"]["examples"]]
    return {"drawing": svg.bars([(reason, count) for reason, count, _ in _rejections(report)]),
            "examples": html.table(("reason", "first at", "text"), examples),
            "near_duplicates": html.table(("left out, from", "like a row of", "text"), near)}


def _answers(report: Mapping[str, Any]) -> dict[str, Any]:
    """A sentence on the answers, and (title, bars) of those that are frequent or begin alike."""
    answers = report["answers"]
    sentence = (f"{answers['different']:,} different answers; the most frequent stands in {answers['largest_group']:,} "
                f"rows; {answers['short']:,} have one token or none, {answers['blank']:,} say nothing.")
    plots = [(title, svg.bars([(shorten(each["text"], 44), each["count"]) for each in answers[key]]))
             for key, title in (("most_frequent", "Most frequent"), ("openings", "Beginning alike")) if answers[key]]
    return {"sentence": sentence, "plots": plots}


def _languages(report: Mapping[str, Any]) -> dict[str, Any]:
    """The shares of languages among the sampled questions."""
    languages = report["languages"]
    shares = [(LANGUAGES.get(name, name), share) for name, share in languages["shares"].items()]
    return {"sampled": html.shown(languages["sampled"]), "drawing": svg.bars(shares)}


def _across(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """The comparison with other domains; None where the report has none."""
    if "across" not in report:
        return None
    across, (sentence, apart) = report["across"], _neighbours(report)
    near, looks = across["near_duplicates"], (across["neighbours"] or {"examples": []})["examples"]
    shared = ((each["domain"], f"{each['split']} / {each['other_split']}", shorten(each["text"], 100))
              for each in across["duplicates"]["examples"])
    alike = ((f"{each['domain']} {each['other_split']}", each["similarity"], shorten(each["text"], 100),
              shorten(each["other_text"], 100))
             for kind in ("across_domains", "across_splits") for each in near[kind]["examples"])
    return {"sentence": sentence, "apart": svg.bars(apart, most=1.0),
            "looks": html.table(("looks like", "text"),
                                ((each["looks_like"], shorten(each["text"], 100)) for each in looks)),
            "shared": html.table(("also in", "split here / there", "text"), shared),
            "alike": html.table(("nearly the same in", "similarity", "here", "there"), alike)}
