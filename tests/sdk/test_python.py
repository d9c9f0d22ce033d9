"""The official Python SDK, unmodified, against the real binary. One line per case, and a line of totals."""

import os
import sys
import time
import unittest

# A proxy of the machine is not for addresses of the machine.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"

import openai

from gateway import Gateway

MESSAGES = [{"role": "user", "content": "May I pass?"}]
gateway = None


def setUpModule():
    global gateway
    gateway = unittest.enterModuleContext(Gateway())


class Sdk(unittest.TestCase):
    def client(self, key="sk-test-free", **more):
        client = openai.OpenAI(api_key=key, base_url=f"http://{gateway.data}/v1", **more)
        self.addCleanup(client.close)
        return client

    def watched(self, key):
        """A client with the SDK's own number of retries, and what it sent and got: time, status, headers."""
        sent, got = [], []
        hooks = {
            "request": [lambda request: sent.append(time.monotonic())],
            "response": [lambda response: got.append((time.monotonic(), response.status_code, response.headers))],
        }
        return self.client(key, http_client=openai.DefaultHttpxClient(event_hooks=hooks)), sent, got

    def chat(self, client, **more):
        return client.chat.completions.create(**{"model": "chat", "messages": MESSAGES, **more})

    def test_chat(self):
        answer = self.chat(self.client())
        self.assertEqual(answer.choices[0].finish_reason, "stop")
        self.assertEqual(len(answer.choices[0].message.content.split()), 20)
        self.assertEqual(answer.usage.completion_tokens, 20)
        self.assertEqual(answer.usage.total_tokens, answer.usage.prompt_tokens + 20)

    def test_chat_by_alias(self):
        self.assertEqual(self.chat(self.client(), model="gpt-4o-mini").usage.completion_tokens, 20)

    def test_streamed_chat_says_the_same(self):
        client = self.client()
        whole = self.chat(client).choices[0].message.content
        chunks = list(self.chat(client, stream=True))
        self.assertTrue(all(chunk.choices and chunk.usage is None for chunk in chunks), "usage nobody asked for")
        self.assertGreater(len(chunks), 10)
        self.assertEqual("".join(chunk.choices[0].delta.content or "" for chunk in chunks), whole)
        self.assertEqual(chunks[-1].choices[0].finish_reason, "stop")

    def test_stream_comes_as_it_is_made(self):
        # 10 tokens at 20 a second: the first one is here long before the last.
        times = [time.monotonic() for chunk in self.chat(self.client(), model="paced", stream=True)]
        self.assertGreater(times[-1] - times[0], 0.3)

    def test_streamed_chat_with_usage(self):
        chunks = list(self.chat(self.client(), stream=True, stream_options={"include_usage": True}))
        self.assertEqual(chunks[-1].choices, [])
        self.assertEqual(chunks[-1].usage.completion_tokens, 20)
        self.assertTrue(all(chunk.usage is None for chunk in chunks[:-1]))

    def test_completion(self):
        answer = self.client().completions.create(model="chat", prompt="May I pass?", max_tokens=3)
        self.assertEqual(len(answer.choices[0].text.split()), 3)

    def test_embedding(self):
        # No encoding_format: the SDK asks for base64 and must read what it gets.
        answer = self.client().embeddings.create(model="embed", input="May I pass?")
        self.assertGreater(len(answer.data[0].embedding), 1)
        self.assertTrue(all(isinstance(number, float) for number in answer.data[0].embedding))
        self.assertGreater(answer.usage.prompt_tokens, 0)

    def test_models(self):
        self.assertEqual(sorted(model.id for model in self.client().models.list()), ["chat", "embed", "gpt-4o-mini", "paced"])
        self.assertEqual([model.id for model in self.client("sk-test-narrow").models.list()], ["embed"])

    def test_one_model(self):
        self.assertEqual(self.client().models.retrieve("chat").id, "chat")
        with self.assertRaises(openai.NotFoundError):
            self.client().models.retrieve("nothing")

    def test_400(self):
        with self.assertRaises(openai.BadRequestError) as raised:
            self.chat(self.client(), model="")
        self.assertEqual((raised.exception.type, raised.exception.param), ("invalid_request_error", "model"))

    def test_401(self):
        before = gateway.answered(401)
        with self.assertRaises(openai.AuthenticationError) as raised:
            self.chat(self.client("sk-test-nobody"))
        self.assertEqual(raised.exception.code, "invalid_api_key")
        self.assertEqual(gateway.answered(401) - before, 1)

    def test_403(self):
        with self.assertRaises(openai.PermissionDeniedError) as raised:
            self.chat(self.client("sk-test-narrow"))
        self.assertEqual(raised.exception.code, "model_not_allowed")

    def test_404(self):
        with self.assertRaises(openai.NotFoundError) as raised:
            self.chat(self.client(), model="nothing")
        self.assertEqual(raised.exception.code, "model_not_found")

    def test_429_is_waited_out(self):
        before = gateway.answered(200), gateway.answered(429)
        client, sent, got = self.watched("sk-test-short")
        for _ in range(3):
            self.assertEqual(self.chat(client).usage.completion_tokens, 20)
        self.assertEqual([status for _, status, _ in got], [200, 200, 429, 200])
        refused_at, _, headers = got[2]
        told, waited = int(headers["retry-after-ms"]) / 1000, sent[3] - refused_at
        self.assertLessEqual(told, 3)
        self.assertEqual(int(headers["retry-after"]), -(-int(headers["retry-after-ms"]) // 1000))
        self.assertNotIn("x-should-retry", headers)
        self.assertGreaterEqual(waited, told - 0.01)
        self.assertEqual((gateway.answered(200) - before[0], gateway.answered(429) - before[1]), (3, 1))

    def test_429_that_is_not_worth_a_retry(self):
        for user in ("slow", "daily"):
            with self.subTest(user):
                before = gateway.answered(429)
                client, sent, got = self.watched(f"sk-test-{user}")
                self.chat(client)
                with self.assertRaises(openai.RateLimitError) as raised:
                    self.chat(client)
                self.assertEqual((raised.exception.type, raised.exception.code), ("requests", "rate_limit_exceeded"))
                self.assertTrue(raised.exception.body["rule"].startswith(user), raised.exception.body)
                self.assertEqual(got[-1][2]["x-should-retry"], "false")
                self.assertEqual((len(sent), gateway.answered(429) - before), (2, 1))

    def test_429_of_tokens_is_waited_out(self):
        client, sent, got = self.watched("sk-test-writer")
        for _ in range(2):
            self.assertEqual(self.chat(client, max_tokens=80).usage.completion_tokens, 20)
        self.assertEqual([status for _, status, _ in got], [200, 429, 200])
        refused_at, _, headers = got[1]
        told = int(headers["retry-after-ms"]) / 1000
        self.assertLessEqual(told, 3)
        self.assertEqual(headers["x-ratelimit-limit-tokens"], "100")
        self.assertGreaterEqual(sent[2] - refused_at, told - 0.01)

    def test_429_of_calls_in_flight_is_tried_again_after_a_second(self):
        client, sent, got = self.watched("sk-test-lane")
        with self.chat(client, model="paced", stream=True) as stream:
            next(stream)
            self.assertEqual(self.chat(client).usage.completion_tokens, 20)
        self.assertEqual([status for _, status, _ in got], [200, 429, 200])
        refused_at, _, headers = got[1]
        self.assertEqual((headers["retry-after"], headers["retry-after-ms"]), ("1", "1000"))
        self.assertGreaterEqual(sent[2] - refused_at, 0.99)

    def test_429_of_money_is_not_worth_a_retry(self):
        client, sent, got = self.watched("sk-test-poor")
        self.chat(client)
        with self.assertRaises(openai.RateLimitError) as raised:
            self.chat(client)
        self.assertEqual((raised.exception.type, raised.exception.code), ("insufficient_quota", "insufficient_quota"))
        self.assertEqual((len(sent), got[-1][2]["x-should-retry"]), (2, "false"))

    def test_403_of_a_rule(self):
        with self.assertRaises(openai.PermissionDeniedError) as raised:
            self.client("sk-test-lane").embeddings.create(model="embed", input="May I pass?")
        self.assertEqual(raised.exception.code, "denied")


class Lines(unittest.TestResult):
    """One line per case."""

    def stopTest(self, test):
        super().stopTest(test)
        faults = [text for case, text in self.failures + self.errors if getattr(case, "test_case", case) is test]
        print(f"{'FAILED' if faults else 'ok':6}  python: {test._testMethodName.removeprefix('test_').replace('_', ' ')}")
        for text in faults:
            print(text, file=sys.stderr)


if __name__ == "__main__":
    result = Lines()
    unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"]).run(result)
    faults = result.failures + result.errors
    failed = {getattr(case, "test_case", case) for case, _ in faults if isinstance(case, unittest.TestCase)}
    # A gateway that did not start is no test that ran.
    unstarted = [text for case, text in faults if not isinstance(case, unittest.TestCase)]
    print(*unstarted, sep="\n", end="", file=sys.stderr)
    passed = result.testsRun - len(failed)
    print(f"python SDK {openai.__version__}: {passed} passed, {len(failed) + len(unstarted)} failed")
    sys.exit(0 if passed and not faults else 1)
