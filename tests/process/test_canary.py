"""No secret is ever shown: a canary is put into every setting, rightly and wrongly, and all output is searched.

The settings are taken from the schema, so that a new secret setting is covered when it is made.
"""

import json
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from api_gateway.cli import main
from api_gateway.config import GatewayConfig, load_config
from api_gateway.settings.diagnostics import ConfigError, type_at, unwrapped
from api_gateway.settings.secret import holds_secret, may_hold_password, shown_path
from tests.kit import ask, eventually
from tests.processes import START, WAYS, children, fresh_process

CANARY = "kAnary7"
LONG = f"{CANARY}-{CANARY}"  # long enough for a token
Place = tuple[str, ...]


def leaves(model: type[BaseModel], place: Place = ()) -> Iterator[Place]:
    """Yield the place of every setting that is not a section; entries of mappings are named `a`, those of lists 0."""
    for name, field in model.model_fields.items():
        yield from inner_leaves(field.annotation, (*place, name))


def inner_leaves(annotation: Any, place: Place) -> Iterator[Place]:
    kind = unwrapped(annotation)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield from leaves(kind, place)
    elif get_origin(kind) is dict:
        yield from inner_leaves(get_args(kind)[1], (*place, "a"))
    elif get_origin(kind) is list:
        yield from inner_leaves(get_args(kind)[0], (*place, "0"))
    else:
        yield place


LEAVES = sorted(set(leaves(GatewayConfig)))
SECRET = [place for place in LEAVES if holds_secret(type_at(GatewayConfig, place))]
URLS = [place for place in LEAVES if may_hold_password(type_at(GatewayConfig, place))]
ABOVE = sorted({place[:length] for place in (*SECRET, *URLS) for length in range(1, len(place))})
PLACES = [*SECRET, *URLS, *ABOVE]

# As a program writes it, and as it is pasted into one line.
PRIVATE_KEYS = [
    f"-----BEGIN PRIVATE KEY-----\n{CANARY}/+{CANARY}\n-----END PRIVATE KEY-----\n",
    f"-----BEGIN RSA PRIVATE KEY----- {CANARY} -----END RSA PRIVATE KEY-----",
]
FILES = [place for place in LEAVES if unwrapped(type_at(GatewayConfig, place)) is Path]

STORE_URLS = [
    f"redis://user:{CANARY}@host:port/0",
    f"redis://user:{CANARY}@host:99999",
    f"redis://user:{CANARY}@host:6379/name",
    f"redis://user:{CANARY}@host:6379/0/1",
    f"redis://user:{CANARY}@host:6379?timeout=1",
    f"redis://user:{CANARY}@host/0#trailing",
    f"redis://user:{CANARY}@",
    f"redis://user:{CANARY}",
    f"redis://:{CANARY}",
    f"redis://user:12/{CANARY}@host",
    f"redis://user:a/{CANARY}@host",
    f"redis://user:a?{CANARY}@host",
    f"redis://user:a#{CANARY}@host",
    f"redis://user:%zz{CANARY}@host",
    f"redis://user:{CANARY}%@host",
    f"redis://{CANARY}:x@host:port",
    f"redis://user:{CANARY}@[::1",
    f"redis://user:{CANARY}@[::x]:1",
    f"redis://user:{CANARY}\uff20host",
    f"redis://user:{CANARY}@ho st",
    f"redis://user:{CANARY}@one,two",
    f"redis://user:{CANARY}@host\n",
    f" redis://user:{CANARY}@host",
    f"postgres://user:{CANARY}@host",
    f"http://user:{CANARY}@host",
    f"redis:/user:{CANARY}@host",
    f"redis:user:{CANARY}@host",
    f"user:{CANARY}@host",
    f"{CANARY}",
    f"redis+sentinel://user:{CANARY}@host",
    f"redis+sentinel://user:1/{CANARY}@host/main",
    f"redis+sentinel://user:{CANARY}@host:x/main",
    f"redis+cluster://user:{CANARY}@host/1",
    f"redis+tls://user:{CANARY}@host",
    f"rediss://user:{CANARY}@host?key=k.pem",
    f"rediss://user:{CANARY}@host?ca_file=",
    f"unix://user:{CANARY}@host/path",
    f"unix://user:{CANARY}@",
    f"unix:///path?db={CANARY}",
    f"memory://{CANARY}",
]
TARGET_URLS = [
    f"http://user:{CANARY}@host:9001",
    f"http://{CANARY}@host",
    f"https://:{CANARY}@host",
    f"http://user:{CANARY}",
    f"http://user:{CANARY}\uff20host",
    f"http://user:{CANARY}@host:port",
    f"http://user:{CANARY}@[::1",
    f"http:user:{CANARY}@host",
    f"http:/user:{CANARY}@host",
    f"http//user:{CANARY}@host",
    f"user:{CANARY}@host",
    f"ftp://user:{CANARY}@host",
    f"http://user:{CANARY}%40host",
    f"http://us er:{CANARY}@host",
]
URL_SHAPES: list[Any] = [
    shape
    for url in (f"http://user:{CANARY}@host", f"http://user:{CANARY}", f"http://user:{CANARY}%40host")
    for shape in (url, [url], {"is": url}, [[url]], {"a": {"b": url}}, [{"ulr": url}])
]
SHAPES: list[Any] = [
    [LONG],
    {"is": LONG},
    {LONG: 1},
    [[LONG]],
    {"a": {"b": LONG}},
    LONG,
    f"x:{LONG}@y",
    [{"url": LONG}],
]


def nested(place: Place, value: Any) -> Any:
    """Return sections that hold the value at this place."""
    for part in reversed(place):
        value = [value] if part == "0" else {part: value}
    return value


def told(sections: Any = None, text: str | None = None, folder: Path | None = None) -> str:
    """Return all that is said of a configuration, with the traceback of its error."""
    path = None
    if text is not None and folder is not None:
        path = folder / "gateway.yaml"
        path.write_text(text, encoding="utf-8")
    try:
        config = load_config(path, sections)
    except ConfigError as error:
        return "\n".join([str(error), repr(error), *traceback.format_exception(error)])
    return f"{config} {config!r} {config.model_dump()} {config.model_dump_json()}"


def test_the_schema_has_the_secrets_that_are_known() -> None:
    assert {("store", "url"), ("admin", "token")} <= set(SECRET)
    assert ("upstreams", "a", "targets", "0", "url") in URLS
    assert all((*place[:-1], f"{place[-1]}_file") in LEAVES for place in SECRET), "every secret may come from a file"


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_wrong_shape_anywhere_above_a_secret_shows_nothing_of_it(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_secret = holds_secret(type_at(GatewayConfig, place))
    shapes = SHAPES if is_secret else URL_SHAPES  # a target that is a mere word is the name of a host
    number = PLACES.index(place)
    for at, shape in enumerate(shapes):
        said = [told(nested(place, shape)), told(text=yaml.safe_dump(nested(place, shape)), folder=tmp_path)]
        # Each place meets a third of the shapes in variables, and each shape a third of the places.
        if "0" not in place and (at + number) % 3 == 0:
            name = "GATEWAY_" + "__".join(place).upper()
            for value in (json.dumps(shape), json.dumps(shape)[:-1]):
                with monkeypatch.context() as patch:
                    patch.setenv(name, value)
                    said.append(told())
                (tmp_path / ".env").write_text(f"{name}='{value}'\n", encoding="utf-8")
                said.append(told())
                (tmp_path / ".env").unlink()
        for text in said:
            assert CANARY not in text, text
    assert CANARY not in caplog.text


@pytest.mark.parametrize("url", STORE_URLS)
def test_no_mistake_in_the_store_s_url_shows_any_of_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "url").write_text(url, encoding="utf-8")
    said = [
        told({"store": {"url": url}}),
        told({"store": url}),
        told({"stor": {"url": url}}),
        told({"store": {"ulr": url}}),
        told({"store": [url]}),
        told({"store": {"url_file": str(tmp_path / "url")}}),
        told(text=f'store:\n  url: "{url.encode("unicode_escape").decode()}"\n', folder=tmp_path),
        told(text=f"store: {{url: {url}", folder=tmp_path),
        told(text=f"store: {{url: *{url}}}", folder=tmp_path),
        told(text=f"store: {{url: !{url} x}}", folder=tmp_path),
        told(text=f"store:\n\turl: {url}", folder=tmp_path),
        told(text=f"store:\n  url: '{url}", folder=tmp_path),
        told(text=f"%{url}\nstore: 1", folder=tmp_path),
    ]
    for name, value in (
        ("GATEWAY_STORE__URL", url),
        ("GATEWAY_STORE", json.dumps({"url": url})),
        ("GATEWAY_STORE", url),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            said.append(told())
    for text in said:
        assert CANARY not in text


@pytest.mark.parametrize("url", TARGET_URLS)
def test_a_user_or_password_in_a_target_is_refused_and_not_shown(url: str, tmp_path: Path) -> None:
    target = {"targets": [{"url": url}]}
    for sections in (
        {"upstreams": {"a": target}},
        {"upstreams": {"a": {"targets": [url]}}},
        {"upstreams": {"a": {"targets": url}}},
        {"upstreams": {"a": url}},
        {"upstreams": url},
    ):
        with pytest.raises(ConfigError):
            load_config(None, sections)
        assert CANARY not in told(sections)
        assert CANARY not in told(text=yaml.safe_dump(sections), folder=tmp_path)


@pytest.mark.parametrize("secret", [f"redis://user:{CANARY}@host", PRIVATE_KEYS[0]], ids=["url", "pem"])
def test_a_secret_in_the_wrong_setting_is_not_shown(secret: str) -> None:
    """As far as it can be known by its looks."""
    for place in LEAVES:
        said = told(nested(place, secret))
        assert "ConfigError" not in said or CANARY not in said, place


def test_the_content_of_a_file_is_refused_in_place_of_its_path_and_not_shown(tmp_path: Path) -> None:
    """It would be shown by everything that shows a path."""
    assert {("server", "tls", "certificates", "0", "key"), ("upstreams", "a", "tls", "key_file")} <= set(FILES)
    for place in FILES:
        for key in PRIVATE_KEYS:
            said = told(text=yaml.safe_dump(nested(place, key)), folder=tmp_path)
            assert "ConfigError" in said, place
            assert CANARY not in said, place


@pytest.mark.parametrize("key", PRIVATE_KEYS)
def test_no_mistake_about_a_private_key_shows_any_of_it(key: str, tmp_path: Path) -> None:
    own = "server: {tls: {certificates: [{certificate: x, key: "
    for text in (
        f"server:\n  tls:\n    certificates:\n      - key: {key}",
        f"server:\n  tls:\n    certificates:\n      - key: |\n  {key}",
        f"{own}{key}",
        f"{own}'{key}",
        key,
        json.dumps({"server": {"tls": key}}),
        json.dumps({"server": {"tls": {"key": key}}}),
        json.dumps({"server": {"tls": {key: "x"}}}),
    ):
        assert CANARY not in told(text=text, folder=tmp_path), text


@pytest.mark.parametrize(
    ("path", "is_shown"),
    [
        *((path, True) for path in ("/run/secrets/Token", "./Token", "../a/Token", "secrets/token", "~/Token")),
        *((path, False) for path in ("token", "aB3/xYz9Q", "/abc/DEF+x=", "/x y", "a:b/c", PRIVATE_KEYS[0])),
    ],
)
def test_a_path_is_shown_if_it_cannot_be_the_secret_itself(path: str, *, is_shown: bool) -> None:
    assert (path in shown_path(path)) is is_shown


@pytest.mark.parametrize(
    "arguments",
    [
        [f"--admin-token={LONG}"],
        ["--store-url", f"redis://:{LONG}@h"],
        [LONG],
        ["--check", f"--token={LONG}", LONG],
        ["keys", "list", "acme", "--token", LONG],
        ["keys", "revoke", "acme", "an-id", LONG],
        ["limits", "acme", f"--tokens={LONG}"],
        ["explain", "an-id", LONG],
        ["doctor", "--password", LONG],
        ["config", "show", f"--secret={LONG}"],
        ["replay", "--config", "a-file", "a-log", f"--key={LONG}"],
    ],
)
def test_an_unknown_option_is_named_without_its_value(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    output, errors = capfd.readouterr()
    assert "unknown" in errors or "more arguments" in errors
    assert CANARY not in output + errors


class EchoingStore:
    """A store of another kind, which quotes what it does not understand, as old servers do."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.heard = b""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self._listener.accept()[0],), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with suppress(OSError), sock:
            while data := sock.recv(65_536):
                self.heard += data
                words = data.replace(b"\r\n", b" ").decode(errors="replace")
                sock.sendall(f"-ERR unknown command, with args beginning with: {words}\r\n".encode())

    def close(self) -> None:
        self._listener.close()


@pytest.mark.timeout(180)
def test_a_running_gateway_shows_no_secret_anywhere(tmp_path: Path) -> None:
    store = EchoingStore()
    (tmp_path / "token").write_text(LONG)
    sections = {
        "server": {"workers": 2},
        "store": {"url": f"redis://user{CANARY}:{LONG}@127.0.0.1:{store.port}"},
        "admin": {"token_file": str(tmp_path / "token")},
        "upstreams": {"a": {"targets": [{"url": "http://127.0.0.1:9"}]}},
        "log": {"level": "debug"},
        "state_dir": str(tmp_path / "state"),
    }
    (tmp_path / "gateway.yaml").write_text(yaml.safe_dump(sections))
    bearer = {"Authorization": f"Bearer {LONG}"}
    # New processes: the command lines of the workers are searched too, and forks only imitate them.
    with fresh_process(*WAYS["python -m"], "--config", str(tmp_path / "gateway.yaml"), cwd=tmp_path) as running:
        eventually(lambda: "Listening on" in running.output, "the workers serve", START)
        eventually(lambda: CANARY.encode() in store.heard, "the store is asked", 30)
        ask(f"{running.url}/api/a/x")
        ask(f"{running.url}/metrics", headers={"Authorization": f"Bearer {LONG}x"})
        said = [
            str(ask(f"{running.url}{path}", headers=headers).body)
            for path in (
                "/health",
                "/metrics",
                "/metrics?format=prometheus",
                "/circuit-breakers",
                "/clients/x",
                "/nix",
            )
            for headers in (bearer, {})
        ]
        commands = dict(children(running.popen.pid))
        for child in list(commands):
            commands |= children(child)
        said += [str(command) for command in commands.values()]
        running.terminate()
    store.close()
    assert len(commands) >= 2
    said += [running.output, running.errors]
    said += [path.read_bytes().decode("latin-1") for path in (tmp_path / "state").rglob("*") if path.is_file()]
    for text in said:
        assert CANARY not in text, [line for line in text.splitlines() if CANARY in line][:3]
