// The official Node SDKs against the demo model: whole and streamed answers agree, tools run in loops, answers are held
// to a shape, prompts are counted. The model is too small to choose well, so tools are asked for and shapes are bounded.
//
// usage: node demo.mjs BASE_URL MODEL, with the SDKs in NODE_CLIENTS/node_modules

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";

const require = createRequire(join(process.env.NODE_CLIENTS, "here.js"));
const { default: OpenAI } = require("openai");
const { default: Anthropic } = require("@anthropic-ai/sdk");
const [base, model] = process.argv.slice(2);
const openai = new OpenAI({ baseURL: `${base}/v1`, apiKey: "unused", maxRetries: 0 });
const anthropic = new Anthropic({ baseURL: base, apiKey: "unused", maxRetries: 0 });

const user = (content) => [{ role: "user", content }];
const object = (properties) => ({ type: "object", properties, required: Object.keys(properties), additionalProperties: false });
const seasons = ["spring", "summer", "autumn", "winter"];
const parameters = object({ season: { type: "string", enum: seasons } });
const verdict = object({ answer: { type: "string", enum: ["yes", "no"] } });
const question = "How warm is it?";
const ran = [];
const warmth = ({ season }) => (assert.ok(seasons.includes(season)), ran.push(season), `${10 * seasons.indexOf(season)} degrees`);

async function chat() {
  const tool = { type: "function", function: { name: "warmth", description: "The warmth of a season", parameters, strict: true } };
  const ask = { model, reasoning_effort: "none", max_tokens: 64, temperature: 0 };
  // the SDK's own loop: it runs a tool that is named, and ends there
  const runner = openai.chat.completions.runTools({
    ...ask,
    messages: user(question),
    tool_choice: { type: "function", function: { name: "warmth" } },
    tools: [{ type: "function", function: { ...tool.function, parse: JSON.parse, function: warmth } }],
  });
  await runner.done();
  const messages = runner.messages;
  assert.deepEqual(messages.map((message) => message.role), ["user", "assistant", "tool"]);
  const told = await openai.chat.completions.create({ ...ask, messages, tools: [tool], tool_choice: "none" });
  assert.ok(told.choices[0].message.content);
  const format = { type: "json_schema", json_schema: { name: "verdict", schema: verdict, strict: true } };
  const parsed = await openai.chat.completions.parse({ ...ask, messages: user(question), response_format: format });
  assert.ok(["yes", "no"].includes(parsed.choices[0].message.parsed.answer));
}

async function responses() {
  const tool = { type: "function", name: "warmth", description: "The warmth of a season", parameters, strict: true };
  const ask = { model, reasoning: { effort: "none" }, max_output_tokens: 64, temperature: 0 };
  const whole = await openai.responses.create({ ...ask, input: "Hello" });
  const streamed = await openai.responses.stream({ ...ask, input: "Hello" }).finalResponse();
  assert.equal(streamed.output_text, whole.output_text);
  assert.deepEqual(streamed.usage, whole.usage);

  const asked = await openai.responses.stream({ ...ask, input: question, tools: [tool], tool_choice: "required" }).finalResponse();
  const call = asked.output.find((item) => item.type === "function_call");
  const result = { type: "function_call_output", call_id: call.call_id, output: warmth(JSON.parse(call.arguments)) };
  const told = await openai.responses.create({ ...ask, input: [result], tools: [tool], tool_choice: "none", previous_response_id: asked.id });
  assert.ok(told.output_text);
  assert.equal(told.previous_response_id, asked.id);
  const kept = await openai.responses.retrieve(told.id);
  assert.deepEqual(kept.output, told.output);
  const items = [];
  for await (const item of openai.responses.inputItems.list(told.id, { order: "asc", limit: 1 })) items.push(item.type);
  assert.deepEqual(items, ["message", "function_call", "function_call_output"]);
  await openai.responses.delete(told.id);
  await assert.rejects(openai.responses.retrieve(told.id), OpenAI.NotFoundError);

  const parsed = await openai.responses.parse({ ...ask, input: question, text: { format: { type: "json_schema", name: "verdict", schema: verdict, strict: true } } });
  assert.ok(["yes", "no"].includes(parsed.output_parsed.answer));
  const scored = await openai.responses.create({ ...ask, input: question, include: ["message.output_text.logprobs"], top_logprobs: 2, max_output_tokens: 8 });
  const [text] = scored.output.at(-1).content;
  assert.equal(text.logprobs.map((token) => token.token).join(""), text.text);
}

async function messages() {
  const ask = { model, max_tokens: 64, temperature: 0 };
  const text = (message) => message.content.map((block) => block.text ?? "").join("");
  const whole = await anthropic.messages.create({ ...ask, messages: user("Hello") });
  const streamed = await anthropic.messages.stream({ ...ask, messages: user("Hello") }).finalMessage();
  assert.equal(text(streamed), text(whole));
  assert.equal(streamed.usage.output_tokens, whole.usage.output_tokens);

  const tools = [{ name: "warmth", description: "The warmth of a season", input_schema: parameters, strict: true }];
  const asked = await anthropic.messages.stream({ ...ask, messages: user(question), tools, tool_choice: { type: "any" } }).finalMessage();
  assert.equal(asked.stop_reason, "tool_use");
  const call = asked.content.find((block) => block.type === "tool_use");
  const result = { type: "tool_result", tool_use_id: call.id, content: warmth(call.input) };
  const turns = [...user(question), { role: "assistant", content: asked.content }, { role: "user", content: [result] }];
  const told = await anthropic.messages.create({ ...ask, messages: turns, tools, tool_choice: { type: "none" } });
  assert.ok(text(told));
  const counted = await anthropic.messages.countTokens({ model, messages: turns, tools });
  const answered = await anthropic.messages.create({ ...ask, messages: turns, tools });
  assert.equal(counted.input_tokens, answered.usage.input_tokens + answered.usage.cache_read_input_tokens);
  const output_config = { format: { type: "json_schema", schema: verdict } };
  const parsed = await anthropic.messages.parse({ ...ask, messages: user(question), output_config });
  assert.ok(["yes", "no"].includes(JSON.parse(text(parsed)).answer));
}

for (const dialect of [chat, responses, messages]) {
  ran.length = 0;
  await dialect();
  assert.equal(ran.length, 1, `${dialect.name} ran a tool once`);
}
console.log("Node: the demo model answers, calls tools, keeps to shapes and counts as it should");
