// Markdown as models write it, built from DOM nodes: a model's text can never become markup of this page.
//
// Headings, paragraphs, lists, tasks, quotes, tables, fenced code, folds (<details>); code spans, emphasis, links, formulas
// (`math.js`). Links open only http and https addresses, in a new tab. An image is shown as a link, because loading it
// would tell its host that it was shown. Time is linear in the text, and nesting is bounded: no pattern has two ways to
// divide a run of spaces.

import { highlight } from "./highlight.js";
import { DISPLAYED, formula } from "./math.js";
import { copyButton, element } from "./units.js";

const DEEPEST = 8;
const LONGEST_LABEL = 1000;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})(?=\s)/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const QUOTE = /^ {0,3}>/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+(.*)|)$/s;
const TABLE_RULE = /^:?-+:?$/;  // one cell
const TASK = /^\[([ xX])\]\s/;
const FOLD = /^ {0,3}<details(?: open)?>/;
const FOLD_END = /^ {0,3}<\/details>\s*$/;
const TITLE = /^\s*<summary>([^<]*(?:<(?!\/summary>)[^<]*)*)<\/summary>/;

/** A view of growing text. Unchanged blocks keep their nodes, so selections and scroll positions survive. */
export class MarkdownView {
  constructor(container) {
    this.container = container;
    this.from = 0;  // where in the text the blocks begin that may still change
    this.numSettled = 0;  // blocks before it
    this.rest = "";  // the text from there on
    this.keys = [];  // of its blocks
  }

  /** Show `text`, which continues the one before. All but its last two blocks stay as they are, and are not read again. */
  update(text) {
    const rest = text.slice(this.from);
    if (rest === this.rest) return;
    const lines = rest.split("\n");
    const blocks = split(lines);
    const keys = blocks.map((block) => `${block.kind}\n${block.isOpen ? "" : "closed"}\n${block.lines.join("\n")}`);
    const { children } = this.container;
    blocks.forEach((block, index) => {
      if (this.keys[index] === keys[index]) return;
      const node = render(block, 0);
      if (index < this.keys.length) children[this.numSettled + index].replaceWith(node);
      else this.container.append(node);
    });
    while (children.length > this.numSettled + blocks.length) this.container.lastElementChild.remove();
    // What follows a block can change it and the one before it, as a line that becomes an item ends a paragraph.
    const numOver = Math.max(0, blocks.length - 2);
    if (numOver > 0) this.from += lines.slice(0, blocks[numOver].from).reduce((sum, line) => sum + line.length + 1, 0);
    this.numSettled += numOver;
    this.keys = keys.slice(numOver);
    this.rest = text.slice(this.from);
  }
}

function split(lines) {
  const blocks = [];
  const absent = new Map();  // what ends a formula, and the line before which there is none
  let at = 0;
  const take = (kind, end, extra = {}) => {
    blocks.push({ kind, from: at, lines: lines.slice(at, end), ...extra });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (line.trim() === "") {
      at += 1;
    } else if (fence) {
      const closing = (other) => other.trim().startsWith(fence[1]) && /^[`~]+$/.test(other.trim());
      let end = at + 1;
      while (end < lines.length && !closing(lines[end])) end += 1;
      take("code", Math.min(end + 1, lines.length), { language: fence[2], isOpen: end >= lines.length });
    } else if (HEADING.test(line)) {
      take("heading", at + 1);
    } else if (RULE.test(line)) {
      take("rule", at + 1);
    } else if (QUOTE.test(line)) {
      take("quote", runOf(lines, at, (other) => QUOTE.test(other)));
    } else if (ITEM.test(line)) {
      take("list", endOfList(lines, at));
    } else if (line.includes("|") && lines[at + 1]?.includes("|") && isTableRule(lines[at + 1])) {
      take("table", runOf(lines, at, (other) => other.includes("|")));
    } else if (FOLD.test(line)) {
      const end = endOfFold(lines, at);
      take("fold", Math.min(end + 1, lines.length), { isOpen: end >= lines.length });
    } else {
      take("paragraph", endOfParagraph(lines, at, absent));
    }
  }
  return blocks;
}

const endsParagraph = (line) => line.trim() === "" || [FENCE, HEADING, QUOTE, ITEM, FOLD].some((start) => start.test(line));

/** Lines of a formula belong to its paragraph, whatever they begin with. Without an end before a blank line it is none. */
function endOfParagraph(lines, at, absent) {
  let end = at;
  while (end < lines.length && (end === at || !endsParagraph(lines[end]))) {
    const closing = closingOf(lines[end]);
    end += 1;
    if (!closing || absent.get(closing) >= end) continue;
    const last = runOf(lines, end, (line) => line.trim() !== "" && !line.includes(closing));
    if (lines[last]?.includes(closing)) end = last + 1;
    else if (last === lines.length) end = last;  // more may come
    else absent.set(closing, last);
  }
  return end;
}

/** What ends the formula that begins in a line and goes on after it; null if there is none. */
function closingOf(line) {
  if (line.split("$$").length % 2 === 0) return "$$";
  if (line.lastIndexOf("\\[") > line.lastIndexOf("\\]")) return "\\]";
  const environment = line.includes("\\begin{") && environmentIn(line.trimStart(), 0);
  return environment && !line.includes(environment.closing) ? environment.closing : null;
}

function endOfFold(lines, at) {
  let depth = 0;
  for (let end = at; end < lines.length; end += 1) {
    if (FOLD.test(lines[end])) depth += 1;
    if (FOLD_END.test(lines[end]) || (FOLD.test(lines[end]) && lines[end].includes("</details>"))) depth -= 1;
    if (depth === 0) return end;
  }
  return lines.length;
}

function isTableRule(line) {
  return line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").every((cell) => TABLE_RULE.test(cell.trim()));
}

function runOf(lines, at, belongs) {
  let end = at;
  while (end < lines.length && belongs(lines[end])) end += 1;
  return end;
}

const indent = (line) => line.length - line.trimStart().length;

function endOfList(lines, at) {
  const base = indent(lines[at]);
  const isOrdered = /\d/.test(ITEM.exec(lines[at])[2]);
  let end = at + 1;
  while (end < lines.length) {
    const line = lines[end];
    const item = ITEM.exec(line);
    if (line.trim() === "") {
      // A blank line belongs to the list if the next line does.
      const next = runOf(lines, end, (other) => other.trim() === "");
      if (next === lines.length) break;
      const follows = ITEM.exec(lines[next]);
      const isItem = follows && indent(lines[next]) >= base && /\d/.test(follows[2]) === isOrdered;
      if (!isItem && indent(lines[next]) <= base) break;
      end = next - 1;
    } else if (item ? indent(line) < base || (indent(line) === base && /\d/.test(item[2]) !== isOrdered) : false) {
      break;
    } else if (!item && indent(line) <= base && lines[end - 1].trim() === "") {
      break;
    } else if (FENCE.test(line) && indent(line) <= base) {
      break;
    }
    end += 1;
  }
  return end;
}

function render(block, depth) {
  switch (block.kind) {
    case "code": return code(block);
    case "heading": {
      const [start, marks] = HEADING.exec(block.lines[0]);
      const text = block.lines[0].slice(start.length);
      let end = text.length;
      while (text[end - 1] === "#") end -= 1;
      return inline(text.slice(0, end).trim(), element(`h${Math.min(6, Math.max(3, marks.length + 1))}`));  // h1 and h2 are the page's own
    }
    case "rule": return element("hr");
    case "quote": {
      const quoted = block.lines.map((line) => line.replace(/^ {0,3}> ?/, ""));
      return inside(element("blockquote"), quoted, depth);
    }
    case "list": return list(block.lines, depth);
    case "fold": return fold(block, depth);
    case "table": return table(block.lines);
    default: return inline(block.lines.map((line) => line.trim()).join("\n"), element("p"));
  }
}

function inside(container, lines, depth) {
  if (depth >= DEEPEST) return inline(lines.join("\n"), container);
  container.append(...split(lines).map((block) => render(block, depth + 1)));
  return container;
}

function fold(block, depth) {
  const last = block.isOpen ? undefined : -1;
  const isOneLine = block.lines.length === 1 && !block.isOpen;
  const first = block.lines[0].replace(FOLD, "").replace(isOneLine ? "</details>" : "", "");
  const inner = [first, ...block.lines.slice(1, isOneLine ? undefined : last)];
  const place = inner.findIndex((line) => line.trim() !== "");
  const title = TITLE.exec(inner[place] ?? "");
  if (title) inner[place] = inner[place].slice(title[0].length);
  return inside(element("details", { open: block.isOpen }, inline(title?.[1].trim() || "Details", element("summary"))), inner, depth);
}

function code(block) {
  const text = block.lines.slice(1, block.isOpen ? undefined : -1).join("\n");
  return element("figure", { class: "code" },
    element("figcaption", {}, block.language || "text", copyButton(text, "Copy this code")),
    element("pre", { tabindex: "0" }, element("code", {}, ...highlight(text, block.language))));
}

function list(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const isOrdered = /\d/.test(first[2]);
  const base = indent(lines[0]);
  const start = parseInt(first[2], 10);
  const made = element(isOrdered ? "ol" : "ul", { start: isOrdered && start !== 1 && start });
  let item = [];
  const finish = () => {
    if (!item.length) return;
    const isTight = !item.some((line, index) => index && line.trim() === "");
    const task = TASK.exec(item[0]);
    if (task) item[0] = item[0].slice(task[0].length);
    const container = inside(element("li", { class: task && "task" }), item, depth);
    if (task) {
      const isDone = task[1] !== " ";
      const box = element("span", { role: "img", "aria-label": isDone ? "done" : "to do" }, isDone ? "\u2611" : "\u2610");
      (container.firstElementChild ?? container).prepend(box, " ");
    }
    if (isTight && container.firstElementChild?.tagName === "P") container.firstElementChild.classList.add("tight");
    made.append(container);
  };
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && indent(line) <= base + 1) {
      finish();
      item = [found[3] ?? ""];
    } else {
      item.push(line.slice(Math.min(indent(line), base + first[2].length + 1)));
    }
  }
  finish();
  return made;
}

function table(lines) {
  const cells = (line) => {
    const inner = line.trim().replace(/^\|/, "").replace(/(^|[^\\])\|$/, "$1");
    return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  };
  const align = (cell) => (/^:-+:$/.test(cell) ? "center" : cell.endsWith(":") ? "right" : "left");
  const aligns = cells(lines[1]).map(align);
  const row = (line, tag) => element("tr", {},
    ...cells(line).map((cell, index) => inline(cell, element(tag, { class: aligns[index] ?? "left" }))));
  return element("div", { class: "table", tabindex: "0" }, element("table", {},
    element("thead", {}, row(lines[0], "th")),
    element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")))));
}

const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
// (address), (<address>) or (address "title"); parentheses in an address come in pairs.
const TARGET = /^\(\s*<?((?:[^\s()<>]|\([^\s()<>]*\))+)>?(?:\s+(?:"[^"]*"\s*)?)?\)/;
const WORD = /[\p{L}\p{N}]/u;

function inline(text, container, depth = 0) {
  const missing = new Set();  // marks and signs without an end from here on, so the search runs once
  let bracket = 0;  // the first "]" from here on, or the end
  let plain = "";
  const flush = () => {
    if (plain) container.append(plain);
    plain = "";
  };
  const add = (node) => {
    flush();
    container.append(node);
  };
  let at = 0;
  while (at < text.length) {
    const char = text[at];
    if (char === "$" || char === "\\") {
      const found = formulaAt(text, at, missing);
      if (found) {
        if (found.node) add(found.node);
        else plain += text.slice(at, found.end);
        at = found.end;
        continue;
      }
    }
    if (char === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      plain += text[at + 1];
      at += 2;
      continue;
    }
    if (char === "\n") {
      add(element("br"));
      at += 1;
      continue;
    }
    if (char === "`") {
      const run = /^`+/.exec(text.slice(at, at + 64))[0];
      const end = missing.has(run) ? -1 : text.indexOf(run, at + run.length);
      if (end < 0) {
        missing.add(run);
        plain += run;
        at += run.length;
      } else {
        add(element("code", {}, text.slice(at + run.length, end).replace(/^ (.*) $/s, "$1")));
        at = end + run.length;
      }
      continue;
    }
    if (bracket < at) bracket = text.indexOf("]", at) >>> 0;
    if ((char === "[" || (char === "!" && text[at + 1] === "[")) && bracket < text.length) {
      const link = linkAt(text, char === "!" ? at + 1 : at);
      if (link) {
        add(anchor(link.href, depth < DEEPEST ? link.label : null, depth));
        at = link.end;
        continue;
      }
    }
    if (text.startsWith("http", at) && !WORD.test(text[at - 1] ?? " ")) {
      const bare = /^https?:\/\/[^\s<>"'`]+/.exec(text.slice(at, at + 2048))?.[0].replace(/[.,;:!?)\]*_]+$/, "");
      if (bare && URL.canParse(bare)) {
        add(anchor(bare, null, depth));
        at += bare.length;
        continue;
      }
    }
    const mark = MARKS.find(([sign]) => text.startsWith(sign, at));
    if (mark && depth < DEEPEST) {
      const end = missing.has(mark[0]) ? -1 : endOfMark(text, at, mark[0]);
      if (end > 0) {
        add(inline(text.slice(at + mark[0].length, end), element(mark[1]), depth + 1));
        at = end + mark[0].length;
        continue;
      }
      if (end < 0) missing.add(mark[0]);
      plain += mark[0];
      at += mark[0].length;
      continue;
    }
    plain += char;
    at += 1;
  }
  flush();
  return container;
}

const ENVIRONMENT = /^\\begin\{([a-z]{1,12}\*?)\}/;
const TEX = /[\\^_={}<>+]/;
// An amount of money, a price range or a sentence: words, and no sign of TeX.
const isProse = (text) => !TEX.test(text) && /\s/.test(text) && /[a-z]{2}/i.test(text) && /^[0-9]|[a-z]{2}\s+\S*[a-z]{2}/i.test(text);
const isMoney = (tex, next) => /\s/.test(tex[0] ?? " ") || /[\s`]/.test(tex.at(-1)) || /[0-9$]/.test(next) || isProse(tex);

/** A formula, or the source of one that has no end, that begins here: {node, end}; null if none begins. */
function formulaAt(text, at, missing) {
  const [opening, closing] = signsAt(text, at) ?? [];
  if (!opening) return null;
  const begin = at + opening.length;
  const none = opening === "$" ? null : { end: begin };
  let end = missing.has(closing) ? -1 : text.indexOf(closing, begin);
  if (opening === "$") while (end > 0 && text[end - 1] === "\\") end = text.indexOf(closing, end + 1);
  if (end < 0) {
    missing.add(closing);
    return none;
  }
  const after = end + closing.length;
  const tex = text.slice(opening[1] === "b" ? at : begin, opening[1] === "b" ? after : end);
  if (opening === "$" ? isMoney(tex, text[after] ?? "") : tex.trim() === "") return none;
  if (opening === "$$" && /[a-z]{3}/i.test(tex) && !TEX.test(tex)) return none;
  const isBlock = opening !== "$" && opening !== "\\(";
  const drawn = formula(tex, isBlock);
  if (!drawn) return { node: element("code", { class: "source" }, text.slice(at, after)), end: after };
  return { node: isBlock ? element("span", { class: "formula", tabindex: "0" }, drawn) : drawn, end: after };
}

/** The signs around a formula that begins here, or undefined. */
function signsAt(text, at) {
  if (text[at] === "$") return text[at + 1] === "$" && text[at - 1] !== "$" && text[at + 2] !== "$" ? ["$$", "$$"] : ["$", "$"];
  if (text[at + 1] === "(") return ["\\(", "\\)"];
  if (text[at + 1] === "[") return ["\\[", "\\]"];
  const found = text[at + 1] === "b" && environmentIn(text, at);
  return found ? [found.opening, found.closing] : undefined;
}

/** The environment that begins here, if it is a formula by itself. */
function environmentIn(text, at) {
  const [opening, name] = ENVIRONMENT.exec(text.slice(at, at + 24)) ?? [];
  return DISPLAYED.has(name) ? { opening, closing: `\\end{${name}}` } : null;
}

/** The end of emphasis that begins here; 0 if none begins; -1 if it has no end. */
function endOfMark(text, at, sign) {
  const after = text[at + sign.length] ?? " ";
  if (/\s/.test(after) || (sign[0] === "_" && WORD.test(text[at - 1] ?? " "))) return 0;
  let end = text.indexOf(sign, at + sign.length);
  for (; end >= 0; end = text.indexOf(sign, end + 1)) {
    const isDoubled = sign.length === 1 && (text[end + 1] === sign || text[end - 1] === sign);
    const isInWord = sign[0] === "_" && WORD.test(text[end + sign.length] ?? " ");
    if (!/\s/.test(text[end - 1]) && end > at + sign.length && !isDoubled && !isInWord) return end;
  }
  return -1;
}

function linkAt(text, at) {
  let depth = 0;
  const limit = Math.min(text.length, at + LONGEST_LABEL);
  for (let end = at; end < limit; end += 1) {
    if (text[end] === "\\") end += 1;
    else if (text[end] === "[") depth += 1;
    else if (text[end] === "]" && --depth === 0) {
      const target = TARGET.exec(text.slice(end + 1, end + 2049));
      if (!target || !/^https?:\/\//i.test(target[1]) || !URL.canParse(target[1])) return null;
      return { label: text.slice(at + 1, end), href: target[1], end: end + 1 + target[0].length };
    }
  }
  return null;
}

function anchor(href, label, depth) {
  const made = element("a", { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" });
  return label ? inline(label, made, DEEPEST) : (made.append(href), made);
}
