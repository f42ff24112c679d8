"""FastGenClient with a stand-in for MII; the real one is in tests/real_servers."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

from flexbench.core.endpoint import Exchange, FailureKind, GenerationRequest, ServiceContext
from flexbench.core.errors import ConfigError, MissingDependencyError, WorkerError
from flexbench.core.progress import Silence
from flexbench.serving.clients.fastgen import FastGenClient, FastGenConfig

# mii.serve returns when the replicas are there; a process of its own is the load balancer.
MII = '''
import json, os, subprocess, sys

LOAD_BALANCER = """
import socket, sys, time
time.sleep(0.1)
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    listener.accept()[0].close()
"""

def serve(model_name_or_path="", **options):
    if model_name_or_path == "broken":
        raise RuntimeError("server crashed for some reason, unable to proceed")
    port = options["port_number"]
    process = subprocess.Popen([sys.executable, "-S", "-c", LOAD_BALANCER, str(port)])
    engine = vars(options.pop("inference_engine_config"))
    names = ("MII_CACHE_PATH", "TMPDIR", "PATH")
    seen = [model_name_or_path, options, engine, process.pid, {name: os.environ[name] for name in names}]
    with open(os.environ["SEEN"], "w") as file:
        json.dump(seen, file, default=vars)
'''
DEEPSPEED = """
class Arguments:
    def __init__(self, **arguments):
        vars(self).update(arguments)
"""


@pytest.fixture
def mii(tmp_path, monkeypatch):
    packages = tmp_path / "packages"
    for name, text in {
        "mii/__init__.py": MII,
        "deepspeed/__init__.py": "",
        "deepspeed/inference/__init__.py": f"{DEEPSPEED}\nDeepSpeedTPConfig = RaggedInferenceEngineConfig = Arguments",
        "deepspeed/inference/v2/__init__.py": "",
        "deepspeed/inference/v2/ragged/__init__.py": f"{DEEPSPEED}\nDSStateManagerConfig = Arguments",
    }.items():
        (packages / name).parent.mkdir(parents=True, exist_ok=True)
        (packages / name).write_text(text)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    return tmp_path / "seen.json"


@pytest.fixture
def context(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return ServiceContext(
        progress=Notes(),
        log_folder=tmp_path,
        scratch_folder=scratch,
        timeout_s=20,
        raise_if_stopped=lambda: None,
        streaming=True,
        max_prompt_tokens=80,
        max_new_tokens=20,
        max_in_flight=256,
    )


class Notes(Silence):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


class RpcError(Exception):
    def __init__(self, code, details):
        self._code, self._details = code, details

    def code(self):
        return SimpleNamespace(name=self._code)

    def details(self):
        return self._details


class Call:
    """What a stub returns: to be awaited, or gone through."""

    def __init__(self, steps):
        self._steps = iter(steps)
        self.is_cancelled = False

    def cancel(self):
        self.is_cancelled = True

    async def _next(self):
        step = next(self._steps, None)
        await asyncio.sleep(60 if step == "wait" else 0)
        if isinstance(step, Exception):
            raise step
        return step

    def __await__(self):
        return self._next().__await__()

    async def __aiter__(self):
        while (message := await self._next()) is not None:
            yield message


class Server:
    """A load balancer, as MII's stub and channel show it. `steps` is what it does next."""

    def __init__(self):
        self.steps = []
        self.asked = []
        self.calls = []
        self.places = []
        self.is_closed = False

    def create_channel(self, host, port):
        self.places.append((host, port))
        return self

    async def channel_ready(self):
        pass

    async def close(self):
        self.is_closed = True

    def stub(self, channel):
        assert channel is self
        return SimpleNamespace(GeneratorReply=self._call, GeneratorReplyStream=self._call)

    def _call(self, message):
        self.asked.append(message)
        self.calls.append(Call(self.steps))
        return self.calls[-1]


@pytest.fixture
def server(monkeypatch):
    fake = Server()
    methods = SimpleNamespace(pack_request_to_proto=lambda prompts, **options: (prompts, options))
    for name, contents in {
        "mii": {},
        "mii.backend": {},
        "mii.backend.client": {"create_channel": fake.create_channel},
        "mii.grpc_related": {},
        "mii.grpc_related.proto": {},
        "mii.grpc_related.proto.modelresponse_pb2_grpc": {"ModelResponseStub": fake.stub},
        "mii.grpc_related.task_methods": {"TASK_METHODS_DICT": {"text": methods}},
        "mii.constants": {"TaskType": SimpleNamespace(TEXT_GENERATION="text")},
        "grpc.aio": {"AioRpcError": RpcError},
    }.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    return fake


def message(text, finish_reason, generated_tokens):
    reply = SimpleNamespace(
        response=text,
        finish_reason=finish_reason,
        prompt_tokens=6,
        generated_tokens=generated_tokens,
    )
    return SimpleNamespace(response=[reply])


def ask(server, steps, *, is_streaming=True, cut_off_after_s=None, **options):
    """Send one request to a server that does `steps`; the exchange, and how it is read."""
    server.steps = steps
    client = FastGenClient(FastGenConfig(**{"model": "m", "port": 50, **options}))
    request = GenerationRequest(
        index=0, prompt="hello", prompt_tokens=5, max_new_tokens=3, is_streaming=is_streaming
    )
    exchange = Exchange()

    async def run():
        await client.open(1)
        sending = client.send_request(client.prepare_request(request), exchange)
        try:
            await asyncio.wait_for(sending, cut_off_after_s)
        finally:
            await client.close()

    if cut_off_after_s is None:
        asyncio.run(run())
    else:
        with pytest.raises(TimeoutError):
            asyncio.run(run())
    return exchange, client.process_response(exchange)


STREAM = [message("a", "none", 1), message("", "none", 2), message("bc", "none", 3), message("", "length", 3)]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"model": "auto"}, "--model: is needed with --api fastgen"),
        ({"deployment_name": "../x"}, "--deployment-name: must be letters"),
        ({"deployment_name": ""}, "--deployment-name: must be letters"),
        ({"tp_size": 0}, "--tp-size: must be"),
        ({"num_replicas": 0}, "--num-replicas: must be"),
        ({"max_ragged_batch_size": 0}, "--max-ragged-batch-size: must be"),
        ({"port": 70000}, "--port: must be"),
        ({"temperature": -0.1}, "--temperature: must be"),
    ],
)
def test_values_that_cannot_be(options, error):
    with pytest.raises(ConfigError, match=error):
        FastGenConfig(**{"model": "m", **options})


def test_every_part_of_a_deployment_has_ports_of_its_own():
    # 100: load balancer. 101 to 106: three replicas of two GPUs. Then queues, then torch's.
    config = FastGenConfig(model="m", port=100, tp_size=2, num_replicas=3)
    assert config.num_ports == 11
    deployment = config.deployment()
    assert deployment["port_number"] == 100
    assert deployment["zmq_port_number"] == 107
    assert deployment["torch_dist_port"] == 110


def test_a_deployment_is_started_described_and_ended(mii, context):
    client = FastGenClient(FastGenConfig(model="m", quantization_mode="wf6af16"))
    try:
        client.start_service(context)
        port = client.config.port
        model, options, engine, load_balancer, environment = json.loads(mii.read_text())
        assert model == "m"
        assert options == {
            "deployment_name": "fastgen-benchmark-deployment",
            "tensor_parallel": 1,
            "replica_num": 1,
            "quantization_mode": "wf6af16",
            "port_number": port,
            "zmq_port_number": port + 2,
            "torch_dist_port": port + 3,
        }
        assert engine == {
            "tensor_parallel": {"tp_size": 1},
            "state_manager": {"max_ragged_batch_size": 768, "max_ragged_sequence_count": 768},
        }
        assert environment["MII_CACHE_PATH"] == str(context.scratch_folder / "mii")
        assert environment["TMPDIR"] == str(context.scratch_folder)
        described = client.describe_service()
        assert 0 < described["ready_after_s"] < 20
        assert described["port_number"] == port
        assert context.progress.notes == []
    finally:
        client.stop_service()
    import psutil

    assert not psutil.pid_exists(load_balancer)
    client.stop_service()


def test_more_requests_than_mii_answers_at_a_time(mii, context):
    client = FastGenClient(FastGenConfig(model="broken"))
    with pytest.raises(WorkerError):
        client.start_service(replace(context, max_in_flight=257))
    client.stop_service()
    assert context.progress.notes == ["MII answers 256 requests at a time; further ones wait in it"]


@pytest.mark.parametrize("has_gpu", [True, False])
def test_a_deployment_that_fails_shows_why(has_gpu, mii, context, monkeypatch):
    monkeypatch.setattr("flexbench.serving.clients.fastgen.may_have_gpu", lambda: has_gpu)
    client = FastGenClient(FastGenConfig(model="broken"))
    with pytest.raises(WorkerError, match="fastgen ended with exit code 1") as caught:
        client.start_service(context)
    client.stop_service()
    lines = caught.value.details.splitlines()
    assert "RuntimeError: server crashed for some reason, unable to proceed" in lines
    assert ("this machine shows no GPU" in lines[-1]) is not has_gpu


def test_without_mii(context, monkeypatch):
    monkeypatch.setattr("flexbench.serving.clients.fastgen.find_spec", lambda name: None)
    client = FastGenClient(FastGenConfig(model="m"))
    with pytest.raises(MissingDependencyError, match="pip install deepspeed-mii"):
        client.start_service(context)
    client.stop_service()
    assert client.describe_service()["model"] == "m"


def test_a_stream_is_a_message_a_token_and_one_for_the_end(server):
    exchange, response = ask(server, STREAM)
    assert server.places == [("127.0.0.1", 50)]
    assert server.is_closed
    assert server.asked == [
        (
            ["hello"],
            {
                "max_new_tokens": 3,
                "ignore_eos": True,
                "return_full_text": False,
                "stream": True,
                "do_sample": False,
            },
        )
    ]
    assert response.failure is None
    # Half a character has no text yet; it is part of the next token's.
    assert response.texts == ["a", "bc"]
    assert response.content_times == [exchange.arrivals[0], exchange.arrivals[2]]
    assert (response.prompt_tokens, response.output_tokens) == (6, 3)
    assert response.finish_reason == "length"
    assert 0 < exchange.sent_at <= exchange.arrivals[0] <= exchange.arrivals[3] <= exchange.ended_at


def test_an_answer_that_comes_at_once(server):
    options = {"is_streaming": False, "temperature": 0.5, "ignore_eos": False}
    exchange, response = ask(server, [message("abc", "stop", 3)], **options)
    assert server.asked[0][1]["stream"] is False
    assert server.asked[0][1]["ignore_eos"] is False
    assert server.asked[0][1]["do_sample"] is True
    assert server.asked[0][1]["temperature"] == 0.5
    assert response.failure is None
    assert response.texts == ["abc"]
    assert response.content_times == exchange.arrivals
    assert (response.output_tokens, response.finish_reason) == (3, "stop")


@pytest.mark.parametrize(
    ("steps", "kind", "words"),
    [
        ([RpcError("UNAVAILABLE", "connection refused")], FailureKind.REFUSED, "gRPC UNAVAILABLE: connection refused"),
        ([STREAM[0], RpcError("UNAVAILABLE", "reset")], FailureKind.CLOSED, "gRPC UNAVAILABLE: reset"),
        ([RpcError("UNKNOWN", "Exception calling\napplication")], FailureKind.SERVER_REPORTED, "gRPC UNKNOWN: Exception calling application"),
        ([RpcError("DEADLINE_EXCEEDED", None)], FailureKind.TIMEOUT, "gRPC DEADLINE_EXCEEDED: no details"),
        ([RpcError("RESOURCE_EXHAUSTED", "too big")], FailureKind.RATE_LIMITED, "gRPC RESOURCE_EXHAUSTED: too big"),
        (STREAM[:2], FailureKind.CLOSED, "the stream ended without its last message"),
        ([], FailureKind.CLOSED, "the stream ended without its last message"),
        ([message("", "length", 0)], FailureKind.EMPTY, "the answer has no token in it"),
        ([SimpleNamespace(response=[])], FailureKind.MALFORMED, "a message without a response"),
    ],
)  # fmt: skip
def test_failures_are_told_apart(server, steps, kind, words):
    exchange, response = ask(server, steps)
    failure = exchange.failure or response.failure
    assert (failure.kind, failure.message) == (kind, words)


def test_one_that_is_cut_off_is_cancelled(server):
    exchange, response = ask(server, [STREAM[0], "wait"], cut_off_after_s=0.05)
    assert server.calls[0].is_cancelled
    assert exchange.ended_at == 0
    assert response.failure is None
    assert response.texts == ["a"]
