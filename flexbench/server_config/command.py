"""`flexbench server-config`: the command line of the sizing of Petals servers."""

from __future__ import annotations

import typer

from flexbench.server_config import options
from flexbench.server_config.arguments import DEFAULT_OUTPUT, request_from
from flexbench.server_config.config import DEFAULT_CUDA_CONTEXT_BYTES, DEFAULT_MODEL
from flexbench.server_config.formats import Format

app = typer.Typer(add_completion=False)


@app.command(name="server-config", cls=options.ServerConfigCommand)
def server_config(
    model: options.Model = DEFAULT_MODEL,
    dry_run: options.DryRun = False,
    output_format: options.OutputFormat = Format.TABLE,
    num_servers: options.NumServers = None,
    hops: options.Hops = None,
    rtt: options.Rtt = None,
    quiet: options.Quiet = False,
    gpu_memory: options.GpuMemory = None,
    device: options.Device = "auto",
    tensor_parallel_devices: options.TensorParallelDevices = None,
    torch_dtype: options.TorchDtype = "auto",
    quant_type: options.QuantType = None,
    attn_cache_tokens: options.AttnCacheTokens = None,
    num_blocks: options.NumBlocks = None,
    block_indices: options.BlockIndices = None,
    adapters: options.Adapters = None,
    adapter_memory: options.AdapterMemory = None,
    cuda_context: options.CudaContext = f"{DEFAULT_CUDA_CONTEXT_BYTES // 2**20}MiB",
    measure: options.Measure = False,
    force: options.Force = False,
    forward_rps: options.ForwardRps = None,
    inference_rps: options.InferenceRps = None,
    network: options.NetworkSpeed = None,
    relay: options.Relay = False,
    measure_timeout: options.MeasureTimeout = 600.0,
    initial_peers: options.InitialPeers = None,
    new_swarm: options.NewSwarm = False,
    dht_prefix: options.DhtPrefix = None,
    port: options.Port = None,
    public_ip: options.PublicIp = None,
    host_maddrs: options.HostMaddrs = None,
    announce_maddrs: options.AnnounceMaddrs = None,
    identity_path: options.IdentityPath = None,
    public_name: options.PublicName = None,
    launch: options.Launch = False,
    connect_timeout: options.ConnectTimeout = 60.0,
    server_timeout: options.ServerTimeout = 1800.0,
    log_dir: options.LogDir = None,
    output: options.Output = DEFAULT_OUTPUT,
) -> None:
    """Size a Petals server: blocks, memory and throughput before it is started.

    With --dry-run by calculation alone, for the GPU that is here or those
    of --gpu-memory. Without it, the swarm of --initial-peers is looked at,
    and --launch starts the server.
    """
    # The options have the names that request_from knows: nothing is gained by listing them again.
    request = request_from(dict(locals()))
    from flexbench.server_config.session import run

    run(request)
