"""Every lasting database, as it first stood on a server."""

import sqlalchemy as sa
from alembic import op

revision = "r0001"
down_revision = None

_COUNTED = ("tombstones", "hidden", "access", "rules")


def upgrade() -> None:
    """Make schemas, tables and indexes."""
    op.create_table("revisions", _text("database", primary_key=True), _big("revision"), schema="ubiquo")
    op.create_table(
        "moving", _text("database", True), _text("name", True), _text("home"), _text("last"), _big("rows"),
        sa.Column("is_done", sa.Boolean, nullable=False), schema="ubiquo",
    )  # fmt: skip
    for name in ("inbox", "contacts", "tombstones", "hidden", "access", "reservations", "journeys", "rules"):
        op.execute(sa.schema.CreateSchema(f"ubiquo_{name}", if_not_exists=True))
    for name in _COUNTED:
        op.execute(sa.text("INSERT INTO ubiquo.revisions VALUES (:name, 0)").bindparams(name=name))
    _inbox("ubiquo_inbox")
    _people()
    _access("ubiquo_access")
    _reservations("ubiquo_reservations")
    _journeys("ubiquo_journeys")


def _text(name: str, primary_key: bool = False, nullable: bool = False) -> sa.Column[str]:
    # ordered by bytes, whatever the server's language is, as in files
    return sa.Column(name, sa.Text(collation="C"), primary_key=primary_key, nullable=nullable)


def _big(name: str, primary_key: bool = False, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, primary_key=primary_key, nullable=nullable, autoincrement=False)


def _bytes(name: str, nullable: bool = False) -> sa.Column[bytes]:
    return sa.Column(name, sa.LargeBinary, nullable=nullable)


def _inbox(schema: str) -> None:
    op.create_table(
        "waiting", _big("seq", True), _big("received_at"), _text("event_id"), _text("content_hash"), _bytes("payload"), _text("source"),
        _bytes("personal", nullable=True), schema=schema,
    )  # fmt: skip
    op.create_table("refused", _big("seq", True), _big("received_at"), _text("source"), _bytes("token"), schema=schema)
    op.create_table(
        "turn", sa.Column("id", sa.Integer, primary_key=True, autoincrement=False), _big("seq"), _big("received_at", nullable=True),
        _big("moved"), _big("moved_until", nullable=True), schema=schema,
    )  # fmt: skip


def _people() -> None:
    op.create_table(
        "contacts", _text("identity_key", True), _text("field", True), _big("known_at"), _bytes("token"), schema="ubiquo_contacts"
    )
    op.create_table(
        "tombstones", _text("tombstone", True), _big("erased_at"), _big("lifted_at", nullable=True),
        sa.Column("settled", sa.Integer, nullable=False), schema="ubiquo_tombstones",
    )  # fmt: skip
    op.create_table("hidden", _text("kind", True), _text("value", True), schema="ubiquo_hidden")
    op.create_table(
        "rules", sa.Column("number", sa.Integer, primary_key=True), _text("said"), _text("made_by"), _big("made_at"),
        _text("ended_by", nullable=True), _big("ended_at", nullable=True), schema="ubiquo_rules",
    )  # fmt: skip
    op.create_index("rules_not_ended", "rules", ["ended_at"], schema="ubiquo_rules")


def _access(schema: str) -> None:
    op.create_table(
        "keys", _text("name", True), _text("digest"), _text("scopes"), _big("created_at"), _big("revoked_at", nullable=True),
        sa.UniqueConstraint("digest"), schema=schema,
    )  # fmt: skip
    op.create_table(
        "audit", sa.Column("rowid", sa.BigInteger, primary_key=True), _big("at"), _text("key"), _text("action"), _text("subject"),
        _text("outcome"), schema=schema,
    )  # fmt: skip


def _reservations(schema: str) -> None:
    op.create_table(
        "reservations", _text("decision_id", True), _text("offer_id", True), _text("customer_id"), _big("at"), _text("channel"),
        _big("expires_at"), schema=schema,
    )  # fmt: skip
    op.create_index("reservations_of", "reservations", ["customer_id"], schema=schema)
    op.create_index("reservations_until", "reservations", ["expires_at"], schema=schema)
    op.create_table("given", _text("decision_id", True), _text("offer_id", True), _big("expires_at"), schema=schema)
    op.create_index("given_of", "given", ["offer_id", "expires_at"], schema=schema)
    op.create_index("given_until", "given", ["expires_at"], schema=schema)
    op.create_table("times", _text("offer_id", True), _big("times"), schema=schema)
    op.create_table("redeemed", _text("event_id", True), _text("offer_id"), schema=schema)


def _journeys(schema: str) -> None:
    op.create_table(
        "runs", _text("run_id", True), _text("journey"), _text("plan"), _text("customer_id"), _big("position"),
        _big("due_at", nullable=True), _big("since"), _big("started_at"), _text("state"), _big("revision"),
        _text("outcome", nullable=True), schema=schema,
    )  # fmt: skip
    for index, columns in (
        ("runs_due", ["due_at", "run_id"]), ("runs_since", ["since"]), ("runs_of", ["customer_id"]), ("runs_plan", ["plan"])
    ):  # fmt: skip
        op.create_index(index, "runs", columns, schema=schema)
    op.create_table(
        "outbox", _text("decision_id", True), _text("run_id"), _text("customer_id"), _text("channel"), _text("sink"), _text("body"),
        _big("created_at"), _big("due_at"), _big("expires_at", nullable=True), _text("status"), _text("reason", nullable=True),
        _big("attempts"), _big("ended_at", nullable=True), schema=schema,
    )  # fmt: skip
    for index, columns in (
        ("outbox_due", ["sink", "status", "due_at"]), ("outbox_of", ["customer_id"]), ("outbox_run", ["run_id"]),
        ("outbox_ended", ["ended_at"]), ("outbox_expires", ["status", "expires_at"]),
    ):  # fmt: skip
        op.create_index(index, "outbox", columns, schema=schema)
    op.create_table("seen", _text("event", True), _big("at"), schema=schema)
    op.create_index("seen_at", "seen", ["at"], schema=schema)
    op.create_table("plans", _text("digest", True), _text("text"), schema=schema)
    op.create_table("days", _text("journey", True), _text("day"), schema=schema)
