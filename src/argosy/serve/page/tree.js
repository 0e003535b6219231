// The messages of a conversation as a tree. An edited message or a second answer is a new branch beside the old one.
//
//   message: id, parent (an id or null), role "user" or "assistant", created (ms), text, attachments
//   answers: reasoning, state, note, model, tokens, ledger; where room was made, dropped (how many messages of the path the
//            model does not read from there on) and summary (what it reads instead)
//   states:  "running", "done", "stopped", "failed"
//
// One leaf is selected, and the path from the root to it is what the page shows and the model reads. Messages are added
// and never moved, and their ids are random: two tabs can add to one conversation, and both additions stay.

export const LONGEST_TITLE = 200;
export const LONGEST_NOTE = 2000;
const TITLE_CHARACTERS = 60;

/** 128 random bits. `crypto.randomUUID` exists only on https and on this machine. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export class Tree {
  constructor(messages = [], leaf = null) {
    this.messages = new Map();
    this.children = new Map();  // ids of the messages after a message, oldest first
    this.chosen = new Map();  // the child that was last shown after a message
    this.leaf = null;
    for (const message of messages) this.put(message);
    this.leaf = this.messages.has(leaf) ? leaf : (this.newest()?.id ?? null);
  }

  get(id) {
    return this.messages.get(id) ?? null;
  }

  /** Add a message and select it. */
  add(message) {
    this.put(message);
    this.leaf = message.id;
    this.remember();
  }

  /** Add a message, or replace the one with its id. The selection stays. */
  put(message) {
    if (!this.messages.has(message.id)) {
      const others = this.after(message.parent);
      this.children.set(message.parent, [...others.map(({ id }) => id), message.id]);
    }
    this.messages.set(message.id, message);
  }

  /** The messages from the root to `leaf`. */
  path(leaf = this.leaf) {
    const path = [];
    for (let message = this.get(leaf); message; message = this.get(message.parent)) path.push(message);
    return path.reverse();
  }

  /** The versions of a message, itself included, oldest first. */
  versions(message) {
    return this.after(message.parent);
  }

  /** Select the branch of `message`: what was last shown after it, otherwise its newest messages. */
  select(message) {
    let at = message;
    for (;;) {
      const next = this.get(this.chosen.get(at.id)) ?? this.after(at.id).at(-1);
      if (!next) break;
      at = next;
    }
    this.leaf = at.id;
    this.remember();
  }

  after(parent) {
    return (this.children.get(parent) ?? []).map((id) => this.messages.get(id)).sort((a, b) => a.created - b.created);
  }

  newest() {
    return [...this.messages.values()].reduce((best, one) => (!best || one.created >= best.created ? one : best), null);
  }

  remember() {
    for (const { id, parent } of this.path()) this.chosen.set(parent, id);
  }
}

/** A title made from the first message. */
export function titleOf(message) {
  const line = message.text.trim().split("\n", 1)[0].trim() || message.attachments[0]?.name || "Untitled";
  const letters = [...line];
  return letters.length > TITLE_CHARACTERS ? `${letters.slice(0, TITLE_CHARACTERS - 1).join("").trimEnd()}\u2026` : line;
}

/** A message as Markdown: an answer's own text, or a question with the names of its files. */
export function messageAsMarkdown({ text, attachments }) {
  const files = attachments.map(({ name }) => `*Attached: ${name}*`);
  return [...files, text.trim()].filter(Boolean).join("\n\n");
}

/** The messages of a path as Markdown, with who said each. */
export function asMarkdown(title, path) {
  const said = path.map((message) => {
    const who = message.role === "user" ? "You" : message.model || "Answer";
    return `**${who}**\n\n${messageAsMarkdown(message)}`;
  });
  return `${[`# ${title}`, ...said].join("\n\n")}\n`;
}
