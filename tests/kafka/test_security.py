"""Every service on a broker with SASL_SSL, SCRAM and the standard authorizer, and a registry with TLS and passwords.

The services have exactly the rights that `bourse acls` prints; without any one of them a message names it.
"""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx2
import pytest
from confluent_kafka import Consumer, KafkaException, Producer
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # not in its __all__
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourcePatternType,
    ResourceType,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bourse_cli.acls import SERVICES, Right, rights
from bourse_sandbox import kafka as embedded
from bourse_sandbox.exchange import practice_exchange
from bourse_sandbox.jars import fetch, read_lock
from bourse_sandbox.processes import Child, spawn
from bourse_sandbox.registry import serve_registry
from bourse_schemas.errors import ConfigurationError, Unreachable
from bourse_schemas.kafka import Cluster

pytestmark = pytest.mark.kafka
BOURSE = [sys.executable, "-c", "from bourse_cli.root import main; main()"]
PREFIX = "tse"
SERVING = ("produce", "alerts", "archive", "postgres", "notify")
CONSUMERS = {"alerts": "alerts", "archive": "archive", "postgres": "archive-postgres", "notify": "notify"}
SECURE = """
listener.security.protocol.map=SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT
inter.broker.listener.name=SASL_SSL
sasl.enabled.mechanisms=SCRAM-SHA-512
sasl.mechanism.inter.broker.protocol=SCRAM-SHA-512
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required username="admin" password="admin-secret";
ssl.keystore.type=PEM
ssl.keystore.location=server.pem
ssl.truststore.type=PEM
ssl.truststore.location=ca.pem
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:admin;User:ANONYMOUS
"""
EXAMPLE = Path(__file__).parents[2] / "examples" / "rules.yaml"
CHANNELS = """
version: 1
channels:
  nowhere: {webhook: {env: HOOK}}
  robot: {alertmanager: "http://127.0.0.1:9"}
"""


def _certificates(folder: Path) -> None:
    """Write ca.pem, and server.pem with a key and a certificate for 127.0.0.1."""
    now, pem = datetime.now(UTC), serialization.Encoding.PEM

    def builder(name: str, issuer: str, key: Any) -> x509.CertificateBuilder:
        names = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, issuer)]
        return (
            x509.CertificateBuilder(names[1], names[0], key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
        )

    authority, server = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = builder("authority", "authority", authority).add_extension(x509.BasicConstraints(True, None), critical=True)
    host = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = builder("server", "authority", server).add_extension(host, critical=False)
    trusted = ca.sign(authority, hashes.SHA256()).public_bytes(pem)
    secret = server.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "ca.pem").write_bytes(trusted)
    (folder / "server.pem").write_bytes(secret + certificate.sign(authority, hashes.SHA256()).public_bytes(pem))


def _password_required(app: Any) -> Any:
    """Wrap the registry: every user's password is the name and `-secret`."""

    async def guarded(scope: Any, receive: Any, send: Any) -> Any:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Basic ")
            user, _, password = base64.b64decode(given).decode().partition(":")
            if not user or password != f"{user}-secret":
                await send({"type": "http.response.start", "status": 401, "headers": []})
                return await send({"type": "http.response.body", "body": b'{"error_code": 40101, "message": "no"}'})
        return await app(scope, receive, send)

    return guarded


@dataclass
class Place:
    """The secure cluster and registry."""

    broker: str
    registry: str
    folder: Path
    admin: AdminClient
    environment: dict[str, str] = field(default_factory=dict)

    def settings(self, user: str, **changes: str | None) -> dict[str, str]:
        """Return the settings of a user, with secrets as values; a change to None leaves one out."""
        ca = str(self.folder / "ca.pem")
        settings: dict[str, str | None] = {
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": user,
            "sasl.password": f"{user}-secret",
            "ssl.ca.location": ca,
            "schema.registry.ssl.ca.location": ca,
            "schema.registry.basic.auth.user.info": f"{user}:{user}-secret",
            **{key.replace("_", "."): value for key, value in changes.items()},
        }
        return {key: value for key, value in settings.items() if value is not None}

    def cluster(self, user: str, **changes: str | None) -> Cluster:
        """Return the cluster as a user sees it."""
        return Cluster(self.broker, self.registry, PREFIX, self.settings(user, **changes))

    def command(self, user: str, *words: str, prefix: str = PREFIX) -> list[str]:
        """Return a command of `bourse` with the user's settings, its secrets in files."""
        options = ["--bootstrap-servers", self.broker, "--registry-url", self.registry, "--topic-prefix", prefix]
        for key, value in self.settings(user).items():
            if key.endswith(("password", "user.info")):
                file = self.folder / f"{user}.{key}"
                file.write_text(f"{value}\n", "utf-8")
                options += ["-X", f"{key}=@{file}"]
            else:
                options += ["-X", f"{key}={value}"]
        return [*BOURSE, *words, *options]

    def run(
        self, user: str, *words: str, prefix: str = PREFIX, meanwhile: Callable[[], object] = bool
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, within two minutes; `meanwhile` is called every second."""
        child = subprocess.Popen(
            self.command(user, *words, prefix=prefix),
            env=os.environ | self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            for _ in range(120):
                with suppress(subprocess.TimeoutExpired):
                    out, err = child.communicate(timeout=1)
                    break
                meanwhile()
            else:
                pytest.fail(f"still running: {words}")
        finally:
            child.kill()
        assert "Traceback" not in err, err
        assert "-secret" not in out + err
        return subprocess.CompletedProcess(words, child.returncode, out, err)

    def grant(self, user: str, granted: Iterable[Right]) -> None:
        """Give a user these rights and wait until the broker has them."""
        for binding in [_binding(user, right) for right in granted]:
            self.admin.create_acls([binding])[binding].result(10)
            self._settled(binding, there=True)

    def revoke(self, user: str, revoked: Iterable[Right]) -> None:
        """Take these rights away and wait until the broker has forgotten them."""
        for binding in [_binding(user, right) for right in revoked]:
            (answer,) = self.admin.delete_acls([_filter(binding)]).values()
            answer.result(10)
            self._settled(binding, there=False)

    @contextmanager
    def without(self, user: str, *revoked: Right) -> Iterator[None]:
        """Take these rights away for a moment."""
        self.revoke(user, revoked)
        try:
            yield
        finally:
            self.grant(user, revoked)

    def _settled(self, binding: Any, *, there: bool) -> None:
        end = time.monotonic() + 10
        while bool(self.admin.describe_acls(_filter(binding)).result(10)) is not there:
            assert time.monotonic() < end
            time.sleep(0.01)


def _parts(user: str, right: Right) -> tuple[Any, ...]:
    kind = ResourceType[right.resource.upper().replace("-", "_")]
    operation = AclOperation[right.operation]
    pattern = ResourcePatternType[right.pattern.upper()]
    return kind, right.name, pattern, f"User:{user}", "*", operation, AclPermissionType.ALLOW


def _binding(user: str, right: Right) -> Any:
    return AclBinding(*_parts(user, right))


def _filter(binding: Any) -> Any:
    names = ("restype", "name", "resource_pattern_type", "principal", "host", "operation", "permission_type")
    return AclBindingFilter(*(getattr(binding, name) for name in names))


def _broker(folder: Path, stack: ExitStack) -> tuple[str, AdminClient]:
    """Start the secure broker, with a user per service."""
    jars = fetch(read_lock(Path(embedded.__file__).with_name("jars.lock")), "Apache Kafka")
    port, controller = embedded.free_port(), embedded.free_port()
    usual = embedded._PROPERTIES.format(broker=port, controller=controller)
    (folder / "server.properties").write_text(
        usual.replace(f"PLAINTEXT://127.0.0.1:{port}", f"SASL_SSL://127.0.0.1:{port}") + SECURE
    )
    environment = os.environ | {"CLASSPATH": os.pathsep.join(map(str, jars)), "LC_ALL": "C.UTF-8"}

    def launch(*arguments: str) -> Child:
        command: list[str | Path] = [embedded.java(), *embedded._JVM, *arguments]
        return spawn(command, env=environment, cwd=folder, stdout=folder / "log.txt", stderr=folder / "log.txt")

    identity = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "_")
    users = [f"SCRAM-SHA-512=[name={user},password={user}-secret]" for user in ("admin", *SERVICES)]
    scram = [word for user in users for word in ("--add-scram", user)]
    arguments = ("format", "-t", identity, "-c", "server.properties", *scram)
    assert launch("kafka.tools.StorageTool", *arguments).wait(60) == 0
    stack.enter_context(launch("kafka.Kafka", "server.properties"))
    settings = Place("", "", folder, None).settings("admin")  # type: ignore[arg-type]
    own = {key: value for key, value in settings.items() if not key.startswith("schema.")}
    admin = AdminClient({"bootstrap.servers": f"127.0.0.1:{port}", "log_level": 0, **own})
    end = time.monotonic() + 60
    while True:
        with suppress(KafkaException):
            if admin.list_topics(timeout=1).brokers:
                return f"127.0.0.1:{port}", admin
        assert time.monotonic() < end, (folder / "log.txt").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Run broker, registry and practice exchange; every service has the rights that are printed for it."""
    folder = tmp_path_factory.mktemp("secure")
    _certificates(folder)
    with ExitStack() as stack:
        registry = stack.enter_context(serve_registry(tls=folder / "server.pem", wrap=_password_required))
        exchange = stack.enter_context(practice_exchange("real", "poll").serve())
        try:
            broker, admin = _broker(folder, stack)
        except embedded.KafkaUnavailable as error:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(error))
        place = Place(broker, registry.url, folder, admin)
        place.environment = {
            "BOURSE_ADDRESS": exchange.url,
            "BOURSE_CLIENT_ID": "practice",
            "BOURSE_CLIENT_SECRET": "practice",
            "BOURSE_NID": "0123456789",
            "HOOK": "http://127.0.0.1:9",
        }
        (folder / "channels.yaml").write_text(CHANNELS, "utf-8")
        for service in SERVICES:
            place.grant(service, rights(PREFIX, service))
        yield place


APPLY = ("topics", "apply", "--any-time", "--replication-factor", "1")
PRODUCE = ("produce", "--schedule", "always", "--clock", "response")
DOCTOR = ("doctor", "--schedule", "always", "--clock", "response", "--json")


def _consume(service: str, dsn: str) -> tuple[str, ...]:
    options = {
        "alerts": ("--rules", str(EXAMPLE)),
        "archive": ("--to", "archive", "--commit-seconds", "1"),
        "postgres": ("--dsn", dsn, "--apply-schema"),
        "notify": ("--channels", "channels.yaml"),
    }
    return ("consume", CONSUMERS[service], "--max-rejected-share", "1", *options[service])


@pytest.fixture(scope="module")
def ready(place: Place) -> Place:
    """Create topics and schemas and publish two polls, each as the user whose job it is."""
    for user, words in {"topics": APPLY, "register": ("schemas", "register"), "produce": (*PRODUCE, "--once")}.items():
        for _ in range(2):
            done = place.run(user, *words)
            assert done.returncode == 0, done.stderr
    return place


def test_every_service_runs_with_the_rights_that_are_printed(
    ready: Place, dsn: str, wait_for: Callable[..., Any]
) -> None:
    """Two polls of a real day go through all of them; they stop when asked to."""
    with ExitStack() as stack:
        running = {}
        for service in CONSUMERS:
            port, log = embedded.free_port(), ready.folder / f"{service}.log"
            command = [*ready.command(service, *_consume(service, dsn)), "--http", str(port)]
            child = spawn(command, env=os.environ | ready.environment, cwd=ready.folder, stdout=log, stderr=log)
            running[service] = (stack.enter_context(child), f"http://127.0.0.1:{port}/metrics", log)
        for child, url, log in running.values():
            wait_for(lambda: child.poll() is not None or _caught_up(url), 60)  # noqa: B023
            assert child.poll() is None, log.read_text()
        for child, _, log in running.values():
            child.send(signal.SIGTERM)
            assert child.wait(10) == 0, log.read_text()
    for place in ("archive", dsn):
        verified = ready.run("verify", "archive", "verify", "--to", place, "--json")
        report = json.loads(verified.stdout)
        assert (verified.returncode, report["findings"]) == (0, []), verified.stderr
        assert report["rows"] == report["compared"] > 300
    tail = ready.run("tail", "tail", "trades", "--from-beginning", "--exit-at-end", "--json")
    assert (tail.returncode, len(tail.stdout.splitlines()) > 300) == (0, True), tail.stderr
    verified = ready.run("archive", "archive", "verify", "--to", "archive")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    doctor = ready.run("doctor", *DOCTOR)
    assert doctor.returncode == 0, doctor.stdout
    assert sum(1 for _ in _subscribe(ready)) > 300


def _caught_up(url: str) -> bool:
    """Return whether a consumer has read everything, by its lag."""
    with suppress(httpx2.HTTPError):
        lines = httpx2.get(url, trust_env=False).text.splitlines()
        lags = [float(line.split()[-1]) for line in lines if line.startswith("bourse_consumer_lag")]
        return httpx2.get(url.replace("metrics", "readyz"), trust_env=False).is_success and set(lags) == {0.0}
    return False


def _subscribe(place: Place) -> Iterator[Any]:
    """Read trades as any other client does, by docs/subscribe.md."""
    settings = {key: value for key, value in place.settings("subscriber").items() if not key.startswith("schema.")}
    group = {"group.id": f"{PREFIX}-subscriber", "auto.offset.reset": "earliest", "enable.partition.eof": True}
    consumer = Consumer({"bootstrap.servers": place.broker, "log_level": 0, **group, **settings})
    try:
        consumer.subscribe([f"{PREFIX}.trades"])
        ends, end = 0, time.monotonic() + 20
        while ends < 6 and time.monotonic() < end:
            for message in consumer.consume(1000, 0.1):
                if (error := message.error()) is None:
                    yield message
                elif error.name() == "_PARTITION_EOF":
                    ends += 1
                else:
                    raise KafkaException(error)
    finally:
        consumer.close()


def _named(right: Right) -> str:
    """Return how a message names a right."""
    return f"{right.operation} on {right.resource.replace('-', ' ')} {right.name}"


def _checks(dsn: str) -> Mapping[str, tuple[str, ...]]:
    return {
        "produce": (*PRODUCE, "--once"),
        "tail": ("tail", "trades", "--exit-at-end"),
        "doctor": DOCTOR,
        **{service: _consume(service, dsn) for service in CONSUMERS},
    }


@pytest.mark.parametrize("service", ["produce", "tail", "doctor", *CONSUMERS])
def test_without_any_one_right_a_message_names_it(ready: Place, dsn: str, service: str) -> None:
    """User, right and resource, whatever kind of right is taken away; it ends with 2, doctor with 1 or 2."""
    settings = {key: value for key, value in ready.settings("admin").items() if not key.startswith("schema.")}
    producer = Producer({"bootstrap.servers": ready.broker, "partitioner": "murmur2_random", **settings})

    def nonsense() -> None:
        """Publish what no consumer can decode: it becomes a dead letter, in a transaction."""
        for topic in ("trades", "alerts"):
            producer.produce(f"{PREFIX}.{topic}", b"nonsense", b"key")
        producer.flush(10)

    def together(right: Right) -> tuple[str, str, str]:
        """Return the key of rights that are taken away together; what alerts rebuild from is read later."""
        alone = service == "alerts" and right.operation == "READ"
        return right.resource, right.operation, right.name if alone else ""

    for (resource, operation, _), group in groupby(sorted(rights(PREFIX, service), key=together), together):
        gone = list(group)
        if service == "doctor" and resource == "group":
            continue  # groups that may not be seen are left out
        with ready.without(service, *gone):
            run = ready.run(service, *_checks(dsn)[service], meanwhile=nonsense if service in CONSUMERS else bool)
        shown = run.stdout + run.stderr
        assert run.returncode in ((1, 2) if service == "doctor" else (2,)), (gone, shown)
        assert f"User:{service}" in shown, (gone, shown)
        # All topics that may not be read or written are named at once.
        named = [_named(right) in shown for right in gone]
        if service == "doctor":  # it reports first that it cannot see the topic
            named = [f" on topic {right.name}" in shown for right in gone]
        enough = all if resource == "topic" and operation in {"READ", "WRITE"} and service in SERVING else any
        assert enough(named), (gone, shown)


def test_topics_apply_names_the_right_that_is_missing(ready: Place) -> None:
    """To create, to see and to alter."""
    prefix = "fresh"
    granted = set(rights(prefix, "topics"))
    ready.grant("topics", granted)
    for operation, message in {
        "CREATE": "User:topics: CREATE on topic fresh.",
        "ALTER": "User:topics: DESCRIBE (part of ALTER) on topic fresh.",
        "ALTER_CONFIGS": "User:topics: DESCRIBE_CONFIGS on topic fresh.",
    }.items():
        with ready.without("topics", *(right for right in granted if right.operation == operation)):
            run = ready.run("topics", *APPLY, prefix=prefix)
        assert (run.returncode, message in run.stderr) == (2, True), run.stderr
        assert ready.run("topics", *APPLY, prefix=prefix).returncode == 0


def test_a_topic_that_may_not_be_seen_is_not_reported_as_missing(ready: Place) -> None:
    """Asked for by name the brokers tell the two apart."""
    with pytest.raises(ConfigurationError, match=r"does not allow User:tail: READ on topic tse\.other"):
        ready.cluster("tail").require_topics(["tse.other"])
    with pytest.raises(ConfigurationError, match=r"no topic tse\.other"):
        ready.cluster("admin").require_topics(["tse.other"])


def test_a_reader_needs_no_group(ready: Place) -> None:
    """Neither does it wait when it closes, nor leave a group behind."""
    began = time.monotonic()
    assert ready.run("tail", "tail", "polls", "--from-beginning", "--exit-at-end").returncode == 0
    assert time.monotonic() - began < 20
    listed = ready.admin.list_consumer_groups(request_timeout=10).result(10).valid
    assert f"{PREFIX}-reader" not in {group.group_id for group in listed}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"security_protocol": None}, Unreachable, "port may expect TLS .* security.protocol is PLAINTEXT"),
        ({"security_protocol": "SSL"}, Unreachable, "port may expect SASL"),
        ({"sasl_password": "wrong"}, ConfigurationError, "refuses User:tail: .*invalid credentials"),
        ({"ssl_ca_location": None}, ConfigurationError, "certificate verify failed"),
    ],
)
def test_a_connection_that_is_refused_is_explained(
    ready: Place, changes: dict[str, str | None], error: type[Exception], message: str
) -> None:
    """Each with what to change."""
    with pytest.raises(error, match=message):
        ready.cluster("tail", **changes).metadata(3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_registry_ssl_ca_location": None}, "no TLS connection to the schema registry .*certificate"),
        ({"schema_registry_basic_auth_user_info": "tail:wrong"}, r"refuses tail to read .*HTTP 401"),
    ],
)
def test_a_registry_that_refuses_is_explained(ready: Place, changes: dict[str, str | None], message: str) -> None:
    """TLS failures are not reported as an outage."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        ready.cluster(
            "tail", **{key.replace("schema_registry", "schema.registry"): v for key, v in changes.items()}
        ).registry().schema(1)
    assert type(caught.value) is ConfigurationError


def test_topics_refuse_what_is_too_small_or_too_many(ready: Place) -> None:
    """The largest batch must fit, and polls have one partition."""
    cluster = ready.cluster("admin")
    name = f"{PREFIX}.candles"
    with _setting(ready, name, "max.message.bytes", "1000"):
        dry = (*APPLY, "--dry-run")
        for user, words in {"topics": APPLY, "admin": dry, "doctor": DOCTOR, "produce": (*PRODUCE, "--once")}.items():
            run = ready.run(user, *words)
            assert run.returncode != 0
            assert f"{name} refuses our largest batch" in run.stdout + run.stderr
    cluster.require_sizes([name])


@contextmanager
def _setting(place: Place, topic: str, key: str, value: str) -> Iterator[None]:
    """Change a topic's setting for a moment."""
    for operation in (AlterConfigOpType.SET, AlterConfigOpType.DELETE):
        entry = ConfigEntry(key, value, incremental_operation=operation)
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
        place.admin.incremental_alter_configs([resource])[resource].result(10)
        if operation is AlterConfigOpType.SET:
            yield
