// Requests to the page's own server, with the key, and event streams read from fetch.
//
// EventSource cannot send a key, so both the engine's events and an answer are parsed here. The key is kept in
// sessionStorage, which ends with the tab. Conversations are kept elsewhere: `store.js`.

const KEY = "argosy-key";
const AGAIN_MS = 1000;  // between attempts to follow the engine
const SILENT_MS = 10_000;  // states come twice a second; a connection without any is dead

/** A server's sentence without what is only for terminals. */
const said = (message) => message.replace(/^hint: /gm, "");

export class ServerError extends Error {
  constructor(message, status = 0, retryAfter = null, code = null) {
    super(message);
    Object.assign(this, { status, retryAfter, code });
  }
}

/** The tab's storage; in a browser that allows the page none, a plain object, which ends with the page. */
const kept = (() => {
  try {
    return sessionStorage;
  } catch {
    return {};
  }
})();

export const key = () => kept[KEY] ?? "";

export function setKey(value) {
  if (value) kept[KEY] = value;
  else delete kept[KEY];
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (key()) headers.Authorization = `Bearer ${key()}`;
  let response;
  try {
    // The page may have a base path: addresses are taken from the page's own.
    const address = new URL(path.slice(1), document.baseURI);
    response = await fetch(address, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = `The server answered ${response.status}.`;
  let code = null;
  try {
    const body = await response.json();
    if (typeof body.error?.message === "string") message = said(body.error.message);
    code = body.error?.code ?? null;
  } catch {
    // A proxy's page instead of JSON: the status must do.
  }
  const wait = response.headers.get("Retry-After");
  return new ServerError(message, response.status, /^\d+$/.test(wait) ? Number(wait) : null, code);
}

export async function getJson(path, signal) {
  return (await request(path, { signal })).json();
}

/** The JSON objects of an event stream, until it ends or sends `[DONE]`. Keep-alive comments are skipped. */
export async function* events(path, options = {}, onResponse = () => {}) {
  const response = await request(path, options);
  onResponse(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const broken = (error) => {
    throw error.name === "AbortError" ? error : new ServerError("The connection to the server was lost.");
  };
  let pending = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(broken);
      if (done) return;
      const lines = (pending + value).split(/\r\n|\n|\r(?!$)/);
      pending = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) {
          data.push(line.slice(line.startsWith("data: ") ? 6 : 5));
        } else if (line === "" && data.length) {
          const text = data.join("\n");
          data = [];
          if (text === "[DONE]") return;
          yield JSON.parse(text);
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});  // an open reader would keep the connection, and with it the sequence
  }
}

async function postJson(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return (await request(path, { method: "POST", headers, body: JSON.stringify(body), signal })).json();
}

/** Tokens of a picture, sound or video, in the words of Responses: `image_tokens`, `audio_tokens`. */
export async function countMediaTokens(part, signal) {
  const body = { input: [{ role: "user", content: [part] }] };
  return (await postJson("/v1/responses/input_tokens", body, signal)).input_tokens_details ?? {};
}

export async function countTextTokens(text, signal) {
  return (await postJson("/tokenize", { content: text }, signal)).count;
}

/** The error that a chunk of an answer tells. */
export const errorOf = ({ error }) => new ServerError(said(error.message ?? "The answer was cut off."));

/** The chunks of a chat completion. `onIgnored(names)` is called with the fields that had no effect, if there are any. */
export function complete(body, { signal, onIgnored }) {
  return events("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({
      ...body,
      stream: true,
      stream_options: { include_usage: true },
      return_progress: true,
      timings: true,
    }),
    signal,
  }, (response) => {
    const names = response.headers.get("x-ignored-params");
    if (names) onIgnored(names.split(", "));
  });
}

/**
 * Call `onState` with every state of the engine, twice a second, while the page is visible. `onChange` is called with
 * "open", "closed" or "refused". A lost connection is tried again every second.
 */
export function watchEngine(onState, onChange) {
  let stop = null;

  async function follow() {
    const controller = new AbortController();
    stop = controller;
    while (!controller.signal.aborted) {
      const silence = new AbortController();
      let timer = setTimeout(() => silence.abort(), SILENT_MS);
      try {
        const signal = AbortSignal.any([controller.signal, silence.signal]);
        for await (const state of events("/v1/engine/events", { signal })) {
          clearTimeout(timer);
          timer = setTimeout(() => silence.abort(), SILENT_MS);
          onChange("open");
          onState(state);
        }
        if (!controller.signal.aborted) onChange("closed");
      } catch (error) {
        if (controller.signal.aborted) return;
        const isRefused = error.status === 401 || error.status === 403;
        onChange(isRefused ? "refused" : "closed", error);
        if (isRefused) return;
      } finally {
        clearTimeout(timer);
      }
      await new Promise((resume) => setTimeout(resume, AGAIN_MS));
    }
  }

  function restart() {
    stop?.abort();
    if (!document.hidden) follow();
  }

  document.addEventListener("visibilitychange", restart);
  restart();
  return restart;
}
