"""Spellings that hide a value from a pattern: the same values, written in many ways.

VALUES x TRICKS  ->  (trick, text, entity); a text holds one value between two words
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from argosy.guard.pii.entities import Entity

VALUES: dict[Entity, tuple[str, ...]] = {
    "email": ("joe@example.com", "maria.91@mail.example.org", "a_b@my-site.example"),
    "card": ("4111111111111111", "378282246310005"),
    "iban": ("DE89370400440532013000", "GB82WEST12345698765432"),
    "phone": ("+4930901820", "+12015550123"),
    "national_id": ("12345678Z",),
    "ip_address": ("8.8.4.4",),
}
_LATIN = "aceopxyABEHKMOPTX"
_CYRILLIC = "асеорхуАВЕНКМОРТХ"


def _shifted(digits_from: int, upper: int | None = None, lower: int | None = None) -> Callable[[str], str]:
    def write(value: str) -> str:
        made = []
        for character in value:
            if character.isdecimal():
                made.append(chr(digits_from + int(character)))
            elif upper is not None and "A" <= character <= "Z":
                made.append(chr(upper + ord(character) - ord("A")))
            elif lower is not None and "a" <= character <= "z":
                made.append(chr(lower + ord(character) - ord("a")))
            else:
                made.append(character)
        return "".join(made)

    return write


def _between(mark: str, every: int = 1) -> Callable[[str], str]:
    return lambda value: "".join(
        character + (mark if (at + 1) % every == 0 and at + 1 < len(value) else "")
        for at, character in enumerate(value)
    )


def _full_width(value: str) -> str:
    return "".join(
        chr(ord(character) + 0xFEE0) if "!" <= character <= "~" else character for character in value
    )


EVERYWHERE: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "full width": _full_width,
    "zero-width spaces": _between("\u200b"),
    "zero-width joiners": _between("\u200d", 2),
    "word joiners": _between("\u2060", 3),
    "soft hyphens": _between("\u00ad"),
    "byte order marks": _between("\ufeff", 2),
    "combining marks": _between("\u0336"),
    "directions": lambda value: "\u202a" + value + "\u202c",
    "variation selectors": _between("\ufe0f"),
    "tags": _between("\U000e0041", 4),
    "look-alikes": lambda value: value.translate(str.maketrans(_LATIN, _CYRILLIC)),
    "full-width digits": _shifted(0xFF10),
    "Arabic digits": _shifted(0x0660),
    "Devanagari digits": _shifted(0x0966),
    "bold digits": _shifted(0x1D7CE, 0x1D400, 0x1D41A),
    "monospace": _shifted(0x1D7F6, 0x1D670, 0x1D68A),
    "sans serif": _shifted(0x1D7E2, 0x1D5A0, 0x1D5BA),
}
ADDRESSES: dict[str, Callable[[str], str]] = {
    name: (lambda value, at=at, dot=dot: value.replace("@", at).replace(".", dot))
    for name, at, dot in (
        ("(at) (dot)", " (at) ", " (dot) "), ("[at] [dot]", " [at] ", " [dot] "), ("{at} {dot}", " {at} ", " {dot} "),
        ("(at) .", "(at)", "."), ("[at] .", " [at] ", "."), ("AT DOT", " AT ", " DOT "), ("at dot", " at ", " dot "),
        ("(@)", " (@) ", "."), ("arroba punto", " arroba ", " punto "), ("arobase point", " arobase ", " point "),
        ("klammeraffe punkt", " Klammeraffe ", " Punkt "), ("spaced", " @ ", "."), ("spaced dots", "@", " . "),
        ("full-width at", "＠", "．"), ("small at", "﹫", "."), ("one-dot leader", "@", "․"),
        ("ideographic", "@", "。"),
        ("percent", "%40", "."), ("entity", "&#64;", "."), ("<at>", " <at> ", " <dot> "),
    )
}  # fmt: skip
NUMBERS: dict[str, Callable[[str], str]] = {
    "every digit spaced": _between(" "),
    "pairs": _between(" ", 2),
    "groups of three": _between(" ", 3),
    "groups of four": _between(" ", 4),
    "dotted": _between(".", 4),
    "dashed": _between("-", 4),
    "en dashes": _between("–", 4),
    "non-breaking hyphens": _between("\u2011", 4),
    "thin spaces": _between("\u2009", 4),
    "no-break spaces": _between("\u00a0", 4),
    "two spaces": _between("  ", 4),
    "spaced dashes": _between(" - ", 4),
}
_SLACK: dict[Entity, frozenset[str]] = {
    # An IBAN may have one separator between two characters, and a national number none of these forms.
    "iban": frozenset({"two spaces", "spaced dashes"}),
}


def spellings() -> Iterator[tuple[str, str, Entity]]:
    """(name of the trick, text, entity)."""
    for entity, values in VALUES.items():
        tricks = dict(EVERYWHERE)
        if entity == "email":
            tricks |= ADDRESSES
        if entity in ("card", "iban", "phone"):
            tricks |= {name: write for name, write in NUMBERS.items() if name not in _SLACK.get(entity, ())}
        for name, write in tricks.items():
            for value in values:
                yield f"{entity}: {name}", f"I wrote {write(value)} there", entity
