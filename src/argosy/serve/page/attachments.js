// The files of the next message: read, shown with a preview and their tokens, and removed.
//
//   picture, sound, video  ->  scaled down if the server would refuse it  ->  data URL  ->  part of a message
//   any other file  ->  text, if it is text in UTF-8  ->  quoted in the message
//
// Every turn sends the files of its conversation again. What is wrong with a file is said beside it; while something is,
// the message cannot be sent.

import { countMediaTokens, countTextTokens } from "./server.js";
import { LONGEST_NAME, quoted, readText, TEXT_ACCEPT } from "./text_files.js";
import { newId } from "./tree.js";
import { button, count, element, volume } from "./units.js";

// The server's limits (PROMPT_LIMITS in media/parts.py, MEDIA_BODY_BYTES in budget/memory_plan.py).
const MOST_PIXELS = 24e6;
const LONGEST_SIDE = 16384;
const MOST_FILE_BYTES = 32 * 2 ** 20;
const MOST_BODY_CHARACTERS = 46 * 2 ** 20;  // leaves room for the text of the conversation
const MOST_BODY_BYTES = MOST_BODY_CHARACTERS * 0.75;  // as base64
const MOST_BYTES = { picture: MOST_FILE_BYTES, sound: MOST_FILE_BYTES, video: MOST_BODY_BYTES };

// Types that browsers give files, and what the server calls them: a media type, or the format of a sound.
const TYPES = {
  picture: {
    "image/png": "image/png", "image/jpeg": "image/jpeg", "image/webp": "image/webp", "image/gif": "image/gif",
  },
  sound: {
    "audio/wav": "wav", "audio/x-wav": "wav", "audio/wave": "wav", "audio/vnd.wave": "wav", "audio/mpeg": "mp3",
    "audio/mp3": "mp3", "audio/flac": "flac", "audio/x-flac": "flac", "audio/ogg": "ogg",
  },
  video: {
    "video/mp4": "video/mp4", "video/x-m4v": "video/mp4", "video/quicktime": "video/quicktime", "video/webm": "video/webm",
    "video/x-matroska": "video/x-matroska", "video/matroska": "video/x-matroska", "video/x-msvideo": "video/x-msvideo",
    "video/avi": "video/x-msvideo", "video/vnd.avi": "video/x-msvideo",
  },
};
// Media types of the formats of sounds. Those of pictures and videos are media types already.
const SOUND_TYPES = { wav: "audio/wav", mp3: "audio/mpeg", flac: "audio/flac", ogg: "audio/ogg" };
/** The formats of each kind: the only ones that a kept or imported file can have. */
export const FORMATS = Object.fromEntries(Object.entries(TYPES).map(([kind, types]) => [kind, [...new Set(Object.values(types))]]));
export const mediaType = (kind, format) => (kind === "sound" ? SOUND_TYPES[format] : format);
/** Bytes of media that one conversation may keep in the browser. */
export const MOST_KEPT_BYTES = 64 * 2 ** 20;

const NAMES = {
  picture: "PNG, JPEG, WEBP and GIF pictures", sound: "WAV, MP3, FLAC and OGG sounds",
  video: "MP4, MOV, WEBM, MKV and AVI videos",
};
const MODALITIES = { image: "picture", audio: "sound", video: "video" };
const TYPING_MS = 700;
const LONG_TEXT = 1000;  // characters of a message whose tokens are counted even without files

/** A text file, as its conversation has it. */
export class TextFile {
  kind = "text";

  constructor({ name, text }) {
    this.name = name;
    this.text = text;
  }

  get size() {
    return this.text.length;
  }

  get record() {
    return { kind: this.kind, name: this.name, text: this.text };
  }
}

/** A picture, sound or video, as its conversation has it; `url` is null if its bytes were not kept. */
export class Media {
  constructor({ id = newId(), kind, name, format, blob = null, url = null }) {
    Object.assign(this, { id, kind, name, format, blob, url });
  }

  /** One that was kept: `blob` is null if its bytes were not. */
  static async kept(record, blob) {
    return new Media({ ...record, blob, url: blob && (await dataUrl(blob)) });
  }

  get size() {
    return this.url?.length ?? 0;
  }

  get record() {
    return { id: this.id, kind: this.kind, name: this.name, format: this.format };
  }

  get data() {
    return this.url.slice(this.url.indexOf(",") + 1);
  }

  /** As Chat Completions has it. */
  get chatPart() {
    const { kind, url } = this;
    if (url === null) return { type: "text", text: `(The file ${this.name} was not kept.)` };
    if (kind === "sound") return this.soundPart;
    return kind === "picture" ? { type: "image_url", image_url: { url } } : { type: "video_url", video_url: { url } };
  }

  /** As Responses has it, whose route counts tokens. */
  get inputPart() {
    const { kind, url } = this;
    if (kind === "sound") return this.soundPart;
    return kind === "picture" ? { type: "input_image", image_url: url } : { type: "input_video", video_url: url };
  }

  get soundPart() {
    return { type: "input_audio", input_audio: { data: this.data, format: this.format } };
  }
}

/** The kinds of attachments that a model takes, from its entry in /v1/models. */
export function kindsOf(model) {
  return (model.architecture?.input_modalities ?? []).map((name) => MODALITIES[name]).filter(Boolean);
}

export class Attachments {
  /**
   * `parts`: the elements `list` and `total`; `numSent()` gives the characters of files in the conversation;
   * `onChange()` is called whenever something changes, `onRemoved()` when the user has removed a file, and
   * `onRefused(error)` if the server refuses the key.
   */
  constructor(parts) {
    Object.assign(this, parts);
    this.kinds = [];
    this.items = [];
    this.text = { value: "", tokens: null, timer: null };
  }

  /** What a file dialog should offer. */
  get accept() {
    return [...this.kinds.flatMap((kind) => Object.keys(TYPES[kind])), TEXT_ACCEPT].join(",");
  }

  /** Why the message cannot be sent yet, or null. */
  get obstacle() {
    if (this.items.some((item) => item.error)) return "Remove the files that cannot be sent.";
    return this.items.some((item) => !item.content) ? "A file is still being read." : null;
  }

  /** Tokens of the next message, as far as they are counted. */
  get tokens() {
    return this.items.reduce((sum, item) => sum + (item.tokens ?? 0), 0) + (this.text.tokens ?? 0);
  }

  add(files) {
    for (const file of files) {
      const item = new Attachment(file, () => this.remove(item));
      this.items.push(item);
      this.list.append(item.node);
      this.read(item);
    }
    this.changed();
  }

  remove(item) {
    this.items = this.items.filter((other) => other !== item);
    item.controller.abort();
    item.node.remove();
    this.changed();
    this.onRemoved();
  }

  /** Give the files away to the message that is sent. */
  take() {
    const taken = this.items;
    this.items = [];
    for (const item of taken) {
      item.controller.abort();
      item.node.remove();
    }
    this.changed();
    return taken.map(({ content }) => content);
  }

  async read(item) {
    const { signal } = item.controller;
    try {
      const kind = this.kindOf(item.file);
      const content = kind === "text"
        ? new TextFile({ name: item.name, text: await readText(item.file) })
        : await this.readMedia(item, kind);
      const together = this.numSent() + this.items.reduce((sum, other) => sum + (other.content?.size ?? 0), content.size);
      if (together > MOST_BODY_CHARACTERS) {
        throw new Error(`The files of a conversation may have ${volume(MOST_BODY_BYTES)} together. `
          + "Start a new chat, or choose a smaller file.");
      }
      item.show(content);
      this.changed();
      item.setTokens(kind === "text" ? await countTextTokens(quoted(content), signal) : await mediaTokens(content, signal));
    } catch (error) {
      if (error.name === "AbortError") return;
      if (error.status === 401 || error.status === 403) this.onRefused(error);
      const isItsFault = error.status === undefined || error.status === 400 || error.status === 413;
      const [fact, ...hint] = error.message.replace(/^input\.0\.content\.0: /, "").split("\n");
      if (isItsFault) item.fail([fact, ...hint].join("\n"));
      else item.remark("tokens not counted");
    }
    this.changed();
  }

  async readMedia(item, kind) {
    const format = TYPES[kind][typeOf(item.file)];
    const fitted = kind === "picture" ? await this.fitted(item) : item.file;
    if (fitted.size > MOST_BYTES[kind]) {
      throw new Error(`A file may have at most ${volume(MOST_BYTES[kind])}, and this one has ${volume(fitted.size)}.`);
    }
    // A picture that was scaled down has a type of its own.
    const own = fitted === item.file ? format : fitted.type;
    const blob = fitted.slice(0, fitted.size, mediaType(kind, own));
    return new Media({ kind, name: item.name, format: own, blob, url: await dataUrl(blob) });
  }

  /** The kind of media that a file is, or "text" for any other. */
  kindOf(file) {
    const type = typeOf(file);
    const kind = this.kinds.find((one) => type in TYPES[one]);
    if (kind) return kind;
    if (!/^(image|audio|video)\//.test(type) || type === "image/svg+xml") return "text";
    const taken = this.kinds.map((one) => NAMES[one]).join(", ");
    throw new Error(taken ? `This model takes text files, ${taken}.` : "This model takes text files only.");
  }

  /** The picture itself, or a smaller one if the server would refuse it. */
  async fitted(item) {
    const { file } = item;
    let bitmap;
    try {
      bitmap = await createImageBitmap(file);
    } catch {
      return file;  // the server says what is wrong with it
    }
    try {
      const { width, height } = bitmap;
      const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (width * height)), LONGEST_SIDE / Math.max(width, height));
      if (scale === 1 && file.size <= MOST_FILE_BYTES) return file;
      const canvas = element("canvas");
      canvas.width = Math.max(1, Math.floor(width * scale));
      canvas.height = Math.max(1, Math.floor(height * scale));
      canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      const asked = file.type === "image/png" && file.size <= MOST_FILE_BYTES ? "image/png" : "image/jpeg";
      const blob = await new Promise((resolve) => { canvas.toBlob(resolve, asked, 0.92); });
      if (!blob) throw new Error("This picture is too large, and the browser cannot make it smaller.");
      item.remark(`scaled down to ${count(canvas.width)} \u00d7 ${count(canvas.height)}`);
      return blob;
    } finally {
      bitmap.close();
    }
  }

  /** Count the text too, once it has not changed for a moment. */
  setText(value) {
    clearTimeout(this.text.timer);
    if (value !== this.text.value) this.text = { value, tokens: value ? null : 0, timer: null };
    const isCounted = this.items.length > 0 || value.length >= LONG_TEXT;
    if (isCounted && this.text.tokens === null) this.text.timer = setTimeout(() => this.countText(), TYPING_MS);
    this.showTotal();
  }

  async countText() {
    const { text } = this;
    try {
      text.tokens = await countTextTokens(text.value);
    } catch {
      return;  // only a number is missing
    }
    this.showTotal();
    this.onChange();
  }

  changed() {
    this.list.hidden = !this.items.length;
    this.setText(this.text.value);
    this.onChange();
  }

  showTotal() {
    const counted = this.items.filter((item) => item.tokens !== null);
    const own = counted.reduce((sum, item) => sum + item.tokens, 0);
    const text = this.text.tokens === null ? "" : ` + ${count(this.text.tokens)} of text`;
    const isAll = counted.length === this.items.length && counted.length > 0;
    this.total.textContent = isAll ? `${count(own)} tokens of attachments${text}` : "";
  }
}

async function mediaTokens(content, signal) {
  const { image_tokens: pictures = 0, audio_tokens: sounds = 0 } = await countMediaTokens(content.inputPart, signal);
  return pictures + sounds;
}

class Attachment {
  content = null;
  tokens = null;
  error = null;

  constructor(file, remove) {
    this.file = file;
    this.name = (file.name || "picture").slice(-LONGEST_NAME);
    this.controller = new AbortController();
    this.preview = element("span", { class: "preview" });
    this.facts = element("span", { class: "facts-line" }, "reading");
    this.remarks = [];
    this.node = element("li", { class: "attachment" }, this.preview,
      element("span", { class: "about" }, element("span", { class: "name" }, this.name), this.facts),
      button("\u2715", remove, { class: "quiet", "aria-label": `Remove ${this.name}` }));
  }

  show(content) {
    this.content = content;
    if (content.kind !== "text") this.preview.replaceChildren(previewOf(content));
    this.update();
  }

  setTokens(tokens) {
    this.tokens = tokens;
    this.update();
  }

  remark(text) {
    this.remarks.push(text);
    this.update();
  }

  fail(text) {
    this.error = text;
    this.node.dataset.state = "failed";
    this.facts.setAttribute("role", "alert");
    this.facts.textContent = text;
  }

  update() {
    if (this.error) return;
    const size = this.tokens === null ? null : `${count(this.tokens)} tokens`;
    this.facts.textContent = [size, ...this.remarks].filter(Boolean).join(", ") || "counting tokens";
  }
}

/** A thumbnail, a player, a text to unfold, or the name of a file that was not kept. */
export function previewOf({ kind, url, name, text }) {
  if (kind === "text") return textPreview(name, text);
  if (url === null) return element("span", { class: "chip" }, `${name} (not kept)`);
  if (kind === "picture") return element("img", { src: url, alt: name });
  const player = element(kind === "sound" ? "audio" : "video", {
    src: url, controls: true, "aria-label": name, preload: "metadata",
  });
  // The server decodes more formats than browsers do.
  if (kind === "video") {
    player.addEventListener("error", () => player.replaceWith(element("span", { class: "unplayable" }, "no preview")));
  }
  return player;
}

function textPreview(name, text) {
  const lines = count(text.replace(/\n$/, "").split("\n").length);
  const fold = element("details", { class: "chip" },
    element("summary", {}, `${name} `, element("small", {}, lines === "1" ? "1 line" : `${lines} lines`)));
  fold.addEventListener("toggle", () => {
    if (fold.open && fold.children.length === 1) fold.append(element("pre", { tabindex: "0" }, text));
  });
  return fold;
}

const ENDINGS = {
  png: "image/png", jpg: "image/jpeg", jpeg: "image/jpeg", webp: "image/webp", gif: "image/gif", wav: "audio/wav",
  mp3: "audio/mpeg", flac: "audio/flac", ogg: "audio/ogg", mp4: "video/mp4", m4v: "video/mp4", mov: "video/quicktime",
  webm: "video/webm", mkv: "video/x-matroska", avi: "video/x-msvideo",
};

/** The type of a file; some systems know none for sounds and videos. */
function typeOf(file) {
  return file.type || ENDINGS[file.name.split(".").pop().toLowerCase()] || "";
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The browser cannot read this file."));
    reader.readAsDataURL(blob);
  });
}
