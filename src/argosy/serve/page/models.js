// The models of the server: which one answers, whether it is loaded, and what it takes.
//
// One model is shown by its name. Several are a list to choose from, each with its state; presets are below their model.
// A model without a state is loaded. Models that read no text, such as transcribers, are left out.

import { getJson } from "./server.js";
import { element } from "./units.js";

const LOADED = new Set([undefined, null, "ready", "loaded"]);
const REFRESH_MS = 3000;

const byId = (id) => document.getElementById(id);
const wordsOf = (state) => (typeof state === "string" && !LOADED.has(state) ? state.slice(0, 40).replaceAll("_", " ") : "");

function chats({ architecture = {} }) {
  const { input_modalities: takes = ["text"], output_modalities: gives = ["text"] } = architecture;
  return takes.includes("text") && gives.includes("text");
}

/** Models in their order, each followed by its presets. */
function grouped(all) {
  const ids = new Set(all.map(({ id }) => id));
  const isPreset = ({ id, parent }) => parent !== id && ids.has(parent);
  return all.filter((one) => !isPreset(one)).flatMap((one) => (
    [one, ...all.filter((other) => isPreset(other) && other.parent === one.id).map((other) => ({ ...other, isPreset: true }))]));
}

export class Models {
  /**
   * `onChoose(id)` is called when the user chooses a model, `onLearned()` when the server has listed them, `onChange()`
   * when anything is known anew.
   */
  constructor(parts) {
    Object.assign(this, parts);
    this.all = [];
    this.wanted = null;
    this.timer = null;
    const list = byId("models");
    list.addEventListener("change", () => {
      this.want(list.value);
      this.onChoose(list.value);
    });
    list.addEventListener("focus", () => this.learn());
  }

  /** The entry of the chosen model in /v1/models; null while none is known. */
  get current() {
    return this.all.find(({ id }) => id === this.wanted) ?? this.all[0] ?? null;
  }

  /** Choose a model, or with null the server's first. */
  want(id) {
    this.wanted = id;
    this.show();
  }

  async learn() {
    clearTimeout(this.timer);
    try {
      const { data } = await getJson("/v1/models");
      this.all = grouped((data ?? []).filter(chats));
      this.show();
      this.onLearned();
    } catch (error) {
      if (error.status === 401 || error.status === 403) this.onRefused(error);
    }
    // While one is being loaded, its state will change by itself.
    const isChanging = this.all.some(({ state }) => wordsOf(state).includes("ing"));
    if (isChanging) this.timer = setTimeout(() => this.learn(), REFRESH_MS);
  }

  show() {
    const { all, current } = this;
    const labelOf = ({ id, state, isPreset }) => `${isPreset ? "\u2003" : ""}${id}${wordsOf(state) && ` (${wordsOf(state)})`}`;
    const [label, list] = [byId("model"), byId("models")];
    const isChoice = all.length > 1;
    label.hidden = isChoice;
    list.hidden = !isChoice;
    if (current) {
      label.textContent = label.title = list.title = labelOf(current).trim();
      document.title = `${current.id} \u2013 Argosy`;
    }
    if (isChoice) {
      const labels = all.map(labelOf);
      if (labels.join("\n") !== [...list.options].map((option) => option.textContent).join("\n")) {
        list.replaceChildren(...all.map(({ id }, place) => element("option", { value: id }, labels[place])));
      }
      list.value = current.id;
    }
    this.onChange();
  }
}
