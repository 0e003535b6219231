// Hold one conversation with the `ollama` package, and print its facts as JSON.
//   node ollama.mjs URL
import { Ollama } from "ollama";

const ollama = new Ollama({ host: process.argv[2] });
const options = { temperature: 0 };
const ask = (content, more = {}) => ({ model: "tiny", messages: [{ role: "user", content }], options, ...more });
const found = {};

found.models = (await ollama.list()).models.map((model) => model.name);

const plain = (await ollama.chat(ask("#think", { think: true }))).message;
found.plain = plain.content;
found.thinking = plain.thinking;

found.streamed = [];
for await (const part of await ollama.chat(ask("#think", { stream: true }))) found.streamed.push(part.message.content);

const tools = [{
  type: "function",
  function: {
    name: "get_weather",
    description: "Weather of a city",
    parameters: {
      type: "object",
      required: ["city"],
      properties: { city: { type: "string", description: "The city" }, days: { type: "integer", description: "Days" } },
    },
  },
}];
const asked = ask("#weather", { tools });
const answer = (await ollama.chat(asked)).message;
found.calls = answer.tool_calls.map((call) => [call.function.name, call.function.arguments]);
const results = answer.tool_calls.map((call) => ({ role: "tool", tool_name: call.function.name, content: "#sunny" }));
const next = await ollama.chat({ ...asked, messages: [...asked.messages, answer, ...results] });
found.after = next.message.content;

const format = { type: "object", properties: { answer: { type: "integer" } }, required: ["answer"] };
found.schema = JSON.parse((await ollama.chat(ask("#json", { format }))).message.content);

found.status = await ollama.chat(ask("Hi", { model: "llama3" })).catch((error) => error.status_code);
found.pull = await ollama.pull({ model: "llama3" }).catch((error) => error.message);
try {
  for await (const _ of await ollama.chat(ask("#fail", { stream: true })));
} catch (error) {
  found.failed = error.message;
}

const long = await ollama.chat(ask("#long", { stream: true }));
let count = 0;
try {
  for await (const _ of long) if (++count === 5) long.abort();
} catch (error) {
  if (error.name !== "AbortError") throw error;
}
found.cancelled = count;

console.log(JSON.stringify(found));
