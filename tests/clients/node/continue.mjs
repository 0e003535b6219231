// Ask for an autocompletion as Continue's provider `llamastack` does, and print its facts as JSON.
//   node continue.mjs URL
import { constructLlmApi } from "@continuedev/openai-adapters";

const api = constructLlmApi({ provider: "llamastack", apiBase: `${process.argv[2]}/v1/`, apiKey: "none" });
const body = { model: "tiny", prompt: "def add(a, b):\n    return ", suffix: "\n\nadd(1, 2)", temperature: 0, stream: true };
const found = {};

found.parts = [];
for await (const part of api.fimStream({ ...body, max_tokens: 12 }, new AbortController().signal)) {
  found.parts.push(part.choices[0].delta.content);
}

found.stopped = "";
for await (const part of api.fimStream({ ...body, max_tokens: 12, stop: [found.parts[2]] }, new AbortController().signal)) {
  found.stopped += part.choices[0].delta.content;
}

console.log(JSON.stringify(found));
