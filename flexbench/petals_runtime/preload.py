"""Imported by the fork server before it makes workers: their common cost, paid once.

hivemind and petals are left out on purpose. hivemind creates locks at import, and all workers that
were forked after that would share them: one killed at the wrong moment would stop all others.
"""

from importlib import import_module

from flexbench.core.fork_server import end_with_parent, quiet_output

end_with_parent()

with quiet_output():
    for _module in (
        "typer",  # workers run the imports of the main script once more
        "torch",
        "transformers.models.bloom.modeling_bloom",
        "transformers.models.falcon.modeling_falcon",
        "transformers.models.llama.modeling_llama",
        "peft",
        "tensor_parallel",
    ):
        import_module(_module)
