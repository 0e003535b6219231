// Syntax colours: one tokenizer for what most languages share: comments, strings, numbers, keywords and calls; and for
// diffs, the lines that were added and removed.
//
// It builds text and spans, never markup, and every character of the text stays. Each match consumes the text it has
// examined, so time is linear. A long block is coloured up to a bound; the rest stays plain.

import { element } from "./units.js";

export const MOST_CHARACTERS = 20_000;
export const MOST_SPANS = 3_000;

const QUOTED = (quote) => `${quote}(?:[^${quote}\\\\\\n]|\\\\.)*${quote}?`;
const DOUBLE = QUOTED('"');
const SINGLE = QUOTED("'");
const BACKTICK = "`(?:[^`\\\\]|\\\\[^])*`?";
const TRIPLE = '"""[^]*?(?:"""|$)|\'\'\'[^]*?(?:\'\'\'|$)';
const SLASHES = "//.*|/\\*[^]*?(?:\\*/|$)";
const HASH = "(?<![^\\s;({\\[])#.*";
const DASHES = "--.*|/\\*[^]*?(?:\\*/|$)";

const C_LIKE = "break case catch class const continue default do else enum extern false finally for goto if import new null "
  + "private protected public return static struct super switch this throw true try typeof void while ";
const KINDS = {
  python: [HASH, `${TRIPLE}|${DOUBLE}|${SINGLE}`, "and as assert async await break case class continue def del elif else "
    + "except False finally for from global if import in is lambda match None nonlocal not or pass raise return True try "
    + "while with yield"],
  javascript: [SLASHES, `${DOUBLE}|${SINGLE}|${BACKTICK}`, C_LIKE + "as async await delete export extends from function "
    + "implements in instanceof interface let of readonly type undefined var yield"],
  c: [SLASHES, `${DOUBLE}|${SINGLE}`, C_LIKE + "abstract auto bool boolean byte char constexpr delete double explicit "
    + "extends final float fun func implements inline int interface internal let long match namespace noexcept nullptr "
    + "object operator override package short signed sizeof string template typedef typename union unsigned using val "
    + "var virtual volatile when"],
  go: [SLASHES, `${DOUBLE}|${SINGLE}|\`[^\`]*\`?`, "break case chan const continue default defer else false fallthrough for "
    + "func go goto if import interface map nil package range return select struct switch true type var"],
  rust: [SLASHES, `${DOUBLE}|'(?:[^'\\\\\\n]|\\\\[^'\\n]+)'`, "as async await break const continue crate dyn else enum extern "
    + "false fn for if impl in let loop match mod move mut pub ref return self Self static struct super trait true type "
    + "unsafe use where while"],
  ruby: [HASH, `${DOUBLE}|${SINGLE}`, "and begin break case class def do else elsif end ensure false for if in module next "
    + "nil not or raise require rescue return self super then true unless until when while yield"],
  shell: [HASH, `${DOUBLE}|${SINGLE}`, "case do done elif else esac exit export fi for function if in local return set "
    + "then until while"],
  sql: [DASHES, `${DOUBLE}|${SINGLE}`, "add all alter and as asc begin between by case check commit create cross default "
    + "delete desc distinct drop else end exists false foreign from full group having if in index inner insert into is "
    + "join key left like limit not null offset on or order outer primary references returning right rollback select set "
    + "table then true union unique update using values view when where with"],
  lua: ["--\\[\\[[^]*?(?:\\]\\]|$)|--.*", `${DOUBLE}|${SINGLE}`, "and break case class do else elseif end false for function "
    + "if import in instance let local module nil not of or repeat return then true type until where while"],
  data: [HASH, `${TRIPLE}|${DOUBLE}|${SINGLE}`, "true false null yes no on off"],
  json: [SLASHES, DOUBLE, "true false null"],
  css: ["/\\*[^]*?(?:\\*/|$)", `${DOUBLE}|${SINGLE}`, "important media supports import keyframes"],
  markup: ["<!--[^]*?(?:-->|$)", DOUBLE, ""],
};
const NAMES = {
  python: "python py python3 pycon starlark",
  javascript: "javascript js jsx ts tsx typescript mjs node",
  c: "c h cpp c++ cc hpp cxx cuda cu java kotlin kt swift cs csharp c# scala dart php objc objective-c groovy glsl hlsl zig",
  go: "go golang",
  rust: "rust rs",
  ruby: "ruby rb perl elixir julia r",
  shell: "bash sh shell zsh console fish dockerfile docker make makefile cmake",
  sql: "sql mysql postgresql postgres sqlite plsql",
  lua: "lua haskell hs ada vhdl elm",
  data: "yaml yml toml ini conf properties env nginx",
  json: "json jsonc json5 jsonl",
  css: "css scss less",
  markup: "html xml svg vue xhtml",
  diff: "diff patch",
};
const KIND_OF = new Map(
  Object.entries(NAMES).flatMap(([kind, names]) => names.split(" ").map((name) => [name, kind])));

const rules = new Map();  // by kind, built on first use

const DIFF = { pattern: /(?<comment>^(?:@@|diff |index |--- |\+\+\+ ).*)|(?<added>^\+.*)|(?<removed>^-.*)/gm };

function ruleFor(kind) {
  if (kind === "diff") return DIFF;
  if (!rules.has(kind)) {
    const [comment, string, words] = KINDS[kind];
    const number = "\\b(?:0[xX][\\da-fA-F_]+|0[bB][01_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)[a-zA-Z]*\\b";
    const word = kind === "markup" ? "</?[A-Za-z][\\w:-]*|/?>" : "[A-Za-z_$][\\w$]*";
    rules.set(kind, {
      pattern: new RegExp(
        `(?<comment>${comment})|(?<string>${string})|(?<number>${number})|(?<word>${word})`, "g"),
      isKeyword: kind === "markup" ? () => true : has(new Set(words.split(" ")), kind === "sql"),
    });
  }
  return rules.get(kind);
}

const has = (words, ignoresCase) => (word) => words.has(ignoresCase ? word.toLowerCase() : word);

/** Text and spans that spell `text`; only plain text if the language is unknown. */
export function highlight(text, language) {
  const kind = KIND_OF.get(language.toLowerCase());
  if (!kind) return [text];
  const { pattern, isKeyword } = ruleFor(kind);
  const nodes = [];
  let plainFrom = 0;
  let spans = 0;
  for (const match of text.slice(0, MOST_CHARACTERS).matchAll(pattern)) {
    const name = Object.keys(match.groups).find((group) => match.groups[group] !== undefined);
    const isCall = name === "word" && text[match.index + match[0].length] === "(";
    const shown = name !== "word" ? name : isKeyword(match[0]) ? "keyword" : isCall && "call";
    if (!shown) continue;
    if (plainFrom < match.index) nodes.push(text.slice(plainFrom, match.index));
    nodes.push(element("span", { class: `code-${shown}` }, match[0]));
    plainFrom = match.index + match[0].length;
    spans += 1;
    if (spans === MOST_SPANS) break;
  }
  if (plainFrom < text.length) nodes.push(text.slice(plainFrom));
  return nodes;
}
