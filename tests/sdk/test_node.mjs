// The official node SDK, unmodified, against the real binary. One line per case, and a line of totals.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";
import { start } from "./gateway.mjs";

const pinned = JSON.parse(readFileSync(new URL("package.json", import.meta.url)));
const messages = [{ role: "user", content: "May I pass?" }];
const gateway = await start();

const client = (apiKey = "sk-test-free", more = {}) =>
  new OpenAI({ apiKey, baseURL: `http://${gateway.data}/v1`, ...more });
const chat = (client, more = {}) => client.chat.completions.create({ model: "chat", messages, ...more });

async function all(stream) {
  const chunks = [];
  for await (const chunk of await stream) chunks.push(chunk);
  return chunks;
}

// A client with the SDK's own number of retries, and what it sent and got: when, status, headers.
function watched(apiKey) {
  const [sent, got] = [[], []];
  const watching = async (...request) => {
    sent.push(performance.now());
    const response = await fetch(...request);
    got.push({ at: performance.now(), status: response.status, headers: response.headers });
    return response;
  };
  return { watcher: client(apiKey, { fetch: watching }), sent, got };
}

const cases = {
  async "chat"() {
    const answer = await chat(client());
    assert.equal(answer.choices[0].finish_reason, "stop");
    assert.equal(answer.choices[0].message.content.trim().split(" ").length, 20);
    assert.equal(answer.usage.completion_tokens, 20);
  },
  async "streamed chat says the same"() {
    const whole = (await chat(client())).choices[0].message.content;
    const chunks = await all(chat(client(), { stream: true }));
    assert.ok(chunks.length > 10);
    assert.ok(chunks.every((chunk) => chunk.choices.length === 1 && !chunk.usage), "usage nobody asked for");
    assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), whole);
    assert.equal(chunks.at(-1).choices[0].finish_reason, "stop");
  },
  async "streamed chat with usage"() {
    const chunks = await all(chat(client(), { stream: true, stream_options: { include_usage: true } }));
    assert.deepEqual(chunks.at(-1).choices, []);
    assert.equal(chunks.at(-1).usage.completion_tokens, 20);
    assert.ok(chunks.slice(0, -1).every((chunk) => !chunk.usage));
  },
  async "completion"() {
    const answer = await client().completions.create({ model: "chat", prompt: "May I pass?", max_tokens: 3 });
    assert.equal(answer.choices[0].text.trim().split(" ").length, 3);
  },
  async "embedding"() {
    const body = { model: "embed", input: "May I pass?" };
    const floats = await client().embeddings.create({ ...body, encoding_format: "float" });
    // Without encoding_format the SDK asks for base64 and decodes what it gets, whatever it is.
    const decoded = await client().embeddings.create(body);
    assert.ok(floats.data[0].embedding.length > 1);
    assert.deepEqual(Array.from(decoded.data[0].embedding), floats.data[0].embedding.map(Math.fround));
    assert.ok(decoded.usage.prompt_tokens > 0);
  },
  async "models"() {
    const ids = (await all(client().models.list())).map((model) => model.id);
    assert.deepEqual(ids.sort(), ["chat", "embed", "gpt-4o-mini", "paced"]);
    assert.equal((await client().models.retrieve("chat")).id, "chat");
    await assert.rejects(client().models.retrieve("nothing"), OpenAI.NotFoundError);
  },
  async "400"() {
    await assert.rejects(chat(client(), { model: "" }), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.deepEqual([error.type, error.param], ["invalid_request_error", "model"]);
      return true;
    });
  },
  async "401"() {
    const before = await gateway.answered(401);
    await assert.rejects(chat(client("sk-test-nobody")), (error) => {
      assert.ok(error instanceof OpenAI.AuthenticationError);
      assert.equal(error.code, "invalid_api_key");
      return true;
    });
    assert.equal((await gateway.answered(401)) - before, 1);
  },
  async "403"() {
    await assert.rejects(chat(client("sk-test-narrow")), OpenAI.PermissionDeniedError);
  },
  async "404"() {
    await assert.rejects(chat(client(), { model: "nothing" }), (error) => {
      assert.ok(error instanceof OpenAI.NotFoundError);
      assert.equal(error.code, "model_not_found");
      return true;
    });
  },
  async "429 is waited out"() {
    const before = [await gateway.answered(200), await gateway.answered(429)];
    const { watcher, sent, got } = watched("sk-test-short");
    for (let i = 0; i < 3; i++) assert.equal((await chat(watcher)).usage.completion_tokens, 20);
    assert.deepEqual(got.map(({ status }) => status), [200, 200, 429, 200]);
    const refused = got[2];
    const told = Number(refused.headers.get("retry-after-ms"));
    assert.ok(told > 0 && told <= 3_000, `${told} ms`);
    assert.equal(Number(refused.headers.get("retry-after")), Math.ceil(told / 1_000));
    assert.equal(refused.headers.get("x-should-retry"), null);
    assert.ok(sent[3] - refused.at >= told - 10, `told ${told} ms, waited ${sent[3] - refused.at} ms`);
    assert.deepEqual([await gateway.answered(200), await gateway.answered(429)], [before[0] + 3, before[1] + 1]);
  },
  async "429 that is not worth a retry"() {
    for (const user of ["slow", "daily"]) {
      const before = await gateway.answered(429);
      const { watcher, sent, got } = watched(`sk-test-${user}`);
      await chat(watcher);
      await assert.rejects(chat(watcher), (error) => {
        assert.ok(error instanceof OpenAI.RateLimitError);
        assert.deepEqual([error.type, error.code], ["requests", "rate_limit_exceeded"]);
        assert.ok(error.error.rule.startsWith(user), error.error.rule);
        return true;
      });
      assert.equal(got.at(-1).headers.get("x-should-retry"), "false");
      assert.deepEqual([sent.length, await gateway.answered(429)], [2, before + 1]);
    }
  },
  async "429 of tokens is waited out"() {
    const { watcher, sent, got } = watched("sk-test-writer");
    for (let i = 0; i < 2; i++) assert.equal((await chat(watcher, { max_tokens: 80 })).usage.completion_tokens, 20);
    assert.deepEqual(got.map(({ status }) => status), [200, 429, 200]);
    const told = Number(got[1].headers.get("retry-after-ms"));
    assert.ok(told > 0 && told <= 3_000, `${told} ms`);
    assert.equal(got[1].headers.get("x-ratelimit-limit-tokens"), "100");
    assert.ok(sent[2] - got[1].at >= told - 10, `told ${told} ms, waited ${sent[2] - got[1].at} ms`);
  },
  async "429 of calls in flight is tried again after a second"() {
    const { watcher, sent, got } = watched("sk-test-lane");
    const stream = await chat(watcher, { model: "paced", stream: true });
    assert.equal((await chat(watcher)).usage.completion_tokens, 20);
    assert.ok((await all(stream)).length > 0);
    assert.deepEqual(got.map(({ status }) => status), [200, 429, 200]);
    assert.deepEqual(["retry-after", "retry-after-ms"].map((name) => got[1].headers.get(name)), ["1", "1000"]);
    assert.ok(sent[2] - got[1].at >= 990, `waited ${sent[2] - got[1].at} ms`);
  },
  async "429 of money is not worth a retry"() {
    const { watcher, sent, got } = watched("sk-test-poor");
    await chat(watcher);
    await assert.rejects(chat(watcher), (error) => {
      assert.ok(error instanceof OpenAI.RateLimitError);
      assert.deepEqual([error.type, error.code], ["insufficient_quota", "insufficient_quota"]);
      return true;
    });
    assert.deepEqual([sent.length, got.at(-1).headers.get("x-should-retry")], [2, "false"]);
  },
  async "403 of a rule"() {
    const denied = client("sk-test-lane").embeddings.create({ model: "embed", input: "May I pass?" });
    await assert.rejects(denied, (error) => error instanceof OpenAI.PermissionDeniedError && error.code === "denied");
  },
};

const counts = { passed: 0, failed: 0 };
for (const [name, run] of Object.entries(cases)) {
  try {
    await run();
    counts.passed += 1;
    console.log(`ok      node: ${name}`);
  } catch (error) {
    counts.failed += 1;
    console.log(`FAILED  node: ${name}`);
    console.error(error);
  }
}
await gateway.stop();
console.log(`node SDK ${pinned.dependencies.openai}: ${counts.passed} passed, ${counts.failed} failed`);
process.exitCode = counts.failed === 0 && counts.passed > 0 ? 0 : 1;
