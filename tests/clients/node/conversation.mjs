// Hold one conversation with the Vercel AI SDK, and print its facts as JSON.
//   node conversation.mjs URL
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, Output, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const provider = createOpenAICompatible({
  name: "argosy",
  baseURL: `${process.argv[2]}/v1`,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const model = provider("tiny");
const tools = {
  get_weather: tool({
    description: "Weather of a city",
    inputSchema: z.object({ city: z.string(), days: z.number().int().optional() }),
    execute: async () => "#sunny",
  }),
};
const found = {};

const plain = await generateText({ model, prompt: "#think" });
found.plain = { text: plain.text, reasoning: plain.reasoningText, usage: plain.usage };

const streamed = streamText({ model, prompt: "#think" });
const deltas = [];
for await (const delta of streamed.textStream) deltas.push(delta);
found.streamed = { deltas, reasoning: await streamed.reasoningText, usage: await streamed.usage };

const calling = streamText({ model, prompt: "#weather", tools, stopWhen: stepCountIs(3) });
await calling.consumeStream();
const steps = await calling.steps;
found.tools = {
  calls: steps.flatMap((step) => step.toolCalls).map((call) => [call.toolName, call.input]),
  texts: steps.map((step) => step.text),
  reasons: steps.map((step) => step.finishReason),
};

const schema = z.object({ answer: z.number().int() });
found.schema = (await generateText({ model, prompt: "#json", output: Output.object({ schema }) })).output;

const leaving = new AbortController();
const long = streamText({ model, prompt: "#long", abortSignal: leaving.signal, onError: () => {} });
let count = 0;
for await (const _ of long.textStream) if (++count === 5) leaving.abort();
found.cancelled = count;

console.log(JSON.stringify(found));
