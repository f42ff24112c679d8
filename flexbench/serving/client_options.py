"""A client's configuration as options of the command line.

`flexbench serving --api NAME` has the options of that client beside its own. Which ones these are
is known only when the arguments are: `ServingCommand` looks for --api first.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer
from typer.main import get_command

from flexbench.core.endpoint import Client
from flexbench.core.errors import ConfigError, FlexbenchError
from flexbench.core.options import SwitchCommand, replace_switch_values
from flexbench.serving.clients import BUILT_IN, DEFAULT_CLIENT, client_names, find_client

API_OPTION = "--api"
MODEL_FIELD = "model"
_MODEL_OPTION = "--model"
_TYPES = (str, int, float, bool, Path)
# Names of parameters must not meet those of the command's own.
_PREFIX = "client__"
_META_KEY = "flexbench.serving.client_options"
_MISSPELT = {"--prompt-lenght-var": "--prompt-length-var"}


@dataclass(frozen=True, kw_only=True)
class _Option:
    """A field of a client's configuration."""

    field_name: str
    annotation: Any
    default: Any
    is_required: bool
    help: str
    metavar: str | None
    is_secret: bool

    @property
    def name(self) -> str:
        return option_name(self.field_name)


def option_name(field_name: str) -> str:
    """'api_url' -> '--api-url'."""
    return f"--{field_name.replace('_', '-')}"


def click_options(config_class: type, *, panel: str) -> list[Any]:
    """Parameters for a command, one for each field but `model`, in a panel of the help.

    All may be left out: `make_config` says which one is missing. Raises FlexbenchError for a field
    of a type that no option can have.
    """
    annotated: Any = Annotated  # to mypy, what is known only now is no type
    parameters, annotations = [], {}
    for option in _options_of(config_class):
        name = f"{_PREFIX}{option.field_name}"
        negative = f"/--no-{option.name[2:]}" if _bare_type(option.annotation) is bool else ""
        declaration = typer.Option(
            f"{option.name}{negative}",
            help=f"{option.help} (required)".strip() if option.is_required else option.help,
            metavar=option.metavar,
            show_default=not option.is_secret,
            rich_help_panel=panel,
        )
        annotation = annotated[option.annotation, declaration]
        annotations[name] = annotation
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=option.default,
                annotation=annotation,
            )
        )
    # Typer makes parameters from a function's signature, and has no other public way to.
    signature: Any = _do_nothing()
    signature.__signature__ = inspect.Signature(parameters)
    signature.__annotations__ = annotations
    app = typer.Typer(add_completion=False)
    app.command()(signature)
    return list(get_command(app).params)


def make_config(
    config_class: type, values: Mapping[str, Any], *, api: str, model: str | None = None
) -> Any:
    """An instance of a client's configuration, from the values of its options by field.

    What is None, or not among the values, gets its default. Raises ConfigError naming an option
    that is needed, and what the configuration itself raises.
    """
    given = {name: value for name, value in values.items() if value is not None}
    for one in fields(config_class):
        if one.name == MODEL_FIELD and model is not None:
            given[MODEL_FIELD] = model
        if _is_required(one) and one.name not in given:
            option = _MODEL_OPTION if one.name == MODEL_FIELD else option_name(one.name)
            raise ConfigError(option, f"is needed with {API_OPTION} {api}")
    return config_class(**given)


def client_values(context: Any) -> dict[str, Any]:
    """Values of the client's options by field, from the typer.Context of a ServingCommand."""
    return dict(context.meta[_META_KEY].values)


def client_config_from(context: Any, *, model: str | None = None) -> Any:
    """The configuration of the client that --api named, from the context of a ServingCommand."""
    chosen: _ClientOptions = context.meta[_META_KEY]
    return make_config(chosen.config_class, chosen.values, api=chosen.api, model=model)


def complete_api(incomplete: str) -> list[str]:
    """For completion of --api's value."""
    return [name for name in client_names() if name.startswith(incomplete)]


class _ClientOptions:
    """What a context knows of the chosen client."""

    def __init__(self, api: str, config_class: Any, parameters: list[Any]) -> None:
        self.api = api
        self.config_class = config_class
        self.parameters = parameters
        self.values: dict[str, Any] = {}


class ServingCommand(SwitchCommand):
    """A command with the options of the client that --api names.

    Also, names of options may be written with underscores, as in DeepSpeedometer, and its
    misspelt --prompt_lenght_var is accepted.
    """

    @staticmethod
    def resolve_client(name: str) -> type[Client]:
        """The class of a client, for the name that --api takes."""
        return find_client(name)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.epilog is None:
            self.epilog = (
                f"Each client has options of its own: {API_OPTION} NAME --help shows them. "
                f"NAME is one of {', '.join(BUILT_IN)}, or that of a plug-in."
            )

    def get_params(self, ctx: Any) -> list[Any]:
        """The command's own parameters, and those of the client that was chosen."""
        chosen = ctx.meta.get(_META_KEY)
        own = super().get_params(ctx)
        return own if chosen is None else [*own, *chosen.parameters]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Find the client, add its options, parse, and take its values out of the parameters."""
        chosen = self._choose(ctx, args)
        ctx.meta[_META_KEY] = chosen
        known = {
            name: not getattr(parameter, "is_flag", False)
            for parameter in self.get_params(ctx)
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        spelt = spell_options(args, known)
        if not ctx.resilient_parsing:
            for written, right in spelt.corrected.items():
                typer.echo(f"Warning: {written} is taken as {right}.", err=True)
            self._refuse_foreign(chosen.api, spelt.unknown)
        switches = {
            name: parameter.secondary_opts[0] if parameter.secondary_opts else None
            for parameter in chosen.parameters
            if getattr(parameter, "is_flag", False)
            for name in parameter.opts
        }
        rest = super().parse_args(ctx, replace_switch_values(spelt.args, switches))
        for parameter in chosen.parameters:
            value = ctx.params.pop(parameter.name, None)
            chosen.values[parameter.name.removeprefix(_PREFIX)] = value
        return rest

    def _choose(self, ctx: Any, args: Sequence[str]) -> _ClientOptions:
        given = given_api(args)
        api = given or self._default_api()
        try:
            config_class = self.resolve_client(api).config_class
            parameters = click_options(config_class, panel=f"Client: {api}")
            self._refuse_collisions(api, parameters)
        except FlexbenchError:
            # The shell wants completions and --help the rest of the help, whatever is installed.
            wants_help = given is None and not set(args).isdisjoint(ctx.help_option_names)
            if not (ctx.resilient_parsing or wants_help):
                raise
            return _ClientOptions(api, None, [])
        return _ClientOptions(api, config_class, parameters)

    def _default_api(self) -> str:
        for parameter in self.params:
            if API_OPTION in parameter.opts and isinstance(parameter.default, str):
                return parameter.default
        return DEFAULT_CLIENT

    def _refuse_collisions(self, api: str, parameters: Iterable[Any]) -> None:
        own = {name for parameter in self.params for name in parameter.opts}
        for parameter in parameters:
            for name in own.intersection(parameter.opts):
                raise FlexbenchError(
                    f"The client {api} has an option {name}, which is one of the command's own."
                )

    def _refuse_foreign(self, api: str, unknown: Iterable[str]) -> None:
        """Say whose option it is; what nobody has is left to the parser."""
        for name in unknown:
            owners = [other for other in BUILT_IN if other != api and self._has(other, name)]
            if owners:
                raise ConfigError(
                    name, f"is an option of {API_OPTION} {' and '.join(owners)}, not of {api}"
                )

    def _has(self, api: str, name: str) -> bool:
        try:
            config_class = self.resolve_client(api).config_class
            names = {option.name for option in _options_of(config_class)}
        except (FlexbenchError, ImportError):
            return False
        return name in names or name.replace("--no-", "--", 1) in names


@dataclass(kw_only=True)
class Spelling:
    """Arguments with the names of options as the command knows them."""

    args: list[str]
    corrected: dict[str, str]
    """Misspelt names, as written, and the right ones."""
    unknown: list[str]


def spell_options(args: Sequence[str], takes_value: Mapping[str, bool]) -> Spelling:
    """['--num_clients', '4'] -> ['--num-clients', '4'], for the names in `takes_value`.

    Values stay as they are, also those that look like an option's name.
    """
    spelling = Spelling(args=[], corrected={}, unknown=[])
    remaining = list(args)
    while remaining:
        argument = remaining.pop(0)
        if argument == "--":
            spelling.args += [argument, *remaining]
            break
        name, equals, value = argument.partition("=")
        if argument.startswith("--") and name not in takes_value:
            written, name = name, name.replace("_", "-")
            if name in _MISSPELT:
                name = _MISSPELT[name]
                spelling.corrected[written] = name
            if name not in takes_value:
                spelling.unknown.append(name)
        spelling.args.append(f"{name}{equals}{value}")
        if takes_value.get(name) and not equals and remaining:
            spelling.args.append(remaining.pop(0))
    return spelling


def given_api(args: Sequence[str]) -> str | None:
    """What --api is given, the last one if it is given several times."""
    api: str | None = None
    for place, argument in enumerate(args):
        if argument == "--":
            break
        name, equals, value = argument.partition("=")
        if name == API_OPTION:
            api = value if equals else next(iter(args[place + 1 :]), None)
    return api


def _options_of(config_class: type) -> list[_Option]:
    try:
        hints = get_type_hints(config_class)
    except NameError as error:
        raise FlexbenchError(f"{config_class.__name__}: {error}") from error
    options = []
    for one in fields(config_class):
        if one.name == MODEL_FIELD or not one.init:
            continue
        annotation = hints[one.name]
        is_required = _is_required(one)
        if _bare_type(annotation) not in _TYPES:
            names = ", ".join(kind.__name__ for kind in _TYPES)
            raise FlexbenchError(
                f"{config_class.__name__}.{one.name} cannot be an option: its type is none of "
                f"{names}, nor one of these or None."
            )
        default = None if one.default is MISSING else one.default
        if one.default_factory is not MISSING:
            default = one.default_factory()
        options.append(
            _Option(
                field_name=one.name,
                annotation=annotation | None if default is None else annotation,
                default=default,
                is_required=is_required,
                help=one.metadata.get("help", ""),
                metavar=one.metadata.get("metavar"),
                is_secret=bool(one.metadata.get("secret")),
            )
        )
    return options


def _is_required(one: Any) -> bool:
    return one.init and one.default is MISSING and one.default_factory is MISSING


def _bare_type(annotation: Any) -> Any:
    """str of str and of `str | None`."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 else annotation


def _do_nothing() -> Callable[[], None]:
    def stand_in() -> None:
        """Never called."""

    return stand_in
