// Conversations as a JSON file: written for export, and read back strictly.
//
//   {"format": "argosy-conversations", "version": 1, "conversations": [{title, created, changed, settings, leaf,
//     messages: [{parent, role, created, text, attachments, ...}]}]}
//
// `parent` and `leaf` are places in `messages`, and a parent comes before its children, so no file can describe a circle.
// Ids are given at import: an imported conversation is always a copy beside the others. A file is someone else's data:
// every field is checked for its type and size, unknown fields are refused, and the types of media come from a table.
// Text stays text. Nothing is imported unless all of it is valid.

import { FORMATS, mediaType, MOST_KEPT_BYTES } from "./attachments.js";
import { EFFORTS, POLICIES } from "./settings.js";
import { LONGEST_NAME, MOST_TEXT_BYTES } from "./text_files.js";
import { LONGEST_NOTE, LONGEST_TITLE, newId } from "./tree.js";
import { count, volume } from "./units.js";

const FORMAT = "argosy-conversations";
const VERSION = 1;
export const MOST_FILE_BYTES = 128 * 2 ** 20;
const MOST_CONVERSATIONS = 10_000;
const MOST_MESSAGES = 10_000;
const MOST_ATTACHMENTS = 1000;
const LONGEST_TEXT = 4 * 2 ** 20;  // as in a request
const LATEST = 8.64e15;  // the last moment of a Date

// Export

/** A file of these conversations, each as `Store.load` gives it. */
export async function exported(loaded) {
  const pieces = [`{"format": ${JSON.stringify(FORMAT)}, "version": ${VERSION}, "conversations": [`];
  let size = 0;
  for (const one of loaded) {
    const piece = JSON.stringify(await plain(one));
    pieces.push(pieces.length > 1 ? ",\n" : "\n", piece);
    size += new Blob([piece]).size;
    if (size > MOST_FILE_BYTES) {
      throw new Error(`The file would have more than ${volume(MOST_FILE_BYTES)} and could not be imported again. `
        + "Export the conversations one by one.");
    }
  }
  return new Blob([...pieces, "\n]}\n"], { type: "application/json" });
}

async function plain({ conversation, messages, media }) {
  const { title, isNamed, isPinned = false, created, changed, settings, leaf } = conversation;
  const ordered = parentsFirst(messages);
  const places = new Map(ordered.map(({ id }, place) => [id, place]));
  const bytes = new Map();
  for (const { id, blob } of media) bytes.set(id, await base64Of(blob));
  return {
    title, isNamed, isPinned, created, changed, settings,
    leaf: places.get(leaf) ?? null,
    messages: ordered.map(({ id, conversation: own, revision, parent, attachments, ...message }) => ({
      ...message,
      parent: places.get(parent) ?? null,
      attachments: attachments.map(({ id: file, ...about }) => (
        about.kind === "text" ? about : { ...about, data: bytes.get(file) ?? null })),
    })),
  };
}

function parentsFirst(messages) {
  const after = new Map();
  for (const message of [...messages].sort((a, b) => a.created - b.created)) {
    if (after.has(message.parent)) after.get(message.parent).push(message);
    else after.set(message.parent, [message]);
  }
  const ordered = [...(after.get(null) ?? [])];
  for (const { id } of ordered) ordered.push(...(after.get(id) ?? []));  // the loop goes on over what it adds
  return ordered;
}

async function base64Of(blob) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("A file of a conversation could not be read."));
    reader.readAsDataURL(blob);
  });
  return url.slice(url.indexOf(",") + 1);
}

// Import

/** The conversations in a file, each as `Store.load` gives it, with new ids. The error says where the file is wrong. */
export async function imported(file) {
  if (file.size > MOST_FILE_BYTES) {
    throw new Error(`A file may have at most ${volume(MOST_FILE_BYTES)}, and this one has ${volume(file.size)}.`);
  }
  let facts;
  try {
    facts = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer()));
  } catch {
    throw new Error("This file is not JSON. Choose a file that this page exported.");
  }
  if (facts?.format !== FORMAT) throw new Error("This file has no conversations of this page. Choose a file that it exported.");
  return FILE(facts, "file").conversations.map(loadedFrom);
}

function loadedFrom(facts) {
  const id = newId();
  const { messages: said, leaf, ...about } = facts;
  const ids = said.map(newId);
  const media = [];
  const messages = said.map(({ attachments, parent, ...message }, place) => ({
    ...message,
    id: ids[place],
    parent: parent === null ? null : ids[parent],
    attachments: attachments.map(({ data, ...one }) => {
      if (one.kind === "text") return one;
      const own = newId();
      if (data !== null) media.push({ id: own, blob: blobOf(data, mediaType(one.kind, one.format)) });
      return { ...one, id: own };
    }),
  }));
  return { conversation: { ...about, id, leaf: leaf === null ? null : ids[leaf] }, messages, media };
}

function blobOf(data, type) {
  const letters = atob(data);
  const bytes = new Uint8Array(letters.length);
  for (let at = 0; at < letters.length; at += 1) bytes[at] = letters.charCodeAt(at);
  return new Blob([bytes], { type });
}

// The shape of a file. A check gives the value, or throws with its place.

function refuse(where, needed, value) {
  const isShort = value === null || ["number", "boolean"].includes(typeof value);
  const kind = Array.isArray(value) ? "a list" : typeof value === "object" ? "an object" : `a ${typeof value}`;
  const found = typeof value === "string" ? `text of ${count(value.length)} characters` : isShort ? String(value) : kind;
  throw new Error(`${where}: needed ${needed}, found ${value === undefined ? "nothing" : found}`);
}

const text = (most) => (value, where) => {
  const isText = typeof value === "string" && value.length <= most && (value.isWellFormed?.() ?? true);
  return isText ? value : refuse(where, `text of at most ${count(most)} characters`, value);
};
const number = (low, high) => (value, where) => (
  Number.isFinite(value) && value >= low && value <= high ? value : refuse(where, `a number from ${low} to ${high}`, value));
const whole = (low, high) => (value, where) => (
  Number.isInteger(value) && value >= low && value <= high ? value : refuse(where, `a whole number from ${low} to ${high}`, value));
const truth = (value, where) => (typeof value === "boolean" ? value : refuse(where, "true or false", value));
const oneOf = (...known) => (value, where) => (known.includes(value) ? value : refuse(where, known.join(" or "), value));
const orNull = (check) => (value, where) => (value === null ? null : check(value, where));
const list = (check, most) => (value, where) => {
  if (!Array.isArray(value) || value.length > most) refuse(where, `a list of at most ${count(most)}`, value);
  return value.map((one, place) => check(one, `${where}[${place}]`));
};

/** An object with exactly these fields; those in `optional` may be absent. */
const record = (fields, optional = {}) => (value, where) => {
  if (typeof value !== "object" || value === null || Array.isArray(value)) refuse(where, "an object", value);
  for (const name of Object.keys(value)) {
    if (!Object.hasOwn(fields, name) && !Object.hasOwn(optional, name)) throw new Error(`${where}: unknown field "${name.slice(0, 40)}"`);
  }
  const made = {};
  for (const [name, check] of Object.entries(fields)) {
    made[name] = check(Object.hasOwn(value, name) ? value[name] : undefined, `${where}.${name}`);
  }
  for (const [name, check] of Object.entries(optional)) {
    if (Object.hasOwn(value, name)) made[name] = check(value[name], `${where}.${name}`);
  }
  return made;
};

const base64 = (value, where) => {
  const isBase64 = typeof value === "string" && value.length % 4 === 0 && !/[^A-Za-z0-9+/]/.test(value.replace(/={1,2}$/, ""));
  return isBase64 ? value : refuse(where, "base64", value);
};

const MOMENT = whole(0, LATEST);
const SETTINGS = record({
  model: orNull(text(256)),
  system: text(LONGEST_TEXT),
  temperature: orNull(number(0, 2)),
  topP: orNull(number(0, 1)),
  maxTokens: orNull(whole(1, 2 ** 31)),
  seed: orNull(whole(0, Number.MAX_SAFE_INTEGER)),
  thinking: orNull(truth),
}, { topK: orNull(whole(0, 2 ** 31 - 1)), minP: orNull(number(0, 1)), policy: orNull(oneOf(...POLICIES)), effort: orNull(oneOf(...EFFORTS)) });
const NAME = text(LONGEST_NAME);
const TEXT_FILE = record({ kind: oneOf("text"), name: NAME, text: text(MOST_TEXT_BYTES) });
const mediaFile = (kind) => record({ kind: oneOf(kind), name: NAME, format: oneOf(...FORMATS[kind]), data: orNull(base64) });
const FILES = { text: TEXT_FILE, ...Object.fromEntries(Object.keys(FORMATS).map((kind) => [kind, mediaFile(kind)])) };

const attachment = (value, where) => {
  const check = Object.hasOwn(FILES, value?.kind) ? FILES[value.kind] : refuse(`${where}.kind`, Object.keys(FILES).join(" or "), value?.kind);
  return check(value, where);
};
const SAID = {
  role: oneOf("user", "assistant"), parent: orNull(whole(0, MOST_MESSAGES)), created: MOMENT, text: text(LONGEST_TEXT),
};
const QUESTION = record({ ...SAID, attachments: list(attachment, MOST_ATTACHMENTS) });
const ANSWER = record(
  { ...SAID, attachments: list(attachment, 0), state: oneOf("running", "done", "stopped", "failed") },
  {
    reasoning: text(LONGEST_TEXT), note: text(LONGEST_NOTE), model: orNull(text(256)), tokens: orNull(whole(0, 2 ** 31)),
    ledger: text(500), dropped: whole(0, MOST_MESSAGES), summary: text(LONGEST_TEXT),
  });
const message = (value, where) => (value?.role === "assistant" ? ANSWER : QUESTION)(value, where);

const CONVERSATION = record({
  title: text(LONGEST_TITLE), isNamed: truth, created: MOMENT, changed: MOMENT, settings: SETTINGS,
  leaf: orNull(whole(0, MOST_MESSAGES)), messages: list(message, MOST_MESSAGES),
}, { isPinned: truth });

const FILE = record({
  format: oneOf(FORMAT),
  version: oneOf(VERSION),
  conversations: list((value, where) => connected(CONVERSATION(value, where), where), MOST_CONVERSATIONS),
});

/** Check what fields alone cannot show: the shape of the tree, and the size of all media. */
function connected(facts, where) {
  const depths = [];  // how many messages are before each one on its path
  facts.messages.forEach(({ parent, role, dropped = 0 }, place) => {
    const at = `${where}.messages[${place}]`;
    if (parent !== null && parent >= place) refuse(`${at}.parent`, "a message before this one", parent);
    const before = parent === null ? null : facts.messages[parent].role;
    if (role === "assistant" && before !== "user") refuse(`${at}.parent`, "a question", parent);
    if (role === "user" && before === "user") refuse(`${at}.parent`, "an answer or null", parent);
    depths.push(parent === null ? 0 : depths[parent] + 1);
    if (dropped > 0 && dropped >= depths[place]) refuse(`${at}.dropped`, "fewer than the messages before this one", dropped);
  });
  if (facts.leaf !== null && facts.leaf >= facts.messages.length) refuse(`${where}.leaf`, "a message of this conversation", facts.leaf);
  const files = facts.messages.flatMap(({ attachments }) => attachments);
  const bytes = files.reduce((sum, { data }) => sum + (data?.length ?? 0) * 0.75, 0);
  if (bytes > MOST_KEPT_BYTES) throw new Error(`${where}: its media have ${volume(bytes)}, and ${volume(MOST_KEPT_BYTES)} can be kept`);
  return facts;
}
