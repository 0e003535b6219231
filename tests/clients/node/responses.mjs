// Hold a conversation through `@ai-sdk/openai`. It uses Responses with `store: true` by default, and sends earlier
// answers back as references.
//   node responses.mjs URL
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, stepCountIs, tool } from "ai";
import { z } from "zod";

const sent = [];
const provider = createOpenAI({
  baseURL: `${process.argv[2]}/v1`,
  apiKey: "none",
  fetch: (url, options) => {
    sent.push(JSON.parse(options.body));
    return fetch(url, options);
  },
});
const model = provider("tiny");
const tools = {
  get_weather: tool({
    description: "Weather of a city",
    inputSchema: z.object({ city: z.string(), days: z.number().int().optional() }),
    execute: async () => "#sunny",
  }),
};

const messages = [{ role: "user", content: "#weather" }];
const first = await generateText({ model, messages, tools, stopWhen: stepCountIs(3) });
messages.push(...first.response.messages, { role: "user", content: "#plain" });
const second = await generateText({ model, messages, tools });

const kinds = (body) => body.input.map((item) => item.type ?? item.role);
console.log(
  JSON.stringify({
    calls: first.steps.flatMap((step) => step.toolCalls).map((call) => [call.toolName, call.input]),
    texts: [first.text, second.text],
    sent: sent.map(kinds),
  }),
);
