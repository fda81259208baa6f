// The official Node SDKs against a cortex over the scripted node, and against the demo model.
//
// usage: node scripted.mjs SCRIPTED_URL DEMO_URL DEMO_MODEL, with the SDKs in NODE_CLIENTS/node_modules

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";

const require = createRequire(join(process.env.NODE_CLIENTS, "here.js"));
const { default: OpenAI } = require("openai");
const { default: Anthropic } = require("@anthropic-ai/sdk");
const [scripted, demo, demoModel] = process.argv.slice(2);
const model = "scripted";
const user = (content) => [{ role: "user", content }];
const schema = { type: "object", properties: { place: { type: "string" } }, required: ["place"] };

async function openaiChat(base) {
  const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: "unused", maxRetries: 0 });
  const tool = { type: "function", function: { name: "weather", parameters: schema } };
  const stream = client.chat.completions.stream({ model, messages: user("Weather?"), tools: [tool] });
  const whole = await stream.finalChatCompletion();
  const calls = whole.choices[0].message.tool_calls;
  assert.deepEqual(calls.map((call) => JSON.parse(call.function.arguments).place), ["Bern", "Basel"]);
  const asked = [];
  const run = (place) => (asked.push(place), "sunny");
  const runner = client.chat.completions.runTools({
    model,
    messages: user("Weather?"),
    tools: [{ type: "function", function: { name: "weather", description: "d", parameters: schema, parse: JSON.parse, function: ({ place }) => run(place) } }],
  });
  assert.equal(await runner.finalContent(), "It is sunny.");
  assert.deepEqual(asked, ["Bern", "Basel"]);
  const ask = (text, options) => client.chat.completions.create({ model, messages: user(text) }, options);
  await assert.rejects(ask("always busy"), OpenAI.RateLimitError);
  await assert.rejects(ask("down"), OpenAI.InternalServerError);
  await assert.rejects(client.chat.completions.create({ model: "nobody", messages: user("x") }), OpenAI.NotFoundError);
  assert.ok((await ask("busy once, openai in node", { maxRetries: 2 })).choices[0].message.content);
}

async function anthropicMessages(base) {
  const client = new Anthropic({ baseURL: base, apiKey: "unused", maxRetries: 0 });
  const tool = { name: "weather", description: "Weather at a place", input_schema: schema };
  const ask = { model, max_tokens: 3000 };
  const thinking = { type: "enabled", budget_tokens: 2000 };
  const stream = client.messages.stream({ ...ask, messages: user("Weather?"), tools: [tool], thinking });
  const whole = await stream.finalMessage();
  assert.deepEqual(whole.content.map((block) => block.type), ["thinking", "tool_use", "tool_use"]);
  assert.deepEqual(whole.content.slice(1).map((block) => block.input.place), ["Bern", "Basel"]);
  assert.equal(whole.stop_reason, "tool_use");
  assert.equal(whole.usage.cache_read_input_tokens, 8);
  const results = whole.content.slice(1).map((block) => ({ type: "tool_result", tool_use_id: block.id, content: "sunny" }));
  const messages = [...user("Weather?"), { role: "assistant", content: whole.content }, { role: "user", content: results }];
  const reply = await client.messages.create({ ...ask, messages, tools: [tool] });
  assert.equal(reply.content[0].text, "It is sunny.");
  const count = await client.messages.countTokens({ model, messages: user("x") });
  assert.equal(count.input_tokens, 4321);
  const listed = [];
  for await (const card of client.models.list({ limit: 1 })) listed.push(card.id);
  assert.deepEqual(listed, [model]);
  const send = (text, options) => client.messages.create({ ...ask, messages: user(text) }, options);
  await assert.rejects(send("always busy"), Anthropic.RateLimitError);
  await assert.rejects(send("down"), (error) => error instanceof Anthropic.APIError && error.status === 529);
  await assert.rejects(client.messages.create({ ...ask, messages: [{ role: "robot", content: "x" }] }), Anthropic.BadRequestError);
  assert.ok((await send("busy once, anthropic in node", { maxRetries: 2 })).content);
}

// the demo model itself: whole and streamed answers agree
async function demoModelAnswers(base) {
  const client = new Anthropic({ baseURL: base, apiKey: "unused", maxRetries: 0 });
  const ask = { model: demoModel, max_tokens: 16, messages: user("Hello"), temperature: 0 };
  const text = (message) => message.content.map((block) => block.text ?? "").join("");
  const whole = await client.messages.create(ask);
  const streamed = await client.messages.stream(ask).finalMessage();
  assert.equal(text(streamed), text(whole));
  assert.equal(streamed.usage.output_tokens, whole.usage.output_tokens);
  const openai = new OpenAI({ baseURL: `${base}/v1`, apiKey: "unused", maxRetries: 0 });
  const reply = await openai.chat.completions.create({ model: demoModel, max_tokens: 16, messages: user("Hello"), temperature: 0 });
  assert.equal(reply.choices[0].message.content ?? "", text(whole));
}

await openaiChat(scripted);
await anthropicMessages(scripted);
await demoModelAnswers(demo);
console.log("Node: tools, thinking, failures, retries and the demo model as they should be");
