// The list of conversations, and the shown one's life in the browser's storage: kept, opened, searched, deleted,
// exported and imported.
//
//   conversation.js  ->  keep  ->  store.js  ->  the list here, and in other tabs
//
// If keeping is off, or the browser has no storage, the shown conversation exists only in this tab's memory. The tab
// remembers which conversation it showed in its entry of the browser's history, never in the address.

import { Media, MOST_KEPT_BYTES, TextFile } from "./attachments.js";
import { DEFAULTS } from "./settings.js";
import { Gone, recordOf, Store } from "./store.js";
import { exported, imported } from "./transfer.js";
import { LONGEST_TITLE, newId, titleOf, Tree } from "./tree.js";
import { button, element, volume } from "./units.js";

const SEARCH_MS = 150;
const UNFINISHED = "This answer was cut off, or another tab is still writing it.";

const byId = (id) => document.getElementById(id);

export class Chats {
  /**
   * `parts`: the `conversation`; `notify(kind, text, action, act)`, `ask(question, action)` which gives whether the user
   * agrees; `onOpen()` is called when another conversation is shown, `onChoose()` when the user has chosen one.
   */
  constructor(parts) {
    Object.assign(this, parts);
    this.store = null;
    this.isKeeping = false;
    this.found = null;  // what the search found, or null without a search
    this.all = [];
    this.numOpened = 0;
    this.numRefreshed = 0;
    this.isStale = false;
    this.before = history.state?.conversation;  // what this tab showed before it was loaded again
    this.listen();
  }

  /** Open the storage, and what this tab showed before. */
  async start() {
    this.store = await Store.open();
    if (this.store) {
      this.store.watch((id) => this.hear(id));
      this.isKeeping = await this.store.isKeeping();
    }
    await this.refresh();
    if (this.all.some(({ id }) => id === this.before) && this.conversation.isEmpty) await this.open(this.before);
  }

  get record() {
    return this.conversation.record;
  }

  // The shown conversation

  startNew(settings) {
    const now = Date.now();
    this.numOpened += 1;
    const record = { id: newId(), title: "", isNamed: false, created: now, changed: now, settings, isKept: false, media: new Map() };
    this.conversation.show(record, new Tree());
    this.remember();
    this.onOpen();
  }

  async open(id) {
    this.numOpened += 1;
    const turn = this.numOpened;
    const loaded = await this.store.load(id);
    if (!loaded) return this.refresh();
    const tree = await treeOf(loaded);
    if (turn !== this.numOpened) return;  // another one was opened meanwhile
    const { leaf, ...about } = loaded.conversation;
    const media = new Map(loaded.media.map((one) => [one.id, one.blob.size]));
    this.conversation.show({ ...about, settings: { ...DEFAULTS, ...about.settings }, isKept: true, media }, tree);
    this.remember();
    this.onOpen();
    this.show();
  }

  remember() {
    const { id, isKept } = this.record;
    history.replaceState(isKept ? { conversation: id } : null, "");
  }

  /** Keep messages of a conversation, and which of its branches is shown. */
  async keep(record, tree, messages) {
    if (messages.length) record.changed = Date.now();
    if (!record.title && tree.path().length) record.title = titleOf(tree.path()[0]);
    if (!this.store || !this.isKeeping || record.isDeleted) return;
    const isNew = !record.isKept;
    const written = isNew ? [...tree.messages.values()] : messages;
    const { id, title, isNamed, created, changed, settings } = record;
    const { leaf } = tree;
    const changes = isNew ? { title, isNamed, created, changed, settings, leaf } : { changed, leaf };
    record.isKept = true;
    await this.write(record, { changes, messages: written, media: this.newMedia(record, written), isNew });
    if (record === this.record) this.remember();
  }

  async write(record, what) {
    try {
      const isMoved = await this.store.keep(record.id, what);
      if (isMoved && record === this.record) this.isStale = true;
    } catch (error) {
      if (error instanceof Gone) this.lose(record);
      else this.tellFull(record, what);
    }
    await this.refresh();
    this.catchUp();
  }

  /** Media that are not kept yet, as far as the conversation's bound allows. */
  newMedia(record, messages) {
    const media = [];
    for (const { id, name, blob } of messages.flatMap(({ attachments }) => attachments)) {
      if (!blob || record.media.has(id)) continue;
      const bytes = [...record.media.values()].reduce((sum, size) => sum + size, blob.size);
      record.media.set(id, bytes > MOST_KEPT_BYTES ? 0 : blob.size);
      if (bytes <= MOST_KEPT_BYTES) media.push({ id, blob });
      else this.notify("warning", `${name} will not be kept: the files of a conversation may have ${volume(MOST_KEPT_BYTES)} together.`);
    }
    return media;
  }

  tellFull(record, { isNew, media }) {
    if (isNew) record.isKept = false;
    for (const { id } of media ?? []) record.media.delete(id);
    this.notify("warning", "The browser has no room for this conversation: it ends with this tab. Delete or export others.");
  }

  /** Another tab has deleted this conversation. */
  lose(record) {
    record.isDeleted = true;
    if (record !== this.record) return;
    this.startNew(record.settings);
    this.notify("news", "This conversation was deleted in another tab.");
  }

  rename(title) {
    const { record } = this;
    const named = title.trim().slice(0, LONGEST_TITLE);
    if (named === record.title || !named) return;
    Object.assign(record, { title: named, isNamed: true });
    if (this.store && record.isKept && this.isKeeping) this.write(record, { changes: { title: named, isNamed: true } });
  }

  changeSettings(settings) {
    this.record.settings = settings;
    if (this.store && this.record.isKept && this.isKeeping) this.write(this.record, { changes: { settings } });
  }

  // Other tabs

  async hear(id) {
    this.isKeeping = await this.store.isKeeping();
    if (id === null || id === this.record.id) this.isStale = this.record.isKept;
    await this.refresh();
    this.catchUp();
  }

  /** Show what another tab has changed in the shown conversation, once nothing is being written here. */
  async catchUp() {
    if (!this.isStale || !this.conversation.isAtRest) return;
    this.isStale = false;
    const { record } = this;
    const loaded = await this.store.load(record.id);
    if (!loaded) return this.lose(record);
    const { tree: old } = this.conversation;
    const tree = await treeOf(loaded, old.messages);
    if (record !== this.record) return;
    if (!this.conversation.isAtRest) {
      this.isStale = true;
      return;
    }
    const { title, isNamed, settings } = loaded.conversation;
    Object.assign(record, { title, isNamed, settings: { ...DEFAULTS, ...settings } });
    tree.chosen = old.chosen;
    const last = old.get(old.leaf);  // its id is another one if it became a version of its own
    if (tree.get(last?.id)) tree.select(tree.get(last.id));
    this.conversation.update(tree);
    this.onOpen();
  }

  // The list

  async refresh() {
    this.numRefreshed += 1;
    const turn = this.numRefreshed;
    const words = byId("search").value.trim();
    const all = this.store ? await this.store.list() : [];
    const found = words && this.store ? await this.store.search(words) : null;
    if (turn !== this.numRefreshed) return;  // a later one knows more
    Object.assign(this, { all, found });
    this.show();
  }

  show() {
    const { all, found } = this;
    const shown = found ? all.filter(({ id }) => found.has(id)) : all;
    const focused = document.activeElement.closest?.("#chat-list button");
    const place = focused && [focused.closest("li").dataset.id, focused.className];
    byId("chat-list").replaceChildren(...shown.map((one) => this.itemOf(one)));
    if (place) byId("chat-list").querySelector(`[data-id="${place[0]}"] .${place[1].split(" ")[0]}`)?.focus();
    byId("chats-status").textContent = this.summary(shown.length);
    byId("search").hidden = !all.length && !byId("search").value;
    byId("keeping").checked = this.isKeeping;
    byId("keeping").disabled = !this.store;
    byId("export-all").hidden = byId("delete-all").hidden = !all.length;
    byId("import-chats").disabled = !this.isKeeping;
    byId("welcome-keeping").textContent = this.isKeeping
      ? "Chats stay in this browser, and never on the server."
      : "The conversation and its files stay in this tab and are gone when you close it.";
  }

  summary(numShown) {
    if (this.found) return numShown ? "" : "No conversation has these words.";
    if (!this.store) return "This browser keeps nothing for this page: a conversation ends with its tab.";
    if (!this.isKeeping) return this.all.length ? "New messages are not kept." : "A conversation ends with its tab.";
    return this.all.length ? "" : "Your conversations will be listed here.";
  }

  itemOf({ id, title: given, changed, isPinned = false }) {
    const title = given || "Untitled";
    const about = this.found?.get(id) || momentOf(changed);
    const open = button(title, () => this.choose(id), { class: "chat", "aria-current": id === this.record.id && "true" });
    open.append(element("small", {}, about));
    const pin = button(isPinned ? "\u2605" : "\u2606", () => this.pin(id, !isPinned), {
      class: "pin quiet", "aria-label": `Keep \u201c${title}\u201d on top`, "aria-pressed": String(isPinned), title: isPinned ? "Unpin" : "Pin",
    });
    return element("li", { "data-id": id }, open, pin,
      button("\u2715", () => this.remove(id), { class: "remove quiet", "aria-label": `Delete \u201c${title}\u201d`, title: "Delete" }));
  }

  async pin(id, isPinned) {
    if (id === this.record.id) this.record.isPinned = isPinned;
    await this.store.keep(id, { changes: { isPinned } }).catch(() => {});  // deleted in another tab
    await this.refresh();
  }

  choose(id) {
    this.onChoose();
    return this.open(id);
  }

  async remove(id) {
    const loaded = await this.store.load(id);
    if (!loaded) return this.refresh();
    const isShown = id === this.record.id;
    const items = [...byId("chat-list").children].map((item) => item.dataset.id);
    const next = items[items.indexOf(id) + 1] ?? items[items.indexOf(id) - 1];
    if (isShown) {
      this.record.isDeleted = true;
      this.startNew(this.record.settings);
    }
    await this.store.remove(id);
    await this.refresh();
    (byId("chat-list").querySelector(`[data-id="${next}"] .chat`) ?? byId("prompt")).focus();
    this.notify("news", `\u201c${loaded.conversation.title}\u201d was deleted.`, "Undo", async () => {
      await this.store.keep(id, { changes: loaded.conversation, messages: loaded.messages, media: loaded.media, isNew: true });
      await this.refresh();
      if (isShown) await this.open(id);
    });
  }

  async removeAll() {
    const number = this.all.length;
    const isSure = await this.ask(`Delete ${number === 1 ? "the conversation" : `all ${number} conversations`}? This cannot be undone.`, "Delete all");
    if (!isSure) return;
    if (this.record.isKept) {
      this.record.isDeleted = true;
      this.startNew(this.record.settings);
    }
    await this.store.removeAll();
    await this.refresh();
    byId("prompt").focus();
  }

  async setKeeping(value) {
    this.isKeeping = value;
    await this.store.setKeeping(value);
    const { record, conversation } = this;
    if (value && !conversation.isEmpty && !conversation.isBusy) await this.keep(record, conversation.tree, [...conversation.tree.messages.values()]);
    await this.refresh();
    if (!value && this.all.length) {
      this.notify("news", "New messages are not kept. Earlier ones are still here.", "Delete them", () => this.removeAll());
    }
  }

  // Files

  /** Save the shown conversation as a file. */
  exportShown() {
    const { title, isNamed, isPinned, created, changed, settings } = this.record;
    const { tree } = this.conversation;
    const messages = [...tree.messages.values()];
    const media = new Map(messages.flatMap(({ attachments }) => attachments).filter(({ blob }) => blob).map((one) => [one.id, one]));
    return this.export([{
      conversation: { title, isNamed, isPinned, created, changed, settings, leaf: tree.leaf },
      messages: messages.map((message) => ({ ...recordOf(message), id: message.id })),
      media: [...media.values()],
    }], "conversation");
  }

  async exportAll() {
    const loaded = [];
    for (const { id } of this.all) loaded.push(await this.store.load(id));
    return this.export(loaded.filter(Boolean), "conversations");
  }

  async export(loaded, name) {
    try {
      const day = new Date().toISOString().slice(0, 10);
      save(await exported(loaded), `argosy-${name}-${day}.json`);
    } catch (error) {
      this.notify("warning", error.message);
    }
  }

  async import(file) {
    let loaded;
    try {
      loaded = await imported(file);
      for (const { conversation, messages, media } of loaded) {
        await this.store.keep(conversation.id, { changes: conversation, messages, media, isNew: true });
      }
    } catch (error) {
      await this.refresh();
      const isFull = error.name === "QuotaExceededError";
      return this.notify("warning", isFull ? "The browser has no room for all of this file." : `Nothing was imported.\n${error.message}`);
    }
    await this.refresh();
    this.notify("news", loaded.length === 1 ? "One conversation was imported." : `${loaded.length} conversations were imported.`);
    if (loaded.length === 1) await this.open(loaded[0].conversation.id);
  }

  listen() {
    let timer = null;
    byId("chat-list").addEventListener("dblclick", async ({ clientX, clientY }) => {
      // The first click has drawn the list anew, so the event is not that of an item.
      const item = document.elementFromPoint(clientX, clientY)?.closest("#chat-list .chat")?.parentElement;
      if (!item) return;
      await this.choose(item.dataset.id);
      byId("title").select();
    });
    byId("search").addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(() => this.refresh(), SEARCH_MS);
    });
    byId("keeping").addEventListener("change", () => this.setKeeping(byId("keeping").checked));
    byId("export-all").addEventListener("click", () => this.exportAll());
    byId("delete-all").addEventListener("click", () => this.removeAll());
    byId("import-chats").addEventListener("click", () => byId("import-file").click());
    byId("import-file").addEventListener("change", async () => {
      const [file] = byId("import-file").files;
      byId("import-file").value = "";  // so that the same file can be chosen again
      if (file) await this.import(file);
    });
  }
}

/** The tree of a kept conversation. Messages in `known` stay the same objects unless another tab has changed them. */
async function treeOf({ conversation, messages, media }, known = new Map()) {
  const blobs = new Map(media.map(({ id, blob }) => [id, blob]));
  const made = await Promise.all(messages.map(async (message) => {
    const old = known.get(message.id);
    if (old?.id === message.id && old.revision === message.revision) return old;
    const attachments = await Promise.all(message.attachments.map((one) => (
      one.kind === "text" ? new TextFile(one) : Media.kept(one, blobs.get(one.id) ?? null))));
    if (message.role === "user") return { ...message, attachments };
    const isCut = message.state === "running";
    const answer = { reasoning: "", note: "", ledger: "", model: null, tokens: null, ...message, attachments };
    return isCut ? { ...answer, state: "stopped", note: UNFINISHED } : answer;
  }));
  return new Tree(made, conversation.leaf);
}

function momentOf(time) {
  const date = new Date(time);
  const isToday = date.toDateString() === new Date().toDateString();
  const form = isToday ? { hour: "numeric", minute: "2-digit" } : { day: "numeric", month: "short", year: "numeric" };
  return date.toLocaleString("en", form);
}

function save(blob, name) {
  const url = URL.createObjectURL(blob);
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
