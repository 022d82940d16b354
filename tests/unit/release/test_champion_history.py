"""Who was champion before: going back undoes what followed."""

import pytest

from moa.release.champion_history import Entry, next_entry, parse, previous_champion


def entries(*versions: int, interrupted: tuple[int, ...] = ()) -> list[Entry]:
    """One change of champion after the other; the places in `interrupted` never took effect."""
    return [Entry(f"k{place}", place, version, "d", None, "2026-01-01", "ann", "why", place not in interrupted)
            for place, version in enumerate(versions)]


@pytest.mark.parametrize(("champions", "expected"), [
    ((), None), ((1,), None), ((1, 1), None), ((1, 2), 1), ((1, 2, 3), 2),
    ((1, 2, 3, 2), 1),        # 3 was left behind
    ((1, 2, 3, 2, 1), None),
    ((1, 2, 3, 1, 4), 1),     # 2 and 3 were
    ((1, 2, 1, 2), 1),        # forward again by hand
])
def test_before(champions: tuple[int, ...], expected: int | None) -> None:
    found = previous_champion(entries(*champions))
    assert (found.version if found else None) == expected


def test_what_never_took_effect_does_not_count() -> None:
    found = previous_champion(entries(1, 2, 3, interrupted=(2,)))
    assert found is not None and found.version == 1


def test_a_record_without_its_move_shows_and_is_continued() -> None:
    first, _ = next_entry([], 1, "d1", None, "first", "ann")
    second, _ = next_entry([first], 2, "d2", 1, "better", "ann")
    tags = {each.key: each.as_json() for each in (first, second)}
    assert [each.effective for each in parse(tags, 1)] == [True, False]
    assert next_entry(parse(tags, 1), 2, "d2", 1, "better", "ann") == (parse(tags, 1)[1], False)
    assert [each.effective for each in parse(tags, None)] == [True, True]   # the alias was deleted
