// Numbers with their units, and elements built without markup.
//
// Memory is in GiB and drive reads are in GB, as everywhere in Argosy. Text reaches the page only as text nodes.

export const UNKNOWN = "\u2013";

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

export function button(label, action, attributes = {}) {
  const made = element("button", { type: "button", ...attributes }, label);
  made.addEventListener("click", action);
  return made;
}

/** A button that copies `text`; null if the browser does not allow it, as on a plain http page of another machine. */
export function copyButton(text, label) {
  if (!navigator.clipboard) return null;
  const made = button("Copy", async () => {
    await navigator.clipboard.writeText(text);
    made.textContent = "Copied";
    setTimeout(() => { made.textContent = "Copy"; }, 1500);
  }, { class: "quiet", "aria-label": label });
  return made;
}

function scaled(count, units) {
  for (const [unit, size] of units) {
    if (Math.abs(count) >= size) {
      const value = count / size;
      return [value.toFixed(value < 100 ? 1 : 0), unit];
    }
  }
  return [count.toFixed(0), "B"];
}

export const memory = (bytes) => scaled(bytes, [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]).join(" ");
export const volume = (bytes) => scaled(bytes, [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]).join(" ");
export const count = (number) => number.toLocaleString("en");

export function seconds(value) {
  if (value >= 120) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

/** A time to go, no more exact than it is known. */
export const roughly = (value) => (value >= 90 ? `${Math.round(value / 60)} min` : `${Math.ceil(value)} s`);

export function rate(tokensPerSecond) {
  return tokensPerSecond == null ? null : tokensPerSecond.toFixed(tokensPerSecond < 100 ? 1 : 0);
}

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
