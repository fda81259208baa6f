"""A scripted neuron: says what a test needs to hear, so that tools are called and failures happen when they should.

usage: node.py PORT
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "scripted"
ANSWER = "It is sunny."
seen = {}  # how often each text has been asked


class Node(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, value, status=200, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        for name, header in headers.items():
            self.send_header(name.replace("_", "-"), header)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status, message, **headers):
        self.reply({"error": {"message": message, "type": "x", "code": None}}, status, **headers)

    def do_GET(self):
        if self.path == "/discovery":
            device = {"id": "cpu", "name": "scripted", "total_bytes": 1000, "free_bytes": 1000}
            self.reply({"host": "scripted", "version": "0", "devices": [device], "features": ["cpu"]})
        else:
            can = ["chat", "completions", "tools", "thinking"]
            model = {"id": MODEL, "state": "loaded", "context_length": 4096, "capabilities": can}
            self.reply({"models": [model]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/tokenize":
            return self.reply({"count": 4321, "max_model_len": 4096, "tokens": []})
        last = request["messages"][-1]
        text = last["content"]
        if isinstance(text, list):
            text = "".join(part.get("text", "") for part in text)
        seen[text] = seen.get(text, 0) + 1
        if text == "always busy" or text.startswith("busy once") and seen[text] == 1:
            return self.refuse(429, "the queue is full", retry_after="1")
        if text == "down":
            return self.refuse(503, "draining")
        if text == "broken":
            return self.refuse(500, "poisoned")
        message, finish, stop = {"role": "assistant", "content": ANSWER}, "stop", None
        if request.get("tools") and last["role"] != "tool":
            name = request["tools"][0]["function"]["name"]
            calls = [
                {"id": f"call_{place}", "type": "function",
                 "function": {"name": name, "arguments": json.dumps({"place": place})}}
                for place in ("Bern", "Basel")
            ]
            message, finish = {"role": "assistant", "content": None, "tool_calls": calls}, "tool_calls"
        elif "response_format" in request:
            message["content"] = json.dumps({"name": "Ada", "age": 36})
        elif request.get("stop"):
            message["content"], stop = "It is", request["stop"][0]
        if request.get("chat_template_kwargs", {}).get("enable_thinking"):
            message["reasoning_content"] = "Let me see."
        usage = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25,
                 "prompt_tokens_details": {"cached_tokens": 8}, "completion_tokens_details": {"reasoning_tokens": 2}}
        head = {"id": "chatcmpl-1", "created": 1, "model": request["model"]}
        if not request.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": finish, "stop_reason": stop}
            return self.reply({**head, "object": "chat.completion", "choices": [choice], "usage": usage})
        self.stream(head, message, finish, stop, usage, torn=text == "die")

    def stream(self, head, message, finish, stop, usage, torn):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

        def send(choices, **more):
            self.event(json.dumps({**head, "object": "chat.completion.chunk", "choices": choices, **more}))

        def delta(**delta):
            send([{"index": 0, "delta": delta, "finish_reason": None}])

        delta(role="assistant", content="")
        for word in message.get("reasoning_content", "").split(" "):
            delta(reasoning_content=word)
        for piece in (message["content"] or "").partition(" "):
            delta(content=piece)
        if torn:
            self.event(json.dumps({"error": {"message": "poisoned", "type": "server_error", "code": None}}))
        else:
            for index, call in enumerate(message.get("tool_calls", [])):
                delta(tool_calls=[{**call, "index": index, "function": {**call["function"], "arguments": ""}}])
                for piece in call["function"]["arguments"].partition(" "):
                    delta(tool_calls=[{"index": index, "function": {"arguments": piece}}])
            send([{"index": 0, "delta": {}, "finish_reason": finish, "stop_reason": stop}])
            send([], usage=usage)
            self.event("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def event(self, data):
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Node).serve_forever()
