// The page: connects the user's input with the conversation, the engine's state and the settings.
//
// Nothing is read from the address, so no link can make this page send a request to the model.

import { Attachments, kindsOf } from "./attachments.js";
import { Conversation } from "./conversation.js";
import { showLedger, showState } from "./engine_panel.js";
import { showHeat, watchHeat } from "./heat_map.js";
import { canRecord, Recorder } from "./recorder.js";
import { getJson, key, setKey, watchEngine } from "./server.js";

const byId = (id) => document.getElementById(id);
const prompt = byId("prompt");
const settings = { model: null, system: "", temperature: null, maxTokens: null };

const conversation = new Conversation({
  log: byId("conversation"),
  scroll: byId("scroll"),
  status: byId("status"),
  settings: () => settings,
  onBusy: showBusy,
  onLedger: showLedger,
  onRefused: askForKey,
});

const attachments = new Attachments({
  list: byId("attachments"),
  total: byId("attachments-total"),
  numSent: () => conversation.numAttached,
  onChange: showWhetherReady,
  onRemoved: () => prompt.focus(),  // the focused button is gone
  onRefused: askForKey,
});

// The message field

function showBusy(isBusy) {
  byId("send").hidden = isBusy;
  byId("stop").hidden = !isBusy;
  byId("welcome").hidden = conversation.turns.length > 0;
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
  if (event.key === "Escape" && !byId("settings").open) conversation.stop();
});

byId("new").addEventListener("click", () => {
  if (!conversation.turns.length) return prompt.focus();
  const bringBack = conversation.clear();
  byId("welcome").hidden = false;
  notify("news", "The conversation was cleared.", "Undo", () => {
    bringBack();
    byId("welcome").hidden = true;
  });
  prompt.focus();
});

// Pictures, sounds and videos: chosen, pasted, dropped or recorded

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
  if (!files.length || types.includes("text/plain") || byId("settings").open) return;
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
  byId("attach").hidden = !kinds.length;
  byId("record").hidden = !kinds.includes("sound") || !canRecord();
  byId("files").accept = attachments.accept;
}

// Notices

function notify(kind, text, action, act) {
  byId("notice").dataset.kind = kind;
  byId("notice-text").textContent = text;
  byId("notice").hidden = false;
  const offered = byId("notice-action");
  offered.textContent = action;
  offered.onclick = () => {
    byId("notice").hidden = true;
    act();
  };
}

byId("notice-close").addEventListener("click", () => { byId("notice").hidden = true; });

function askForKey(error) {
  const text = key() ? `The key was refused: ${error.message}` : "This server needs an API key.";
  notify("warning", text, "Enter key", openSettings);
}

// Settings

const number = (id) => (byId(id).value === "" ? null : byId(id).valueAsNumber);

function openSettings() {
  byId("key").value = key();
  byId("system").value = settings.system;
  byId("temperature").value = settings.temperature ?? "";
  byId("max-tokens").value = settings.maxTokens ?? "";
  byId("settings").returnValue = "";
  byId("settings").showModal();
}

byId("open-settings").addEventListener("click", openSettings);
byId("cancel-settings").addEventListener("click", () => byId("settings").close());
byId("settings").addEventListener("close", () => {
  if (byId("settings").returnValue !== "save") return;
  const typed = byId("key").value.trim();
  const isOtherKey = typed !== key();
  setKey(typed);
  Object.assign(settings, {
    system: byId("system").value.trim(),
    temperature: number("temperature"),
    maxTokens: number("max-tokens"),
  });
  if (isOtherKey) {
    byId("notice").hidden = true;
    learnModel();
    follow();
  }
});

// The engine

byId("toggle-engine").addEventListener("click", () => {
  const isOpen = byId("engine").classList.toggle("open");
  byId("toggle-engine").setAttribute("aria-expanded", String(isOpen));
});

const CONNECTION = { open: "connected", closed: "not connected", refused: "key needed" };

function showConnection(change, error) {
  const node = byId("connection");
  if (node.dataset.state === change) return;
  node.dataset.state = change;
  node.textContent = CONNECTION[change];
  if (change === "refused") askForKey(error);
  if (change === "open" && settings.model === null) learnModel();
}

function showModel(id, family) {
  settings.model = id;
  byId("model").textContent = id;
  byId("model").title = family ? `${id}, ${family}` : id;
  document.title = `${id} \u2013 Argosy`;
}

async function learnModel() {
  try {
    const { data } = await getJson("/v1/models");
    if (data?.length) {
      showModel(data[0].id);
      offerAttachments(kindsOf(data[0]));
    }
  } catch (error) {
    if (error.status === 401 || error.status === 403) askForKey(error);
  }
}

watchHeat();
grow();
learnModel();
const follow = watchEngine((state) => {
  if (state.model && settings.model === null) showModel(state.model.id, state.model.family);
  showState(state);
  showHeat(state.heat);
}, showConnection);
prompt.focus();
