"""With this on PYTHONPATH, MII's replicas recite the alphabet instead of loading a model.

Everything else is MII's own: mii.serve, DeepSpeed's launcher, the load balancer, both gRPC servers.
Python imports a module of this name when it starts.
"""

from __future__ import annotations

import sys
import threading
import time
from itertools import count

TOKEN_S = 0.01


class Recital:
    """What mii.api.async_pipeline returns, as far as a replica's server uses it."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._uids = count(1)

    def start(self) -> None: ...

    def shutdown(self) -> None: ...

    def flush_uid(self, uid: int) -> None: ...

    def put_request(self, prompt: str, kwargs: dict) -> int:
        from mii.config import GenerateParamsConfig

        tokens = len(prompt.encode())
        # As MII does: it refuses what it does not know.
        params = GenerateParamsConfig(**kwargs, prompt_length=tokens)
        uid = next(self._uids)
        self._own.answers = self._answers(uid, tokens, params)
        return uid

    def get_response(self):
        return next(self._own.answers)

    def _answers(self, uid, prompt_tokens, params):
        from mii.batching.data_classes import Response
        from mii.constants import GenerationFinishReason

        total = params.max_new_tokens
        assert params.ignore_eos
        assert not params.do_sample
        text = "".join(chr(ord("a") + index % 26) for index in range(total))
        for index in range(total):
            time.sleep(TOKEN_S)
            if params.stream:
                yield (
                    uid,
                    Response(text[index], prompt_tokens, index + 1, GenerationFinishReason.NONE),
                )
        last = "" if params.stream else text
        yield uid, Response(last, prompt_tokens, total, GenerationFinishReason.LENGTH)


if "mii.launch.multi_gpu_server" in sys.orig_argv and "--load-balancer" not in sys.orig_argv:
    import mii.api

    mii.api.async_pipeline = lambda model_config: Recital()
