// The official Node SDKs against a cortex over the scripted node.
//
// usage: node scripted.mjs BASE_URL, with the SDKs in NODE_CLIENTS/node_modules

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";

const require = createRequire(join(process.env.NODE_CLIENTS, "here.js"));
const { default: OpenAI } = require("openai");
const { default: Anthropic } = require("@anthropic-ai/sdk");
const [base] = process.argv.slice(2);
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

async function openaiResponses(base) {
  const client = new OpenAI({ baseURL: `${base}/v1`, apiKey: "unused", maxRetries: 0 });
  const tool = { type: "function", name: "weather", parameters: schema, strict: true };
  const stream = client.responses.stream({ model, input: "Weather?", tools: [tool], reasoning: { summary: "auto" } });
  const kinds = [];
  for await (const event of stream) kinds.push(event.type);
  const whole = await stream.finalResponse();
  assert.equal(kinds[0], "response.created");
  assert.equal(kinds.at(-1), "response.completed");
  const calls = whole.output.filter((item) => item.type === "function_call");
  assert.deepEqual(calls.map((call) => JSON.parse(call.arguments).place), ["Bern", "Basel"]);
  assert.equal(whole.usage.input_tokens_details.cached_tokens, 8);
  const results = calls.map((call) => ({ type: "function_call_output", call_id: call.call_id, output: "sunny" }));
  const told = await client.responses.create({ model, input: results, tools: [tool], previous_response_id: whole.id });
  assert.equal(told.output_text, "It is sunny.");
  const format = { type: "json_schema", name: "person", schema: { type: "object", properties: { name: { type: "string" } } } };
  const parsed = await client.responses.parse({ model, input: "Who?", text: { format } });
  assert.deepEqual(parsed.output_parsed, { name: "Ada", age: 36 });
  const ask = (input, options) => client.responses.create({ model, input }, options);
  await assert.rejects(ask("always busy"), OpenAI.RateLimitError);
  await assert.rejects(ask("down"), OpenAI.InternalServerError);
  await assert.rejects(client.responses.create({ model: "nobody", input: "x" }), OpenAI.NotFoundError);
  const refused = (error) => error instanceof OpenAI.BadRequestError && error.param === "background";
  await assert.rejects(client.responses.create({ model, input: "x", background: true }), refused);
  await assert.rejects(client.responses.stream({ model, input: "die" }).finalResponse(), /poisoned/);
  assert.ok((await ask("busy once, responses in node", { maxRetries: 2 })).output_text);
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

await openaiChat(base);
await openaiResponses(base);
await anthropicMessages(base);
console.log("Node: tools, thinking, failures and retries as they should be");
