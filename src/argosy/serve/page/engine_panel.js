// The engine's state for the user: memory and its limit, speed, experts, queue, privacy, and the ledger of the last
// answer. Every bar has the same facts as text beside it, so nothing is shown by colour alone.

import { UNKNOWN, count, element, isNumber, memory, rate, roughly, seconds, volume } from "./units.js";

const HUES = {
  "process": "gray",
  "dense weights": "blue",
  "KV cache": "violet",
  "recurrent state": "pink",
  "state snapshots": "rose",
  "replay": "brown",
  "working buffers": "amber",
  "staging": "olive",
  "expert records": "lime",
  "page tables": "steel",
  "expert cache": "teal",
  "expert slots": "teal",
};
const PART_HUES = {
  "attention_and_dense": "blue",
  "expert_compute": "teal",
  "waiting_for_reads": "amber",
  "router": "violet",
  "sampling": "pink",
  "other": "gray",
};
const MOST_PROMPTS = 8;
const SPARE = ["rose", "lime", "brown", "steel"];
const MOST_SHOWN = 4;  // parts of a bar before the others are folded

const byId = (id) => document.getElementById(id);
const share = (part, whole) => (whole > 0 ? Math.min(1, Math.max(0, part / whole)) : 0);

function write(id, value, unit = "") {
  const node = byId(id);
  const text = value == null ? UNKNOWN : String(value);
  if (node.dataset.shown === text + unit) return;
  node.dataset.shown = text + unit;
  node.replaceChildren(text, ...(unit && value != null ? [element("small", {}, ` ${unit}`)] : []));
}

/** A bar of parts and its legend. Nodes are reused while the parts stay the same, so that widths can animate. */
class Bar {
  /** `more`: a fold for all but the largest parts, with a `title` and a list for the `rest`. */
  constructor(bar, legend, more = null) {
    this.bar = bar;
    this.legend = legend;
    this.more = more;
    this.names = null;
  }

  show(parts, whole, label) {
    const names = parts.map((part) => part.name).join("\n");
    if (names !== this.names) this.build(parts);
    this.names = names;
    parts.forEach((part, index) => {
      const { segment, fill, value, note } = this.rows[index];
      segment.style.width = `${100 * share(part.size, whole)}%`;
      segment.title = `${part.name}: ${part.text}`;
      fill.style.width = `${100 * (part.used ?? 1)}%`;
      value.textContent = part.text;
      note.textContent = part.note ?? "";
    });
    this.bar.setAttribute("aria-label", label);
  }

  build(parts) {
    this.rows = parts.map(({ name, hue }) => {
      const fill = element("span", { class: "fill" });
      const segment = element("span", { class: `segment ${hue}` }, fill);
      const value = element("span", { class: "value" });
      const note = element("span", { class: "remark" });
      const swatch = element("span", { class: `swatch ${hue}` });
      const row = element("li", {}, swatch, element("span", { class: "name" }, name), value, note);
      return { segment, fill, value, note, row };
    });
    this.bar.replaceChildren(...this.rows.map(({ segment }) => segment));
    const isFolded = this.more !== null && parts.length > MOST_SHOWN + 1;
    const sizes = parts.map(({ size }) => size).sort((a, b) => b - a);
    const large = this.rows.filter((_, index) => !isFolded || parts[index].size >= sizes[MOST_SHOWN - 1]);
    this.legend.replaceChildren(...large.map(({ row }) => row));
    if (!this.more) return;
    this.more.fold.hidden = !isFolded;
    this.more.title.textContent = `${parts.length - large.length} more`;
    this.more.rest.replaceChildren(...this.rows.filter((one) => !large.includes(one)).map(({ row }) => row));
  }
}

const memoryBar = new Bar(byId("memory-bar"), byId("memory-legend"), {
  fold: byId("memory-more"), title: byId("memory-more-title"), rest: byId("memory-rest"),
});
const timeBar = new Bar(byId("time-bar"), byId("time-legend"));
const answerBar = new Bar(byId("answer-bar"), byId("answer-legend"));

let heardAt = null;

/** Whether the numbers are old, because the server is gone, and whether there are none without a key. */
export function showStale(isStale, isRefused) {
  const panel = byId("engine");
  panel.classList.toggle("stale", isStale && heardAt !== null);
  panel.classList.toggle("refused", isRefused);
  byId("stale").hidden = !isStale && !isRefused;
  const when = heardAt?.toLocaleTimeString("en", { hour12: false });
  const lost = when ? `The server has not been heard of since ${when}. The numbers are from then.` : "The server cannot be reached.";
  byId("stale").textContent = isRefused ? "The engine's state needs a key of scope metrics." : lost;
}

export function showState(state) {
  heardAt = new Date();
  showMemory(state);
  showModels(state);
  showWorkers(state);
  const { speed = {}, experts = {}, queue = {}, kv = {} } = state;
  write("decode", rate(speed.decode_tok_per_s), "tok/s");
  write("prefill", rate(speed.prefill_tok_per_s), "tok/s");
  write("hit-rate", isNumber(experts.hit_rate) ? experts.hit_rate.toFixed(2) : null);
  write("drive", isNumber(experts.drive_bytes_per_s) ? (experts.drive_bytes_per_s / 1e9).toFixed(2) : null, "GB/s");
  const places = isNumber(queue.max_sequences) ? ` of ${count(queue.max_sequences)} at once` : "";
  const waiting = `${count(queue.waiting ?? 0)} waiting`;
  write("queue", isNumber(queue.running) ? `${count(queue.running)} running${places}, ${waiting}` : null);
  write("resident", isNumber(experts.resident) ? resident(experts) : null);
  const kept = kv.blocks_cached > 0 ? `, ${count(kv.blocks_cached)} kept for later` : "";
  write("kv", isNumber(kv.blocks_used) ? `${count(kv.blocks_used)} of ${count(kv.blocks_total)} in use${kept}` : null);
  write("read", isNumber(experts.bytes_read) ? volume(experts.bytes_read) : null);
  showPrompts(state.running);
  showRecent(state.recent);
  showTime(state.time);
  showPrivacy(state.privacy);
}

/** How far the prompts are that are being read, for everyone who waits for one. */
function showPrompts(running = []) {
  const reading = running.filter(({ prompt_done: done, prompt_tokens: all }) => done < all);
  byId("prompts").hidden = reading.length === 0;
  writeList("prompts-facts", reading.slice(0, MOST_PROMPTS).map(({ prompt_done: done, prompt_tokens: all, seconds_left: left }) => {
    const toGo = isNumber(left) ? `, about ${roughly(left)} left` : "";
    return ["Reading a prompt", `${count(done)} of ${count(all)} tokens (${Math.floor((100 * done) / all)} %)${toGo}`];
  }));
}

/** The hit rate of the last minutes beside what other caches would have done with the same choices. */
function showRecent(recent) {
  byId("recent-row").hidden = !recent;
  if (!recent) return;
  const rates = `${recent.hit_rate.toFixed(2)}; LRU ${recent.lru.toFixed(2)}, best possible ${recent.optimum.toFixed(2)}`;
  write("recent", `${rates}, over ${count(recent.tokens)} tokens`);
}

/** The ledger of the last seconds: its parts sum to the whole. */
function showTime(time) {
  byId("time").hidden = !(time?.wall_s > 0);
  if (!(time?.wall_s > 0)) return;
  const parts = timeParts(time.parts, { other: "other, and idle" });
  const spoken = parts.map((part) => `${part.name} ${part.text}`).join(", ");
  timeBar.show(parts, time.wall_s, `Where the last ${seconds(time.wall_s)} went: ${spoken}.`);
  write("time-total", `of the last ${seconds(time.wall_s)}`);
}

/** Parts of a bar from seconds by part. */
function timeParts(spent, names = {}) {
  return Object.entries(spent ?? {})
    .filter(([, size]) => size > 0)
    .map(([name, size]) => ({
      name: names[name] ?? name.replaceAll("_", " "),
      size,
      hue: PART_HUES[name] ?? "olive",
      text: seconds(size),
    }));
}

function showMemory({ memory: facts, experts = {}, kv = {} }) {
  if (!facts) return;
  const planned = facts.lines.reduce((sum, line) => sum + line.bytes, 0);
  const whole = Math.max(facts.budget_bytes, planned);
  let spare = 0;
  const parts = facts.lines.map(({ name, bytes, note }) => ({
    name,
    size: bytes,
    hue: HUES[name] ?? SPARE[spare++ % SPARE.length],
    text: memory(bytes),
    note,
    used: usedShare(name, experts, kv),
  }));
  const free = facts.budget_bytes - planned;
  if (free > 0) {
    const cacheBytes = facts.lines.find(({ name }) => name === "expert cache")?.bytes ?? 0;
    const note = whyLeftOver(free, cacheBytes, experts);
    parts.push({ name: "unused", size: free, hue: "empty", text: memory(free), note });
  }
  const peak = isNumber(facts.peak_bytes) ? `, peak so far ${memory(facts.peak_bytes)}` : "";
  const spoken = parts.map((part) => `${part.name} ${part.text}`).join(", ");
  memoryBar.show(parts, whole, `Memory: limit ${memory(facts.budget_bytes)}${peak}. ${spoken}.`);
  write("memory-total", `limit ${memory(facts.budget_bytes)}${peak}`);
  showPeak(facts, whole);
}

/** The state of each model, if there are several, and its share of the memory. */
function showModels({ models = [] }) {
  byId("sharing").hidden = models.length < 2;
  if (models.length < 2) return;
  write("sharing-total", `${count(models.filter(({ state }) => state === "ready").length)} of ${count(models.length)} in memory`);
  writeList("sharing-facts", models.map((model) => [model.id, standing(model)]));
}

/** Rows of a name and texts; nodes stay as long as the texts do. */
function writeList(id, rows) {
  const list = byId(id);
  const shown = JSON.stringify(rows);
  if (list.dataset.shown === shown) return;
  list.dataset.shown = shown;
  list.replaceChildren(...rows.map(([name, ...texts]) => {
    const told = texts.map((text) => element("dd", {}, text));
    return element("div", {}, element("dt", { title: name }, name), ...told);
  }));
}

/** The machines that run experts for this server, as `argosy top` shows them. */
function showWorkers({ workers = [] }) {
  byId("workers").hidden = workers.length === 0;
  write("workers-total", `${count(workers.filter(({ state }) => state === "ready").length)} of ${count(workers.length)} ready`);
  writeList("workers-facts", workers.map((worker) => [worker.host, worker.state, ...work(worker)]));
}

function work(worker) {
  const hits = isNumber(worker.hit_rate) ? `, hit rate ${worker.hit_rate.toFixed(2)}` : "";
  const [p50, p99] = [worker.p50_us, worker.p99_us].map((us) => (us / 1e3).toFixed(2));
  const lines = [
    `${owned(worker)}${hits}`,
    `round trip ${p50} ms, 99th percentile ${p99} ms; ${count(worker.experts_rerouted)} experts rerouted`,
    `${volume(worker.bytes_out)} sent, ${volume(worker.bytes_in)} received`,
  ];
  return worker.why ? [...lines, worker.why] : lines;
}

/** A worker may have experts in memory that others own. One that is not connected tells nothing. */
function owned({ state, experts_owned: all, resident }) {
  if (!all) return "owns no experts";
  if (state === "away" || state === "refused") return `owns ${count(all)} experts`;
  return `owns ${count(all)} experts, ${resident >= all ? "all" : count(resident)} in memory`;
}

function standing({ state, memory_bytes: bytes, running }) {
  const held = bytes > 0 ? `, ${memory(bytes)}` : "";
  return `${state}${held}${running > 0 ? `, ${count(running)} running` : ""}`;
}

const peakRow = element("li", {}, element("span", { class: "swatch tick" }),
  element("span", { class: "name" }, "peak so far"), element("span", { class: "value" }));

function showPeak({ peak_bytes: peak }, whole) {
  let mark = byId("memory-bar").querySelector(".peak");
  if (!isNumber(peak)) {
    peakRow.remove();
    return mark?.remove();
  }
  if (!mark) {
    mark = element("span", { class: "peak" });
    byId("memory-bar").append(mark);
  }
  mark.style.left = `${100 * share(peak, whole)}%`;
  mark.title = `peak ${memory(peak)}`;
  const legend = byId("memory-legend");
  if (legend.lastElementChild !== peakRow) legend.append(peakRow);
  peakRow.lastElementChild.textContent = memory(peak);
}

/** Why part of the limit is unused. */
function whyLeftOver(free, cacheBytes, { slots, total }) {
  if (!(slots > 0) || !(total > 0)) return "";
  if (slots >= total) return "every expert is in memory";
  if (free < (2 * cacheBytes) / slots) return "too small for one more expert";
  return `the cache is fixed at ${count(slots)} experts; --memory lets it grow`;
}

/** Experts in memory, all experts, and the number of slots if they cannot hold all. */
function resident({ resident: now, slots, total }) {
  const room = slots < total ? `, room for ${count(slots)}` : "";
  return `${count(now)} of ${count(total)}${room}`;
}

/** The share of a reserved part that is in use; the rest of its segment is drawn lighter. */
function usedShare(name, experts, kv) {
  if ((name === "expert cache" || name === "expert slots") && experts.slots > 0) return share(experts.resident, experts.slots);
  if (name === "KV cache" && kv.blocks_total > 0) {
    return share(kv.blocks_used + (kv.blocks_cached ?? 0), kv.blocks_total);
  }
  return 1;
}

function showPrivacy(privacy) {
  if (!privacy) return;
  const logging = privacy.logging ? "Prompts and answers are logged." : "Prompts and answers are not logged.";
  const traces = privacy.traces
    ? "Routing traces are on: they can reveal the text."
    : "Routing traces are off.";
  write("privacy", `${logging} ${traces}`);
  byId("privacy").classList.toggle("warning", Boolean(privacy.logging || privacy.traces));
}

/** Show the ledger of the last answer: the `timings` of its last chunk. */
export function showLedger(timings, usage) {
  byId("answer").hidden = false;
  const parts = timeParts(timings.parts);
  const whole = parts.reduce((sum, part) => sum + part.size, 0);
  const spoken = parts.map((part) => `${part.name} ${part.text}`).join(", ");
  answerBar.show(parts, whole, `Where the time went: ${spoken}.`);
  byId("answer-bar").hidden = parts.length === 0;
  write("answer-total", isNumber(timings.wall_s) ? seconds(timings.wall_s) : whole ? seconds(whole) : "");
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  const kept = cached > 0 ? ` (${count(cached)} from the prefix cache)` : "";
  const tokens = isNumber(timings.prompt_tokens)
    ? `${count(timings.prompt_tokens)} prompt${kept}, ${count(timings.new_tokens ?? 0)} new`
    : null;
  const facts = [
    ["Tokens", tokens],
    ["First token", isNumber(timings.time_to_first_token_s) ? seconds(timings.time_to_first_token_s) : null],
    ["Decode", isNumber(timings.decode_tok_per_s) ? `${rate(timings.decode_tok_per_s)} tok/s` : null],
    ["Hit rate", isNumber(timings.hit_rate) ? timings.hit_rate.toFixed(2) : null],
    ["Read from the drive", isNumber(timings.bytes_read) ? volume(timings.bytes_read) : null],
  ].filter(([, text]) => text != null);
  byId("answer-facts").replaceChildren(
    ...facts.map(([name, text]) => element("div", {}, element("dt", {}, name), element("dd", {}, text))));
}
