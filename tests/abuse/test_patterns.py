"""No regular expression of the source can be made slow by a text, unless its text is short or the operator's own."""

from __future__ import annotations

import pytest

from tests.abuse.patterns import Automaton, slow_patterns

# By file and name: why the pattern may stay.
ALLOWED = {
    ("checkpoint/hub.py", "f'[0-9a-f]{{{length}}}'"): "one set of characters, a fixed number of times",
    ("checkpoint/upcycle.py", "own"): "a name that is escaped, and eight characters",
    ("cli/shared/remote.py", "own_path"): "the address that the user gave on the command line",
    ("engine/grammar/constraint.py", "b'|'.join(map(re.escape, texts))"): "literal words",
    ("engine/grammar/grammar_bounds.py", "_LEXEME"): "reading ends at the first character that begins no lexeme",
    ("guard/pii/spelling.py", "word"): "letters and the signs between them share no character",
    ("guard/view.py", "_STRING"): "an open text takes the rest",
    ("model/reading/layout.py", "known"): "names of at most 256 characters; no part of it repeats beside another",
    ("model/reading/layout.py", "layer_of"): "names of at most 256 characters; no part of it repeats beside another",
    ("model/reading/schemes.py", "expression"): "3 repetitions at most, none in another, of 256 characters",
    ("model/remote.py", "_LAYER"): "names of at most 256 characters",
    ("model/remote.py", "_EXPERT"): "names of at most 256 characters",
    ("machine/rates.py", "one.pattern"): "a table of ours over the name of this machine's processor",
    ("prompt/formats/deepseek.py", "parameter"): "at most 256 characters from each place",
    ("prompt/formats/format.py", "f'({pieces})'"): "literal control tokens",
    ("prompt/formats/minimax_m2.py", "parameter"): "at most 256 characters from each place",
    ("prompt/formats/parser.py", "'|'.join(map(re.escape, self._written))"): "literal marks",
    ("prompt/formats/qwen3_coder.py", "function"): "tried once for each function",
    ("prompt/formats/qwen3_coder.py", "parameter"): "tried behind closing tags, and the next one of them ends it",
    ("prompt/tokenizer.py", "starts"): "literal markers",
    ("serve/http/gate.py", "given.join(map(re.escape, parts))"): "paths of ours, each part between slashes or last",
}  # fmt: skip


def test_no_pattern_can_be_made_slow_by_a_text() -> None:
    found = {
        (one.place.partition(":")[0], one.name): f"{one.place} {one.name}: {fault}"
        for one, fault in slow_patterns()
        if fault
    }
    assert not found.keys() - ALLOWED.keys(), "\n".join(
        sorted(found[key] for key in found.keys() - ALLOWED.keys())
    )
    assert not ALLOWED.keys() - found.keys(), "no longer needed"


@pytest.mark.parametrize(
    ("pattern", "is_searched", "is_full", "is_slow"),
    [
        (r"(a*)*b", False, False, True),
        (r"(a|aa)+b", False, False, True),
        (r"a*a*b", False, False, True),
        (r"(.+?)\s*$", False, False, True),
        (r"a+b", True, False, True),
        (r"\s*$", True, False, True),
        (r"<f=([^>]+)>", True, False, True),
        (r'"(?:[^"\\]|\\.)*"', True, False, True),
        (r"a+b", False, False, False),
        (r"a+", True, False, False),
        (r"^a+b", True, False, False),
        (r"(\d+,)*\d+", False, True, False),
        (r'"(?:[^"\\]|\\.)*"', False, True, False),
        (r"[a-z]+@[a-z]+", False, True, False),
    ],
)
def test_the_analysis_knows_slow_patterns_from_others(
    pattern: str, is_searched: bool, is_full: bool, is_slow: bool
) -> None:
    assert bool(Automaton(pattern).slow(is_searched=is_searched, is_full=is_full)) == is_slow
