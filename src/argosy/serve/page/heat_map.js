// Uses of each expert in each layer: layers x experts on a canvas, the same as a table, and one cell in words.
//
// The counts are sums over many tokens. If the server sends none, nothing is shown. The arrow keys move over the cells
// like the pointer.

import { count, element } from "./units.js";

const byId = (id) => document.getElementById(id);
const TALLEST = 260;
const HOTTEST = 4;  // times an equal share of the layer's uses

let heat = null;
let cell = null;

export function showHeat(facts) {
  const layers = facts?.layers?.map((uses, layer) => ({ layer, uses })).filter(({ uses }) => uses.length);
  byId("heat").hidden = !layers?.length;
  if (!layers?.length) {
    heat = cell = null;
    return;
  }
  heat = {
    tokens: facts.tokens,
    layers,
    width: Math.max(...layers.map(({ uses }) => uses.length)),
    sums: layers.map(({ uses }) => uses.reduce((sum, use) => sum + use, 0)),
  };
  byId("heat-tokens").textContent = `over about ${count(heat.tokens)} tokens, the last ones most`;
  draw();
  if (byId("heat").querySelector("details").open) showTable();
  read();
}

/** Colours show the use of an expert relative to an equal share, so that layers can be compared. */
function draw() {
  const canvas = byId("heat-map");
  const cssWidth = canvas.clientWidth || canvas.parentElement.clientWidth;
  if (!cssWidth) return;
  const ratio = window.devicePixelRatio || 1;
  const rowHeight = Math.max(2, Math.min(14, Math.floor(TALLEST / heat.layers.length)));
  const height = rowHeight * heat.layers.length;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(cssWidth * ratio);
  canvas.height = Math.round(height * ratio);
  const colors = palette();
  const small = new OffscreenCanvas(heat.width, heat.layers.length);
  const pixels = new ImageData(heat.width, heat.layers.length);
  heat.layers.forEach(({ uses }, row) => {
    const hottest = (HOTTEST * Math.max(1, heat.sums[row])) / uses.length;
    uses.forEach((use, expert) => {
      const level = Math.round(255 * Math.min(1, use / hottest));
      pixels.data.set(colors.subarray(4 * level, 4 * level + 4), 4 * (row * heat.width + expert));
    });
  });
  small.getContext("2d").putImageData(pixels, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = canvas.width < heat.width;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  if (cell) outline(context, canvas);
  canvas.setAttribute("aria-label", summary());
}

function outline(context, canvas) {
  const width = canvas.width / heat.width;
  const height = canvas.height / heat.layers.length;
  context.strokeStyle = getComputedStyle(canvas).color;
  context.lineWidth = Math.max(2, window.devicePixelRatio || 1);
  context.strokeRect(cell.expert * width, cell.row * height, Math.max(width, 3), Math.max(height, 3));
}

/** 256 colours between the ends given in the style sheet. */
function palette() {
  const scale = byId("heat-scale");
  scale.width = 256;
  scale.height = 1;
  const context = scale.getContext("2d", { willReadFrequently: true });
  const style = getComputedStyle(scale);
  const gradient = context.createLinearGradient(0, 0, 256, 0);
  gradient.addColorStop(0, style.getPropertyValue("--cold"));
  gradient.addColorStop(0.55, style.getPropertyValue("--warm"));
  gradient.addColorStop(1, style.getPropertyValue("--hot"));
  context.fillStyle = gradient;
  context.fillRect(0, 0, 256, 1);
  return context.getImageData(0, 0, 256, 1).data;
}

function busiest(row) {
  const { uses } = heat.layers[row];
  const expert = uses.indexOf(Math.max(...uses));
  return { expert, uses: uses[expert], share: heat.sums[row] ? uses[expert] / heat.sums[row] : 0 };
}

const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;

function summary() {
  const rows = heat.layers.map((_, row) => row).sort((a, b) => busiest(b).share - busiest(a).share);
  const { expert, share } = busiest(rows[0]);
  const used = heat.layers.reduce((sum, { uses }) => sum + uses.filter(Boolean).length, 0);
  const all = heat.layers.reduce((sum, { uses }) => sum + uses.length, 0);
  return `Expert use over ${count(heat.tokens)} tokens, ${heat.layers.length} layers of ${heat.width} experts: `
    + `${count(used)} of ${count(all)} were used. Layer ${heat.layers[rows[0]].layer} is the most uneven: `
    + `its expert ${expert} has ${percent(share)} of the uses.`;
}

function read() {
  if (!cell) {
    byId("heat-reading").textContent = "Each row is a layer and each column an expert. Use the arrow keys to read a cell.";
    return;
  }
  cell.row = Math.min(cell.row, heat.layers.length - 1);
  const { layer, uses } = heat.layers[cell.row];
  const use = uses[cell.expert] ?? 0;
  const part = heat.sums[cell.row] ? use / heat.sums[cell.row] : 0;
  byId("heat-reading").textContent =
    `Layer ${layer}, expert ${cell.expert}: ${count(use)} uses, ${percent(part)} of its layer`;
}

function showTable() {
  const columns = ["Layer", "Used", "Busiest expert", "Its share"];
  const head = element("tr", {}, ...columns.map((name) => element("th", { scope: "col" }, name)));
  const rows = heat.layers.map(({ layer, uses }, row) => {
    const most = busiest(row);
    const cells = [`${uses.filter(Boolean).length} of ${uses.length}`, String(most.expert), percent(most.share)];
    return element("tr", {},
      element("th", { scope: "row" }, String(layer)),
      ...cells.map((text) => element("td", {}, text)));
  });
  byId("heat-table").replaceChildren(element("thead", {}, head), element("tbody", {}, ...rows));
}

function moveTo(row, expert) {
  cell = {
    row: Math.min(Math.max(row, 0), heat.layers.length - 1),
    expert: Math.min(Math.max(expert, 0), heat.width - 1),
  };
  draw();
  read();
}

export function watchHeat() {
  const canvas = byId("heat-map");
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (!heat || !steps[event.key]) return;
    event.preventDefault();
    if (cell) moveTo(cell.row + steps[event.key][0], cell.expert + steps[event.key][1]);
    else moveTo(0, 0);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!heat) return;
    const box = canvas.getBoundingClientRect();
    moveTo(
      Math.floor((heat.layers.length * (event.clientY - box.top)) / box.height),
      Math.floor((heat.width * (event.clientX - box.left)) / box.width));
  });
  const leave = () => {
    cell = null;
    if (heat) { draw(); read(); }
  };
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("blur", leave);
  byId("heat").querySelector("details").addEventListener("toggle", () => { if (heat) showTable(); });
  new ResizeObserver(() => { if (heat) draw(); }).observe(byId("heat"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (heat) draw(); });
}
