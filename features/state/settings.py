"""What the environment may set: every variable in one place, and each mistake told with its name."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

PREFIX = "UBIQUO_"
ANOTHERS = {"MLFLOW_TRACKING_URI": "tracking_uri", "SPARK_MASTER": "spark_master"}
"""Variables of other projects that mean something here too, each with its setting."""
INTERNAL = ("loopback", "single_process", "shared", "siblings")
"""How ``python -m serving`` tells the process that answers how it was started."""
EngineName = Literal["duckdb", "spark"]
"""What can work features out."""
_LAKE = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w.=-]+)*")


class SettingError(ValueError):
    """A variable of the environment says something that cannot be; the message names it and the fix."""


class ObjectStore(NamedTuple):
    """Where an S3 store is, as the variables of its own clients say; keys are read by those clients themselves."""

    endpoint: str
    """Empty for that of AWS."""
    region: str
    virtual: bool
    """Whether the bucket stands in the host's name."""

    @classmethod
    def from_environment(cls) -> ObjectStore:
        """``AWS_ENDPOINT_URL`` (or ``AWS_ENDPOINT``), ``AWS_REGION`` (or ``AWS_DEFAULT_REGION``), ``AWS_VIRTUAL_HOSTED_STYLE_REQUEST``."""
        said = os.environ.get
        endpoint = said("AWS_ENDPOINT_URL") or said("AWS_ENDPOINT") or ""
        region = said("AWS_REGION") or said("AWS_DEFAULT_REGION") or "us-east-1"
        return cls(endpoint.rstrip("/"), region, said("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "").lower() in ("true", "1"))


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The variables ``UBIQUO_<NAME>``, by their names in small letters."""

    home: Annotated[str, Meta(description="the folder that holds all data, stores and models")] = "var"
    secret: Annotated[str, Meta(description="what identifiers are hashed and contacts encrypted under; else secret.key of the home")] = ""
    clock: Annotated[str, Meta(description="system, from:ISO-TIME (runs on from there) or fixed:ISO-TIME")] = "system"
    api_key: Annotated[str, Meta(description="a key that opens everything, beside those of python -m serving keys")] = ""
    redis: Annotated[str, Meta(description="where online rows are kept, such as localhost:6379; else in SQLite")] = ""
    lake: Annotated[str, Meta(description="where the tables of the log lie, such as s3://bucket/prefix; else in the home")] = ""
    cache: Annotated[str, Meta(description="this machine's folder for copies of the lake's files; else cache in the home")] = ""
    engine: Annotated[EngineName, Meta(description="what computes features and scores in bulk: duckdb or spark")] = "duckdb"
    spark_master: Annotated[str, Meta(description="where Spark runs, such as spark://host:7077; else as Spark is told, or local[2]")] = ""
    database: Annotated[str, Meta(description="postgresql://user:password@host:port/name: state that many machines share")] = ""
    rate_limit: Annotated[str, Meta(description="how often one key may ask")] = "2000/second"
    cors_origins: Annotated[str, Meta(description="whose pages may call: origins such as https://shop.example, by commas")] = ""
    browser_rate_limit: Annotated[str, Meta(description="how often one address may ask with a browser's key")] = "600/minute"
    trusted_proxies: Annotated[str, Meta(description="whose X-Forwarded-For is believed: addresses or networks, by commas")] = ""
    max_waiting: Annotated[int, Meta(ge=1, description="how many events may wait for the log before callers come again")] = 200_000
    max_decision_bytes: Annotated[int, Meta(ge=1_000_000, description="how much the decision log may hold")] = 5_000_000_000
    keep_days: Annotated[int, Meta(ge=0, description="for how many days events are kept in the log; 0: for good")] = 0
    purge_at: Annotated[str, Meta(description="when files are purged of who was erased: the shop's time, such as 03:30; else at once")] = ""
    mlflow: Annotated[str, Meta(description="the mlflow.yaml that describes the models; else the one beside the code")] = ""
    tracking_uri: Annotated[str, Meta(description="where MLflow keeps runs and models; else what mlflow.yaml says")] = ""
    log: Annotated[Literal["text", "json"], Meta(description="how a service writes what it tells: text, or json, one object a line")] = (
        "text"
    )
    commit: Annotated[str, Meta(description="the commit of the code, where there is no checkout")] = "unknown"
    demo_shop: Annotated[bool, Meta(description="whether the console has a shop to try; what is done in it counts as real")] = False
    loopback: Annotated[bool, Meta(description="only this machine can ask")] = False
    single_process: Annotated[bool, Meta(description="no arbiter watches over the process")] = False
    shared: Annotated[bool, Meta(description="other services run on the same state")] = False
    siblings: Annotated[str, Meta(description="the folder in which the processes of one service tell their metrics")] = ""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """The settings of this process.

        Raises:
            SettingError: a variable seems to be misspelt, or says something that cannot be.
        """
        said = {k: v for k, v in (os.environ if environment is None else environment).items() if k.startswith(PREFIX) or k in ANOTHERS}
        known = {variable_of(name): name for name in cls.__struct_fields__}
        values: dict[str, Any] = {}
        for variable, text in said.items():
            if variable not in known:
                # one that is quite another may be somebody else's
                if near := difflib.get_close_matches(variable, known, 1, 0.85):
                    raise SettingError(f"{variable} is no setting: did you mean {near[0]}?")
                continue
            try:
                values[known[variable]] = msgspec.convert(text, get_type_hints(cls, include_extras=True)[known[variable]], strict=False)
            except msgspec.ValidationError as error:
                raise SettingError(f"{variable}={text!r}: {str(error)[0].lower()}{str(error)[1:]}") from None
        _check_database(values.get("database", ""))
        return cls(**values)

    def __post_init__(self) -> None:
        if self.lake and not _LAKE.fullmatch(self.lake):
            raise SettingError(
                f"UBIQUO_LAKE={self.lake!r}: give s3://BUCKET/PREFIX, the bucket in small letters, digits, dots and hyphens, "
                "and no slash at the end"
            )

    @property
    def root(self) -> Path:
        """The home as an absolute path."""
        return Path(self.home).resolve()

    @property
    def models_file(self) -> Path | None:
        """The file that describes the models, where it is not the one beside the code."""
        return Path(self.mlflow) if self.mlflow else None


def _check_database(url: str) -> None:
    """See that a URL names a database that can be used; the message repeats none of it, as it may hold a password.

    Raises:
        SettingError: it does not.
    """
    if not url:
        return
    try:
        told = urlsplit(url)
        # a port that is none raises
        fits = told.scheme == "postgresql" and bool(told.path.strip("/")) and (told.port is None or told.port > 0)
    except ValueError:
        fits = False
    if not fits:
        raise SettingError("UBIQUO_DATABASE must read postgresql://user:password@host:port/database; leave it out to keep state in files")


def shown(setting: str, value: object) -> str:
    """What may be told of a setting: of a secret that there is one, of an address all but passwords."""
    told = f"{value}"
    if setting in ("secret", "api_key"):
        return "(set)" if value else ""
    if setting in ("database", "tracking_uri"):
        return _without_password(told)
    if setting == "redis":
        # Feast's way to write it: servers, then what else there is, such as password=...
        return ",".join(part.rpartition("@")[2] for part in told.split(",") if "=" not in part)
    return told


def _without_password(url: str) -> str:
    try:
        told = urlsplit(url)
    except ValueError:
        return "(set)"
    if not told.netloc:
        return url
    if "@" in f"{told.path}{told.query}{told.fragment}":
        # a password whose signs are not escaped
        return "(set)"
    return told._replace(netloc=f"{'(set)@' if '@' in told.netloc else ''}{told.netloc.rpartition('@')[2]}", query="").geturl()


def variable_of(setting: str) -> str:
    """The variable of the environment that a setting is read from."""
    return {name: variable for variable, name in ANOTHERS.items()}.get(setting, f"{PREFIX}{setting.upper()}")


def described() -> list[tuple[str, str, str]]:
    """Each setting that a user may make, what it is unless set, and what it means."""
    found = []
    for name, hint in get_type_hints(Settings, include_extras=True).items():
        if name not in INTERNAL:
            [meta] = [each for each in hint.__metadata__ if each.description]
            found.append((name, f"{getattr(Settings(), name)}", str(meta.description)))
    return found
