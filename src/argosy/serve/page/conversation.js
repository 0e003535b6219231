// A conversation: its messages, the answer as it arrives, and the actions on it.
//
//   send, regenerate, edit  ->  messages  ->  server.complete  ->  nodes
//
// The messages exist only in this object. Arriving text is drawn at most once per frame, however many chunks arrived.
// Reasoning and failed answers are not sent back to the model. Two user messages in a row, which some chat templates
// refuse, are sent as one.

import { previewOf } from "./attachments.js";
import { MarkdownView } from "./markdown.js";
import { complete } from "./server.js";
import { button, copyButton, count, element, isNumber, rate, seconds, volume } from "./units.js";

const ENDINGS = {
  length: "The answer reached its maximum length.",
  content_filter: "The server's policy blocked the answer.",
};

export class Conversation {
  /**
   * `parts`: the elements `log`, `scroll`, `status`; `settings()` gives model, system, temperature, maxTokens;
   * `onBusy(isBusy)`, `onLedger(timings, usage)` and `onRefused(error)` are called for other parts of the page.
   */
  constructor(parts) {
    Object.assign(this, parts);
    this.turns = [];
    this.controller = null;
  }

  get isBusy() {
    return this.controller !== null;
  }

  send(text, attachments = []) {
    if (this.isBusy || !(text.trim() || attachments.length)) return;
    this.add(userTurn(text, attachments));
    this.answer();
  }

  /** Characters of all attachments, which every request carries again. */
  get numAttached() {
    return this.turns.flatMap((turn) => turn.attachments ?? []).reduce((sum, { url }) => sum + url.length, 0);
  }

  stop() {
    this.controller?.abort();
  }

  regenerate() {
    if (this.isBusy || this.turns.at(-1)?.role !== "assistant") return;
    this.turns.pop().node.remove();
    this.answer();
  }

  /** Remove all turns; the returned function restores them. */
  clear() {
    this.stop();
    const old = this.turns;
    this.turns = [];
    this.log.replaceChildren();
    return () => {
      this.turns = old;
      this.log.replaceChildren(...old.map((turn) => turn.node));
    };
  }

  edit() {
    if (this.isBusy) return;
    const turn = this.turns.findLast((other) => other.role === "user");
    if (!turn || turn.editor) return;
    const field = element("textarea", { "aria-label": "Your last message", rows: "3" });
    field.value = turn.content;
    const close = () => {
      turn.editor.remove();
      turn.editor = null;
      turn.body.hidden = turn.tools.hidden = false;
      turn.tools.querySelector("button")?.focus();
    };
    const save = () => {
      if (!(field.value.trim() || turn.attachments.length)) return;
      const text = field.value;
      const first = this.turns.indexOf(turn);
      for (const gone of this.turns.splice(first)) gone.node.remove();
      this.send(text, turn.attachments);
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") { event.stopPropagation(); close(); }
      if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); save(); }
    });
    turn.editor = element("div", { class: "editor" }, field,
      element("div", { class: "buttons" }, button("Cancel", close), button("Send again", save, { class: "primary" })));
    turn.body.hidden = turn.tools.hidden = true;
    turn.node.append(turn.editor);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  add(turn) {
    this.turns.push(turn);
    this.log.append(turn.node);
    this.offerTools();
    this.follow();
    return turn;
  }

  /** Only the last exchange can be edited or regenerated, so only it has the buttons. */
  offerTools() {
    const lastUser = this.turns.findLast((turn) => turn.role === "user");
    for (const turn of this.turns) {
      if (turn.role === "user") {
        const isEditable = turn === lastUser && !this.isBusy;
        turn.tools.replaceChildren(...(isEditable ? [button("Edit", () => this.edit(), { class: "quiet" })] : []));
      } else {
        const tools = [];
        if (turn.state !== "running" && turn.content) tools.push(copyButton(turn.content, "Copy the answer"));
        if (turn.state !== "running" && turn === this.turns.at(-1)) {
          const label = turn.state === "failed" ? "Try again" : "Regenerate";
          tools.push(button(label, () => this.regenerate(), { class: "quiet" }));
        }
        turn.tools.replaceChildren(...tools.filter(Boolean));
      }
    }
  }

  messages() {
    const { system } = this.settings();
    const said = system ? [{ role: "system", content: system }] : [];
    for (const { role, content, state, attachments = [] } of this.turns) {
      const last = said.at(-1);
      const parts = [...attachments.map((one) => one.chatPart), ...(content.trim() ? [{ type: "text", text: content }] : [])];
      const whole = attachments.length ? parts : content;
      if (role === "user" && last?.role === "user") last.content = joined(last.content, whole);
      else if (role === "user" || (content && state !== "failed")) said.push({ role, content: whole });
    }
    return said;
  }

  async answer() {
    const { model, temperature, maxTokens } = this.settings();
    const body = { model, messages: this.messages() };
    if (isNumber(temperature)) body.temperature = temperature;
    if (isNumber(maxTokens)) body.max_tokens = maxTokens;
    const turn = new AssistantTurn();
    this.controller = new AbortController();
    this.add(turn);
    this.log.setAttribute("aria-busy", "true");  // read aloud once complete, not word by word
    this.onBusy(true);
    this.say("Waiting for the model.");
    let finish = null;
    let failure = null;
    try {
      for await (const chunk of complete(body, this.controller.signal)) {
        if (chunk.error) throw new Error(chunk.error.message ?? "The answer was cut off.");
        if (chunk.prompt_progress) turn.showProgress(chunk.prompt_progress, (text) => this.say(text));
        const choice = chunk.choices?.[0];
        const delta = choice?.delta ?? {};
        const reasoning = delta.reasoning_content ?? delta.reasoning;
        if (reasoning) turn.addReasoning(reasoning);
        if (delta.content) turn.addContent(delta.content);
        if (choice?.finish_reason) finish = choice.finish_reason;
        if (chunk.timings) {
          turn.showLedger(chunk.timings);
          this.onLedger(chunk.timings, chunk.usage);
        }
        this.draw(turn);
      }
      if (finish === null) throw new Error("The connection ended before the answer did.");
    } catch (error) {
      failure = error;
    }
    this.controller = null;
    this.keepEnd(() => {
      if (failure) this.fail(turn, failure);
      else this.succeed(turn, finish);
      turn.draw();
      this.log.removeAttribute("aria-busy");
      this.offerTools();
      this.onBusy(false);
    });
  }

  succeed(turn, finish) {
    turn.finish("done", ENDINGS[finish]);
    this.say("The answer is complete.");
  }

  fail(turn, error) {
    if (error.name === "AbortError") {
      turn.finish("stopped", "Stopped.");
      this.say("Stopped.");
      return;
    }
    const wait = error.retryAfter ? `; try again in ${error.retryAfter} s` : "";
    const [fact, ...hint] = error.message.split("\n");
    turn.finish("failed", [fact + wait, ...hint].join("\n"));
    this.say("The answer failed.");
    if (error.status === 401 || error.status === 403) this.onRefused(error);
  }

  say(text) {
    if (this.status.textContent !== text) this.status.textContent = text;
  }

  draw(turn) {
    if (turn.isDrawing) return;
    turn.isDrawing = true;
    requestAnimationFrame(() => {
      turn.isDrawing = false;
      this.keepEnd(() => turn.draw());
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

/** Two user messages as one: text, or parts if one of them has parts. */
function joined(one, other) {
  if (typeof one === "string" && typeof other === "string") return `${one}\n\n${other}`;
  const parts = (content) => (typeof content === "string" ? [{ type: "text", text: content }] : content);
  return [...parts(one), ...parts(other)];
}

function userTurn(content, attachments) {
  const body = element("div", { class: "body" });
  if (attachments.length) {
    body.append(element("ul", { class: "attached", "aria-label": "Attachments" },
      ...attachments.map((one) => element("li", {}, previewOf(one)))));
  }
  if (content.trim()) body.append(element("p", { class: "said" }, content));
  const tools = element("div", { class: "tools" });
  const node = element("article", { class: "turn user", "aria-label": "You" }, body, tools);
  return { role: "user", content, attachments, node, body, tools };
}

class AssistantTurn {
  role = "assistant";
  content = "";
  reasoning = "";
  state = "running";

  constructor() {
    this.bar = element("progress", { "aria-label": "Reading the prompt" });
    this.progressText = element("span", {}, "Waiting for the model");
    this.progress = element("div", { class: "progress" }, this.progressText, this.bar);
    this.summary = element("summary", {}, "Thinking");
    this.thoughts = element("div", { class: "text" });
    this.fold = element("details", { class: "reasoning", hidden: true }, this.summary, this.thoughts);
    this.body = element("div", { class: "text" });
    this.note = element("p", { class: "note", hidden: true });
    this.ledger = element("p", { class: "ledger", hidden: true });
    this.tools = element("div", { class: "tools" });
    this.node = element("article", { class: "turn assistant", "aria-label": "Argosy", "data-state": "running" },
      this.progress, this.fold, this.body, this.note, element("div", { class: "foot" }, this.tools, this.ledger));
    this.view = new MarkdownView(this.body);
    this.thoughtsView = new MarkdownView(this.thoughts);
    this.summary.addEventListener("click", () => { this.isFoldTouched = true; });
  }

  showProgress({ processed, total, cache, encoded }, say) {
    if (this.content || this.reasoning || !(total > 0)) return;
    this.bar.max = total;
    this.bar.value = processed;
    const fromCache = cache > 0 ? `, ${count(cache)} from the prefix cache` : "";
    const next = isNumber(encoded) ? `; the next file is ${Math.floor(100 * encoded)} % encoded` : "";
    this.progressText.textContent = `Reading the prompt: ${count(processed)} of ${count(total)} tokens${fromCache}${next}`;
    say(`Reading the prompt, ${25 * Math.floor((4 * processed) / total)} percent.`);
  }

  addReasoning(text) {
    if (!this.reasoning) {
      this.thoughtFrom = performance.now();
      this.fold.hidden = false;
      this.fold.open = true;
      this.progress.hidden = true;
    }
    this.reasoning += text;
  }

  addContent(text) {
    if (!this.content) {
      this.endReasoning();
      if (!this.isFoldTouched) this.fold.open = false;
      this.progress.hidden = true;
    }
    this.content += text;
  }

  endReasoning() {
    if (!this.thoughtFrom) return;
    this.summary.textContent = `Thought for ${seconds((performance.now() - this.thoughtFrom) / 1000)}`;
    this.thoughtFrom = null;
  }

  showLedger(timings) {
    const parts = [
      isNumber(timings.new_tokens) && `${count(timings.new_tokens)} tokens`,
      isNumber(timings.decode_tok_per_s) && `${rate(timings.decode_tok_per_s)} tok/s`,
      isNumber(timings.time_to_first_token_s) && `first after ${seconds(timings.time_to_first_token_s)}`,
      isNumber(timings.hit_rate) && `hit rate ${timings.hit_rate.toFixed(2)}`,
      isNumber(timings.bytes_read) && timings.bytes_read > 0 && `${volume(timings.bytes_read)} read`,
    ].filter(Boolean);
    this.ledger.textContent = parts.join(" \u00b7 ");
    this.ledger.hidden = parts.length === 0;
  }

  finish(state, note) {
    this.state = state;
    this.endReasoning();
    this.progress.hidden = true;
    this.node.dataset.state = state;
    this.note.textContent = note ?? "";
    this.note.hidden = !note;
  }

  draw() {
    if (this.reasoning) this.thoughtsView.update(this.reasoning);
    this.view.update(this.content);
  }
}
