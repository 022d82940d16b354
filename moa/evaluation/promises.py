"""What the router promises about abstention, in words: before training, from the groups of the corpora; and afterwards.

The numbers are those of `moa.mixture.abstention`. Pure functions.
"""

from collections.abc import Mapping
from typing import Any

from moa.core.config import AssembleParams
from moa.core.text import NAMES_SHOWN
from moa.mixture import abstention
from moa.mixture.assemble import PROMISING

EACH = 4   # most domains that have a sentence each
NEVER = "No prompt is left to the base (assemble.max_abstention is null)."


def groups_of(manifest: Mapping[str, Any], params: AssembleParams) -> int | None:
    """At least how many groups the promise of a domain will rest on; None where its corpus's manifest counts no groups.

    The router reads a row at least of each training and validation group, until there are `PROMISING` groups beside
    those of the `assemble.rows` rows that its heads are trained on.
    """
    groups, rows = manifest.get("groups") or {}, manifest.get("rows") or {}
    if not groups.get("train"):
        return None
    heads = min(params.rows, int(rows.get("train", groups["train"])), int(groups["train"]))
    return min(int(groups["train"]) - heads + int(groups.get("validation", 0)), PROMISING)


def expected(corpora: Mapping[str, Mapping[str, Any]], params: AssembleParams) -> list[str]:
    """What a router that is calibrated on these corpora will promise, as sentences.

    Args:
        corpora: manifests of prepared corpora, by domain.
    """
    counted = {domain: groups_of(manifest, params) for domain, manifest in corpora.items()}
    return sentences({domain: groups for domain, groups in counted.items() if groups is not None},
                     params.max_abstention)


def recorded(promises: Mapping[str, Any] | None) -> list[str]:
    """What a router promises, as sentences.

    Args:
        promises: of the mixture's manifest, each a `moa.mixture.abstention.Promise` by domain; empty for a router that
            never abstains. None = a router from before promises, which makes none.
    """
    if promises is None:
        return []
    return sentences({domain: each["groups"] for domain, each in promises.items()}, wanted(promises))


def wanted(promises: Mapping[str, Any]) -> float | None:
    """The `assemble.max_abstention` that a router was calibrated with; None = null."""
    return next((float(each["wanted"]) for each in promises.values()), None)


def sentences(groups: Mapping[str, int], share: float | None) -> list[str]:
    """What so many groups of each domain promise: a sentence each for a few domains, two in all for many.

    Args:
        groups: the number of groups by domain.
        share: `assemble.max_abstention`.
    """
    if share is None:
        return [NEVER]
    if len(groups) <= EACH:
        return [abstention.sentence(domain, count, share) for domain, count in groups.items()]
    missing = too_few(groups, share)
    kept = len(groups) - len(_short(groups, share))
    return [f"Of fresh prompts at most {share:.2%} are left to the base in {kept} of {len(groups)} domains (95 % "
            "confidence).", *([missing] if missing else [])]


def too_few(groups: Mapping[str, int], share: float) -> str:
    """The domains that have too few groups to promise `share`, and how many more they need; empty where none has.

    The domains that promise least come first.
    """
    short = _short(groups, share)
    if not short:
        return ""
    needed = abstention.groups_needed(share) if share > 0 else None
    reason = f"Too few groups to promise {share:.2%}" if needed else "No number of groups promises 0%"
    named = [f"{domain} (at most {kept:.2%}" + (f", {needed - groups[domain]:,} more groups)" if needed else ")")
             for domain, kept in sorted(short.items(), key=lambda each: (-each[1], each[0]))]
    more = f" and {len(named) - NAMES_SHOWN} more" if len(named) > NAMES_SHOWN else ""
    return f"{reason}: {', '.join(named[:NAMES_SHOWN])}{more}."


def _short(groups: Mapping[str, int], share: float) -> dict[str, float]:
    """What the domains promise that cannot promise `share`."""
    kept = {domain: abstention.upper_limit(abstention.most_left(count, share), count) if count else 1.0
            for domain, count in groups.items()}
    return {domain: each for domain, each in kept.items() if each > share}
