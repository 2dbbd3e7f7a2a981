"""The judgement of benchmarks/instructions.py; its counts need valgrind and half a minute."""

import json

import pytest

from benchmarks import instructions

KNOWN = {"avx2": {"adaln float32 16x768": 1000, "sums float32 16x768": 100}}


@pytest.mark.parametrize(
    ("counts", "complaints"),
    [
        ({"adaln float32 16x768": 1010, "sums float32 16x768": 50}, []),
        (
            {"adaln float32 16x768": 1011, "sums float32 16x768": 100},
            ["avx2 adaln float32 16x768: 1,011, 1,000 committed"],
        ),
        ({"adaln float32 16x768": 1000}, ["avx2 sums float32 16x768: gone"]),
        ({**KNOWN["avx2"], "pack float32 16x768": 7}, ["avx2 pack float32 16x768: 7, new"]),
    ],
)
def test_a_call_may_not_take_more_than_a_percent_more(counts, complaints):
    facts = {"compiler": "g++", "machine": "x86_64"}
    committed = {**facts, "counts": KNOWN}
    assert instructions.compare({**facts, "counts": {"avx2": counts}}, committed) == complaints
    assert (
        instructions.compare({**committed, "compiler": "clang++", "counts": {}}, committed) is None
    )


@pytest.mark.skipif(not instructions.RESULTS.exists(), reason="an sdist has no results")
def test_the_committed_counts_are_whole():
    """Every set has the same calls, and each call takes instructions."""
    committed = json.loads(instructions.RESULTS.read_text("utf-8"))
    assert committed["compiler"] and committed["machine"]
    calls = [list(counts) for counts in committed["counts"].values()]
    assert len(calls) >= 1 and len(calls[0]) > 70 and all(c == calls[0] for c in calls)
    assert all(n > 0 for counts in committed["counts"].values() for n in counts.values())


@pytest.mark.parametrize(
    ("compiler", "count", "status", "said"),
    [
        ("g++", 1010, 0, "no count is above the committed one"),
        ("g++", 1011, 1, "avx2 adaln float32 16x768: 1,011, 1,000 committed"),
        ("clang++", 1011, 0, "not compared: the committed counts are of g++"),
    ],
)
def test_the_command_judges_and_updates(
    monkeypatch, tmp_path, capsys, compiler, count, status, said
):
    facts = {"machine": "x86_64", "valgrind": "3.19"}
    counts = KNOWN["avx2"] | {"adaln float32 16x768": count}
    found = {**facts, "compiler": compiler, "counts": {"avx2": counts}}
    monkeypatch.setattr(instructions, "RESULTS", tmp_path / "instructions.json")
    monkeypatch.setattr(instructions, "count_all", lambda: found)
    assert instructions.main([]) == 0  # there is nothing to compare with
    instructions.RESULTS.write_text(json.dumps({**facts, "compiler": "g++", "counts": KNOWN}))
    assert instructions.main([]) == status
    assert capsys.readouterr().out.splitlines()[-1] == said
    assert instructions.main(["--update"]) == 0
    assert json.loads(instructions.RESULTS.read_text()) == found
