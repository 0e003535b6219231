// Conversations kept in this browser: one IndexedDB database of this page's address. Nothing of it goes to the server.
//
//   conversations  id, title, isNamed, created, changed, leaf, settings
//   messages       [conversation, id]: what tree.js describes, and a revision
//   media          [conversation, id]: the bytes of an attached file
//   page           whether conversations are kept
//
// Several tabs may write. Messages are records of their own, so two tabs that add to a conversation both succeed. If a
// message itself was changed by another tab, the second version is kept beside it, as a branch. A conversation that was
// deleted in another tab stays deleted. Other tabs are told of every change.

import { newId } from "./tree.js";

const NAME = "argosy";
const VERSION = 1;
const SNIPPET_BEFORE = 24;
const SNIPPET_CHARACTERS = 90;

/** The conversation was deleted in another tab. */
export class Gone extends Error {}

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

const finished = (transaction) => new Promise((resolve, reject) => {
  transaction.oncomplete = resolve;
  transaction.onabort = () => reject(transaction.error ?? new Error("The browser's storage did not take the change."));
});

const within = (id) => IDBKeyRange.bound([id], [id, []]);

const FIELDS = ["parent", "role", "created", "text", "reasoning", "state", "note", "model", "tokens", "ledger", "dropped", "summary"];

/** What is stored of a message: its own fields, and its attachments without their bytes. */
export function recordOf(message) {
  const own = FIELDS.filter((name) => message[name] !== undefined).map((name) => [name, message[name]]);
  return { ...Object.fromEntries(own), attachments: message.attachments.map((one) => one.record ?? one) };
}

export class Store {
  /** Open the database; null if this browser has none for this page. */
  static async open() {
    try {
      const request = indexedDB.open(NAME, VERSION);
      request.onupgradeneeded = () => {
        const base = request.result;
        base.createObjectStore("conversations", { keyPath: "id" });
        base.createObjectStore("messages", { keyPath: ["conversation", "id"] });
        base.createObjectStore("media", { keyPath: ["conversation", "id"] });
        base.createObjectStore("page", { keyPath: "id" });
      };
      const base = await done(request);
      base.onversionchange = () => base.close();  // a newer page in another tab may change the database
      return new Store(base);
    } catch {
      return null;
    }
  }

  constructor(base) {
    this.base = base;
    this.channel = new BroadcastChannel(NAME);
    this.last = Promise.resolve();
  }

  /** Call `onChange(id)` when another tab has changed a conversation, with null when it has changed any number. */
  watch(onChange) {
    this.channel.onmessage = ({ data }) => onChange(data.id);
  }

  async isKeeping() {
    return (await done(this.reading("page").objectStore("page").get("keeping")))?.value !== false;
  }

  setKeeping(value) {
    return this.change(["page"], null, (transaction) => {
      transaction.objectStore("page").put({ id: "keeping", value });
    });
  }

  /** All conversations, pinned ones and then the last changed first. */
  async list() {
    await this.last;
    const all = await done(this.reading("conversations").objectStore("conversations").getAll());
    return all.sort((a, b) => Boolean(b.isPinned) - Boolean(a.isPinned) || b.changed - a.changed);
  }

  /** A conversation with its messages and media, or null. */
  async load(id) {
    await this.last;
    const transaction = this.reading("conversations", "messages", "media");
    const [conversation, messages, media] = await Promise.all([
      done(transaction.objectStore("conversations").get(id)),
      done(transaction.objectStore("messages").getAll(within(id))),
      done(transaction.objectStore("media").getAll(within(id))),
    ]);
    return conversation ? { conversation, messages, media } : null;
  }

  /**
   * Write changed fields of a conversation, messages and media, all or nothing. A message gets its new revision, and a
   * new id if another tab had changed it. Returns whether one did. Throws Gone unless the conversation exists or `isNew`.
   */
  keep(id, { changes = {}, messages = [], media = [], isNew = false }) {
    return this.change(["conversations", "messages", "media"], id, async (transaction) => {
      const conversations = transaction.objectStore("conversations");
      const stored = await done(conversations.get(id));
      if (!stored && !isNew) throw new Gone("This conversation was deleted in another tab.");
      conversations.put({ ...stored, ...changes, id });
      const store = transaction.objectStore("messages");
      const written = [];
      for (const message of messages) {
        const old = await done(store.get([id, message.id]));
        const isConflict = old !== undefined && old.revision !== message.revision;
        const next = { id: isConflict ? newId() : message.id, revision: isConflict ? 1 : (message.revision ?? 0) + 1 };
        store.put({ ...recordOf(message), ...next, conversation: id });
        written.push([message, next, isConflict]);
      }
      for (const one of media) transaction.objectStore("media").put({ ...one, conversation: id });
      return () => {
        for (const [message, next] of written) Object.assign(message, next);
        return written.some(([, , isConflict]) => isConflict);
      };
    });
  }

  remove(id) {
    return this.change(["conversations", "messages", "media"], id, (transaction) => {
      transaction.objectStore("conversations").delete(id);
      for (const name of ["messages", "media"]) transaction.objectStore(name).delete(within(id));
    });
  }

  removeAll() {
    return this.change(["conversations", "messages", "media"], null, (transaction) => {
      for (const name of transaction.objectStoreNames) transaction.objectStore(name).clear();
    });
  }

  /** The conversations whose title or messages contain `words`: a Map of ids to the place, or to "" for a title. */
  async search(words) {
    const wanted = words.toLowerCase();
    const found = new Map();
    const transaction = this.reading("conversations", "messages");
    for (const { id, title } of await done(transaction.objectStore("conversations").getAll())) {
      if (title.toLowerCase().includes(wanted)) found.set(id, "");
    }
    await new Promise((resolve, reject) => {
      const request = transaction.objectStore("messages").openCursor();
      request.onerror = () => reject(request.error);
      request.onsuccess = () => {
        const cursor = request.result;
        if (!cursor) return resolve();
        const { conversation, text } = cursor.value;
        const at = found.get(conversation) ? -1 : text.toLowerCase().indexOf(wanted);
        if (at >= 0) found.set(conversation, snippet(text, at));
        cursor.continue();
      };
    });
    return found;
  }

  reading(...names) {
    return this.base.transaction(names, "readonly");
  }

  /**
   * One change after the other, so that a message is never written twice with one revision. `act` may return a function
   * to call when all is written.
   */
  change(names, id, act) {
    const run = async () => {
      const transaction = this.base.transaction(names, "readwrite");
      const ended = finished(transaction);
      ended.catch(() => {});  // an error of `act` is told instead
      let conclude;
      try {
        conclude = await act(transaction);
      } catch (error) {
        if (error instanceof Gone) transaction.abort();
        throw error;
      }
      await ended;
      this.channel.postMessage({ id });
      return conclude?.();
    };
    const changed = this.last.then(run);
    this.last = changed.catch(() => {});
    return changed;
  }
}

function snippet(text, at) {
  const from = Math.max(0, at - SNIPPET_BEFORE);
  const piece = text.slice(from, from + SNIPPET_CHARACTERS).replace(/\s+/g, " ").trim();
  return `${from > 0 ? "\u2026" : ""}${piece}${from + SNIPPET_CHARACTERS < text.length ? "\u2026" : ""}`;
}
