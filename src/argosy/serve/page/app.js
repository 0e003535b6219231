// The page: connects the user's input with the conversation, the list of conversations, the engine's state and settings.
//
// Nothing is read from the address, so no link can make this page send a request to the model.

import { Attachments, kindsOf } from "./attachments.js";
import { Chats } from "./chats.js";
import { Conversation } from "./conversation.js";
import { showLedger, showStale, showState } from "./engine_panel.js";
import { showHeat, watchHeat } from "./heat_map.js";
import { Models } from "./models.js";
import { canRecord, Recorder } from "./recorder.js";
import { getJson, key, watchEngine } from "./server.js";
import { DEFAULTS, Drawer, numChanged } from "./settings.js";
import { asMarkdown } from "./tree.js";
import { count, isNumber } from "./units.js";

const byId = (id) => document.getElementById(id);
const prompt = byId("prompt");

const conversation = new Conversation({
  log: byId("conversation"),
  scroll: byId("scroll"),
  status: byId("status"),
  settings: () => chats.record.settings,
  model: () => models.current?.id ?? null,
  contextTokens: () => contextTokens(),
  onKeep: (record, tree, messages) => chats.keep(record, tree, messages),
  onChange: showConversation,
  onBusy: showBusy,
  onLedger: showLedger,
  onIgnored: showIgnored,
  onNews: (text) => notify("news", text),
  onRefused: askForKey,
});

const chats = new Chats({
  conversation,
  notify,
  ask,
  onOpen() {
    models.want(chats.record.settings.model);
    showSettings();
  },
  onChoose: () => openSheet(null),
});

const models = new Models({
  onChoose: (id) => chats.changeSettings({ ...chats.record.settings, model: id }),
  onLearned: showPractice,
  onChange() {
    offerAttachments(models.current ? kindsOf(models.current) : []);
    showModel();
    showContext();
  },
  onRefused: askForKey,
});

const drawer = new Drawer({
  settings: () => chats.record.settings,
  model: () => models.current,
  onSave(settings) {
    chats.changeSettings(settings);
    showSettings();
  },
  onKey() {
    byId("notice").hidden = true;
    models.learn();
    follow();
  },
});

const attachments = new Attachments({
  list: byId("attachments"),
  total: byId("attachments-total"),
  numSent: () => conversation.numAttached,
  onChange: showWhetherReady,
  onRemoved: () => prompt.focus(),  // the focused button is gone
  onRefused: askForKey,
});

// The shown conversation

function showConversation() {
  const { isEmpty, record } = conversation;
  byId("welcome").hidden = !isEmpty;
  byId("chat-bar").hidden = isEmpty;
  if (document.activeElement !== byId("title")) byId("title").value = record.title;
  showContext();
  chats.catchUp();
}

const contextTokens = () => models.current?.context_length ?? models.current?.max_model_len ?? null;

/** How much of the context the conversation takes, and whether the next message fits. */
function showContext() {
  const limit = contextTokens();
  const { tokens } = conversation;
  const node = byId("context");
  byId("room").hidden = !isNumber(limit);
  if (!isNumber(limit)) return;
  const next = attachments.tokens;
  const left = Math.max(0, limit - (tokens ?? 0));
  const isTight = next > left;
  node.classList.toggle("warning", isTight);
  const answer = Math.min(left - next, chats.record.settings.maxTokens ?? left);
  [tokens ?? 0, next, Math.max(0, answer)].forEach((part, place) => {
    byId("meter").children[place].style.width = `${(100 * part) / limit}%`;
  });
  byId("meter").setAttribute("aria-label", `Context: ${count(tokens ?? 0)} used, ${count(next)} for this message, ${count(Math.max(0, answer))} for the answer`);
  byId("meter").title = byId("meter").getAttribute("aria-label");
  if (isTight) node.textContent = `This message has about ${count(next)} tokens, and ${count(left)} of the context are left.`;
  else if (tokens === null) node.textContent = `Context: ${count(limit)} tokens`;
  else node.textContent = `Context: ${count(tokens)} of ${count(limit)} tokens, ${count(left)} left`;
}

/** Whether answers carry a watermark; that a machine writes them is in the page itself. */
async function showPractice() {
  try {
    const { watermark } = await getJson("/v1/engine/transparency");
    byId("watermark").hidden = watermark?.is_on !== true;
  } catch {
    byId("watermark").hidden = true;  // not known
  }
}

byId("title").addEventListener("change", () => {
  chats.rename(byId("title").value);
  byId("title").value = chats.record.title;
});
byId("title").addEventListener("keydown", (event) => {
  if (event.key === "Enter") prompt.focus();
});
byId("copy-chat").hidden = !navigator.clipboard;
byId("copy-chat").addEventListener("click", async () => {
  await navigator.clipboard.writeText(asMarkdown(chats.record.title, conversation.path));
  byId("copy-chat").textContent = "Copied";
  setTimeout(() => { byId("copy-chat").textContent = "Copy all"; }, 1500);
});
byId("export-chat").addEventListener("click", () => chats.exportShown());
byId("print-chat").addEventListener("click", () => window.print());

const SENSES = { picture: "pictures", sound: "sound", video: "video" };
let experts = "";

/** What the model is, where an empty conversation begins. */
function showModel() {
  const { current } = models;
  if (!current) return;
  const limit = contextTokens();
  const senses = kindsOf(current).map((kind) => SENSES[kind]).join(", ").replace(/, ([^,]*)$/, " and $1");
  const facts = [experts, isNumber(limit) && `${count(limit)}-token context`, senses && `reads ${senses}`].filter(Boolean);
  byId("welcome-model").textContent = `${current.id}${current.isPreset ? `, a preset of ${current.parent},` : ""} runs on this server${facts.length ? `: ${facts.join(", ")}` : ""}.`;
}

/** The experts of the model, once the engine has told them. */
function learnExperts({ num_layers: layers, num_experts: number, experts_per_token: chosen } = {}) {
  const told = layers > 0 && number > 0 ? `${count(chosen)} of ${count(number)} experts in each layer for a token` : "";
  if (told === experts) return;
  experts = told;
  showModel();
}

byId("examples").addEventListener("click", ({ target }) => {
  if (target.localName !== "button" || conversation.isBusy) return;
  prompt.value = target.textContent;
  send();
  prompt.focus();
});

// The message field

function showBusy(isBusy) {
  byId("send").hidden = isBusy;
  byId("stop").hidden = !isBusy;
  if (document.activeElement === document.body) prompt.focus();  // the focused button is gone
}

function grow() {
  prompt.style.height = "auto";
  const borders = prompt.offsetHeight - prompt.clientHeight;
  prompt.style.height = `${prompt.scrollHeight + borders}px`;
  // Rounded heights would show a scrollbar next to text that fits.
  prompt.style.overflowY = prompt.scrollHeight > prompt.clientHeight + 1 ? "auto" : "hidden";
  attachments.setText(prompt.value);
  showWhetherReady();
}

const isReady = () => !attachments.obstacle && (prompt.value.trim() !== "" || attachments.items.length > 0);

function showWhetherReady() {
  // Not `disabled`: the tab key should reach the button after the message, not the engine's panel.
  byId("send").setAttribute("aria-disabled", String(!isReady()));
  byId("send").title = attachments.obstacle ?? "";
  showContext();
}

function send() {
  if (conversation.isBusy || !isReady()) return;
  const text = prompt.value;
  const taken = attachments.take();
  prompt.value = "";
  grow();
  if (byId("notice").dataset.kind === "news") byId("notice").hidden = true;  // a new message makes undo impossible
  conversation.send(text, taken);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("input", grow);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
byId("stop").addEventListener("click", () => conversation.stop());
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  const toggle = Object.entries(SHEETS).find(([sheet]) => byId(sheet).classList.contains("open"))?.[1];
  if (!toggle) return conversation.stop();
  openSheet(null);
  byId(toggle).focus();
});

byId("new").addEventListener("click", () => {
  openSheet(null);
  const { isEmpty, record, tree } = conversation;
  if (isEmpty) return prompt.focus();
  chats.startNew(record.settings);
  chats.show();
  if (!record.isKept) {
    notify("news", "The conversation was cleared.", "Undo", () => {
      conversation.show(record, tree);
      showSettings();
    });
  }
  prompt.focus();
});

// Files: chosen, pasted, dropped or recorded

byId("attach").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", () => {
  attach(byId("files").files);
  byId("files").value = "";  // so that the same file can be chosen again
});

function attach(files) {
  attachments.add(files);
  prompt.focus();
}

document.addEventListener("paste", (event) => {
  const { files, types } = event.clipboardData;
  if (!files.length || types.includes("text/plain") || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  attach(files);
});

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
let dragsInside = 0;  // a drag enters an element before it leaves the one around it

function showDrag(change) {
  dragsInside = Math.max(0, dragsInside + change);
  byId("composer").classList.toggle("dropping", dragsInside > 0);
}

document.addEventListener("dragenter", (event) => { if (hasFiles(event)) showDrag(1); });
document.addEventListener("dragleave", (event) => { if (hasFiles(event)) showDrag(-1); });
document.addEventListener("dragover", (event) => { if (hasFiles(event)) event.preventDefault(); });
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();  // otherwise the browser would leave the page for the file
  showDrag(-dragsInside);
  attach(event.dataTransfer.files);
});

let recorder = null;

function showRecording(text) {
  byId("record").setAttribute("aria-pressed", String(recorder !== null));
  byId("record").setAttribute("aria-label", recorder ? "Stop recording" : "Record with the microphone");
  byId("recording").textContent = text;
}

async function record() {
  byId("record").disabled = true;
  try {
    if (recorder) {
      await stopRecording();
    } else {
      const onTime = (seconds) => {
        const text = `Recording, ${Math.floor(seconds)} s`;
        if (recorder && byId("recording").textContent !== text) showRecording(text);
      };
      recorder = await Recorder.start({ onTime, onEnd: stopRecording });
      showRecording("Recording, 0 s");
    }
  } catch (error) {
    recorder = null;
    showRecording("");
    const isDenied = error.name === "NotAllowedError";
    const text = isDenied ? "The browser does not let this page use the microphone." : "There is no microphone to record with.";
    notify("warning", text, "Try again", record);
  } finally {
    byId("record").disabled = false;
  }
}

async function stopRecording() {
  const ended = recorder;
  recorder = null;
  showRecording("");
  const file = await ended.stop();
  if (file) attach([file]);
}

byId("record").addEventListener("click", record);

function offerAttachments(kinds) {
  attachments.kinds = kinds;
  byId("record").hidden = !kinds.includes("sound") || !canRecord();
  byId("files").accept = attachments.accept;
}

// Notices and questions

const FADES_MS = 6000;
let fading = null;

/** Show a sentence, with a button if there is something to do about it. News without one goes by itself. */
function notify(kind, text, action = null, act = null) {
  clearTimeout(fading);
  if (kind === "news" && action === null) fading = setTimeout(() => { byId("notice").hidden = true; }, FADES_MS);
  byId("notice").dataset.kind = kind;
  byId("notice-text").textContent = text;
  byId("notice").hidden = false;
  const offered = byId("notice-action");
  offered.hidden = action === null;
  offered.textContent = action ?? "";
  offered.onclick = () => {
    byId("notice").hidden = true;
    act();
  };
}

byId("notice-close").addEventListener("click", () => { byId("notice").hidden = true; });

function askForKey(error) {
  const text = key() ? `The key was refused: ${error.message}` : "This server needs an API key.";
  notify("warning", text, "Enter key", () => drawer.open(true));
}

/** Ask before something that cannot be undone. Gives whether the user agrees. */
function ask(question, action) {
  const dialog = byId("question");
  byId("question-text").textContent = question;
  byId("question-yes").textContent = action;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

const SWITCHES = {
  enable_thinking: "This model has no switch for thinking: that setting had no effect.",
  reasoning_effort: "This model cannot think more or less: that setting had no effect.",
};

function showIgnored(names) {
  const text = names.map((name) => SWITCHES[name]).find(Boolean);
  if (text) notify("news", text);
}

// Settings

byId("open-settings").addEventListener("click", () => drawer.open());

function showSettings() {
  const changed = numChanged(chats.record.settings);
  byId("open-settings").title = changed ? `Settings, ${changed} changed` : "Settings";
  byId("open-settings").classList.toggle("changed", changed > 0);
}

// The panels at the sides, which are sheets on narrow screens

const SHEETS = { chats: "toggle-chats", engine: "toggle-engine" };

/** Open one of the sheets, or with null none. */
function openSheet(name) {
  for (const [sheet, toggle] of Object.entries(SHEETS)) {
    byId(sheet).classList.toggle("open", sheet === name);
    byId(toggle).setAttribute("aria-expanded", String(sheet === name));
  }
}

for (const [sheet, toggle] of Object.entries(SHEETS)) {
  byId(toggle).addEventListener("click", () => openSheet(byId(sheet).classList.contains("open") ? null : sheet));
}

// The engine

const CONNECTION = { open: "connected", closed: "not connected", refused: "key needed" };

function showConnection(change, error) {
  const node = byId("connection");
  if (node.dataset.state === change) return;
  node.dataset.state = change;
  node.textContent = CONNECTION[change];
  showStale(change === "closed", change === "refused");
  if (change === "refused") askForKey(error);
  if (change === "open") models.learn();
}

chats.startNew(DEFAULTS);
chats.start();
watchHeat();
grow();
models.learn();
const follow = watchEngine((state) => {
  showState(state);
  showHeat(state.heat);
  const { id, parent } = models.current ?? {};
  learnExperts([id, parent].includes(state.model?.id) ? state.model : undefined);
}, showConnection);
prompt.focus();
