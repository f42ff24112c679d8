"""VLLMClient with a stand-in for `vllm serve`; the real one is in tests/real_servers."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest

from flexbench.core.endpoint import Exchange, FailureKind, GenerationRequest, ServiceContext
from flexbench.core.errors import ConfigError, MissingDependencyError, RunError, WorkerError
from flexbench.core.progress import Silence
from flexbench.serving.clients.vllm import VLLMClient, VLLMConfig

# Healthy at the second question only. Its model has a name of the server's own.
STAND_IN = """
import http.server, json, os, sys
print("arguments", *sys.argv[1:], flush=True)
print("environment", os.environ.get("HF_HUB_OFFLINE"), os.environ.get("VLLM_NO_USAGE_STATS"), flush=True)
if "--fail" in sys.argv:
    sys.exit("importlib.metadata.PackageNotFoundError: No package metadata was found for vllm")
port = int(sys.argv[sys.argv.index("--port") + 1])
questions = 0

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        global questions
        if self.path == "/health":
            questions += 1
            self.answer(200 if questions > 1 else 503, {})
        elif self.path == "/version":
            self.answer(200, {"version": "1.2.3"})
        elif self.path == "/v1/models":
            key = os.environ.get("VLLM_API_KEY")
            allowed = key is None or self.headers.get("Authorization") == f"Bearer {key}"
            models = {"data": [{"id": "its-name", "max_model_len": 100}]}
            self.answer(200, models) if allowed else self.answer(401, {})
        else:
            self.answer(404, {})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choice = {"index": 0, "text": json.dumps([self.path, asked], sort_keys=True), "finish_reason": "length"}
        usage = {"prompt_tokens": 5, "completion_tokens": asked["max_tokens"]}
        self.answer(200, {"choices": [choice], "usage": usage})

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Notes(Silence):
    def __init__(self):
        self.notes = []
        self.phases = []

    @contextmanager
    def phase(self, description, total):  # noqa: ARG002
        self.phases.append(description)
        yield self

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return str(folder)


@pytest.fixture
def command(tmp_path):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    return f"'{sys.executable}' -S '{script}' serve"


@pytest.fixture
def context(tmp_path):
    return ServiceContext(
        progress=Notes(),
        log_folder=tmp_path,
        scratch_folder=tmp_path,
        timeout_s=10,
        raise_if_stopped=lambda: None,
        streaming=False,
        max_prompt_tokens=80,
        max_new_tokens=20,
        max_in_flight=1,
    )


@pytest.fixture
def started(command, model, context):
    client = VLLMClient(VLLMConfig(model=model, vllm_command=command))
    try:
        client.start_service(context)
        yield client
    finally:
        client.stop_service()


async def ask(config):
    client = VLLMClient(config)
    await client.open(1)
    request = GenerationRequest(
        index=0, prompt="hello", prompt_tokens=5, max_new_tokens=7, is_streaming=False
    )
    exchange = Exchange()
    await client.send_request(client.prepare_request(request), exchange)
    await client.close()
    return client.process_response(exchange)


def test_the_command_of_vllm_serve():
    config = VLLMConfig(
        model="some/model", tp_size=2, port=80, vllm_args="--max-model-len 4096 --dtype 'float16'"
    )
    assert config.command() == [
        *("vllm", "serve", "some/model", "--max-model-len", "4096", "--dtype", "float16"),
        *("--tensor-parallel-size", "2", "--host", "127.0.0.1", "--port", "80"),
    ]


def test_the_command_of_a_module_gets_the_model_as_an_option():
    config = VLLMConfig(model="m", port=80, vllm_command="/env/bin/python -m vllm.module")
    assert config.command()[:5] == ["/env/bin/python", "-m", "vllm.module", "--model", "m"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "--model: is needed with --api vllm"),
        ({"model": "auto"}, "--model: is needed with --api vllm"),
        ({"tp_size": 0}, "--tp-size: must be a whole number of at least 1"),
        ({"port": 0}, "--port: must be a whole number of at least 1"),
        ({"port": 65536}, "--port: must be a whole number of at most 65535"),
        ({"vllm_command": " "}, "--vllm-command: must name a command"),
        ({"vllm_command": "vllm 'serve"}, "--vllm-command: cannot be split into words"),
        ({"vllm_args": "--dtype 'float16"}, "--vllm-args: cannot be split into words"),
        ({"vllm_args": "--port=1"}, "--vllm-args: must not have --port: give --port instead"),
        ({"vllm_args": "--tensor_parallel_size 2"}, "--vllm-args: .*: give --tp-size instead"),
        ({"vllm_args": "--host 0.0.0.0"}, r"--vllm-args: .*: the server listens on 127\.0\.0\.1"),
        ({"vllm_args": "--por 3"}, "--vllm-args: must not have --por: give --port instead"),
        ({"vllm_args": "--hos=0.0.0.0"}, "--vllm-args: must not have --hos: the server listens"),
        ({"vllm_args": "-tp2"}, "--vllm-args: must not have -tp2: give --tp-size instead"),
        ({"vllm_args": "-t 2"}, "--vllm-args: must not have -t: give --tp-size instead"),
        ({"vllm_args": "--tensor_par 2"}, "--vllm-args: .*: give --tp-size instead"),
        ({"vllm_args": "--mod x"}, "--vllm-args: must not have --mod: give --model instead"),
        ({"vllm_args": "--max-num-seqs 2 --"}, "--vllm-args: must not have --: "),
        ({"model": "--port=3"}, "--model: must be a folder, or a name on a hub, not an option"),
        ({"endpoint": "embeddings"}, "--endpoint: must be completions or chat"),
        ({"temperature": -1.0}, "--temperature: must be a number of at least 0"),
        ({"extra_body": "["}, "--extra-body: is not JSON"),
    ],
)
def test_values_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        VLLMConfig(**{"model": "m", **options})


@pytest.mark.parametrize(
    "words",
    [
        "--api-key s3cret",
        "--api-key=s3cret",
        "--api_key s3cret",
        "--api-k s3cret",
        "--api s3cret",
        "--hf_token s3cret",
        "--hf-t s3cret",
        "--some-password=s3cret",
        "VLLM_API_KEY=s3cret x",
        "--env HF_TOKEN=s3cret",
        "-eHF_TOKEN=s3cret",
        "sh -c 'x --api-key s3cret'",
        "s3cret --api-key",
    ],
)
def test_secrets_are_no_arguments(words):
    for options in ({"vllm_args": words}, {"vllm_command": f"env {words} vllm serve"}):
        option = f"--{next(iter(options)).replace('_', '-')}"
        with pytest.raises(
            ConfigError, match=f"{option}: must not have keys.* VLLM_API_KEY"
        ) as caught:
            VLLMConfig(model="m", **options)
        assert "s3cret" not in str(caught.value)


def test_arguments_that_look_like_others():
    words = "--api-server-count 2 --hf-overrides {} --max-num-batched-tokens 9 --trust-remote-code"
    assert VLLMConfig(model="m", vllm_args=words).further_arguments() == words.split()


def test_without_what_sends_requests_nothing_is_started(command, model, context, monkeypatch):
    monkeypatch.setitem(sys.modules, "httptools", None)
    client = VLLMClient(VLLMConfig(model=model, vllm_command=command))
    with pytest.raises(MissingDependencyError, match="needs httptools"):
        client.start_service(context)
    client.stop_service()
    assert not (context.log_folder / "vllm.log").exists()


def test_a_server_is_started_described_asked_and_ended(started, command, model, context):
    port = started.config.port
    described = started.describe_service()
    assert 0 <= described.pop("ready_after_s") < 10
    assert described == {
        "url": f"http://127.0.0.1:{port}/v1/completions",
        "version": "1.2.3",
        "command": f"{command} {model} --tensor-parallel-size 1 --host 127.0.0.1 --port {port}".replace("'", ""),
        "model": "its-name",
        "max_model_len": 100,
    }  # fmt: skip
    assert context.progress.notes == []
    assert "environment 1 1" in (context.log_folder / "vllm.log").read_text()

    response = asyncio.run(ask(started.config))
    assert (response.failure, response.prompt_tokens, response.output_tokens) == (None, 5, 7)
    path, asked = json.loads(response.texts[0])
    assert path == "/v1/completions"
    assert asked == {
        "model": "its-name",
        "prompt": "hello",
        "max_tokens": 7,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": False,
    }

    started.stop_service()
    assert asyncio.run(ask(started.config)).failure.kind is FailureKind.REFUSED
    started.stop_service()
    assert context.progress.phases == ["Starting vLLM", "Stopping vLLM"]


def test_further_fields_of_requests():
    config = VLLMConfig(model="m", port=80, extra_body='{"top_k": 5, "ignore_eos": false}')
    assert config.requests_config().extra_fields() == {"top_k": 5, "ignore_eos": False}
    without = replace(config, extra_body=None)
    assert without.requests_config().extra_fields() == {"ignore_eos": True}
    assert replace(without, ignore_eos=False).requests_config().extra_body is None


def test_chat_and_the_end_of_a_text(started):
    config = replace(started.config, endpoint="chat", ignore_eos=False, temperature=0.5)
    client = VLLMClient(config)
    request = GenerationRequest(
        index=0, prompt="hello", prompt_tokens=5, max_new_tokens=7, is_streaming=True
    )
    head, _, body = client.prepare_request(request).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert json.loads(body) == {
        "model": "its-name",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 7,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_requests_that_are_longer_than_the_server_takes(command, model, context):
    client = VLLMClient(VLLMConfig(model=model, vllm_command=command))
    try:
        client.start_service(replace(context, max_new_tokens=21))
    finally:
        client.stop_service()
    assert context.progress.notes == [
        "Requests may have up to 101 tokens, the server takes 100: longer ones will fail"
    ]


def test_the_key_that_vllm_asks_for_is_sent_and_shown_nowhere(command, model, context, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    client = VLLMClient(VLLMConfig(model=model, vllm_command=command))
    try:
        client.start_service(context)
        described = client.describe_service()
        assert described["max_model_len"] == 100
        request = GenerationRequest(
            index=0, prompt="hello", prompt_tokens=5, max_new_tokens=7, is_streaming=True
        )
        assert b"authorization: bearer s3cret\r\n" in client.prepare_request(request).lower()
    finally:
        client.stop_service()
    assert "s3cret" not in f"{described} {client.config}"
    assert "s3cret" not in (context.log_folder / "vllm.log").read_text()


def test_what_a_person_has_set_is_kept(command, context, model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    client = VLLMClient(VLLMConfig(model=model, vllm_command=command))
    try:
        client.start_service(context)
    finally:
        client.stop_service()
    assert "environment 0 1" in (context.log_folder / "vllm.log").read_text()


@pytest.mark.parametrize(
    ("options", "environment"),
    [({"model": "some/model"}, "None 1"), ({"vllm_args": "--tokenizer some/tokenizer"}, "None 1")],
)
def test_a_hub_may_be_asked_when_something_may_come_from_there(
    options, environment, command, context, model, monkeypatch
):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    client = VLLMClient(VLLMConfig(**{"model": model, "vllm_command": command, **options}))
    try:
        client.start_service(context)
    finally:
        client.stop_service()
    assert f"environment {environment}" in (context.log_folder / "vllm.log").read_text()


def test_a_server_that_ends_shows_why(command, model, context):
    client = VLLMClient(VLLMConfig(model=model, vllm_command=command, vllm_args="--fail"))
    with pytest.raises(WorkerError, match="vllm ended with exit code 1") as caught:
        client.start_service(context)
    client.stop_service()
    lines = caught.value.details.splitlines()
    assert lines[-3].endswith("No package metadata was found for vllm")
    assert lines[-2] == f"Full log: {context.log_folder / 'vllm.log'}"
    assert lines[-1].endswith("--vllm-command 'python -m vllm.entrypoints.openai.api_server'")


def test_a_server_that_is_not_there(model, context, tmp_path):
    missing = tmp_path / "bin" / "vllm"
    client = VLLMClient(VLLMConfig(model=model, vllm_command=f"{missing} serve"))
    with pytest.raises(MissingDependencyError, match=f"There is no command {missing}"):
        client.start_service(context)
    client.stop_service()


def test_a_port_that_is_taken(command, model, context):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        client = VLLMClient(VLLMConfig(model=model, vllm_command=command, port=port))
        with pytest.raises(ConfigError, match=f"--port: {port} is in use"):
            client.start_service(context)
    client.stop_service()


def test_a_server_that_says_other_things(tmp_path, model, context):
    script = tmp_path / "other.py"
    script.write_text(STAND_IN.replace('"/version"', '"/v"').replace('{"version": "1.2.3"}', "[]"))
    client = VLLMClient(VLLMConfig(model=model, vllm_command=f"{sys.executable} -S {script} serve"))
    try:
        client.start_service(context)
        assert client.describe_service()["version"] is None
    finally:
        client.stop_service()
    script.write_text(STAND_IN.replace("json.dumps(value).encode()", 'b"no JSON"'))
    client = VLLMClient(VLLMConfig(model=model, vllm_command=f"{sys.executable} -S {script} serve"))
    try:
        with pytest.raises(RunError, match="vLLM does not answer /version as it should"):
            client.start_service(context)
    finally:
        client.stop_service()
