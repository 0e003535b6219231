// Settings of a conversation: the system message, how the model samples, and the server's key, in a drawer.
//
// The key belongs to the tab (`server.js`). Everything else belongs to the conversation, and a new one starts with it.

import { key, setKey } from "./server.js";
import { isNumber } from "./units.js";

/** Null, or an empty system message, leaves a choice to the server. */
export const DEFAULTS = Object.freeze({
  model: null, system: "", temperature: null, topP: null, topK: null, minP: null, maxTokens: null, seed: null, thinking: null, effort: null,
  policy: null,  // what to do about a full context: null asks
});

const NAMES = {
  temperature: "temperature", topP: "top_p", topK: "top_k", minP: "min_p", maxTokens: "max_tokens", seed: "seed",
  thinking: "enable_thinking", effort: "reasoning_effort",
};
const FIELDS = { temperature: "temperature", topP: "top-p", topK: "top-k", minP: "min-p", maxTokens: "max-tokens", seed: "seed" };
export const EFFORTS = ["low", "medium", "high"];
const THINKING = { on: { thinking: true }, off: { thinking: false }, ...Object.fromEntries(EFFORTS.map((effort) => [effort, { effort }])) };
// What a model lets one choose, by its entry in /v1/models.
const CHOICES = { none: [], "on-off": ["on", "off"], efforts: EFFORTS, both: ["on", "off", ...EFFORTS] };

/** The choice of thinking in these settings, or "". */
const thinkingOf = ({ thinking, effort }) => effort ?? { true: "on", false: "off" }[thinking] ?? "";
export const POLICIES = ["trim", "summarise"];

/** The fields of a request that these settings ask for. */
export function sampling(settings) {
  const given = Object.entries(NAMES).filter(([name]) => settings[name] !== null);
  return Object.fromEntries(given.map(([name, field]) => [field, settings[name]]));
}

/** How many settings differ from their defaults. */
export function numChanged(settings) {
  return Object.keys(DEFAULTS).filter((name) => name !== "model" && settings[name] !== DEFAULTS[name]).length;
}

const byId = (id) => document.getElementById(id);

export class Drawer {
  /**
   * `settings()` gives those to show, `model()` the model's entry in /v1/models or null; `onSave(settings)` takes changed
   * ones, `onKey()` is called for another key.
   */
  constructor(parts) {
    Object.assign(this, parts);
    this.empty = {};  // what an empty field shows if the model tells no value
    const drawer = byId("settings");
    byId("cancel-settings").addEventListener("click", () => drawer.close());
    byId("reset-settings").addEventListener("click", () => this.fill(DEFAULTS));
    drawer.addEventListener("click", (event) => { if (event.target === drawer) drawer.close(); });  // on what is behind
    drawer.addEventListener("close", () => { if (drawer.returnValue === "save") this.save(); });
  }

  get isOpen() {
    return byId("settings").open;
  }

  /** With `needsKey`, the server has refused a request without the right key. */
  open(needsKey = false) {
    this.needsKey ||= needsKey;
    byId("key").value = key();
    byId("key-part").hidden = !this.needsKey && !key();
    this.showModel();
    this.fill(this.settings());
    byId("settings").returnValue = "";
    byId("settings").showModal();
    if (needsKey) byId("key").focus();
  }

  /** The model's own values in empty fields, and how it may think: on or off, how much, or both. */
  showModel() {
    const { default_parameters: own = {}, capabilities = {}, parent, supported_parameters: known } = this.model() ?? {};
    for (const [name, id] of Object.entries(FIELDS)) {
      const value = own[NAMES[name]];
      this.empty[id] ??= byId(id).placeholder;
      byId(id).placeholder = isNumber(value) ? String(value) : this.empty[id];
    }
    byId("system").placeholder = parent ? "that of the preset" : "none";
    const canThink = !Array.isArray(known) || known.includes("reasoning_effort");
    const choices = CHOICES[capabilities.thinking] ?? CHOICES[canThink ? "on-off" : "none"];
    const chosen = thinkingOf(this.settings());
    for (const option of byId("thinking").options) {
      option.hidden = option.disabled = option.value !== "" && option.value !== chosen && !choices.includes(option.value);
    }
    byId("thinking-choice").hidden = !choices.length && !chosen;
  }

  fill(settings) {
    byId("system").value = settings.system;
    byId("policy").value = settings.policy ?? "";
    for (const [name, id] of Object.entries(FIELDS)) byId(id).value = settings[name] ?? "";
    byId("thinking").value = thinkingOf(settings);
  }

  save() {
    const typed = byId("key").value.trim();
    const isOtherKey = typed !== key();
    setKey(typed);
    const chosen = { ...this.settings(), system: byId("system").value.trim(), policy: byId("policy").value || null };
    Object.assign(chosen, { thinking: null, effort: null, ...THINKING[byId("thinking").value] });
    for (const [name, id] of Object.entries(FIELDS)) chosen[name] = byId(id).value === "" ? null : byId(id).valueAsNumber;
    this.onSave(chosen);
    if (isOtherKey) this.onKey();
  }
}
