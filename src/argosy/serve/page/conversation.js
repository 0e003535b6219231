// The shown conversation: its messages, the answer as it arrives, and the actions on them.
//
//   send, edit, regenerate, continue  ->  tree  ->  path  ->  server.complete  ->  nodes
//
// The messages are a tree (`tree.js`); keeping them is `chats.js`. Arriving text is drawn at most once per frame, however
// many chunks arrived. Reasoning and failed answers are not sent back to the model. Two user messages in a row, which
// some chat templates refuse, are sent as one.

import { previewOf } from "./attachments.js";
import { MarkdownView } from "./markdown.js";
import { cutFor, cutsOf, roomOf, summaryQuestion, summaryTokens } from "./room.js";
import { complete, errorOf } from "./server.js";
import { POLICIES, sampling } from "./settings.js";
import { quoted } from "./text_files.js";
import { LONGEST_NOTE, messageAsMarkdown, newId, titleOf, Tree } from "./tree.js";
import { button, copyButton, count, element, isNumber, rate, roughly, seconds, volume } from "./units.js";

const TOO_LONG = "The answer reached its maximum length.";
const FULL = "The context is full";  // so begins the note of an answer that needs room
const THOUGHT_OUT = "All tokens that the answer may have went into thoughts. Allow more in Settings, or turn thinking off.";
const MAKE_ROOM = { trim: "Drop the oldest turns", summarise: "Summarise the oldest turns" };
const ENDINGS = { length: TOO_LONG, content_filter: "The server's policy blocked the answer." };
const KEEP_MS = 2000;  // how often a growing answer is kept
const LONGEST_WAIT_S = 60;  // for a busy server; a quota may ask for hours

export class Conversation {
  /**
   * `parts`: the elements `log`, `scroll`, `status`; `settings()` and `model()` give what the next request uses, and
   * `contextTokens()` what it may hold, or null;
   * `onKeep(record, tree, messages)` is called with messages to keep, `onChange()` whenever other messages are shown,
   * `onBusy(isBusy)`, `onLedger(timings, usage)`, `onIgnored(names)`, `onNews(text)` and `onRefused(error)` for other parts of the page.
   */
  constructor(parts) {
    Object.assign(this, parts);
    this.controller = null;
    this.record = null;
    this.tree = new Tree();
    this.views = new Map();
    this.editing = null;
    // What grows below the conversation, as attachments do, hides nothing of its end.
    this.isFollowing = true;
    this.scroll.addEventListener("scroll", () => { this.isFollowing = this.isAtEnd(); });
    new ResizeObserver(() => { if (this.isFollowing) this.follow(); }).observe(this.scroll);
  }

  get isBusy() {
    return this.controller !== null;
  }

  get isEmpty() {
    return this.tree.leaf === null;
  }

  get path() {
    return this.tree.path();
  }

  /** Whether other messages may be put in place of the shown ones without a loss. */
  get isAtRest() {
    return !this.isBusy && this.editing === null;
  }

  /** Characters of all files, which every request carries again. */
  get numAttached() {
    return this.path.flatMap(({ attachments }) => attachments).reduce((sum, { size }) => sum + size, 0);
  }

  /** Tokens of the shown messages after the last answer; null if no answer has told them. */
  get tokens() {
    return this.path.findLast(({ tokens }) => isNumber(tokens))?.tokens ?? null;
  }

  /** Show another conversation. A running answer stops, and what has arrived of it is kept. */
  show(record, tree) {
    this.stop();
    if (this.isBusy) {
      this.controller = null;
      this.log.removeAttribute("aria-busy");
      this.onBusy(false);
    }
    Object.assign(this, { record, tree, editing: null, views: new Map() });
    this.render();
    this.follow();
  }

  /** Show the same conversation with messages that another tab has added. */
  update(tree) {
    this.tree = tree;
    this.keepEnd(() => this.render());
  }

  send(text, attachments = []) {
    if (this.isBusy || !(text.trim() || attachments.length)) return;
    this.ask(this.tree.leaf, text, attachments);
  }

  ask(parent, text, attachments) {
    const question = { id: newId(), parent, role: "user", created: Date.now(), text, attachments };
    this.tree.add(question);
    this.onKeep(this.record, this.tree, [question]);
    this.begin(question.id);
  }

  /** Answer a question once more, beside the answers it has; `room` is what the model does not read. */
  begin(parent, room = {}) {
    const answer = {
      id: newId(), parent, role: "assistant", created: Date.now(), text: "", attachments: [], reasoning: "",
      state: "running", note: "", model: this.model(), tokens: null, ledger: "", ...room,
    };
    this.tree.add(answer);
    this.answer(answer);
  }

  stop() {
    this.controller?.abort();
  }

  /** A failed answer is tried again in its place; any other keeps its branch. */
  regenerate(message) {
    if (this.isBusy) return;
    if (message.state !== "failed") this.begin(message.parent, { dropped: message.dropped, summary: message.summary });
    else this.goOn(message);
  }

  /** Go on with an answer, after making room by `policy` if one is given. One without text begins anew. */
  goOn(message, policy = null) {
    if (this.isBusy) return;
    Object.assign(message, { state: "running", note: "", ledger: "" });
    if (!message.text) {
      Object.assign(message, { reasoning: "", model: this.model(), tokens: null });
      this.views.delete(message.id);
    }
    this.tree.select(message);
    this.answer(message, policy);
  }

  /** Show another version of a message, and keep the keyboard on the arrows. */
  turnTo(version, step) {
    this.tree.select(version);
    this.onKeep(this.record, this.tree, []);
    this.render();
    const { tools } = this.viewOf(version);
    (tools.querySelector(`[data-step="${step}"]:not([disabled])`) ?? tools.querySelector("[data-step]:not([disabled])")).focus();
  }

  edit(message) {
    if (!this.isAtRest) return;
    const view = this.viewOf(message);
    const field = element("textarea", { "aria-label": "Your message", rows: "3" });
    field.value = message.text;
    const close = () => {
      this.editing.remove();
      this.editing = null;
      view.body.hidden = view.tools.hidden = false;
      this.onChange();
    };
    const cancel = () => {
      close();
      [...view.tools.querySelectorAll("button")].find(({ textContent }) => textContent === "Edit")?.focus();
    };
    const save = () => {
      if (!(field.value.trim() || message.attachments.length)) return;
      close();
      this.ask(message.parent, field.value, message.attachments);
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") { event.stopPropagation(); cancel(); }
      if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); save(); }
    });
    this.editing = element("div", { class: "editor" }, field,
      element("div", { class: "buttons" }, button("Cancel", cancel), button("Send again", save, { class: "primary" })));
    view.body.hidden = view.tools.hidden = true;
    view.node.append(this.editing);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  // What is shown

  /** Show the selected path. Nodes of messages that stay keep their place, and so players and selections survive. */
  render() {
    const nodes = this.path.map((message) => this.viewOf(message).node);
    const { children } = this.log;
    let same = 0;
    while (same < nodes.length && children[same] === nodes[same]) same += 1;
    while (children.length > same) this.log.lastElementChild.remove();
    this.log.append(...nodes.slice(same));
    this.offerTools();
    this.onChange();
  }

  viewOf(message) {
    const known = this.views.get(message.id);
    if (known?.message === message) return known;
    const view = message.role === "user" ? new QuestionView(message) : new AnswerView(message);
    this.views.set(message.id, view);
    return view;
  }

  offerTools() {
    const { path } = this;
    let dropped = 0;
    for (const message of path) {
      const tools = message.state === "running" ? [] : this.toolsOf(message, message === path.at(-1));
      const view = this.viewOf(message);
      view.tools.replaceChildren(...tools.filter(Boolean));
      if (message.dropped > dropped) view.showDropped(path.slice(0, message.dropped));
      dropped = message.dropped || dropped;
    }
  }

  toolsOf(message, isLast) {
    const quiet = { class: "quiet" };
    const isQuestion = message.role === "user";
    const markdown = messageAsMarkdown(message);
    const tools = [markdown && copyButton(markdown, isQuestion ? "Copy the message" : "Copy the answer")];
    if (this.isBusy) return tools;
    if (isQuestion && isLast) tools.push(button("Get an answer", () => this.begin(message.id), quiet));
    if (isQuestion) tools.push(button("Edit", () => this.edit(message), quiet));
    else if (message.state === "failed") tools.push(button("Try again", () => this.regenerate(message), quiet));
    else tools.push(button("Regenerate", () => this.regenerate(message), quiet));
    const isFull = !isQuestion && message.note.startsWith(FULL);
    if (isLast && isFull && cutsOf(this.path).length) {
      tools.push(...POLICIES.map((policy) => button(MAKE_ROOM[policy], () => this.goOn(message, policy), quiet)));
    }
    const isUnfinished = !isFull && (message.state === "stopped" || message.note === TOO_LONG);
    if (isLast && isUnfinished && message.text) tools.push(button("Continue", () => this.goOn(message), quiet));
    return [this.arrows(message), ...tools];
  }

  /** Buttons to move between the versions of a message; null if there is only one. */
  arrows(message) {
    const versions = this.tree.versions(message);
    if (versions.length < 2) return null;
    const at = versions.indexOf(message);
    const arrow = (step, sign, name) => button(sign, () => this.turnTo(versions[at + step], step), {
      class: "quiet arrow", "aria-label": name, "data-step": step, disabled: !versions[at + step],
    });
    return element("span", { class: "versions", role: "group", "aria-label": "Versions" },
      arrow(-1, "\u2039", "Previous version"),
      element("span", {}, `${at + 1} of ${versions.length}`),
      arrow(1, "\u203a", "Next version"));
  }

  /** Get the answer from the server: a new one, or the rest of one that has begun. Makes room if the policy is to. */
  async answer(message, policy = null) {
    const { record, tree } = this;
    const isShown = () => this.tree === tree;
    const controller = new AbortController();
    this.controller = controller;
    this.log.setAttribute("aria-busy", "true");  // read aloud once complete, not word by word
    this.render();
    const view = this.viewOf(message);
    this.follow();
    this.onBusy(true);
    const asked = { message, view, record, tree, settings: this.settings(), signal: controller.signal };
    for (let next = policy; ;) {
      const isTooLong = await this.attempt(asked, next);
      if (controller.signal.aborted || !message.note.startsWith(FULL)) break;
      next = cutsOf(tree.path(message.id)).length ? asked.settings.policy : null;
      const hasSpare = isTooLong && message.summary;  // without its summary it may fit
      if (!next && !hasSpare) break;
      if (!next) message.summary = "";
      Object.assign(message, { state: "running", note: "", ...(message.text ? {} : { reasoning: "" }) });
    }
    view.end();
    this.onKeep(record, tree, [message]);
    if (!isShown() || this.controller !== controller) return;
    this.controller = null;
    this.say({ done: "The answer is complete.", stopped: "Stopped.", failed: "The answer failed." }[message.state]);
    this.keepEnd(() => {
      view.draw();
      this.log.removeAttribute("aria-busy");
      this.offerTools();
      this.onChange();
      this.onBusy(false);
    });
  }

  /** Ask once: what comes, and how it ends, is written into the message. Gives whether the server found it too long. */
  async attempt({ message, view, record, tree, settings, signal }, policy) {
    let finish = null;
    let failure = null;
    let keptAt = performance.now();
    view.wait();
    try {
      if (policy) {
        await this.makeRoom({ message, view, tree, settings, signal }, policy);
        this.onKeep(record, tree, [message]);
      }
      this.say("Waiting for the model.");
      const path = tree.path(message.id);
      const body = {
        model: this.model(),
        messages: this.messagesOf(settings, message.text ? path : path.slice(0, -1), roomOf(path)),
        ...sampling(settings),
      };
      for await (const chunk of this.chunks(body, view, signal, (names) => this.onIgnored(names))) {
        if (chunk.error) throw errorOf(chunk);
        if (chunk.prompt_progress) view.showProgress(chunk.prompt_progress, (text) => this.say(text));
        const choice = chunk.choices?.[0];
        const delta = choice?.delta ?? {};
        const reasoning = delta.reasoning_content ?? delta.reasoning;
        if (reasoning) view.addReasoning(reasoning);
        if (delta.content) view.addText(delta.content);
        if (choice?.finish_reason) finish = choice.finish_reason;
        if (isNumber(chunk.usage?.total_tokens)) message.tokens = chunk.usage.total_tokens;
        if (chunk.timings) {
          message.ledger = ledgerOf(chunk.timings);
          this.onLedger(chunk.timings, chunk.usage);
        }
        this.draw(view);
        if (performance.now() - keptAt > KEEP_MS) {
          keptAt = performance.now();
          this.onKeep(record, tree, [message]);
        }
      }
      if (finish === null) throw new Error("The connection to the server was lost.");
    } catch (error) {
      failure = error;
    }
    const isTooLong = failure?.code === "context_length_exceeded";
    const isFull = finish === "length" && message.tokens >= (this.contextTokens() ?? Infinity);
    if (isTooLong || isFull) Object.assign(message, this.full(tree.path(message.id), isTooLong));
    else if (failure) Object.assign(message, this.failed(failure, message.text !== ""));
    else Object.assign(message, { state: "done", note: finish === "length" && !message.text ? THOUGHT_OUT : (ENDINGS[finish] ?? "") });
    if (failure?.status === 401 || failure?.status === 403) this.onRefused(failure);
    return isTooLong;
  }

  /** The messages of a request: those of a path that the model reads. */
  messagesOf({ system }, path, { dropped, summary }) {
    const summed = summary ? [
      { role: "user", content: summaryQuestion(this.contextTokens()) }, { role: "assistant", content: summary },
    ] : [];
    return chatMessages(system, path.slice(dropped), summed);
  }

  /** Leave out the oldest turns, so that about half of the context is free; the model may summarise them first. */
  async makeRoom({ message, view, tree, settings, signal }, policy) {
    const limit = this.contextTokens();
    const path = tree.path(message.id);
    const room = { dropped: cutFor(path, limit), summary: "" };
    if (policy === "summarise") {
      const told = "Summarising the oldest turns";
      view.showWork(told);
      this.say(`${told}.`);
      const question = { role: "user", content: summaryQuestion(limit) };
      const body = {
        model: this.model(),
        messages: [...this.messagesOf(settings, path.slice(0, room.dropped), roomOf(path)), question],
        ...sampling({ ...settings, thinking: false, effort: null, maxTokens: summaryTokens(limit) }),
      };
      try {
        for await (const chunk of this.chunks(body, view, signal, () => {})) {
          if (chunk.error) throw errorOf(chunk);
          if (chunk.prompt_progress) view.showProgress(chunk.prompt_progress, (text) => this.say(text), "Reading the oldest turns for a summary");
          room.summary += chunk.choices?.[0]?.delta?.content ?? "";
          if (room.summary) view.showWork(`${told}: ${count(room.summary.length)} characters`);
        }
      } catch (error) {
        if (error.name === "AbortError") throw new Error(`${FULL}. The summary was stopped, so nothing was dropped.`);
        if (error.code !== "context_length_exceeded") throw error;
        room.summary = "";  // the turns are too long to be summarised
      }
      room.summary = room.summary.trim();
      if (!room.summary) this.onNews("The oldest turns could not be summarised: they are left out without a summary.");
      view.wait();
    }
    Object.assign(message, room);
    view.showDropped(path.slice(0, room.dropped));
  }

  /** How an answer ends that has no room, and what helps. */
  full(path, isTooLong) {
    const limit = this.contextTokens();
    const size = isNumber(limit) ? `${count(limit)} tokens` : "it";
    const canDrop = cutsOf(path).length > 0;
    const fact = !isTooLong ? `${FULL}: ${size} are used.` : `${FULL}: ${canDrop ? "the conversation" : "this message alone"} does not fit into ${size}.`;
    const help = canDrop ? "Nothing is lost: drop or summarise the oldest turns, and the answer goes on."
      : isTooLong ? "Shorten it, or start the server with a larger --context." : "A server with a larger --context can go on.";
    return { state: path.at(-1).text ? "stopped" : "failed", note: `${fact} ${help}` };
  }

  /** The chunks of an answer. A busy server is asked again, after as long as it says. */
  async* chunks(body, view, signal, onIgnored) {
    for (;;) {
      try {
        yield* complete(body, { signal, onIgnored });
        return;
      } catch (error) {
        const isBusy = (error.status === 429 || error.status === 503) && error.retryAfter !== null && error.retryAfter <= LONGEST_WAIT_S;
        if (!isBusy) throw error;
        const fact = factOf(error);
        const reason = fact.startsWith("the server is busy") ? `T${fact.slice(1)}` : `The server is busy: ${fact}`;
        this.say(`${reason}. The page asks again by itself.`);
        for (let left = Math.max(1, error.retryAfter); left > 0; left -= 1) {
          view.showBusy(`${reason}. Trying again in ${left} s`, () => this.stop());
          await second(signal);
        }
        view.wait();
      }
    }
  }

  /** What an answer becomes by an error. One that has begun keeps what it has, and can be continued. */
  failed(error, hasBegun) {
    if (error.name === "AbortError") return { state: "stopped", note: "Stopped." };
    const wait = error.retryAfter ? `; try again in ${seconds(error.retryAfter)}` : "";
    const note = [factOf(error) + wait, ...error.message.split("\n").slice(1)].join("\n").slice(0, LONGEST_NOTE);
    return { state: hasBegun ? "stopped" : "failed", note };
  }

  say(text) {
    if (this.status.textContent !== text) this.status.textContent = text;
  }

  draw(view) {
    if (view.isDrawing) return;
    view.isDrawing = true;
    requestAnimationFrame(() => {
      view.isDrawing = false;
      this.keepEnd(() => view.draw());
    });
  }

  isAtEnd() {
    const { scrollTop, clientHeight, scrollHeight } = this.scroll;
    return scrollHeight - scrollTop - clientHeight < 48;
  }

  /** Make a change and stay at the end, unless the user has scrolled up. */
  keepEnd(change) {
    const isAtEnd = this.isAtEnd();
    change();
    if (isAtEnd) this.follow();
  }

  follow() {
    this.scroll.scrollTop = this.scroll.scrollHeight;
  }
}

/** What an error says first, without a wait, which is told apart. */
const factOf = (error) => error.message.split("\n", 1)[0].replace(/; try again in \d+ s$/, "");

/** Wait a second, or fail as soon as the user stops. */
function second(signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, 1000);
    signal.addEventListener("abort", stop);
    if (signal.aborted) stop();
  });
}

/** The messages of a path as those of a request, after the system message and the turn `before`. */
function chatMessages(system, path, before) {
  const said = [...(system ? [{ role: "system", content: system }] : []), ...before];
  for (const message of path) {
    const last = said.at(-1);
    if (message.role === "assistant") {
      if (message.text && message.state !== "failed") said.push({ role: "assistant", content: message.text });
    } else if (last?.role === "user") {
      last.content = joined(last.content, contentOf(message));
    } else {
      said.push({ role: "user", content: contentOf(message) });
    }
  }
  return said;
}

/** Text files are quoted before the words; pictures, sounds and videos are parts before the text. */
function contentOf({ text, attachments }) {
  const media = attachments.filter(({ kind }) => kind !== "text");
  const files = attachments.filter(({ kind }) => kind === "text").map(quoted);
  const words = files.length ? [...files, text].filter((one) => one.trim()).join("\n\n") : text;
  if (!media.length) return words;
  return [...media.map((one) => one.chatPart), ...(words.trim() ? [{ type: "text", text: words }] : [])];
}

/** Two user messages as one: text, or parts if one of them has parts. */
function joined(one, other) {
  if (typeof one === "string" && typeof other === "string") return `${one}\n\n${other}`;
  const parts = (content) => (typeof content === "string" ? [{ type: "text", text: content }] : content);
  return [...parts(one), ...parts(other)];
}

function ledgerOf(timings) {
  return [
    isNumber(timings.new_tokens) && `${count(timings.new_tokens)} tokens`,
    isNumber(timings.decode_tok_per_s) && `${rate(timings.decode_tok_per_s)} tok/s`,
    isNumber(timings.time_to_first_token_s) && `first after ${seconds(timings.time_to_first_token_s)}`,
    isNumber(timings.hit_rate) && `hit rate ${timings.hit_rate.toFixed(2)}`,
    isNumber(timings.bytes_read) && timings.bytes_read > 0 && `${volume(timings.bytes_read)} read`,
  ].filter(Boolean).join(" \u00b7 ");
}

class QuestionView {
  constructor(message) {
    const { text, attachments } = message;
    this.message = message;
    this.body = element("div", { class: "body" });
    if (attachments.length) {
      this.body.append(element("ul", { class: "attached", "aria-label": "Attachments" },
        ...attachments.map((one) => element("li", {}, previewOf(one)))));
    }
    if (text.trim()) this.body.append(element("p", { class: "said" }, text));
    this.tools = element("div", { class: "tools" });
    this.node = element("article", { class: "turn user", "aria-label": "You" }, this.body, this.tools);
  }
}

class AnswerView {
  constructor(message) {
    this.message = message;
    this.bar = element("progress", { "aria-label": "Reading the prompt" });
    this.progressText = element("span");
    this.progress = element("div", { class: "progress", hidden: true }, this.progressText, this.bar);
    this.summary = element("summary", {}, "Thoughts");
    this.thoughts = element("div", { class: "text" });
    this.fold = element("details", { class: "reasoning" }, this.summary, this.thoughts);
    this.body = element("div", { class: "text" });
    this.note = element("p", { class: "note" });
    this.ledger = element("p", { class: "ledger" });
    this.tools = element("div", { class: "tools" });
    this.node = element("article", { class: "turn assistant", "aria-label": "Argosy" },
      this.progress, this.fold, this.body, this.note, element("div", { class: "foot" }, this.tools, this.ledger));
    this.view = new MarkdownView(this.body);
    this.thoughtsView = new MarkdownView(this.thoughts);
    this.summary.addEventListener("click", () => { this.isFoldTouched = true; });
    this.draw();
  }

  /** Show that the model is asked. */
  wait() {
    this.progressText.textContent = "Waiting for the model";
    this.progress.hidden = false;
    this.bar.hidden = false;
    this.bar.removeAttribute("value");
    this.isBegun = false;
    this.readingFrom = null;
    this.draw();
  }

  /** Say which messages the model does not read, and what it reads instead. */
  showDropped(messages) {
    const [first, last] = [messages[0], messages.findLast(({ role }) => role === "user")].map((one) => `\u201c${titleOf(one)}\u201d`);
    const which = first === last ? `${first} and its answer` : `from ${first} to the answer to ${last}`;
    const { summary } = this.message;
    const told = summary ? `To fit the context, the model reads a summary in place of the first ${count(messages.length)} messages: ${which}.`
      : `To fit the context, the first ${count(messages.length)} messages are left out: ${which}. The model does not read them.`;
    const made = element("div", { class: "left-out" }, element("p", {}, told));
    if (summary) made.append(element("details", {}, element("summary", {}, "The summary"), element("p", {}, summary)));
    if (this.dropped?.textContent === made.textContent) return;
    this.dropped?.remove();
    this.dropped = made;
    this.node.prepend(made);
  }

  /** Show what is done before the answer can begin. */
  showWork(text) {
    this.progressText.textContent = text;
  }

  /** Show why the answer does not begin yet, and a button that gives it up. */
  showBusy(text, cancel) {
    this.bar.hidden = true;
    this.cancel ??= button("Cancel", cancel, { class: "quiet" });
    this.progressText.replaceChildren(text, " ", this.cancel);
  }

  showProgress({ processed, total, cache, encoded }, say, what = "Reading the prompt") {
    if (this.isBegun || !(total > 0)) return;
    this.bar.max = total;
    this.bar.value = processed;
    const fromCache = cache > 0 ? `, ${count(cache)} from the prefix cache` : "";
    const next = isNumber(encoded) ? `; the next file is ${Math.floor(100 * encoded)} % encoded` : "";
    const left = this.secondsLeft(processed, total);
    const toGo = left > 2 ? `, about ${roughly(left)} left` : "";
    this.progressText.textContent = `${what}: ${count(processed)} of ${count(total)} tokens${fromCache}${toGo}${next}`;
    say(`${what}, ${25 * Math.floor((4 * processed) / total)} percent.`);
  }

  /** Seconds until the whole prompt is read, at the rate since the first news of it. */
  secondsLeft(processed, total) {
    const now = performance.now();
    this.readingFrom ??= { processed, at: now };
    const { processed: before, at } = this.readingFrom;
    return processed > before ? ((total - processed) * (now - at)) / (1000 * (processed - before)) : 0;
  }

  addReasoning(text) {
    if (!this.thoughtFrom) {
      this.thoughtFrom = performance.now();
      this.summary.textContent = "Thinking";
      this.fold.open = true;
    }
    this.begin();
    this.message.reasoning += text;
  }

  addText(text) {
    if (this.thoughtFrom) {
      this.endReasoning();
      if (!this.isFoldTouched) this.fold.open = false;
    }
    this.begin();
    this.message.text += text;
  }

  begin() {
    this.isBegun = true;
    this.progress.hidden = true;
  }

  endReasoning() {
    if (!this.thoughtFrom) return;
    this.summary.textContent = `Thought for ${seconds((performance.now() - this.thoughtFrom) / 1000)}`;
    this.thoughtFrom = null;
  }

  end() {
    this.endReasoning();
    this.progress.hidden = true;
    this.draw();
  }

  draw() {
    const { reasoning, text, note, ledger, state } = this.message;
    this.node.dataset.state = state;
    this.fold.hidden = !reasoning;
    this.thoughtsView.update(reasoning);
    this.view.update(text);
    for (const [node, words] of [[this.note, note], [this.ledger, ledger]]) {
      node.textContent = words;
      node.hidden = !words;
    }
  }
}
