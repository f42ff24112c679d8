"""A client's configuration as options of the command line, and clients by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from flexbench.core.errors import ConfigError, FlexbenchError, MissingDependencyError
from flexbench.serving import client_options, clients
from flexbench.serving.client_options import (
    ServingCommand,
    click_options,
    client_config_from,
    client_values,
    given_api,
    make_config,
    spell_options,
)
from flexbench.serving.clients import client_names, find_client
from flexbench.serving.clients.dummy import DummyClient


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    model: str
    api_url: str = field(metadata={"help": "Where it is."})
    api_key: str | None = field(default="k3y", metadata={"help": "Key.", "secret": True})
    num_retries: int = field(default=3, metadata={"help": "Tries.", "metavar": "N"})
    scale: float = 0.5
    folder: Path | None = None
    is_chat: bool = True
    deployment: str | None = None
    tags: str = field(default_factory=lambda: "none")

    def __post_init__(self) -> None:
        if self.num_retries < 0:
            raise ConfigError("--num-retries", "must not be negative")


@dataclass(frozen=True, kw_only=True)
class OtherConfig:
    tp_size: int = 1
    is_eager: bool = False


@dataclass(frozen=True, kw_only=True)
class ClashingConfig:
    num_clients: int = 1


CONFIGS = {
    "openai": PlainConfig,
    "vllm": OtherConfig,
    "fastgen": OtherConfig,
    "clash": ClashingConfig,
}


class Command(ServingCommand):
    @staticmethod
    def resolve_client(name):
        if name == "broken":
            raise MissingDependencyError("no package")
        if name not in CONFIGS:
            raise ConfigError("--api", f"must be one of {', '.join(CONFIGS)}, not {name}")
        return SimpleNamespace(config_class=CONFIGS[name])


@pytest.fixture
def app():
    app = typer.Typer(
        add_completion=False, context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.seen = []

    @app.command(cls=Command)
    def serving(
        context: typer.Context,
        api: Annotated[str, typer.Option("--api")] = "openai",
        model: Annotated[str, typer.Option("--model")] = "auto",
        num_clients: Annotated[list[int] | None, typer.Option("--num-clients")] = None,
        prompt_length_var: Annotated[float, typer.Option("--prompt-length-var")] = 0.3,
        prompt_text_source: Annotated[str | None, typer.Option("--prompt-text-source")] = None,
        streaming: Annotated[bool, typer.Option("--streaming/--no-streaming")] = True,
        quiet: Annotated[bool, typer.Option("--quiet", "-q")] = False,
    ) -> None:
        """Load it."""
        own = {name: value for name, value in locals().items() if name not in ("context", "app")}
        app.seen.append(
            SimpleNamespace(
                own=SimpleNamespace(**own),
                values=client_values(context),
                config=client_config_from(context, model=model),
            )
        )

    return app


def run(app, line: str):
    result = CliRunner().invoke(app, line.split(), catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return SimpleNamespace(**vars(app.seen[-1]), error_output=result.stderr)


def refusal(app, line: str) -> str:
    result = CliRunner().invoke(app, line.split(), env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


# --- options ---


def test_every_field_but_the_model_is_an_option():
    found = {parameter.opts[0]: parameter for parameter in click_options(PlainConfig, panel="P")}
    assert list(found) == [
        "--api-url", "--api-key", "--num-retries", "--scale", "--folder", "--is-chat", "--deployment", "--tags",
    ]  # fmt: skip
    assert found["--is-chat"].secondary_opts == ["--no-is-chat"]
    assert found["--num-retries"].default == 3
    assert found["--num-retries"].metavar == "N"
    assert found["--tags"].default == "none"
    assert found["--api-url"].help == "Where it is. (required)"
    assert not found["--api-url"].required
    assert {parameter.rich_help_panel for parameter in found.values()} == {"P"}
    assert not found["--api-key"].show_default


def test_values_reach_the_configuration(app):
    done = run(
        app, "--api-url http://x --num-retries 7 --scale 2 --folder /tmp --no-is-chat --model m"
    )
    assert done.config == PlainConfig(
        model="m", api_url="http://x", num_retries=7, scale=2.0, folder=Path("/tmp"), is_chat=False
    )
    assert done.values == {
        "api_url": "http://x", "api_key": "k3y", "num_retries": 7, "scale": 2.0, "folder": Path("/tmp"),
        "is_chat": False, "deployment": None, "tags": "none",
    }  # fmt: skip


def test_another_api_has_other_options(app):
    assert run(app, "--tp-size 2 --api vllm").config == OtherConfig(tp_size=2)
    assert run(app, "--api=vllm").config == OtherConfig()
    # Nothing of one command line is left for the next one.
    assert run(app, "--api openai --api-url u").config.num_retries == 3


def test_underscores_are_hyphens_in_names_but_not_in_values(app):
    done = run(
        app, "--api_url a_b --num_clients 1 2 4 --prompt_text_source --api_key --num_retries=4"
    )
    assert done.own.num_clients == [1, 2, 4]
    assert done.own.prompt_text_source == "--api_key"
    assert (done.config.api_url, done.config.num_retries) == ("a_b", 4)


def test_switches_take_words_as_in_the_original(app):
    assert not run(app, "--api-url u --streaming False").own.streaming
    assert not run(app, "--api-url u --is_chat false").config.is_chat
    assert run(app, "--api vllm --is-eager 1").config.is_eager


@pytest.mark.parametrize("name", ["--prompt_lenght_var", "--prompt-lenght-var"])
def test_the_misspelt_option_is_accepted_with_one_warning(app, name):
    done = run(app, f"--api-url u {name} 0.1 {name}=0.2")
    assert done.own.prompt_length_var == 0.2
    assert done.error_output == f"Warning: {name} is taken as --prompt-length-var.\n"


def test_a_right_option_is_no_warning(app):
    assert run(app, "--api-url u --prompt_length_var 0.1").error_output == ""


def test_an_option_that_is_needed_is_named_with_its_api(app):
    with pytest.raises(ConfigError, match=r"^--api-url: is needed with --api openai$"):
        run(app, "--model m")


def test_the_configuration_checks_itself(app):
    with pytest.raises(ConfigError, match="--num-retries: must not be negative"):
        run(app, "--api-url u --num-retries -1")


@pytest.mark.parametrize("option", ["--tp-size", "--tp_size", "--no-is-eager"])
def test_an_option_of_others_says_whose_it_is(app, option):
    with pytest.raises(ConfigError, match=r"is an option of --api vllm and fastgen, not of openai"):
        run(app, f"--api-url u {option} 2")


def test_an_option_of_nobody_is_refused_by_the_parser(app):
    assert "No such option: --api-urk" in refusal(app, "--api-urk u")


def test_a_value_of_the_wrong_type_is_refused_by_the_parser(app):
    assert "'--num-retries'" in refusal(app, "--num-retries many")


def test_an_api_without_a_name_is_refused_by_the_parser(app):
    assert "'--api' requires an argument" in refusal(app, "--api")


def test_an_unknown_api_is_refused(app):
    with pytest.raises(ConfigError, match="--api: must be one of"):
        run(app, "--api nobody")


def test_a_client_cannot_take_an_option_of_the_command(app):
    with pytest.raises(FlexbenchError, match="client clash has an option --num-clients"):
        run(app, "--api clash")


def test_what_follows_two_hyphens_is_no_option(app):
    assert given_api(["--quiet", "--", "--api", "x"]) is None
    assert spell_options(["--a_b", "--", "--a_b"], {"--a-b": False}).args == [
        "--a-b",
        "--",
        "--a_b",
    ]


def test_the_last_api_counts():
    assert given_api(["--api", "a", "--api=b"]) == "b"
    assert given_api([]) is None


# --- help and completion ---


def help_of(app, line: str) -> str:
    result = CliRunner().invoke(app, line.split(), env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return result.output


def test_help_shows_the_options_of_the_default_client_and_how_to_see_others(app):
    text = help_of(app, "--help")
    assert "Client: openai" in text
    assert "--api-url" in text
    assert "k3y" not in text
    assert "--tp-size" not in text
    assert "--api NAME --help shows them" in " ".join(text.split())


def test_help_shows_the_options_of_the_client_that_is_named(app):
    text = help_of(app, "-h --api vllm")
    assert "Client: vllm" in text
    assert "--tp-size" in text
    assert "--api-url" not in text


def test_help_is_there_even_if_the_default_client_is_not(app, monkeypatch):
    monkeypatch.delitem(CONFIGS, "openai")
    assert "--num-clients" in help_of(app, "--help")
    with pytest.raises(ConfigError):
        run(app, "--quiet")


def complete(app, args: list[str], incomplete: str) -> list[str]:
    """As the shell does: parse what is there, then ask the command."""
    context = get_command(app).make_context("serving", args, resilient_parsing=True)
    return [item.value for item in context.command.shell_complete(context, incomplete)]


def test_completion_knows_the_options_of_the_client(app):
    assert complete(app, [], "--api-") == ["--api-url", "--api-key"]
    assert complete(app, ["--api", "vllm"], "--tp") == ["--tp-size"]
    assert complete(app, ["--api", "vllm"], "--api-") == []


@pytest.mark.parametrize(
    "args",
    [["--api"], ["--api", "nobody"], ["--api=broken"], ["--prompt_lenght_var"], ["--nothing"]],
)
def test_completion_goes_on_with_half_a_command_line(app, args, capsys):
    assert complete(app, args, "--num-c") == ["--num-clients"]
    assert capsys.readouterr().err == ""


def test_apis_are_completed(monkeypatch):
    monkeypatch.setattr(clients, "_plug_ins", lambda: {"mine": []})
    assert client_options.complete_api("") == [*clients.BUILT_IN, "mine"]
    assert client_options.complete_api("d") == ["dummy", "dist"]


# --- configurations ---


def test_a_configuration_takes_the_model_only_if_it_has_one():
    assert make_config(OtherConfig, {"tp_size": 4}, api="vllm", model="m") == OtherConfig(tp_size=4)
    config = make_config(PlainConfig, {"api_url": "u", "api_key": None}, api="openai", model="m")
    assert (config.model, config.api_key) == ("m", "k3y")


def test_a_model_that_is_needed_is_named():
    with pytest.raises(ConfigError, match=r"--model: is needed with --api openai"):
        make_config(PlainConfig, {"api_url": "u"}, api="openai")


def test_a_type_that_no_option_has_is_refused():
    @dataclass
    class Odd:
        numbers: list[int] = field(default_factory=list)

    with pytest.raises(FlexbenchError, match=r"Odd\.numbers cannot be an option"):
        click_options(Odd, panel="P")


# --- clients by name ---


@pytest.fixture
def plug_ins(monkeypatch):
    """Entry points that packages would have; each loads what it is given, or raises it."""

    def install(**objects):
        entries = {}
        for name, loaded in objects.items():
            entry = SimpleNamespace(
                name=name, value=f"pack.mod:{name}", dist=SimpleNamespace(name=f"{name}-pack")
            )

            def load(loaded=loaded):
                if isinstance(loaded, Exception):
                    raise loaded
                return loaded

            entry.load = load
            entries[name] = [entry]
        monkeypatch.setattr(clients, "_plug_ins", lambda: entries)
        return entries

    return install


def test_a_built_in_client_is_found_without_a_look_at_plug_ins(monkeypatch):
    monkeypatch.setattr(clients, "_plug_ins", lambda: pytest.fail("was asked"))
    assert find_client("dummy") is DummyClient


def test_a_plug_in_is_found(plug_ins):
    plug_ins(mine=DummyClient)
    assert find_client("mine") is DummyClient
    assert client_names() == [*clients.BUILT_IN, "mine"]


def test_an_unknown_name_is_refused_with_those_that_are_known(plug_ins):
    plug_ins(mine=DummyClient)
    with pytest.raises(
        ConfigError,
        match=r"--api: must be one of openai, .*, dist, mine, not vlm; did you mean vllm\?",
    ):
        find_client("vlm")


@pytest.mark.parametrize(
    ("loaded", "problem"),
    [
        (ImportError("No module named 'pack'"), "cannot be loaded from pack.mod:mine: ImportError: No module"),
        (AttributeError("module has no attribute"), "cannot be loaded .* AttributeError"),
        (RuntimeError("at import"), "cannot be loaded .* RuntimeError: at import"),
        (3, "does not work: pack.mod:mine is no class"),
        (type("Empty", (), {"config_class": OtherConfig, "preload": (), "open": print}), "lacks requests_per_worker, packages, start_service"),
        (type("Odd", (DummyClient,), {"config_class": dict}), "has a config_class that is no dataclass"),
    ],
)  # fmt: skip
def test_a_plug_in_that_does_not_work_is_named_with_its_package(plug_ins, loaded, problem):
    plug_ins(mine=loaded)
    with pytest.raises(
        FlexbenchError, match=f"The client mine of the package mine-pack .*{problem}|{problem}"
    ) as raised:
        find_client("mine")
    assert "mine-pack" in str(raised.value)


def test_a_name_of_two_packages_is_refused(plug_ins):
    entries = plug_ins(mine=DummyClient, other=DummyClient)
    entries["mine"] += entries["other"]
    with pytest.raises(
        ConfigError, match="mine is a client of several packages: mine-pack, other-pack"
    ):
        find_client("mine")


def test_plug_ins_are_entry_points_of_the_group(monkeypatch):
    asked = []

    def entry_points(*, group):
        asked.append(group)
        return [EntryPoint("mine", "flexbench.serving.clients.dummy:DummyClient", group)]

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    assert find_client("mine") is DummyClient
    assert set(asked) == {"flexbench.clients"}


def test_a_package_that_a_built_in_client_needs_is_named(monkeypatch, tmp_path):
    (tmp_path / "needy_client.py").write_text("import a_package_of_nobody\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(clients.BUILT_IN, "needy", "needy_client:Client")
    with pytest.raises(
        MissingDependencyError, match=r"--api needy needs a_package_of_nobody.*flexbench\[serving\]"
    ):
        find_client("needy")
